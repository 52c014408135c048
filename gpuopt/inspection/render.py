"""The answers of `gpuopt inspect` and `gpuopt check` as text: pure functions, plain aligned lines."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from gpuopt.backends.tensorrt.library import name_of
from gpuopt.inspection.model import (
    BundleFacts,
    EngineFacts,
    FileFacts,
    GraphFacts,
    Inspection,
    IntegrityReport,
    LoadingFacts,
    OriginFacts,
    ProfileFacts,
    SignatureFacts,
    TensorFacts,
)
from gpuopt.report.markdown import format_bytes
from gpuopt.shapes import format_shape

_LABEL = 13
_WIDTH = 120
_MOST_OPERATORS = 12


def inspection(found: Inspection) -> str:
    """What something is, a part for each file."""
    parts: list[Iterable[str]] = []
    if found.bundle is not None:
        parts.append([f"{found.path}: bundle", *_bundle(found.bundle)])
        parts += [[f"{one.file.name}: {_engine_title(one)}", *_engine(one)] for one in found.bundle.engines]
        parts += [[f"{one.file.name}: ONNX", *_graph(one)] for one in found.bundle.graphs]
    if found.engine is not None:
        parts.append([f"{found.path}: {_engine_title(found.engine)}", *_engine(found.engine)])
    if found.graph is not None:
        parts.append([f"{found.path}: ONNX", *_graph(found.graph)])
    return "\n\n".join("\n".join(_printable(line) for line in part) for part in parts)


def integrity(found: IntegrityReport) -> str:
    """What was checked."""
    size = format_bytes(found.size_bytes)
    lines = [*_row("manifest", f"{found.files} files, {size}: each is there with its SHA-256, and no other file is")]
    for name in found.engines:
        lines += _row("engine", f"{name}: its record fits the file and the manifest")
    if not found.engines:
        lines += _row("engine", "none")
    if found.status is None:
        lines += _row("report", "none: a folder of 'gpuopt quantize'")
    else:
        lines += _row("report", f"fits the manifest and the files: {found.precision}, status {found.status}")
    lines += _row("signature", _signature(found.signature))
    return "\n".join(map(_printable, lines))


def _signature(found: SignatureFacts) -> str:
    if found.state == "none":
        return "none"
    if found.state == "unchecked":
        return "there, not checked: no --public-key"
    return f"valid, key {found.key_id}: {found.trusted_comment}"


def _bundle(found: BundleFacts) -> Iterator[str]:
    yield from _row("status", found.status or "none: a folder of 'gpuopt quantize'")
    if found.precision:
        yield from _row("precision", found.precision)
    fits = "; every SHA-256 fits the manifest" if not found.problems else ""
    yield from _row("files", f"{found.files}, {format_bytes(found.size_bytes)}{fits}")
    yield from _rows("problems", found.problems)
    yield from _row("signature", "there; 'gpuopt check --public-key' verifies it" if found.signature else "none")
    yield from _origin(found.origin)


def _engine_title(found: EngineFacts) -> str:
    if found.target is None:
        return "serialized engine"
    return f"{name_of(found.target)} engine, {found.precision}"


def _engine(found: EngineFacts) -> Iterator[str]:
    yield from _file(found.file)
    if found.record_problem:
        yield from _row("record", found.record_problem.removeprefix("no record") or "none")
    if found.target is not None:
        versions = "; runs in later minor releases, too" if found.version_compatible else ""
        yield from _row("built by", f"{name_of(found.target)} {found.library_version}{versions}")
        builder = f"on {found.gpu}, driver for CUDA {found.driver_version}" if found.gpu else "without a GPU"
        yield from _row("for GPUs", f"{_capabilities(found)}; built {builder}")
        if found.precision == "fp32":
            yield from _row("TF32", "allowed" if found.tf32 else "off")
        yield from _interface(found.inputs, found.outputs, found.profiles)
    if found.status is not None:
        yield from _row("status", found.status)
    yield from _coverage(found)
    yield from _loading(found.loading)
    if found.origin is not None:
        yield from _origin(found.origin)


def _capabilities(found: EngineFacts) -> str:
    if found.compute_capabilities and found.hardware_compatibility != "ampere+":
        return f"compute capability {', '.join(found.compute_capabilities)}"
    if found.target == "tensorrt-rtx" or found.hardware_compatibility == "ampere+":
        return "compute capability 8.0 and newer"
    return "compute capability not known"


def _coverage(found: EngineFacts) -> Iterator[str]:
    if found.coverage is None:
        return
    told = found.coverage
    for name, count in sorted(told.layers.items(), key=lambda item: -item[1]):
        of_time = f", {told.time_share.get(name, 0.0):.1%} of their time" if told.time_share is not None else ""
        share = told.layer_share.get(name, 0.0)
        yield from _row("layers", f"{name.upper():<6}{count:>5}, {share:.1%} of the computing layers{of_time}")
    between = f"{told.reformats} change a layout, {told.quantizations} are Q or DQ alone"
    if told.overhead_time_share is not None:
        between += f"; {told.overhead_time_share:.1%} of the whole time"
    yield from _row("between", between)
    if told.milliseconds is not None:
        yield from _row("time", f"{told.milliseconds:.3f} ms, each layer alone, on {found.proved_on or 'a GPU'}")


def _graph(found: GraphFacts) -> Iterator[str]:
    yield from _file(found.file)
    for data in found.external:
        yield from _row("weights in", f"{data.name}, {format_bytes(data.size_bytes)}")
        yield from _row("", f"SHA-256 {data.sha256}{_fits(data)}")
    opsets = ", ".join(f"{domain} {version}" for domain, version in found.opsets.items())
    yield from _row("written by", f"{found.producer or 'not stated'}; IR {found.ir_version}, opset {opsets}")
    yield from _interface(found.inputs, found.outputs, found.profiles)
    for dtype, weights in found.weights.items():
        yield from _row("weights", f"{dtype:<9}{format_bytes(weights.size_bytes):>10} in {_tensors(weights.tensors)}")
    operators = [f"{name} {count}" for name, count in found.operators.items()]
    more = len(operators) - _MOST_OPERATORS
    shown = ", ".join(operators[:_MOST_OPERATORS]) + (f", {more} more operators" if more > 0 else "")
    yield from _row("nodes", f"{sum(found.operators.values())}: {shown}")
    for name, count in found.computing_nodes.items():
        yield from _row("computing", f"{name.upper():<8}{count:>5} convolutions and matrix products")
    yield from _row("Q/DQ", f"{found.qdq_pairs} pairs, {found.dequantized_weights} constants stored as integers")
    if found.macs is not None and found.int8_macs_share is not None:
        shapes = ", ".join(f"{name} {shape}" for name, shape in found.macs_shapes.items())
        where = f" at {shapes}" if shapes else ""
        yield from _row("INT8", f"{found.int8_macs_share:.1%} of {found.macs} multiply-accumulates{where}")
    yield from _loading(found.loading, ", in ONNX Runtime")
    if found.origin is not None:
        yield from _origin(found.origin)


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' if count != 1 else ''}"


def _file(found: FileFacts) -> Iterator[str]:
    yield from _row("size", f"{format_bytes(found.size_bytes)} ({found.size_bytes} bytes)")
    yield from _row("SHA-256", f"{found.sha256}{_fits(found)}")


def _fits(found: FileFacts) -> str:
    told = [
        f"{'fits' if fits else 'does not fit'} the {name}"
        for name, fits in (("record", found.matches_record), ("manifest", found.matches_manifest))
        if fits is not None
    ]
    return f", {', '.join(told)}" if told else ""


def _interface(
    inputs: Sequence[TensorFacts], outputs: Sequence[TensorFacts], profiles: Sequence[ProfileFacts]
) -> Iterator[str]:
    cells = [_tensor(tensor) for tensor in (*inputs, *outputs)]
    labels = ["input"] * len(inputs) + ["output"] * len(outputs)
    for label, line in zip(labels, _aligned(cells), strict=True):
        yield from _row(label, line)
    for index, profile in enumerate(profiles):
        rows = [(name, f"min {r.min}", f"opt {r.opt}", f"max {r.max}") for name, r in profile.items()]
        for line in _aligned(rows):
            yield from _row(f"profile {index}", line)


def _tensor(found: TensorFacts) -> tuple[str, ...]:
    shape = "shape not stated" if found.shape is None else format_shape(found.shape)
    return found.name, found.dtype, shape, found.layout or ""


def _loading(found: LoadingFacts, where: str = "") -> Iterator[str]:
    if found.verdict == "unknown" and len(found.reasons) == 1:
        yield from _row("loads here", f"unknown, {found.reasons[0]}")
    else:
        yield from _row("loads here", found.verdict + where)
        yield from _rows("", found.reasons)
    yield from _rows("needs", found.needs)


def _origin(found: OriginFacts) -> Iterator[str]:
    model = " with ".join(name for name in (found.model_factory, found.model_path) if name) or "not stated"
    yield from _row("model", f"{model}{f' ({found.model_kind})' if found.model_kind else ''}")
    if found.model_sha256:
        yield from _row("", f"SHA-256 {found.model_sha256}")
    if found.exporter:
        yield from _row("exported by", found.exporter)
    yield from _row("made by", f"gpuopt {found.gpuopt_version}{f', {found.created}' if found.created else ''}")
    if found.platform:
        gpus = ", ".join(found.gpus) or "no GPU"
        yield from _row("made on", f"{found.platform}, Python {found.python}, {gpus}")
    if found.command:
        yield from _row("command", shlex.join(found.command))
    if found.packages:
        yield from _row("packages", ", ".join(f"{name} {version}" for name, version in found.packages.items()))


def _rows(label: str, texts: Sequence[str]) -> Iterator[str]:
    for index, text in enumerate(texts):
        yield from _row(label if index == 0 else "", text)


def _row(label: str, text: str) -> Iterator[str]:
    """A label and a text, the text wrapped behind it; a word that is too long stays whole."""
    wrapped = textwrap.wrap(
        text,
        _WIDTH - _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
    for index, line in enumerate(wrapped or [""]):
        yield f"{label if index == 0 else '':<{_LABEL}}{line}".rstrip()


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _printable(line: str) -> str:
    """Names in a file may hold what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in line)
