"""PyTorch (or a ready ONNX file) to a checked FP32 ONNX graph, with reference outputs at every corner."""

from __future__ import annotations

import contextlib
import re
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gpuopt import interface, onnx_model, reference, user_code
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration import first_layers
from gpuopt.comparison import SAME, compare, first_difference
from gpuopt.deployed_form import input_forms, samples_as_original
from gpuopt.errors import BuildError, ExportError, GpuoptError, ModelError, described, one_line
from gpuopt.interface import StatedInput
from gpuopt.model_file import ModelKind, detect
from gpuopt.quantization import existing
from gpuopt.recipe import Recipe
from gpuopt.reference import Interface, Reference
from gpuopt.shapes import ShapeRange, TensorSpec
from gpuopt.stages import samples
from gpuopt.stages.context import StageContext
from gpuopt.tolerance import problem

TORCHSCRIPT_MAX_OPSET = 20
_GENERATED = "The inputs were generated: give --calibration-data, or recipe keys inputs.NAME.low and high."
DYNAMO_MIN_OPSET = 18
LAST_ASYMMETRIC_OPSET = 10
"""From opset 11 on, Resize says how it takes its points."""
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass(frozen=True)
class Attempt:
    """How one exporter fared.

    Attributes:
        reason: why it lost; empty for the one that won.
        frozen: where it took for constant what depends on data.
        branch: the line that branches on data, where it lost for that.
        log: its traceback, where it raised one.
    """

    exporter: str
    reason: str
    frozen: tuple[str, ...] = ()
    branch: str = ""
    log: str = ""


def run(context: StageContext) -> StageOutcome:
    """Make `onnx` (FP32, IR and opset pinned) and `reference`.

    Raises:
        ModelError, UsageError, DataError: the model or its shapes are not usable.
        ExportError: no exporter gave a graph that computes what PyTorch does, or a converted opset none that computes
            what the ONNX file did.
    """
    recipe = context.recipe
    feeds: Sequence[reference.Feed] = samples.load(context.folder("samples"))
    kind = detect(Path(recipe.model.path)) if recipe.model.path else ModelKind.FACTORY
    if kind is ModelKind.ONNX:
        return _adopt_onnx(context, feeds)
    return _export_torch(context, kind, feeds)


def _export_torch(context: StageContext, kind: ModelKind, feeds: Sequence[reference.Feed]) -> StageOutcome:
    recipe = context.recipe
    import torch

    from gpuopt import torch_model

    torch.manual_seed(recipe.export.seed)
    loaded = torch_model.load(recipe.model, kind)
    warnings = list(loaded.notes)
    feeds = interface.with_model_names(feeds, loaded.stated)
    feeds = samples_as_original(recipe.layout, feeds, [entry.spec for entry in loaded.stated])
    resolved = interface.resolve(recipe, loaded.parameters, loaded.stated, feeds)
    input_forms(recipe.layout, resolved.inputs)
    warnings.extend(resolved.warnings)
    corner_feeds = interface.corner_feeds(recipe, resolved, feeds)
    first = next(iter(corner_feeds.values()))
    with torch_model.quiet_torch():
        try:
            names = loaded.output_names(first)
            _check_repeatable(loaded, names, first)
            tensors = Interface(resolved.inputs, tuple(names), resolved.profiles)
            stored = reference.record(context.made("reference"), tensors, loaded.run, corner_feeds, "PyTorch")
            _store_first_layers(loaded, first, stored.folder)
        except GpuoptError:
            raise
        except (Exception, SystemExit) as error:  # the user's model may raise anything
            shapes = ", ".join(f"{n} {tuple(v.shape)} {v.dtype}" for n, v in first.items())
            takes = ", ".join(loaded.parameters) or "unnamed inputs"
            raise ExportError(
                f"the PyTorch model fails on {shapes}: {one_line(error)}",
                f"Check --input names, shapes and dtypes; forward takes {takes}."
                + ("" if feeds else f"\n{_GENERATED}"),
            ) from error
    warnings.extend(_without_numbers(stored, not feeds))
    warnings.extend(_entangled(stored))
    folder = context.made("onnx")
    attempts = []
    for exporter in _order(recipe, loaded):
        attempts.append(_attempt(exporter, loaded, stored, recipe, folder))
        if not attempts[-1].reason:
            break
        context.progress.line(f"export: the {exporter} exporter lost: {attempts[-1].reason}")
    if attempts[-1].reason:
        refusal = ExportError(
            f"no exporter gave a graph equal to the model: {attempts[-1].exporter}: {attempts[-1].reason}",
            (
                one_line("; ".join(f"{a.exporter}: {a.reason}" for a in attempts[:-1]))
                or "Try --set export.exporters=..."
            )
            + ("" if feeds else f"\n{_GENERATED}"),
        )
        refusal.details = "".join(f"\n{a.exporter}: {a.reason}\n{a.log}" for a in attempts)
        raise refusal
    _check_branches(attempts)
    warnings.extend(
        f"the {attempts[-1].exporter} exporter made a constant of what depends on data: {line}"
        for line in attempts[-1].frozen
    )
    opset = onnx_model.opset(onnx.load(str(folder / ONNX_FILE), load_external_data=False))
    if opset != recipe.export.opset:
        warnings.append(f"the {attempts[-1].exporter} exporter writes opset {opset}, not {recipe.export.opset}")
    facts = {
        "model_kind": kind.value,
        "exporter": attempts[-1].exporter,
        "attempts": [{"exporter": a.exporter, "reason": a.reason} for a in attempts],
        "opset": opset,
        "ir_version": onnx_model.IR_VERSION,
        **interface.facts_of(stored),
    }
    return StageOutcome(facts, tuple(warnings), user_code.dependencies(loaded.files_read))


