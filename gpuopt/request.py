"""From the command line's words to a recipe, and the answers of the small commands."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from gpuopt import environment
from gpuopt.cache import Cache, default_folder
from gpuopt.errors import UsageError
from gpuopt.recipe import AUTO, FACTORY_PATTERN, MemorySize, Recipe, load, parse_setting, resolve, set_value
from gpuopt.shapes import format_shape, parse_input, parse_named_shapes
from gpuopt.storage import list_files

if TYPE_CHECKING:
    from gpuopt.pipeline import Step


_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smh]?)", re.ASCII)
_SECONDS_OF = {"": 1, "s": 1, "m": 60, "h": 3600}
_LONGEST = 365 * 24 * 3600


@dataclass(frozen=True)
class Flags:
    """The flags of `gpuopt compile` and `gpuopt quantize` that stand for a recipe key; None or empty: not given."""

    model: str | None = None
    factory: str | None = None
    trust_pickle: bool = False
    precision: str | None = None
    output: Path | None = None
    target: tuple[str, ...] = ()
    no_build: bool = False
    compute_capability: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    min_shapes: tuple[str, ...] = ()
    opt_shapes: tuple[str, ...] = ()
    max_shapes: tuple[str, ...] = ()
    input_layout: tuple[str, ...] = ()
    output_layout: tuple[str, ...] = ()
    input_dtype: tuple[str, ...] = ()
    mean: str | None = None
    std: str | None = None
    scale: str | None = None
    calibration_data: str | None = None
    calibration_method: str | None = None
    calibration_samples: int | None = None
    max_calibration_memory: str | None = None
    calibration_ranges: str | None = None
    strict_calibration: bool = False
    random_calibration: bool = False
    quant_format: str | None = None
    quantizer: str | None = None
    min_precision_coverage: str | None = None
    nodes_to_exclude: tuple[str, ...] = ()
    op_types_to_exclude: tuple[str, ...] = ()
    equalize: str | None = None
    bias_correction: str | None = None
    min_cosine: float | None = None
    opset: int | None = None
    max_accuracy_drop: str | None = None
    metric: str | None = None
    evaluation_data: str | None = None
    labels: str | None = None
    analyze_samples: int | None = None
    workspace: str | None = None
    optimization_level: int | None = None
    timing_cache: str | None = None
    require_timing_cache: bool = False
    tactic_sources: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    io_formats: tuple[str, ...] = ()
    benchmark: bool = False
    gate_mode: str | None = None
    max_latency: tuple[str, ...] = ()
    max_latency_vs_fp16: float | None = None
    min_throughput: float | None = None
    max_engine_size: str | None = None
    max_device_memory: str | None = None
    max_build_seconds: float | None = None
    max_calibration_warnings: int | None = None


def recipe(path: Path | None, flags: Flags, settings: Sequence[str]) -> Recipe:
    """Lay flags, then `--set`, over a recipe file and validate the whole.

    Raises:
        UsageError: what is wrong, where, and the nearest right thing.
        StorageError: the recipe file cannot be read.
    """
    tree: dict[str, Any] = load(path) if path else {}
    by_key = {
        "model.factory": flags.factory,
        "model.trust_pickle": flags.trust_pickle or None,
        "precision": flags.precision,
        "output.directory": str(flags.output) if flags.output else None,
        "build.target": list(flags.target) or None,
        "build.enabled": False if flags.no_build else None,
        "build.compute_capability": list(flags.compute_capability) or None,
        "layout.input": _by_tensor("--input-layout", flags.input_layout),
        "layout.output": _by_tensor("--output-layout", flags.output_layout),
        "layout.input_dtype": _by_tensor("--input-dtype", flags.input_dtype),
        "layout.mean": _numbers("--mean", flags.mean),
        "layout.std": _numbers("--std", flags.std),
        "layout.scale": flags.scale,
        "calibrate.data": flags.calibration_data,
        "calibrate.method": flags.calibration_method,
        "calibrate.samples": flags.calibration_samples,
        "calibrate.max_memory": flags.max_calibration_memory,
        "calibrate.ranges": flags.calibration_ranges,
        "calibrate.strict": flags.strict_calibration or None,
        "calibrate.random": flags.random_calibration or None,
        "quantize.format": flags.quant_format,
        "quantize.quantizer": flags.quantizer,
        "verify.min_precision_coverage": flags.min_precision_coverage,
        "quantize.nodes_to_exclude": list(flags.nodes_to_exclude) or None,
        "quantize.op_types_to_exclude": list(flags.op_types_to_exclude) or None,
        "quantize.equalize": flags.equalize,
        "quantize.bias_correction": flags.bias_correction,
        "verify.min_cosine": flags.min_cosine,
        "export.opset": flags.opset,
        "accuracy.max_drop": flags.max_accuracy_drop,
        "accuracy.metric": flags.metric,
        "accuracy.data": flags.evaluation_data,
        "accuracy.labels": flags.labels,
        "analyze.samples": flags.analyze_samples,
        "build.workspace": flags.workspace,
        "build.optimization_level": flags.optimization_level,
        "build.timing_cache": flags.timing_cache,
        "build.require_timing_cache": flags.require_timing_cache or None,
        "build.tactic_sources": _tactic_sources(flags.tactic_sources) or None,
        "build.plugins": list(flags.plugins) or None,
        "build.io_formats": _io_formats(flags.io_formats) or None,
        "benchmark.enabled": "on" if flags.benchmark else None,
        "gates.mode": flags.gate_mode,
        "gates.max_latency_ms": _latencies(flags.max_latency) or None,
        "gates.max_latency_vs_fp16": flags.max_latency_vs_fp16,
        "gates.min_throughput": flags.min_throughput,
        "gates.max_engine_size": flags.max_engine_size,
        "gates.max_device_memory": flags.max_device_memory,
        "gates.max_build_seconds": flags.max_build_seconds,
        "gates.max_calibration_warnings": flags.max_calibration_warnings,
    }
    if flags.model is not None:
        is_factory = not Path(flags.model).exists() and FACTORY_PATTERN.match(flags.model)
        if is_factory and flags.factory:
            raise UsageError("two factories are given", "Give the weights file as MODEL and the factory as --model.")
        by_key["model.factory" if is_factory else "model.path"] = flags.model
        if is_factory:
            # A file that the recipe names would be compiled in its place.
            set_value(tree, "model.path", None)
    for key, value in by_key.items():
        if value is not None:
            _lay_over(tree, key, value)
    for name, entry in _inputs(flags).items():
        _set_input(tree, name, entry)
    for text in settings:
        set_value(tree, *parse_setting(text))
    if not tree.get("model"):
        raise UsageError("no model is given", "Name a model file, package.module:factory, or a recipe with --recipe.")
    return resolve(tree)


def describe(chosen: Recipe, as_json: bool) -> str:
    """The resolved recipe and the plan, as `--dry-run` prints them: YAML with the plan in comments, or JSON."""
    from gpuopt.compile import with_defaults

    resolved = with_defaults(chosen)
    steps = [step.label for step in _steps(resolved)]
    if as_json:
        return json.dumps({"recipe": resolved.model_dump(mode="json"), "plan": steps}, indent=2) + "\n"
    comments = "".join(f"#   {number}. {step}\n" for number, step in enumerate(steps, 1))
    return f"{resolved.to_yaml()}# plan:\n{comments}"


def _steps(resolved: Recipe) -> list[Step]:
    from gpuopt.pipeline import plan
    from gpuopt.precision import with_precision

    if resolved.precision != "auto":
        return plan(resolved)
    # Each candidate has a plan of its own; INT8's is the longest.
    return plan(with_precision(resolved, "int8"))


def sizes(text: str | None) -> tuple[int, ...]:
    """Parse `1,8,32`.

    Raises:
        UsageError: a part is not a positive whole number.
    """
    parts = text.split(",") if text else []
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"'{text}' is not a list of batch sizes", "Write them with commas: --batches 1,8,32.")
    return tuple(int(part) for part in parts)


def duration(text: str | None) -> float | None:
    """Seconds of `90`, `90s`, `15m` or `2h`; None stays None.

    Raises:
        UsageError: it is no time, or none at all.
    """
    if text is None:
        return None
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS_OF[match[2]] if match else 0.0
    if not 0 < seconds <= _LONGEST:
        raise UsageError(f"'{text}' is not a time", "Write seconds, or a number with a unit: 90s, 15m, 2h.")
    return seconds


def memory(text: str | None) -> int | None:
    """Bytes of `8GiB`; None stays None.

    Raises:
        UsageError: it is no size.
    """
    if text is None:
        return None
    try:
        return TypeAdapter(MemorySize).validate_python(text)
    except ValidationError as error:
        raise UsageError(f"'{text}' is not a size of memory", "Write a number with a unit: 8GiB, 500MiB.") from error


def check_trace(subject: Path, path: Path) -> None:
    """Refuse before the profile what no trace can be taken of, or into.

    Raises:
        UsageError: the subject is no bundle, or one that was compiled from ONNX; the file has another ending.
        RequirementError: torch is not installed.
        StorageError: the bundle is damaged.
    """
    from gpuopt import bundle
    from gpuopt.model_file import ModelKind, detect

    if not path.name.endswith((".json", ".json.gz")):
        raise UsageError(f"a trace is a .json or .json.gz file, not {path.name}", "Name it so.")
    if not subject.is_dir():
        raise UsageError(
            f"a trace is of the PyTorch model that a bundle's recipe names, and {subject.name} is no bundle",
            "Name the bundle's folder, or leave out --trace.",
        )
    bundle.open_bundle(subject)
    model = resolve(load(subject / "recipe.yaml")).model
    if model.path and detect(Path(model.path)) is ModelKind.ONNX:
        raise UsageError("the bundle was compiled from ONNX: there is no PyTorch model to trace", "Leave out --trace.")
    environment.require("torch", "tracing the PyTorch model")


@contextlib.contextmanager
def open_cache(folder: Path | None, discard: bool) -> Iterator[Cache]:
    """The stage cache; a temporary one if nothing is to be kept."""
    if not discard:
        yield Cache((folder or default_folder()).absolute())
        return
    with tempfile.TemporaryDirectory(prefix="gpuopt-") as temporary:
        yield Cache(Path(temporary))


def schema(document: str) -> str:
    """The JSON Schema of `report`, `bench`, `profile` or `sweep`."""
    from gpuopt.report.schema import rendered

    return rendered(document)


def doctor(as_json: bool) -> str:
    """What is installed and what each target still needs."""
    found = environment.describe()
    states = environment.target_states()
    if as_json:
        targets = [{"target": s.target, "ready": s.ready, "needs": s.needs, "note": s.note} for s in states]
        return json.dumps({**found, "targets": targets}, indent=2) + "\n"
    gpu = ", ".join(f"{g['name']} ({g['compute_capability']})" for g in found["gpus"]) or "none"
    tested = "" if environment.python_is_supported() else " (untested; 3.10 to 3.13 are tested)"
    lines = [f"Python    {found['python']}{tested} on {found['platform']}", f"GPU       {gpu}", "", "Packages"]
    names = (*environment.CORE_PACKAGES, *environment.EXPORT_PACKAGES, *environment.RUNTIME_PACKAGES)
    lines += [f"  {name:<20}{found['packages'].get(name, '-')}" for name in names]
    if {"onnxruntime", "onnxruntime-gpu"} <= set(found["packages"]):
        lines.append("  onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then install one")
    lines += ["", "Exporting PyTorch models"]
    missing = [name for name in environment.EXPORT_PACKAGES if not environment.has_module(name)]
    lines += [f"  needs {name}: {environment.install_hint(name)}" for name in missing] or ["  ready"]
    lines += ["", "Targets"]
    for state in states:
        lines.append(f"  {state.target:<14}{'ready' if state.ready else 'not ready'}: {state.note}")
        lines += [f"    needs {need}" for need in state.needs]
    return "\n".join(lines) + "\n"


def cache_state(folder: Path | None, clear: bool, as_json: bool) -> str:
    """Where the cache lies and how large it is; `clear` empties it first."""
    store = Cache((folder or default_folder()).absolute())
    cleared = store.clear() if clear else 0
    entries = len(list((store.folder / "entries").glob("*")))
    size = sum(path.stat().st_size for path in list_files(store.folder)) if store.folder.is_dir() else 0
    if as_json:
        state = {"folder": str(store.folder), "entries": entries, "size_bytes": size, "cleared_entries": cleared}
        return json.dumps(state, indent=2) + "\n"
    from gpuopt.report.markdown import format_bytes

    return f"{store.folder}: {entries} entries, {format_bytes(size)}\n"


def _lay_over(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a key; of a mapping the entries that are given, and those of the recipe stay beside them."""
    before: Any = tree
    for level in key.split("."):
        before = before.get(level) if isinstance(before, dict) else None
    both = isinstance(before, dict) and isinstance(value, dict)
    set_value(tree, key, {**before, **value} if both else value)


