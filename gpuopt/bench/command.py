"""`gpuopt bench` without its command line: a bundle or an engine in, a document out."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gpuopt
from gpuopt import bundle, engine_record, environment, reference
from gpuopt.artifact import ONNX_FILE
from gpuopt.bench import baselines, conditions
from gpuopt.bench.report import THE_CPU, BenchReport, Row
from gpuopt.engine_record import Trust
from gpuopt.errors import EngineError, GpuoptError, RequirementError, UsageError
from gpuopt.gpu_turn import gpu_turn
from gpuopt.progress import Progress
from gpuopt.reference import Reference
from gpuopt.shapes import Shape, format_shape, tuned_shapes
from gpuopt.storage import sha256_file, write_text

GROUPS = ("latency", "loads", "phases", "overlap", "streams", "batches", "memory", "baselines")


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        subject: a bundle's folder, or an engine with its record beside it.
        groups: of `GROUPS`.
        seconds: for each row.
        batches: batch sizes to sweep; empty: the profile's smallest, tuned and largest.
        streams: largest number of executions at once.
        beside: another engine to run at the same time; None: none.
        trust: what the engines may run on the CPU; None: nothing.
        baselines: beginnings of the names of those wanted; empty: all.
        baseline_python: the interpreter for the baselines; None: this one.
        public_key: whose signature the bundle has to bear; None: no matter.
    """

    subject: Path
    groups: tuple[str, ...] = GROUPS
    seconds: float = 1.0
    batches: tuple[int, ...] = ()
    streams: int = 4
    beside: Path | None = None
    trust: Trust | None = None
    baselines: tuple[str, ...] = ()
    baseline_python: Path | None = None
    public_key: str | None = None


@dataclass(frozen=True)
class _Found:
    engine: Path | None
    folder: Path | None
    stored: Reference | None


def bench(request: Request, command: Sequence[str], progress: Progress) -> BenchReport:
    """Measure an engine, ONNX Runtime and PyTorch, as far as they are here.

    Raises:
        UsageError: the subject is neither a bundle nor an engine, or a group is unknown.
        SignatureError: it is not signed as it has to be.
        StorageError, EngineError: it is damaged, or belongs elsewhere; an engine without a bundle cannot be run here.
        RequirementError: what is asked for is of an engine, and none runs here.
    """
    started = time.monotonic()
    unknown = sorted(set(request.groups) - set(GROUPS))
    if unknown:
        raise UsageError(f"there is no group '{unknown[0]}'", f"Groups: {', '.join(GROUPS)}.")
    kinds = baselines.kinds(request.baselines)
    found = _find(request.subject, request.public_key)
    if request.beside is not None and request.public_key is not None:
        bundle.open_subject(request.beside, request.public_key)
    rows: list[Row] = []
    warnings: list[str] = []
    memory: dict[str, object] = {}
    shapes = _shapes(found)
    target, version, subject = "onnxruntime", environment.version_of("onnxruntime") or "", ONNX_FILE
    gpu = next((one.name for one in environment.gpus()), THE_CPU)
    missing = environment.why_not_run(engine_record.read(found.engine).target) if found.engine else "no engine"
    if found.engine is not None and missing:
        if found.folder is None:
            raise EngineError(f"{found.engine.name} cannot be run here: {missing}", "Run it where it was built.")
        warnings.append(f"{found.engine.name} was not measured: {missing}")
    if missing and "baselines" not in request.groups:
        what = found.engine.name if found.engine is not None else f"{request.subject}"
        raise RequirementError(
            f"nothing of {what} can be measured here: {missing}",
            "All groups but baselines measure an engine: run it on its GPU's machine ('gpuopt build' makes one there).",
        )
    unwatched = "only an engine's run is watched, and there was none" if missing else ""
    with gpu_turn(progress), conditions.watched(None if missing else _pci_bus_id(), unwatched) as state:
        if found.engine is not None and not missing:
            from gpuopt.bench import engines

            record = engine_record.read(found.engine)
            target, version, subject = record.target, record.library_version, found.engine.name
            with engines.EngineBench(found.engine, record, request, progress) as measured:
                gpu = measured.device.name
                rows += measured.rows(shapes)
                memory = measured.memory
            if target == "tensorrt-rtx":
                warnings.append("TensorRT-RTX's licence may forbid publishing figures: read it before you do")
    # Their processes use the GPU, too: the watch over it is closed before.
    if "baselines" in request.groups and found.folder is not None:
        with gpu_turn(progress):
            rows += baselines.rows(found.folder, shapes, request.seconds, request.baseline_python, progress, kinds)
    warnings += state.warnings()
    warnings += [
        f"{r.group}, {r.name}: its timings were not steady after the warm-up" for r in rows if r.was_steady is False
    ]
    return BenchReport(
        command=list(command),
        gpuopt_version=gpuopt.__version__,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        subject=subject,
        sha256=sha256_file(found.engine or request.subject / ONNX_FILE),
        target=target,
        library_version=version,
        gpu=gpu,
        shapes={name: format_shape(shape) for name, shape in shapes.items()},
        rows=rows,
        memory=memory,
        conditions=state.summary(),
        warnings=warnings,
        environment=environment.describe(),
        seconds=round(time.monotonic() - started, 3),
    )


def write(report: BenchReport, path: Path) -> None:
    """Write the document.

    Raises:
        StorageError: it cannot be written.
    """
    write_text(path, report.model_dump_json(indent=2) + "\n")


def _find(subject: Path, public_key: str | None) -> _Found:
    bundle.open_subject(subject, public_key)
    if subject.is_dir():
        return _Found(engine_record.find_engine(subject), subject, reference.load(subject / "reference"))
    if subject.suffix == ".engine" and subject.is_file():
        return _Found(subject, None, None)
    raise UsageError(f"{subject} is neither a bundle nor an engine", "Name a folder that 'gpuopt compile' wrote.")


def _shapes(found: _Found) -> dict[str, Shape]:
    if found.stored is not None:
        return tuned_shapes(found.stored.profiles)
    if found.engine is None:
        raise UsageError("there is nothing to measure", "Name a folder that 'gpuopt compile' wrote.")
    return tuned_shapes(engine_record.read(found.engine).shape_profiles())


def _pci_bus_id() -> str | None:
    from gpuopt.cuda.device import pci_bus_id

    try:
        return pci_bus_id()
    except GpuoptError:
        return None
