"""Everything `gpuopt bench` measures of one engine."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpuopt import engine_record
from gpuopt.backends.tensorrt.runtime import (
    Execution,
    ExecutionOptions,
    LoadedEngine,
    Part,
    Pools,
    feeds_of_shape,
)
from gpuopt.bench.engine_race import LOADS, Racing, race_engines
from gpuopt.bench.measuring import Settings, measure, warm_up
from gpuopt.bench.report import Row, row, throughput_row
from gpuopt.bench.subjects import ALL_PARTS, EngineSubject
from gpuopt.cuda.device import Device
from gpuopt.cuda.memory import DevicePool, PinnedPool
from gpuopt.cuda.stream import Event
from gpuopt.engine_record import EngineRecord
from gpuopt.environment import has_module
from gpuopt.errors import GpuoptError
from gpuopt.progress import Progress
from gpuopt.shapes import Shape, batch_size, tuned_shapes

if TYPE_CHECKING:
    from gpuopt.bench.command import Request

_DEVICE = "compute alone, inputs and outputs stay on the GPU"
_WHOLE = "host-to-device copy, compute, device-to-host copy"
_GRAPH = "as a CUDA graph"
_NO_GRAPH = "without a CUDA graph"
_ROUNDS = 7
_ENQUEUED = 2
"""Inferences a stream has at a time, so that it never runs dry."""
_DEPTHS = (1, 2, 3)
_CHANGES = 300


class EngineBench:
    """One engine on one device, measured group by group; a context manager.

    Attributes:
        memory: bytes, filled by `rows`.
    """

    def __init__(self, path: Path, record: EngineRecord, request: Request, progress: Progress) -> None:
        self._path = path
        self._request = request
        self._progress = progress
        self._settings = Settings(seconds=request.seconds)
        self.memory: dict[str, Any] = {}
        self._graphs = has_module("cuda.bindings")
        with ExitStack() as stack:
            self.device = stack.enter_context(Device())
            self._free_before = self.device.free_bytes()
            loaded = LoadedEngine.open(path, self.device, record, trust=request.trust)
            self._engine = stack.enter_context(loaded)
            self._stack = stack.pop_all()

    def __enter__(self) -> EngineBench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def rows(self, shapes: Mapping[str, Shape]) -> list[Row]:
        """All groups asked for, at these shapes."""
        groups = {
            "latency": self._latency,
            "loads": self._loads,
            "phases": self._phases,
            "overlap": self._overlap,
            "streams": self._streams,
            "beside": self._beside,
            "batches": self._batches,
        }
        found: list[Row] = []
        for name, group in groups.items():
            if name in self._request.groups or (name == "beside" and self._request.beside is not None):
                with self._progress.stage(f"bench {name}"):
                    found += group(shapes)
        if "memory" in self._request.groups:
            with self._progress.stage("bench memory"):
                self._measure_memory(shapes)
        return found

    def _ready(self, shapes: Mapping[str, Shape], page_locked: bool = True) -> Execution:
        execution = self._engine.execution(shapes, ExecutionOptions(page_locked=page_locked))
        execution.run(feeds_of_shape(self._engine, shapes))
        return execution

    def _latency(self, shapes: Mapping[str, Shape]) -> Iterator[Row]:
        """Compute alone and end to end; with and without a CUDA graph; page-locked and pageable."""
        cases: list[tuple[str, Sequence[Part], bool, bool]] = [
            ("compute", ("compute",), False, True),
            ("end to end, page-locked", ALL_PARTS, False, True),
            ("end to end, pageable", ALL_PARTS, False, False),
        ]
        if self._graphs:
            cases.insert(1, ("compute, CUDA graph", ("compute",), True, True))
            cases.insert(3, ("end to end, page-locked, CUDA graph", ALL_PARTS, True, True))
        for name, parts, graph, page_locked in cases:
            includes = f"{_DEVICE if len(parts) == 1 else _WHOLE}; {_GRAPH if graph else _NO_GRAPH}"
            with self._ready(shapes, page_locked) as execution:
                yield self._measured("latency", name, shapes, includes, execution, parts, graph)

    def _loads(self, shapes: Mapping[str, Shape]) -> Iterator[Row]:
        """The engine loaded anew: where it lies in memory decides its speed, too."""
        racing = Racing({"": self._path}, shapes, self._request.trust, self._graphs, self._request.seconds * LOADS)
        batch, includes = batch_size(shapes), f"{_DEVICE}; {self._how}; loaded anew"
        try:
            times = race_engines(racing, self.device).in_loads("")
        except GpuoptError as error:
            yield Row(group="loads", name="load 1", batch=batch, includes=includes, failed=error.message)
            return
        for number, rounds in enumerate(times, 1):
            yield throughput_row("loads", f"load {number}", batch, includes, rounds)

    def _phases(self, shapes: Mapping[str, Shape]) -> Iterator[Row]:
        """Each part alone."""
        names: dict[Part, str] = {"copy_in": "host to device", "compute": "compute", "copy_out": "device to host"}
        with self._ready(shapes) as execution:
            for part, name in names.items():
                includes = f"that part alone, {_NO_GRAPH}; percentiles with launch and wait, ms/inf by the GPU's clock"
                yield self._measured("phases", name, shapes, includes, execution, (part,), False)

    def _measured(
        self, group: str, name: str, shapes: Mapping[str, Shape], includes: str, execution: Execution,
        parts: Sequence[Part], graph: bool,
    ) -> Row:  # fmt: skip
        batch = batch_size(shapes)
        try:
            return row(group, name, batch, includes, measure(EngineSubject(execution, parts, graph), self._settings))
        except GpuoptError as error:
            return Row(group=group, name=name, batch=batch, includes=includes, failed=error.message)

    def _overlap(self, shapes: Mapping[str, Shape]) -> Iterator[Row]:
        """So many inferences in flight, each with its own buffers and stream, copies and all."""
        for depth in _DEPTHS:
            includes = f"{_WHOLE}; {self._how}; a buffer is filled again once its inference is done"
            yield self._at_once("overlap", f"depth {depth}", shapes, depth, ALL_PARTS, includes, 1)

    def _streams(self, shapes: Mapping[str, Shape]) -> Iterator[Row]:
        """Executions of one engine side by side, without copies."""
        count = 1
        while count <= self._request.streams:
            name = f"{count} stream{'s' if count > 1 else ''}"
            includes = f"{_DEVICE}; {self._how}; on every stream the next one waits enqueued"
            yield self._at_once("streams", name, shapes, count, ("compute",), includes, _ENQUEUED)
            count *= 2

    @property
    def _how(self) -> str:
        return _GRAPH if self._graphs else _NO_GRAPH

    def _at_once(
        self, group: str, name: str, shapes: Mapping[str, Shape], count: int, parts: Sequence[Part], includes: str,
        enqueued: int,
    ) -> Row:  # fmt: skip
        batch = batch_size(shapes)
        try:
            with ExitStack() as stack:
                ready = [stack.enter_context(self._ready(shapes)) for _ in range(count)]
                subjects = [EngineSubject(execution, parts, self._graphs) for execution in ready]
                rounds = self._in_turn(subjects, enqueued)
            return throughput_row(group, name, batch, includes, rounds)
        except GpuoptError as error:
            return Row(group=group, name=name, batch=batch, includes=includes, failed=error.message)

    def _in_turn(self, subjects: Sequence[EngineSubject], enqueued: int) -> list[float]:
        """Milliseconds an inference, a value a round: enqueued in turn on all streams, waited for at the end.

        Args:
            enqueued: inferences that a stream has at most, before the oldest is waited for.
        """
        for subject in subjects:
            warm_up(subject)
        once = max(subjects[0].run_many(5) / 1000, 1e-6)
        per_round = max(len(subjects) * 3, int(self._request.seconds / _ROUNDS / once))
        per_round = min(per_round, 20000)
        found = []
        for _ in range(_ROUNDS):
            self.device.synchronize()
            events: list[collections.deque[Event]] = [collections.deque() for _ in subjects]
            started = time.perf_counter()
            for index in range(per_round):
                subject, waiting = subjects[index % len(subjects)], events[index % len(subjects)]
                if len(waiting) >= enqueued:
                    waiting.popleft().synchronize()
                subject.enqueue()
                waiting.append(subject.record())
            self.device.synchronize()
            found.append((time.perf_counter() - started) / per_round * 1000)
        return found

    def _beside(self, shapes: Mapping[str, Shape]) -> Iterator[Row]:
        """Two different engines at once, and each of them alone."""
        path = self._request.beside
        if path is None:
            return
        batch = batch_size(shapes)
        with ExitStack() as stack:
            record = engine_record.read(path)
            loaded = LoadedEngine.open(path, self.device, record, trust=self._request.trust)
            other = stack.enter_context(loaded)
            other_shapes = tuned_shapes(other.profiles)
            theirs = stack.enter_context(other.execution(other_shapes))
            theirs.run(feeds_of_shape(other, other_shapes))
            ours = stack.enter_context(self._ready(shapes))
            one, two = EngineSubject(ours, cuda_graph=self._graphs), EngineSubject(theirs, cuda_graph=self._graphs)
            includes = f"{_DEVICE}; {self._how}; on every stream the next one waits enqueued"
            alone = [self._in_turn([subject], _ENQUEUED) for subject in (one, two)]
            yield throughput_row("beside", "this engine alone", batch, includes, alone[0])
            yield throughput_row("beside", f"{path.name} alone", batch_size(other_shapes), includes, alone[1])
            pairs = [2 * time for time in self._in_turn([one, two], _ENQUEUED)]
            yield throughput_row("beside", "both at once, a pair", batch, f"{includes}; one inference of each", pairs)

    def _batches(self, shapes: Mapping[str, Shape]) -> Iterator[Row]:
        """Other batch sizes of the profile."""
        profile = self._engine.profiles[self._engine.profile_for(shapes)]
        bounds = next((bounds for bounds in profile.values() if bounds.opt), None)
        if bounds is None:
            return
        wanted = self._request.batches or tuple(dict.fromkeys((bounds.min[0], bounds.opt[0], bounds.max[0])))
        for batch in wanted:
            resized = {name: (batch, *shape[1:]) if shape else shape for name, shape in shapes.items()}
            try:
                with self._ready(resized) as execution:
                    includes = f"{_DEVICE}; {self._how}"
                    yield self._measured(
                        "batches", f"batch {batch}", resized, includes, execution, ("compute",), self._graphs
                    )
            except GpuoptError as error:
                yield Row(group="batches", name=f"batch {batch}", batch=batch, includes=_DEVICE, failed=error.message)

    def _measure_memory(self, shapes: Mapping[str, Shape]) -> None:
        """Peak of the device, and what a long run of changing shapes does to it with and without a pool.

        What is lost of the free memory between the end of the first and of the last turn through the shapes, nothing
        being in use at either, is fragmentation or a leak: `lost_bytes_*`.
        """
        self._engine.pools.device.trim()
        self._engine.pools.pinned.trim()
        with self._ready(shapes) as execution:
            self.memory["execution_bytes"] = execution.device_bytes
            self.memory["scratch_bytes"] = self._engine.device_memory_bytes
            self.memory["used_bytes"] = self._free_before - self.device.free_bytes()
        profile = self._engine.profiles[self._engine.profile_for(shapes)]
        points = [{n: getattr(bounds, at) for n, bounds in profile.items()} for at in ("min", "opt", "max")]
        for label, pooled in (("with_pool", True), ("without_pool", False)):
            pools = Pools(DevicePool(self.device), PinnedPool(self.device))
            engine_pools, self._engine.pools = self._engine.pools, pools
            lowest, after_one_turn, spent = self.device.free_bytes(), 0, 0.0
            try:
                for index in range(_CHANGES):
                    started = time.perf_counter()
                    with self._engine.execution(points[index % len(points)]) as execution:
                        spent += time.perf_counter() - started
                        execution.compute()
                        execution.wait()
                        lowest = min(lowest, self.device.free_bytes())
                    if not pooled:
                        pools.device.trim()
                        pools.pinned.trim()
                    if index + 1 == len(points):
                        after_one_turn = self.device.free_bytes()
            finally:
                self._engine.pools = engine_pools
            self.memory[f"lost_bytes_{label}"] = after_one_turn - self.device.free_bytes()
            self.memory[f"shape_change_ms_{label}"] = round(spent / _CHANGES * 1000, 3)
            self.memory[f"peak_bytes_{label}"] = self._free_before - lowest
            self.memory[f"held_bytes_{label}"] = pools.device.held_bytes
            pools.device.close()
            pools.pinned.close()
