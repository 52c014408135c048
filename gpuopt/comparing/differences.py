"""What keeps two reports from being comparable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from gpuopt.comparing.figures import benchmark_of, interface
from gpuopt.comparing.model import Aspect, Difference
from gpuopt.report.model import BenchmarkReport, Report

ASPECTS: tuple[Aspect, ...] = ("gpu", "library", "driver", "shapes", "definition", "model")
ALL = "all"
_LIBRARY = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX", "onnxruntime": "ONNX Runtime"}


def between(old: Report, new: Report, allowed: Iterable[str]) -> list[Difference]:
    """Other interfaces, targets that are gone, and what else differs of targets that both measured.

    Args:
        allowed: aspects that may differ, or `all`.
    """
    names = set(allowed)
    return [
        Difference(
            aspect=aspect,
            target=target,
            what=what,
            old=before,
            new=after,
            allowed=ALL in names or aspect in names,
        )
        for aspect, target, what, before, after in _differences(old, new)
    ]


def _differences(old: Report, new: Report) -> Iterator[tuple[Aspect, str, str, str, str]]:
    before, after = interface(old), interface(new)
    if before is not None and after is not None:
        for what, one, other in zip(("inputs", "outputs"), before, after, strict=True):
            if one != other:
                yield "model", "", what, one, other
    targets = [[engine.target for engine in report.engines] for report in (old, new)]
    if new.status == "passed" and not set(targets[0]) <= set(targets[1]):
        yield "library", "", "targets", ", ".join(targets[0]), ", ".join(targets[1])
    yield from _engines(old, new)
    for benchmark in new.benchmarks:
        earlier = benchmark_of(old, benchmark.target)
        if earlier is None:
            continue
        pairs = zip(_conditions(earlier), _conditions(benchmark), strict=True)
        for (aspect, what, one), (_, _, other) in pairs:
            if one != other:
                yield aspect, benchmark.target, what, _shown(one), _shown(other)


def _engines(old: Report, new: Report) -> Iterator[tuple[Aspect, str, str, str, str]]:
    """Engines for other libraries or GPUs, also where nothing was measured."""
    earlier = {engine.target: engine for engine in old.engines}
    for engine in new.engines:
        before = earlier.get(engine.target)
        if before is None or engine.target == "onnxruntime":
            continue
        pairs: tuple[tuple[Aspect, str, Any, Any], ...] = (
            ("library", f"version of {_LIBRARY[engine.target]}", before.library_version, engine.library_version),
            ("gpu", "compute capability", before.compute_capabilities, engine.compute_capabilities),
            ("gpu", "GPU of the proof", (before.proof or {}).get("gpu"), (engine.proof or {}).get("gpu")),
        )
        measured = benchmark_of(old, engine.target) is not None and benchmark_of(new, engine.target) is not None
        for aspect, what, one, other in pairs:
            # What the benchmarks tell is told once.
            if one and other and one != other and not (measured and aspect == "library"):
                yield aspect, engine.target, what, _shown(one), _shown(other)


def _conditions(found: BenchmarkReport) -> list[tuple[Aspect, str, Any]]:
    """What has to be the same where speed is compared."""
    return [
        ("gpu", "GPU or CPU", found.where),
        ("library", f"version of {_LIBRARY.get(found.target, 'the library')}", found.library_version),
        ("driver", "driver", found.driver_version),
        ("shapes", "shapes", found.shapes),
        ("shapes", "batch", found.batch),
        ("definition", "CUDA graph", found.cuda_graph),
        ("definition", "definition", found.definition),
        ("definition", "what an inference includes", found.includes),
    ]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {shape}" for name, shape in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, "") else str(value)
