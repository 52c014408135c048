"""Engines timed in turn on one GPU, each loaded several times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpuopt import engine_record
from gpuopt.backends.tensorrt.runtime import LoadedEngine, feeds_of_shape
from gpuopt.bench.measuring import Race, joined, race
from gpuopt.bench.subjects import EngineSubject
from gpuopt.cuda.device import Device
from gpuopt.engine_record import Trust
from gpuopt.shapes import Shape, tuned_shapes

LOADS = 5
"""How often each engine is loaded: where its weights and its scratch memory lie decides how fast it is, too."""

ROUNDS = 15
"""Of each engine, over all loads."""

_LONGEST_LOAD_SECONDS = 20.0
"""For all engines; where it takes longer (TensorRT-RTX compiles kernels then) they are loaded once."""


@dataclass(frozen=True)
class Racing:
    """What runs, and how.

    Attributes:
        files: engines by name, each beside its record.
        shapes: of the inputs; None: the optimum of each engine's first profile.
        trust: code from elsewhere that the engines may run.
        cuda_graph: whether an inference is launched as a graph.
        seconds: for all rounds of all engines together, about.
    """

    files: Mapping[str, Path]
    shapes: Mapping[str, Shape] | None = None
    trust: Trust | None = None
    cuda_graph: bool = True
    seconds: float = 3.0


def race_engines(racing: Racing, device: Device, tell: Callable[[int, int], None] | None = None) -> Race:
    """Time engines in turn: compute alone, inputs and outputs stay on the GPU, the next inference waits enqueued.

    A load stays until the end, so that the next one gets other memory, where there is enough of it.

    Args:
        device: whose context is current.
        tell: called with the loads done and their number.

    Raises:
        EngineError: an engine is not what its record says, or cannot be run here.
        RequirementError: the GPU's memory does not suffice.
        StorageError: a file cannot be read.
    """
    found: list[Race] = []
    loads = LOADS
    with ExitStack() as until_the_end:
        while len(found) < loads:
            one_load = until_the_end.enter_context(ExitStack())
            started, free = time.monotonic(), device.free_bytes()
            subjects = one_load.enter_context(_loaded(racing, device))
            if not found and time.monotonic() - started > _LONGEST_LOAD_SECONDS:
                loads = 1
            found.append(race(subjects, racing.seconds / loads, ROUNDS // loads))
            if tell is not None:
                tell(len(found), loads)
            left = device.free_bytes()
            if 2 * (free - left) > left:
                one_load.close()
    return joined(found)


@contextmanager
def _loaded(racing: Racing, device: Device) -> Iterator[dict[str, EngineSubject]]:
    subjects: dict[str, EngineSubject] = {}
    with ExitStack() as stack:
        for name, path in racing.files.items():
            record = engine_record.read(path)
            engine = stack.enter_context(LoadedEngine.open(path, device, record, trust=racing.trust))
            shapes = racing.shapes or tuned_shapes(engine.profiles)
            execution = stack.enter_context(engine.execution(shapes))
            execution.run(feeds_of_shape(engine, shapes))
            subjects[name] = EngineSubject(execution, cuda_graph=racing.cuda_graph)
        # A graph goes before the execution that it launches.
        stack.callback(subjects.clear)
        yield subjects