def _tactic_sources(texts: Sequence[str]) -> list[str]:
    return [name.strip() for text in texts for name in text.split(",")]


def _latencies(texts: Sequence[str]) -> dict[str, float]:
    """Milliseconds by percentile from `p99=5ms`.

    Raises:
        UsageError: no percentile, or no time, or a percentile twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        percentile, _, limit = text.partition("=")
        name = percentile.strip().lower()
        if name in found:
            raise UsageError(f"--max-latency is given twice for {name}", "Give it once for each percentile.")
        try:
            found[name] = float(limit.strip().removesuffix("ms"))
        except ValueError:
            raise UsageError(f"--max-latency '{text}' is no percentile and time", "Write it as p99=5ms.") from None
    return found


def _by_tensor(flag: str, texts: Sequence[str]) -> str | dict[str, str] | None:
    """`nhwc` for all tensors, or `NAME=nhwc` for each that is named.

    Raises:
        UsageError: both, or a tensor twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        if name in found:
            of = f"'{name}'" if name else "all tensors"
            raise UsageError(f"{flag} is given twice for {of}", "Give it once for each tensor.")
        found[name] = value
    if "" in found and len(found) > 1:
        raise UsageError(f"{flag} is given for all tensors and for some", "Name each tensor, or none.")
    return found.get("", found or None)


