"""PyTorch (or a ready ONNX file) to a checked FP32 ONNX graph, with reference outputs at every corner."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gpuopt import interface, onnx_model, reference
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.backends.onnxruntime import Session, first_line
from gpuopt.errors import ExportError, GpuoptError
from gpuopt.interface import StatedInput
from gpuopt.model_file import ModelKind, detect
from gpuopt.recipe import Recipe
from gpuopt.reference import Interface, Reference
from gpuopt.shapes import ShapeRange, TensorSpec
from gpuopt.stages import samples
from gpuopt.stages.context import StageContext

TORCHSCRIPT_MAX_OPSET = 20
DYNAMO_MIN_OPSET = 18


@dataclass(frozen=True)
class Attempt:
    """How one exporter fared; `reason` is empty for the one that won."""

    exporter: str
    reason: str


def run(context: StageContext) -> StageOutcome:
    """Make `onnx` (FP32, IR and opset pinned) and `reference`.

    Raises:
        ModelError, UsageError, DataError: the model or its shapes are not usable.
        ExportError: no exporter gave a graph that computes what PyTorch does.
    """
    recipe = context.recipe
    feeds = samples.load(context.folder("samples"))
    kind = detect(Path(recipe.model.path)) if recipe.model.path else ModelKind.FACTORY
    if kind is ModelKind.ONNX:
        return _adopt_onnx(context, feeds)
    return _export_torch(context, kind, feeds)


def _export_torch(context: StageContext, kind: ModelKind, feeds: Sequence[reference.Feed]) -> StageOutcome:
    recipe = context.recipe
    known = set(sys.modules)
    import torch

    from gpuopt import torch_model

    torch.manual_seed(recipe.export.seed)
    loaded = torch_model.load(recipe.model, kind)
    warnings = list(loaded.notes)
    feeds = interface.with_model_names(feeds, loaded.stated)
    resolved = interface.resolve(recipe, loaded.parameters, loaded.stated, feeds)
    warnings.extend(resolved.warnings)
    corner_feeds = interface.corner_feeds(recipe, resolved, feeds)
    first = next(iter(corner_feeds.values()))
    with torch_model.quiet_torch():
        try:
            names = loaded.output_names(first)
            tensors = Interface(resolved.inputs, tuple(names), resolved.profiles)
            stored = reference.record(context.made("reference"), tensors, loaded.run, corner_feeds, "PyTorch")
        except Exception as error:  # the user's model may raise anything
            shapes = ", ".join(f"{n} {tuple(v.shape)} {v.dtype}" for n, v in first.items())
            raise ExportError(
                f"the PyTorch model fails on {shapes}: {first_line(error)}",
                "Check --input names, shapes and dtypes; forward takes: "
                + (", ".join(loaded.parameters) or "unnamed inputs")
                + ".",
            ) from error
    folder = context.made("onnx")
    attempts = []
    for exporter in _order(recipe, loaded):
        reason = _attempt(exporter, loaded, stored, recipe, folder)
        attempts.append(Attempt(exporter, reason))
        if not reason:
            break
        context.progress.line(f"export: the {exporter} exporter lost: {reason}")
    if attempts[-1].reason:
        raise ExportError(
            f"no exporter gave a graph equal to the model: {attempts[-1].exporter}: {attempts[-1].reason}",
            "; ".join(f"{a.exporter}: {a.reason}" for a in attempts[:-1])[:600]
            or "Try another --set export.exporters or --set export.opset.",
        )
    facts = {
        "model_kind": kind.value,
        "exporter": attempts[-1].exporter,
        "attempts": [{"exporter": a.exporter, "reason": a.reason} for a in attempts],
        "opset": recipe.export.opset,
        "ir_version": onnx_model.IR_VERSION,
    }
    return StageOutcome(facts, tuple(warnings), tuple(torch_model.user_files(known)))


def _order(recipe: Recipe, loaded: Any) -> list[str]:
    order: list[str] = list(recipe.export.exporters)
    if loaded.kind is ModelKind.TORCHSCRIPT or recipe.export.opset < DYNAMO_MIN_OPSET:
        # torch's current exporter takes no TorchScript, and writes opset 18 at the least.
        order.sort(key=lambda exporter: exporter != "torchscript")
    return order


def _attempt(exporter: str, loaded: Any, stored: Reference, recipe: Recipe, folder: Path) -> str:
    """Export and compare with PyTorch at every corner; the reason of a failure, or nothing."""
    from gpuopt import torch_model

    path = folder / ONNX_FILE
    example = _example_feed(stored)
    tensors = torch_model.as_tensors(example)
    try:
        with torch_model.quiet_torch():
            if exporter == "dynamo":
                _export_dynamo(loaded, tensors, stored, recipe.export.opset, path)
            else:
                _export_torchscript(loaded, tensors, stored, recipe.export.opset, path)
        model = onnx.load(str(path))
        for extra in folder.iterdir():
            extra.unlink()
        model.ir_version = onnx_model.IR_VERSION
        onnx_model.name_dimensions(model, stored.inputs)
        if frozen := onnx_model.static_axes(model, interface.dynamic_axes(stored.inputs)):
            return f"the graph fixes the dynamic axes {', '.join(frozen)}"
        onnx_model.node_names_made_unique(model)
        onnx_model.save(model, folder)
        onnx_model.check(path)
        return _difference(path, stored, recipe.export.atol)
    except GpuoptError as error:
        return error.message
    except Exception as error:  # exporters raise errors of their own without a common base
        return f"{type(error).__name__}: {first_line(error)}"


def _export_dynamo(loaded: Any, tensors: dict[str, Any], stored: Reference, opset: int, path: Path) -> None:
    import torch

    args, kwargs = loaded.arguments(tensors)
    options: dict[str, Any] = {}
    target = loaded.module
    if loaded.kind is ModelKind.TORCHSCRIPT:
        raise ExportError("torch's current exporter takes no TorchScript archive")
    if loaded.kind is not ModelKind.EXPORTED_PROGRAM:
        by_name = {
            name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
            for name, axes in interface.dynamic_axes(stored.inputs).items()
        }
        options["dynamic_shapes"] = (
            {name: by_name[name] for name in kwargs} if kwargs else tuple(by_name[name] for name in tensors)
        )
        if not kwargs and loaded.parameters:
            options["dynamic_shapes"] = tuple(by_name.values()) if len(by_name) == len(args) else None
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


def _difference(path: Path, stored: Reference, atol: float) -> str:
    """Where the FP32 graph's outputs leave the reference by more than `atol` times the largest value."""
    session = Session(path)
    for corner in stored.corners:
        actual = session.run(stored.feed(corner))
        for name, expected in stored.expected(corner).items():
            got = actual.get(name)
            if got is None:
                return f"the graph has no output '{name}'"
            if got.shape != expected.shape:
                return f"output '{name}' at {corner.name} has the shape {got.shape}, PyTorch's {expected.shape}"
            if expected.dtype.kind != "f":
                differing = float(np.mean(got != expected)) if expected.size else 0.0
                if differing > 0.01:
                    return f"output '{name}' at {corner.name} differs in {differing:.1%} of its values"
                continue
            scale = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
            error = float(np.max(np.abs(got.astype(np.float64) - expected), initial=0.0)) / scale
            if not error <= atol and not (np.isnan(got) == np.isnan(expected)).all():
                return f"output '{name}' at {corner.name} has NaN where PyTorch has none"
            if not error <= atol and not np.isnan(error):
                return f"output '{name}' at {corner.name} is off by {error:.2e} (allowed {atol:.0e})"
    return ""


