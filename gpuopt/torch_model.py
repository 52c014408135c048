"""Loading a PyTorch model of any kind and running it on feeds keyed by input name."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpuopt import user_code
from gpuopt.errors import GpuoptError, ModelError, UsageError, described, one_line
from gpuopt.interface import StatedInput
from gpuopt.model_file import ModelKind, hazards
from gpuopt.quantization.existing import file_holds_quantization
from gpuopt.recipe import ModelSection
from gpuopt.shapes import ShapeRange, TensorSpec

_UNBOUNDED_BATCH = 16
_UNBOUNDED_FACTOR = 4


@dataclass
class TorchModel:
    """A loaded model.

    Attributes:
        module: an `nn.Module`, a `ScriptModule` or an `ExportedProgram`.
        kind: what it was loaded from.
        parameters: names of forward's parameters, in order; empty if unknown.
        keyword_only: those of them that have to be passed by name.
        variadic: whether forward takes `*args`.
        files_read: files that the factory opened.
        stated: what the model itself says of its inputs; only exported programs do.
        notes: for the report.
    """

    module: Any
    kind: ModelKind
    parameters: tuple[str, ...]
    stated: tuple[StatedInput, ...] = ()
    keyword_only: frozenset[str] = frozenset()
    variadic: bool = False
    notes: list[str] = field(default_factory=list)
    files_read: set[str] = field(default_factory=set)

    def arguments(self, feed: Mapping[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of forward for a feed."""
        if self.kind is ModelKind.EXPORTED_PROGRAM:
            return self._program_arguments(feed)
        if not self._by_name(feed):
            return tuple(feed.values()), {}
        leading = self.parameters[: len(feed)]
        if set(leading) == set(feed) and not self.keyword_only & set(feed):
            return tuple(feed[name] for name in leading), {}
        return (), dict(feed)

    def bind(self, values: Mapping[str, Any]) -> Any:
        """One value an input, in the form torch.export wants for the arguments above: by name where it can be."""
        if not self._by_name(values):
            return ([*values.values()],) if self.variadic else tuple(values.values())
        return {name: values[name] for name in self.parameters if name in values}

    def _by_name(self, feed: Mapping[str, Any]) -> bool:
        return bool(self.parameters) and set(feed) <= set(self.parameters)

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        """Outputs as numpy arrays, nested structures flattened, for one feed of numpy arrays."""
        with torch.inference_mode():
            return [value.detach().cpu().numpy() for _, value in self._leaves(self.forward(as_tensors(feed)))]

    def forward(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """What the model itself gives for a feed of tensors."""
        args, kwargs = self.arguments(tensors)
        return self._callable()(*args, **kwargs)

    def output_names(self, feed: Mapping[str, Any]) -> list[str]:
        """A name for every output: its key in a dict or in transformers' outputs, else `output` or `output_<n>`."""
        args, kwargs = self.arguments(as_tensors(feed))
        with torch.inference_mode():
            leaves = self._leaves(self._callable()(*args, **kwargs))
        names = []
        for index, (path, _) in enumerate(leaves):
            keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
            name = "_".join(key for key in keys if key)
            names.append(name or ("output" if len(leaves) == 1 else f"output_{index}"))
        return names if len(set(names)) == len(names) else [f"output_{i}" for i in range(len(names))]

    def as_module(self) -> Any:
        """The model as something that torch's older exporter takes."""
        if self.kind is not ModelKind.EXPORTED_PROGRAM:
            return self.module
        run = self._callable()

        class Unlifted(torch.nn.Module):  # type: ignore[misc]
            """Holds the program out of the exporter's sight: it refuses train() and eval()."""

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return run(*args, **kwargs)

        for parameter in run.parameters():  # type: ignore[attr-defined]
            parameter.requires_grad_(False)
        return Unlifted()

    def _callable(self) -> Callable[..., Any]:
        if self.kind is ModelKind.EXPORTED_PROGRAM:
            if not hasattr(self, "_unlifted"):
                self._unlifted = self.module.module()
            result: Callable[..., Any] = self._unlifted
            return result
        module: Callable[..., Any] = self.module
        return module

    def _leaves(self, outputs: Any) -> list[tuple[Any, torch.Tensor]]:
        leaves, _ = pytree.tree_flatten_with_path(outputs)
        tensors = [(path, value) for path, value in leaves if isinstance(value, torch.Tensor)]
        foreign = sorted({type(v).__name__ for _, v in leaves if v is not None and not isinstance(v, torch.Tensor)})
        if foreign or not tensors:
            raise ModelError(
                f"forward returns {' and '.join(foreign) or 'nothing'}; an engine can only give tensors",
                "Return a tensor, or a tuple, list or dict of tensors; wrap the model to leave out the rest.",
            )
        return tensors

    def _program_arguments(self, feed: Mapping[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        flat = [
            feed[spec.arg.name] if spec.arg.name in feed else getattr(spec.arg, "value", None)
            for spec in self.module.graph_signature.input_specs
            if spec.kind.name == "USER_INPUT"
        ]
        args, kwargs = pytree.tree_unflatten(flat, self.module.module_call_graph[0].signature.in_spec)
        return args, kwargs


def as_tensors(feed: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Numpy arrays as tensors that share nothing with them."""
    return {name: torch.from_numpy(value.copy()) for name, value in feed.items()}


def load(settings: ModelSection, kind: ModelKind) -> TorchModel:
    """Load the model that a recipe names; `kind` comes from `model_file.detect` (FACTORY without a file).

    Raises:
        ModelError: the file is damaged, would run code without being trusted to, does not fit the
            factory's model, or the factory fails.
        UsageError: weights without a factory.
    """
    path = Path(settings.path) if settings.path else None
    if path is not None:
        _refuse_untrusted(path, kind, settings.trust_pickle)
    with quiet_torch(), user_code.files_opened() as opened:
        model = _load(settings, path, kind)
    model.files_read = opened - {str(path.resolve()) if path else ""}
    return model


def _load(settings: ModelSection, path: Path | None, kind: ModelKind) -> TorchModel:
    if path is None:
        return _module(_call_factory(settings.factory or ""), ModelKind.FACTORY)
    if kind in (ModelKind.STATE_DICT, ModelKind.SAFETENSORS):
        if not settings.factory:
            raise UsageError(
                f"{path} holds weights only ({kind.value}): the code of the model is missing",
                "Name a function that returns the nn.Module: --model package.module:factory.",
            )
        return _load_weights(path, kind, settings.factory)
    try:
        if kind is ModelKind.EXPORTED_PROGRAM:
            if file_holds_quantization(path, kind):
                # Importing it registers the operators that torch's and torchao's quantizers write.
                with contextlib.suppress(ImportError):
                    importlib.import_module("torch.ao.quantization.fx._decomposed")
            with path.open("rb") as stream:
                return _program(torch.export.load(stream))
        if kind is ModelKind.TORCHSCRIPT:
            script = torch.jit.load(str(path), map_location="cpu").eval()
            names = [a.name for a in script.forward.schema.arguments if a.name != "self"]
            return TorchModel(script, kind, tuple(names))
        user_code.search_current_folder()
        return _module(torch.load(path, map_location="cpu", weights_only=False), kind)
    except GpuoptError:
        raise
    except (ModuleNotFoundError, AttributeError) as error:
        raise ModelError(
            f"{path} needs code that is not here: {error}",
            "Run gpuopt where the model's own package can be imported.",
        ) from error
    except (Exception, SystemExit) as error:  # torch raises plain RuntimeError and worse for damaged files
        raise ModelError(
            f"{path} ({kind.value}) cannot be loaded by torch {torch.__version__}: {described(error)}",
            "The file may be damaged, or written by a newer torch.",
        ) from error


@contextlib.contextmanager
def quiet_torch() -> Iterator[list[warnings.WarningMessage]]:
    """Keep torch's talk off stderr; what tracing takes for constant is collected, see `traced_away`."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", torch.jit.TracerWarning)
            yield caught
    finally:
        logging.disable(level)


def traced_away(caught: Iterable[warnings.WarningMessage]) -> tuple[str, ...]:
    """What a tracing exporter turned into constants though it depends on data, a line each."""
    lines = [one_line(str(w.message)).split(" We can't record")[0] for w in caught]
    return tuple(dict.fromkeys(lines))


def _refuse_untrusted(path: Path, kind: ModelKind, trusted: bool) -> None:
    if trusted or kind is ModelKind.ONNX:
        return
    found = hazards(path, kind)
    if found:
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise ModelError(
            f"{path} is a {kind.value} and loading it would run code that it names: {shown}",
            "If you trust its author, add --trust-pickle. Safer: torch.export.save, or a state dict with --model.",
        )


def _call_factory(factory: str) -> Any:
    module_name, _, function = factory.partition(":")
    try:
        module = getattr(user_code.imported(module_name), function)()
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and be a program that ends
        raise ModelError(
            f"the factory {factory} fails: {described(error)}",
            "It is called without arguments and looked for in the current folder, PYTHONPATH and what is installed.",
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"the factory {factory} returned {type(module).__name__}, not an nn.Module",
            "Return the model itself.",
        )
    return module


def _load_weights(path: Path, kind: ModelKind, factory: str) -> TorchModel:
    module = _call_factory(factory)
    if kind is ModelKind.SAFETENSORS:
        from safetensors.torch import load_file

        try:
            weights = load_file(path)
        except Exception as error:  # SafetensorError, OSError, and KeyError for a dtype that torch lacks
            raise ModelError(
                f"{path} is a damaged safetensors file: {one_line(error)}", "Save or download the model again."
            ) from error
    else:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ...
            raise ModelError(f"{path} cannot be loaded: {one_line(error)}", "Save the state dict again.") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
            break
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ModelError(f"{path} holds no state dict", "Save model.state_dict() alone, or under 'state_dict'.")
    # DataParallel writes `module.` before every name; of a model that has such names itself the file's own fit more.
    stripped = {name.removeprefix("module."): value for name, value in weights.items()}
    names = module.state_dict().keys()
    weights = max(weights, stripped, key=lambda named: len(names & named.keys()))
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ModelError(
            f"{path} does not fit {factory}: {one_line(error)}", "Use the factory it was saved from."
        ) from error
    if missing or unexpected:
        raise ModelError(
            f"{path} does not fit {factory}: {len(missing)} weights are missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} are unexpected ({', '.join(unexpected[:3])})",
            "Use the factory it was saved from.",
        )
    return _module(module, kind)


def _module(module: Any, kind: ModelKind) -> TorchModel:
    if isinstance(module, dict):
        raise ModelError(
            "the pickle holds a dict, not an nn.Module",
            "Name the model's code: --model package.module:factory.",
        )
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"the pickle holds a {type(module).__name__}, not an nn.Module", "Save the nn.Module itself.")
    notes = []
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if kinds - {torch.float32}:
        notes.append(f"weights of dtype {', '.join(sorted(map(str, kinds)))} were made float32 before export")
    module = module.to("cpu").float().eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    parameters = inspect.signature(module.forward).parameters.values()
    return TorchModel(
        module,
        kind,
        tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)),
        keyword_only=frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
        variadic=any(p.kind is p.VAR_POSITIONAL for p in parameters),
        notes=notes,
    )


_TRAINING_ARGUMENT = {
    "batch_norm": 5,
    "_native_batch_norm_legit": 5,
    "_native_batch_norm_legit_functional": 5,
    "dropout": 2,
}


def _refuse_training_mode(program: Any) -> None:
    """Dropout at work and batch statistics make a sample's result depend on chance and on its neighbours."""
    for node in program.graph.nodes:
        name = str(node.target).removeprefix("aten.").partition(".")[0]
        place = _TRAINING_ARGUMENT.get(name)
        if node.op == "call_function" and place is not None and len(node.args) > place and node.args[place] is True:
            raise ModelError(
                f"the program was exported in training mode: {name} at node '{node.name}'",
                "Call .eval() on the model before torch.export.export, and save it again.",
            )


def _program(program: Any) -> TorchModel:
    _refuse_training_mode(program)
    stated = []
    names = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in names and isinstance(value, torch.Tensor):
            stated.append(_stated_input(node.name, value, program.range_constraints))
    return TorchModel(program, ModelKind.EXPORTED_PROGRAM, tuple(s.spec.name for s in stated), tuple(stated))


def _stated_input(name: str, value: torch.Tensor, constraints: Mapping[Any, Any]) -> StatedInput:
    low: list[int] = []
    high: list[int] = []
    unbounded: list[int] = []
    shape: list[int | str] = []
    for axis, size in enumerate(value.shape):
        if isinstance(size, int):
            low.append(size)
            high.append(size)
            shape.append(size)
            continue
        bounds = constraints.get(size.node.expr)
        lower = max(1, int(bounds.lower)) if bounds else 1
        # A lower bound of 2 is torch's own way to tell 1 from "any": the graph takes 1 as well.
        lower = 1 if lower == 2 and axis == 0 else lower
        upper = str(bounds.upper) if bounds else "int_oo"
        if upper.isdigit():
            high.append(int(upper))
        else:
            high.append(_UNBOUNDED_BATCH if axis == 0 else max(lower, int(size.node.hint or 2)) * _UNBOUNDED_FACTOR)
            unbounded.append(axis)
        low.append(lower)
        shape.append(str(size))
    spec = TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(shape))
    return StatedInput(spec, ShapeRange(tuple(low), tuple(high), tuple(high)), tuple(unbounded))