def _numbers(flag: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} '{text}' is no list of numbers", f"Write {flag} 0.485,0.456,0.406.") from None


def _io_formats(texts: Sequence[str]) -> dict[str, str] | str:
    if list(texts) == [AUTO]:
        return AUTO
    formats: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals or not name or not value:
            raise UsageError(
                f"--io-format {text}: no format",
                "Write NAME=DTYPE:FORMAT, as in --io-format image=fp16:hwc8, or auto alone.",
            )
        if name in formats:
            raise UsageError(f"'{name}' has two formats", "Give --io-format once for each input or output.")
        formats[name] = value
    return formats


def _inputs(flags: Flags) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for text in flags.inputs:
        name, shape, dtype = parse_input(text)
        if name in entries:
            raise UsageError(f"input '{name}' is given twice", "Name each input once.")
        entries[name] = {"shape": format_shape(shape), **({"dtype": dtype} if dtype else {})}
    for key, texts in (("min", flags.min_shapes), ("opt", flags.opt_shapes), ("max", flags.max_shapes)):
        for name, shape in parse_named_shapes(texts).items():
            entries.setdefault(name, {})[key] = format_shape(shape)
    return entries


def _set_input(tree: dict[str, Any], name: str, entry: Mapping[str, Any]) -> None:
    inputs = tree.setdefault("inputs", {})
    if not isinstance(inputs, dict) or not isinstance(inputs.setdefault(name, {}), dict):
        raise UsageError("recipe: 'inputs' is no mapping of input names", "Write inputs: {NAME: {shape: 1x3x224x224}}.")
    if "shape" in entry:
        # Else a range of the recipe would hide the flag.
        for key in ("min", "opt", "max"):
            inputs[name].pop(key, None)
    inputs[name].update(entry)