def _adopt_onnx(context: StageContext, feeds: Sequence[reference.Feed]) -> StageOutcome:
    """Take an ONNX file as it is: pin opset and IR, and let ONNX Runtime say what it computes."""
    recipe = context.recipe
    source = Path(recipe.model.path or "")
    model = onnx_model.load_untrusted(source)
    stated = [_stated_by_graph(spec) for spec in onnx_model.input_specs(model)]
    feeds = interface.with_model_names(feeds, stated)
    resolved = interface.resolve(recipe, [s.spec.name for s in stated], stated, feeds)
    warnings = list(resolved.warnings)
    before = onnx_model.opset(model)
    if before != recipe.export.opset and not DYNAMO_MIN_OPSET - 1 <= before <= recipe.export.opset:
        try:
            model = onnx.version_converter.convert_version(model, recipe.export.opset)
        except Exception as error:  # the converter raises RuntimeError and its own kinds
            raise ExportError(
                f"{source} has opset {before}, which cannot be converted to {recipe.export.opset}: {first_line(error)}",
                "Export the model again with that opset.",
            ) from error
        warnings.append(f"opset {before} was converted to {recipe.export.opset}")
    model.ir_version = onnx_model.IR_VERSION
    onnx_model.node_names_made_unique(model)
    path = onnx_model.save(model, context.made("onnx"))
    try:
        onnx_model.check(path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{source} is not valid ONNX: {first_line(error)}", "Export the model again.") from error
    session = Session(path)
    outputs = tuple(spec.name for spec in onnx_model.output_specs(model))
    reference.record(
        context.made("reference"),
        Interface(resolved.inputs, outputs, resolved.profiles),
        lambda feed: list(session.run(feed).values()),
        interface.corner_feeds(recipe, resolved, feeds),
        "ONNX",
    )
    facts = {
        "model_kind": ModelKind.ONNX.value,
        "exporter": "none: the model is ONNX",
        "attempts": [],
        "opset": onnx_model.opset(model),
        "ir_version": onnx_model.IR_VERSION,
    }
    return StageOutcome(facts, tuple(warnings))


def _stated_by_graph(spec: TensorSpec) -> StatedInput:
    fixed = tuple(size for size in spec.shape if isinstance(size, int))
    whole = len(fixed) == len(spec.shape)
    return StatedInput(spec, ShapeRange(fixed, fixed, fixed) if whole else None)


def _example_feed(stored: Reference) -> dict[str, Any]:
    """The corner whose dynamic axes are largest: exporters take a size of 1 for a constant."""
    largest = max(stored.corners, key=lambda c: sum(sum(shape) for shape in c.shapes.values()))
    return stored.feed(largest)
