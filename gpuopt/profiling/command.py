"""`gpuopt profile` without its command line: a bundle or an engine in, a document out."""

from __future__ import annotations

import datetime
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

import gpuopt
from gpuopt import bundle, engine_record, environment, reference
from gpuopt.artifact import ENGINE_ONNX_FILE, ONNX_FILE
from gpuopt.engine_record import Trust
from gpuopt.errors import EngineError, RequirementError, UsageError
from gpuopt.gpu_turn import gpu_turn
from gpuopt.profiling import layers
from gpuopt.profiling.peaks import peak_of
from gpuopt.progress import Progress
from gpuopt.recipe import load, resolve
from gpuopt.storage import write_bytes

_MOST_ROWS = 40


class ProfileReport(BaseModel):
    """A run of `gpuopt profile`.

    Attributes:
        sum_ms: of the layers, each timed alone; above `latency_ms`, since profiling keeps them from overlapping.
        floor_ms: sum of the layers' floors; None where the GPU's peaks are not known.
        peak: of the GPU, and where its figures come from.
        commands: for NVIDIA's own profilers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    command: list[str]
    gpuopt_version: str
    created: str
    subject: str
    where: str
    latency_ms: float
    sum_ms: float
    floor_ms: float | None
    peak: dict[str, Any] | None
    layers: list[dict[str, Any]]
    modules: list[dict[str, Any]]
    commands: list[str]
    warnings: list[str]
    environment: dict[str, Any]


def profile(
    subject: Path,
    iterations: int,
    command: Sequence[str],
    progress: Progress,
    trust: Trust | None = None,
    public_key: str | None = None,
) -> ProfileReport:
    """Time every layer of an engine; of a bundle whose engine cannot run here, every node in ONNX Runtime.

    Raises:
        UsageError: the subject is neither a bundle nor an engine.
        SignatureError: it does not bear the signature of `public_key`.
        StorageError, EngineError: it is damaged, or belongs elsewhere.
        RequirementError: a package is missing.
    """
    bundle.open_subject(subject, public_key)
    warnings: list[str] = []
    engine, folder = _find(subject)
    peak = None
    with tempfile.TemporaryDirectory(prefix="gpuopt-") as temporary, progress.stage("profile"):
        scratch = Path(temporary)
        missing = environment.why_not_run(engine_record.read(engine).target) if engine else "the bundle has no engine"
        if engine is not None and not missing:
            devices = environment.gpus()
            peak = peak_of(devices[0].name) if devices else None
            if peak is None:
                warnings.append("the peaks of this GPU are not in the table: no floors are told")
            graph = _graph(folder, scratch)
            with gpu_turn(progress):
                found = layers.of_engine(engine, graph, iterations, peak, trust)
        elif folder is None:
            raise EngineError(f"{subject.name} cannot be run here: {missing}", "Run it where it was built.")
        else:
            environment.require("onnxruntime", "profiling model.onnx")
            warnings.append(f"the profile is ONNX Runtime's on the CPU: {missing}")
            graph = layers.Graph.read(folder / ONNX_FILE, reference.load(folder / "reference"), scratch / "shapes")
            found = layers.of_session(folder, graph, iterations, scratch)
    floors = [layer.floor_milliseconds for layer in found.layers]
    known = [floor for floor in floors if floor is not None]
    return ProfileReport(
        command=list(command),
        gpuopt_version=gpuopt.__version__,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        subject=found.subject,
        where=found.where,
        latency_ms=found.latency_ms,
        sum_ms=sum(layer.milliseconds for layer in found.layers),
        floor_ms=sum(known) if known and len(known) == len(floors) else None,
        peak=asdict(peak) if peak else None,
        layers=[asdict(layer) for layer in found.layers],
        modules=[
            {"module": name, "milliseconds": spent, "layers": count}
            for name, spent, count in layers.by_module(found.layers)
        ],
        commands=profiler_commands(engine or subject) if engine is not None else [],
        warnings=warnings,
        environment=environment.describe(),
    )


def profiler_commands(engine: Path) -> list[str]:
    """Ready command lines of Nsight Systems and Nsight Compute; TensorRT marks every layer with an NVTX range."""
    run = f"gpuopt bench {shlex.quote(str(engine))} --only latency --seconds 0.2"
    return [
        f"nsys profile --trace=cuda,nvtx,osrt --cuda-graph-trace=node --force-overwrite=true --output=gpuopt {run}",
        f"ncu --set detailed --nvtx --target-processes=all --launch-skip=200 --launch-count=100 --export=gpuopt {run}",
    ]


def trace(folder: Path, path: Path) -> None:
    """Write a Chrome trace of the original PyTorch model, with its modules, as the PyTorch profiler takes it.

    Args:
        folder: a bundle that was compiled from PyTorch; the model is loaded by its recipe, and its rules of trust.
        path: `.json` or `.json.gz`; chrome://tracing, Perfetto and TensorBoard open it.

    Raises:
        UsageError: the bundle was compiled from ONNX, or the name has another ending.
        RequirementError: torch is not installed.
        StorageError: it cannot be written.
    """
    from gpuopt.model_file import ModelKind, detect

    if not path.name.endswith((".json", ".json.gz")):
        raise UsageError(f"a trace is a .json or .json.gz file, not {path.name}", "Name it so.")
    bundle.open_bundle(folder)
    recipe = resolve(load(folder / "recipe.yaml"))
    kind = detect(Path(recipe.model.path)) if recipe.model.path else ModelKind.FACTORY
    if kind is ModelKind.ONNX:
        raise UsageError("the bundle was compiled from ONNX: there is no PyTorch model to trace", "Leave out --trace.")
    environment.require("torch", "tracing the PyTorch model")
    # The profiler's library reports its start and end on stderr otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from gpuopt import torch_model

    loaded = torch_model.load(recipe.model, kind)
    stored = reference.load(folder / "reference")
    corner = next((c for c in stored.corners if c.name == "profile0-opt"), stored.corners[0])
    tensors = torch_model.as_tensors(stored.feed(corner))
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available() and isinstance(loaded.module, torch.nn.Module):
        activities.append(ProfilerActivity.CUDA)
        loaded.module = loaded.module.cuda()
        tensors = {name: tensor.cuda() for name, tensor in tensors.items()}
    with torch.inference_mode():
        for _ in range(3):
            loaded.forward(tensors)
        with torch_profile(activities=activities, record_shapes=True, with_stack=True) as taken:
            loaded.forward(tensors)
    with tempfile.TemporaryDirectory(prefix="gpuopt-") as temporary:
        made = Path(temporary) / path.name
        taken.export_chrome_trace(str(made))
        if not made.is_file():
            raise RequirementError("the PyTorch profiler wrote no trace", "Try another release of torch.")
        write_bytes(path, made.read_bytes())


def render(report: ProfileReport, by_time: bool) -> str:
    """The report as plain text."""
    return "\n".join(_lines(report, by_time))


def _lines(report: ProfileReport, by_time: bool) -> Iterator[str]:
    yield (
        f"{report.subject} on {report.where}: {report.latency_ms:.4f} ms back to back; "
        f"its layers, each timed alone: {report.sum_ms:.4f} ms"
    )
    if report.floor_ms is not None and report.peak is not None:
        yield f"floor by {report.peak['source']}: {report.floor_ms:.4f} ms"
    yield ""
    yield f"{'ms':>8} {'share':>6}  {'in':<6}{'bound by':<11}{'operators':<22}{'module':<28}kernel"
    entries = sorted(report.layers, key=lambda entry: -entry["milliseconds"]) if by_time else report.layers
    for entry in entries[:_MOST_ROWS]:
        share = entry["milliseconds"] / report.sum_ms if report.sum_ms else 0.0
        operators = "+".join(entry["op_types"]) or "-"
        yield (
            f"{entry['milliseconds']:>8.4f} {share:>6.1%}  {entry['precision']:<6}{entry['bound_by'] or '-':<11}"
            f"{operators[:21]:<22}{entry['module'][-27:] or '-':<28}{entry['kernel'][:48]}"
        )
    if len(entries) > _MOST_ROWS:
        yield f"{len(entries) - _MOST_ROWS} more layers are in the JSON"
    yield ""
    for entry in report.modules[:10]:
        yield f"{entry['milliseconds']:>8.4f} ms in {entry['layers']} layers of {entry['module']}"
    if report.commands:
        yield ""
        yield from report.commands


def _find(subject: Path) -> tuple[Path | None, Path | None]:
    """The engine and the bundle's folder."""
    if subject.is_dir():
        return engine_record.find_engine(subject), subject
    if subject.suffix == ".engine" and subject.is_file():
        return subject, None
    raise UsageError(f"{subject} is neither a bundle nor an engine", "Name a folder that 'gpuopt compile' wrote.")


def _graph(folder: Path | None, scratch: Path) -> layers.Graph | None:
    if folder is None:
        return None
    name = ENGINE_ONNX_FILE if (folder / ENGINE_ONNX_FILE).is_file() else ONNX_FILE
    return layers.Graph.read(folder / name, reference.load(folder / "reference"), scratch / "shapes")