def _store_first_layers(loaded: Any, feed: reference.Feed, folder: Path) -> None:
    """Keep what the first BatchNorms know of the training data, before the exporter folds them away."""
    from gpuopt.torch_norms import first_convs

    # Of a model that torch cannot watch the data are checked less: no reason to stop its export.
    with contextlib.suppress(Exception):
        first_layers.save(folder, first_convs(loaded, feed))


def _without_numbers(stored: Reference, generated: bool) -> list[str]:
    """Outputs in which the original model itself gives NaN, with which nothing can be compared.

    Args:
        generated: whether the inputs were.

    Raises:
        ModelError: an output has no finite value.
    """
    partly: dict[str, str] = {}
    for corner in stored.corners:
        for name, value in stored.expected(corner).items():
            if value.dtype.kind != "f" or not value.size:
                continue
            if not np.isfinite(value).any():
                what = "NaN" if np.isnan(value).any() else "infinity"
                raise ModelError(
                    f"the original model gives nothing but {what} in output '{name}' at {corner.name}: "
                    "no engine can be compared with that",
                    _GENERATED if generated else "Look at its weights, and at the calibration data that it was fed.",
                )
            share = float(np.mean(np.isnan(value)))
            if share:
                partly.setdefault(name, f"in {share:.1%} of output '{name}' at {corner.name}")
    return [f"the original model gives NaN {where}: the other values alone are compared" for where in partly.values()]


def _entangled(stored: Reference) -> list[str]:
    """Outputs whose rows depend on the other rows of the batch in the original model itself."""
    largest = reference.largest_batch(stored.corners, stored.profiles)
    if largest is None:
        return []
    names = [s.name for s in stored.outputs if s.shape[:1] == ("batch",) and s.name not in stored.batched_outputs]
    if reference.with_distinct_rows(stored.feed(next(c for c in stored.corners if c.name == largest))) is None:
        return [
            f"all reference inputs are one row, which cannot show whether '{name}' of a sample depends on the others "
            "of its batch: give calibration data of several samples"
            for name in names
        ]
    return [f"in {stored.origin}, '{name}' of a sample depends on the other samples of its batch" for name in names]


def _check_repeatable(loaded: Any, names: Sequence[str], feed: reference.Feed) -> None:
    """A model that answers the same question in two ways has dropout or the like at work.

    Raises:
        ModelError: an output differs between two runs.
    """
    for name, once, again in zip(names, loaded.run(feed), loaded.run(feed), strict=True):
        if found := problem(compare(again, once), SAME):
            raise ModelError(
                f"the model gives another '{name}' when it runs again on the same input: {found}",
                "Dropout or another random layer is in training mode: call .eval() before saving.",
            )


def _order(recipe: Recipe, loaded: Any) -> list[str]:
    order: list[str] = list(recipe.export.exporters)
    if loaded.kind is ModelKind.TORCHSCRIPT or recipe.export.opset < DYNAMO_MIN_OPSET:
        # torch's current exporter takes no TorchScript, and writes opset 18 at the least.
        order.sort(key=lambda exporter: exporter != "torchscript")
    return order


def _check_branches(attempts: Sequence[Attempt]) -> None:
    """Refuse a graph that has one path of a branch on data: for other data it would be silently wrong.

    Raises:
        ExportError: one exporter found such a branch, and the one that won took its condition for a constant.
    """
    place = next((attempt.branch for attempt in attempts if attempt.branch), "")
    if place and attempts[-1].frozen:
        raise ExportError(
            f"a data-dependent branch or loop: the model decides by the values of a tensor ({place}), "
            "and its graph would have the one path that the example took",
            "Write it with torch.where, or with torch.cond, which becomes an If node.\n"
            "To ship that one path: --set export.exporters=torchscript.",
        )


def _place(error: BaseException) -> str:
    """The innermost line of a traceback that is the model's: neither torch's nor gpuopt's."""
    import torch

    others = (str(Path(torch.__file__).parent), str(Path(user_code.__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(others)]
    found = [f for f in frames if Path(f.filename).is_file() and "onnxscript" not in Path(f.filename).parts]
    return f" (at {Path(found[-1].filename).name}, line {found[-1].lineno}: {found[-1].line})" if found else ""


def _branch(error: BaseException) -> str:
    """Where a model branches on data, if that is why torch.export refuses it."""
    if type(error).__name__ != "GuardOnDataDependentSymNode":
        return ""
    frames = _FRAME.findall(str(error).rpartition("The following call raised this error")[2])
    return f"{Path(frames[-1][0]).name}, line {frames[-1][1]}" if frames else "torch.export does not say where"


def _attempt(exporter: str, loaded: Any, stored: Reference, recipe: Recipe, folder: Path) -> Attempt:
    """Export and compare with PyTorch at every corner."""
    from gpuopt import torch_model

    path = folder / ONNX_FILE
    tensors = torch_model.as_tensors(_example_feed(stored))
    try:
        with torch_model.quiet_torch() as caught:
            if exporter == "dynamo":
                _export_dynamo(loaded, tensors, stored, recipe.export.opset, path)
            else:
                _export_torchscript(loaded, tensors, stored, recipe.export.opset, path)
        return Attempt(exporter, _adopt_export(path, stored), torch_model.traced_away(caught))
    except GpuoptError as error:
        return Attempt(exporter, error.message)
    except Exception as error:  # exporters raise errors of their own without a common base
        cause = error.__cause__ or error
        return Attempt(exporter, described(cause) + _place(cause), branch=_branch(cause), log=traceback.format_exc())


def _adopt_export(path: Path, stored: Reference) -> str:
    """Tidy what an exporter wrote; what is wrong with it, or nothing."""
    model = onnx.load(str(path))
    for extra in path.parent.iterdir():
        extra.unlink()
    onnx_model.name_dimensions(model, stored.inputs)
    if frozen := onnx_model.static_axes(model, interface.dynamic_axes(stored.inputs)):
        return f"the graph fixes the dynamic axes {', '.join(frozen)}"
    onnx_model.node_names_made_unique(model)
    onnx_model.einsum_labels_lowered(model)
    onnx_model.save(model, path.parent)
    onnx_model.check(path)
    return first_difference(Session(path), stored, SAME)


def _export_dynamo(loaded: Any, tensors: dict[str, Any], stored: Reference, opset: int, path: Path) -> None:
    import torch

    if loaded.kind is ModelKind.TORCHSCRIPT:
        raise ExportError("torch's current exporter takes no TorchScript archive")
    target = loaded.module
    if loaded.kind is not ModelKind.EXPORTED_PROGRAM:
        args, kwargs = loaded.arguments(tensors)
        axes = interface.dynamic_axes(stored.inputs)
        shapes = {name: dict.fromkeys(axes[name], torch.export.Dim.DYNAMIC) for name in tensors}
        options = {"dynamic_shapes": loaded.bind(shapes)}
        target = torch.export.export(loaded.module, args, kwargs, strict=False, **options)
    program = torch.onnx.export(target, opset_version=opset, dynamo=True, verbose=False)
    # The exporter's own renaming does not look whether an inner tensor has the name already.
    model = program.model_proto
    onnx_model.rename_interface(model, [s.name for s in stored.inputs], [s.name for s in stored.outputs])
    onnx.save(model, str(path))


def _export_torchscript(loaded: Any, tensors: dict[str, Any], stored: Reference, opset: int, path: Path) -> None:
    import torch

    args, kwargs = loaded.arguments(tensors)
    module = loaded.as_module()
    dynamic = {
        spec.name: {axis: size for axis, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in (*stored.inputs, *stored.outputs)
        if "*" not in spec.shape
    }
    torch.onnx.export(
        module,
        (*args, kwargs) if kwargs else args,
        str(path),
        input_names=[spec.name for spec in stored.inputs],
        output_names=[spec.name for spec in stored.outputs],
        dynamic_axes={name: axes for name, axes in dynamic.items() if axes},
        opset_version=min(opset, TORCHSCRIPT_MAX_OPSET),
        dynamo=False,
    )


def _adopt_onnx(context: StageContext, feeds: Sequence[reference.Feed]) -> StageOutcome:
    """Take an ONNX file as it is: pin opset and IR, and let ONNX Runtime say what it computes."""
    recipe = context.recipe
    source = Path(recipe.model.path or "")
    model = onnx_model.with_types(onnx_model.load_untrusted(source))
    stated = [_stated_by_graph(spec) for spec in onnx_model.input_specs(model)]
    feeds = interface.with_model_names(feeds, stated)
    feeds = samples_as_original(recipe.layout, feeds, [entry.spec for entry in stated])
    resolved = interface.resolve(recipe, [s.spec.name for s in stated], stated, feeds)
    input_forms(recipe.layout, resolved.inputs)
    warnings = list(resolved.warnings)
    before = onnx_model.opset(model)
    original: onnx.ModelProto | None = None
    if before != recipe.export.opset and not DYNAMO_MIN_OPSET - 1 <= before <= recipe.export.opset:
        original, model = model, _convert(model, recipe.export.opset, source)
        warnings.append(f"opset {before} was converted to {recipe.export.opset}")
    model.ir_version = onnx_model.IR_VERSION
    onnx_model.node_names_made_unique(model)
    onnx_model.einsum_labels_lowered(model)
    onnx_model.kernel_shapes_stated(model)
    path = onnx_model.save(model, context.made("onnx"))
    try:
        onnx_model.check(path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{source} is not valid ONNX: {one_line(error)}", "Export the model again.") from error
    session = Session(path)
    outputs = tuple(spec.name for spec in onnx_model.output_specs(model))
    stored = reference.record(
        context.made("reference"),
        Interface(resolved.inputs, outputs, resolved.profiles),
        lambda feed: list(session.run(feed).values()),
        interface.corner_feeds(recipe, resolved, feeds),
        "ONNX",
    )
    if original is not None:
        warnings.extend(_check_conversion(original, path, stored, source))
    warnings.extend(_without_numbers(stored, not feeds))
    first_layers.save(stored.folder, first_layers.of_graph(model))
    facts = {
        "model_kind": ModelKind.ONNX.value,
        "exporter": "none: the model is ONNX",
        "attempts": [],
        "opset": onnx_model.opset(model),
        "ir_version": onnx_model.IR_VERSION,
        **interface.facts_of(stored),
    }
    return StageOutcome(facts, tuple(warnings))


def _convert(model: onnx.ModelProto, opset: int, source: Path) -> onnx.ModelProto:
    """The model in another opset.

    Raises:
        ExportError: onnx cannot convert it.
        QuantizationError: nor can TensorRT take what stops it: a node of the model's own quantization.
    """
    before = onnx_model.opset(model)
    try:
        converted: onnx.ModelProto = onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # the converter raises RuntimeError and its own kinds
        if existing.holds_quantization(model):
            # INT16, INT4 and FP8 cannot be converted: say so by the node's name.
            existing.adopt(model, fp16=False)
        raise ExportError(
            f"{source} has opset {before}, which cannot be converted to {opset}: {one_line(error)}",
            "Export the model again with that opset.",
        ) from error
    if before <= LAST_ASYMMETRIC_OPSET:
        onnx_model.resizes_asymmetric(converted)
    return converted


def _check_conversion(original: onnx.ModelProto, path: Path, stored: Reference, source: Path) -> list[str]:
    """Compare a model with what a conversion of its opset made of it, at every corner; what to warn of.

    Both run as they are written: an optimizer that knows one opset alone makes a difference in FP16.

    Raises:
        ExportError: an output differs.
    """
    before, after = onnx_model.opset(original), onnx_model.opset(onnx.load(str(path), load_external_data=False))
    with tempfile.TemporaryDirectory(prefix="gpuopt-export-") as scratch:
        try:
            old = Session(onnx_model.save(original, Path(scratch)), optimization="none")
        except BuildError as error:
            return [f"the conversion from opset {before} was not checked: {error.message}"]
        new = Session(path, optimization="none")
        for corner in stored.corners:
            feed = stored.feed(corner)
            converted = new.run(feed)
            for name, expected in old.run(feed).items():
                if found := problem(compare(converted[name], expected), SAME):
                    raise ExportError(
                        f"{source} computes something else once its opset {before} is converted to {after}: "
                        f"output '{name}' at {corner.name}: {found}",
                        f"Export the model again with opset {after}.",
                    )
    return []


def _stated_by_graph(spec: TensorSpec) -> StatedInput:
    fixed = tuple(size for size in spec.shape if isinstance(size, int))
    whole = len(fixed) == len(spec.shape)
    return StatedInput(spec, ShapeRange(fixed, fixed, fixed) if whole else None)


def _example_feed(stored: Reference) -> dict[str, Any]:
    """The corner whose dynamic axes are largest: exporters take a size of 1 for a constant."""
    largest = max(stored.corners, key=lambda c: sum(sum(shape) for shape in c.shapes.values()))
    return stored.feed(largest)
