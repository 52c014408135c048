"""Running serialized engines of TensorRT 8.5 to 11 and TensorRT-RTX."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpuopt.backends.tensorrt import formats, preflight
from gpuopt.backends.tensorrt import network as networks
from gpuopt.backends.tensorrt.library import import_module, version
from gpuopt.backends.tensorrt.log import last_words, library_log
from gpuopt.cuda.device import Device
from gpuopt.cuda.graph import Graph
from gpuopt.cuda.memory import DeviceBuffer, DevicePool, PinnedPool
from gpuopt.cuda.stream import Stream
from gpuopt.engine_record import EngineRecord, Trust
from gpuopt.errors import DataError, EngineError
from gpuopt.shapes import Profile, Shape, TensorSpec, format_shape

Array = npt.NDArray[Any]
Part = Literal["copy_in", "compute", "copy_out"]

_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
    "UINT8": "uint8",
}  # fmt: skip
_SHORT = {"float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True)
class Pools:
    """Where buffers come from; several engines may share them."""

    device: DevicePool
    pinned: PinnedPool


@dataclass(frozen=True)
class ExecutionOptions:
    """How an execution is set up.

    Attributes:
        profile: index of the optimisation profile; None: the first that admits the shapes.
        page_locked: host buffers in page-locked memory, from which copies overlap with the GPU's work.
    """

    profile: int | None = None
    page_locked: bool = True


@dataclass(frozen=True)
class LayerTime:
    """Median time of one layer."""

    name: str
    milliseconds: float


class LoadedEngine:
    """A deserialised engine on one device; a context manager. The device's context has to be current for every call.

    Attributes:
        record: what it was built as.
        inputs, outputs: numpy dtypes; a dynamic dimension is a string.
        profiles: min / opt / max of every input.
        io_formats: by tensor, as `fp16:hwc8`.
        device_memory_bytes: scratch memory of one execution.
    """

    def __init__(
        self,
        plan: bytes,
        record: EngineRecord,
        device: Device,
        pools: Pools | None = None,
        trust: Trust | None = None,
    ) -> None:
        if record.weights_stripped:
            raise EngineError(
                f"{record.file} holds no weights: it was built with build.strip_weights",
                "Refit it where it is deployed, by TensorRT's OnnxParserRefitter, or build it with its weights.",
            )
        trust = trust or Trust()
        trt = import_module(record.target)
        self.record = record
        self.device = device
        self.pools = pools or Pools(DevicePool(device), PinnedPool(device))
        self._trt = trt
        self._log = library_log(trt)
        self._log.clear()
        if record.target == "tensorrt":
            trt.init_libnvinfer_plugins(self._log, "")
        if missing := sorted(set(record.plugins) - {path.name for path in trust.plugins}):
            raise EngineError(
                f"{record.file} was built with the plugin library {missing[0]}, which has to be loaded before it",
                f"Name it, if you trust it: --plugin FOLDER/{missing[0]}, or gpuopt.load(..., plugins=[...]).",
            )
        networks.load_plugins(trt, trust.plugins)
        self._runtime: Any = trt.Runtime(self._log)
        if record.version_compatible:
            if not trust.host_code:
                raise EngineError(
                    f"{record.file} carries code for the CPU, as every version-compatible engine does",
                    "If you trust it: --allow-host-code, or gpuopt.load(..., allow_host_code=True).",
                )
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            said = " ".join((self._log.messages["ERROR"] or ["no reason given"])[0].split())[:300]
            raise EngineError(
                f"TensorRT {trt.__version__} refuses {record.file}: {said}",
                "The file is damaged or was built elsewhere: copy it again, or build it here.",
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        kinds = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.io_formats = {name: self._io_format(name) for name in names}
        self.inputs = tuple(self._spec(name) for name in names if kinds[name])
        self.outputs = tuple(self._spec(name) for name in names if not kinds[name])
        self.profiles: tuple[Profile, ...] = record.shape_profiles()
        self.device_memory_bytes = int(
            self._engine.device_memory_size_v2
            if hasattr(self._engine, "device_memory_size_v2")
            else self._engine.device_memory_size
        )
        self._in_use: dict[int, int] = {}
        device.own(self)

    @staticmethod
    def open(
        path: Path, device: Device, record: EngineRecord, pools: Pools | None = None, trust: Trust | None = None
    ) -> LoadedEngine:
        """Check the file and this machine against the record, then deserialise.

        Raises:
            BuildError: a plugin library cannot be loaded.
            EngineError: the file was changed, or was built for another library, GPU or driver.
            RequirementError: the library is missing.
        """
        preflight.check_file(path, record)
        library = str(import_module(record.target).__version__)
        here = preflight.Here(library, device.compute_capability, device.name, device.driver_version)
        preflight.check_machine(record, here)
        return LoadedEngine(path.read_bytes(), record, device, pools, trust)

    def __enter__(self) -> LoadedEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the engine go; its executions have to be closed before. A second call does nothing."""
        self._engine = None
        self._runtime = None

    def layer_information(self, execution: Execution | None = None) -> str:
        """The inspector's JSON: every layer with its tactic, dtypes and formats.

        Args:
            execution: whose shapes stand for dynamic ones; without one they are -1.
        """
        inspector = self._engine.create_engine_inspector()
        if execution is not None:
            inspector.execution_context = execution.context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    @property
    def shares_profiles(self) -> bool:
        """Whether several executions can be on one profile with dynamic shapes: TensorRT 8.6 and newer."""
        return self.record.target == "tensorrt-rtx" or version(self._trt) >= (8, 6)

    def execution(self, shapes: Mapping[str, Shape], options: ExecutionOptions | None = None) -> Execution:
        """Buffers, stream and context for these input shapes.

        Raises:
            DataError: no profile admits the shapes.
            EngineError: this TensorRT needs one more profile for another execution.
            RequirementError: the GPU has no memory left.
        """
        return Execution(self, shapes, options or ExecutionOptions())

    def profile_for(self, shapes: Mapping[str, Shape]) -> int:
        """Index of the first profile that admits the shapes of all inputs.

        Raises:
            DataError: there is none, an input is missing or unknown.
        """
        expected = {spec.name for spec in self.inputs}
        if set(shapes) != expected:
            raise DataError(
                f"the engine takes the inputs {', '.join(sorted(expected))}, not {', '.join(sorted(shapes)) or 'none'}",
                "Give each input once, by its name.",
            )
        for index, profile in enumerate(self.profiles):
            if all(profile[name].admits(tuple(shape)) for name, shape in shapes.items()):
                return index
        name, shape, bounds = self._misfit(shapes)
        raise DataError(
            f"input '{name}' has the shape {format_shape(shape)}, the engine takes {bounds}",
            "Change the input, or build with other --min-shapes and --max-shapes.",
        )

    def take_profile(self, profile: int) -> None:
        """Note that an execution uses a profile.

        Raises:
            EngineError: another one does, and this TensorRT gives a profile of dynamic shapes to one at a time.
        """
        dynamic = any(bounds.dynamic_axes for bounds in self.profiles[profile].values())
        if dynamic and not self.shares_profiles and self._in_use.get(profile):
            major, minor = version(self._trt)
            raise EngineError(
                f"TensorRT {major}.{minor} runs one execution a profile of dynamic shapes; profile {profile} has one",
                "Build with one shape, or with the profile repeated under 'profiles'; TensorRT 8.6 and newer share it.",
            )
        self._in_use[profile] = self._in_use.get(profile, 0) + 1

    def give_profile_back(self, profile: int) -> None:
        """Note that an execution has ended."""
        self._in_use[profile] -= 1

    def _misfit(self, shapes: Mapping[str, Shape]) -> tuple[str, Shape, str]:
        profile = self.profiles[0]
        wrong = next((n for n, shape in shapes.items() if not profile[n].admits(tuple(shape))), next(iter(shapes)))
        bounds = dict.fromkeys(
            f"{format_shape(p[wrong].min)} to {format_shape(p[wrong].max)}"
            if p[wrong].min != p[wrong].max
            else format_shape(p[wrong].min)
            for p in self.profiles
        )
        return wrong, shapes[wrong], " or ".join(bounds)

    def _spec(self, name: str) -> TensorSpec:
        dtype = _DTYPES.get(self._engine.get_tensor_dtype(name).name)
        if dtype is None:
            raise EngineError(
                f"tensor '{name}' is {self._engine.get_tensor_dtype(name).name}, which numpy does not have",
                "Build with inputs and outputs in FP32 or FP16.",
            )
        shape = tuple(self._engine.get_tensor_shape(name))
        known = next((t for t in (*self.record.inputs, *self.record.outputs) if t.name == name), None)
        symbols = known.shape if known is not None and len(known.shape) == len(shape) else ()
        named = tuple(
            int(size) if size >= 0 else str(symbols[axis]) if axis < len(symbols) else f"dim{axis}"
            for axis, size in enumerate(shape)
        )
        return TensorSpec(name, dtype, named)

    def _io_format(self, name: str) -> str:
        layout = self._engine.get_tensor_format(name).name
        written = next((ours for ours, theirs in formats.NAMES.items() if theirs == layout), layout.lower())
        dtype = _DTYPES.get(self._engine.get_tensor_dtype(name).name, "?")
        return f"{_SHORT.get(dtype, dtype)}:{written}"

    def _layout(self, name: str) -> str:
        layout = self.io_formats[name].partition(":")[2]
        if layout not in formats.NAMES:
            raise EngineError(f"tensor '{name}' has the format {layout}, which is not supported", "Build without it.")
        return layout

    def _context(self) -> Any:
        """An execution context without scratch memory."""
        trt = self._trt
        if hasattr(self._engine, "create_execution_context_without_device_memory"):
            context = self._engine.create_execution_context_without_device_memory()
        else:
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise EngineError(
                f"TensorRT {trt.__version__} cannot set up an execution: {self._last_words()}",
                "Use fewer streams or a smaller engine.",
            )
        return context

    def _last_words(self) -> str:
        return last_words(self._log)


class Execution:
    """One execution context at fixed shapes, with its own stream and buffers; nothing is allocated after it is made.

    Attributes:
        inputs, outputs: host arrays as they lie in memory (`packed_shape` of their format); write the former, read
            the latter.
        shapes: logical shape of every input and output.
        stream: where its work goes by default.
        device_bytes: of buffers and scratch memory.
    """

    def __init__(self, loaded: LoadedEngine, shapes: Mapping[str, Shape], options: ExecutionOptions) -> None:
        self._loaded = loaded
        self._profile = loaded.profile_for(shapes) if options.profile is None else options.profile
        self.stream = Stream(loaded.device)
        loaded.take_profile(self._profile)
        try:
            self._context: Any = loaded._context()
        except BaseException:
            loaded.give_profile_back(self._profile)
            raise
        self._buffers: dict[str, DeviceBuffer] = {}
        self._scratch: DeviceBuffer | None = None
        self.inputs: dict[str, Array] = {}
        self.outputs: dict[str, Array] = {}
        self.shapes: dict[str, Shape] = {}
        self._graphs: list[Graph] = []
        loaded.device.own(self)
        try:
            self._set_up(shapes, options)
        except BaseException:
            self.close()
            raise

    def _set_up(self, shapes: Mapping[str, Shape], options: ExecutionOptions) -> None:
        loaded, context = self._loaded, self._context
        dynamic = any(bounds.dynamic_axes for bounds in loaded.profiles[self._profile].values())
        if (dynamic or len(loaded.profiles) > 1) and context.active_optimization_profile != self._profile:
            if not context.set_optimization_profile_async(self._profile, self.stream.handle):
                raise EngineError(
                    f"profile {self._profile} cannot be used: {loaded._last_words()}", "Run with --debug for more."
                )
            self.stream.synchronize()
        for name, shape in shapes.items():
            if not context.set_input_shape(name, tuple(shape)):
                raise DataError(
                    f"input '{name}' cannot have the shape {format_shape(shape)}: {loaded._last_words()}",
                    "Use a shape of the engine's profiles.",
                )
        for spec in (*loaded.inputs, *loaded.outputs):
            shape = tuple(int(size) for size in context.get_tensor_shape(spec.name))
            if any(size < 0 for size in shape):
                raise EngineError(
                    f"the shape of output '{spec.name}' depends on values, not only on the inputs' shapes",
                    "Let the model give an output of fixed size (top-k, padding) instead.",
                )
            self.shapes[spec.name] = shape
            host_shape = formats.packed_shape(shape, loaded._layout(spec.name))
            allocate: Callable[[Shape, str], Array] = loaded.pools.pinned.allocate if options.page_locked else _pageable
            host = allocate(host_shape, spec.dtype)
            buffer = loaded.pools.device.allocate(host.nbytes)
            self._buffers[spec.name] = buffer
            context.set_tensor_address(spec.name, buffer.address)
            (self.inputs if spec in loaded.inputs else self.outputs)[spec.name] = host
        self._scratch = loaded.pools.device.allocate(loaded.device_memory_bytes)
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self._scratch.address, loaded.device_memory_bytes)
        else:
            context.device_memory = self._scratch.address
        self.device_bytes = self._scratch.nbytes + sum(buffer.nbytes for buffer in self._buffers.values())
        for name, host in self.inputs.items():
            host[...] = 0
            self.stream.copy_in(self._buffers[name].address, host)
        self.stream.synchronize()

    @property
    def context(self) -> Any:
        """TensorRT's own object."""
        return self._context

    def copy_in(self, stream: Stream | None = None) -> None:
        """Enqueue the copies of all inputs to the device."""
        for name, host in self.inputs.items():
            (stream or self.stream).copy_in(self._buffers[name].address, host)

    def compute(self, stream: Stream | None = None) -> None:
        """Enqueue the engine's work."""
        if not self._context.execute_async_v3((stream or self.stream).handle):
            raise EngineError(f"the engine fails: {self._loaded._last_words()}", "Run with --debug for its messages.")

    def copy_out(self, stream: Stream | None = None) -> None:
        """Enqueue the copies of all outputs to the host."""
        for name, host in self.outputs.items():
            (stream or self.stream).copy_out(host, self._buffers[name].address)

    def wait(self) -> None:
        """Wait for what was enqueued on `stream`."""
        self.stream.synchronize()

    def write(self, feeds: Mapping[str, Array]) -> None:
        """Put arrays of the logical shapes and right dtypes into `inputs`.

        Raises:
            DataError: an input is missing, or has another shape or dtype.
        """
        for spec in self._loaded.inputs:
            value = feeds.get(spec.name)
            if value is None:
                raise DataError(f"input '{spec.name}' is missing", "Give every input by its name.")
            if value.shape != self.shapes[spec.name] or value.dtype != np.dtype(spec.dtype):
                raise DataError(
                    f"input '{spec.name}' is {value.dtype} {format_shape(value.shape)}, "
                    f"expected {spec.dtype} {format_shape(self.shapes[spec.name])}",
                    "Convert it before the call.",
                )
            layout = self._loaded._layout(spec.name)
            np.copyto(self.inputs[spec.name], formats.pack(value, layout))

    def read(self) -> dict[str, Array]:
        """Copies of the outputs, in their logical shapes."""
        return {
            name: np.array(formats.unpack(host, self.shapes[name], self._loaded._layout(name)))
            for name, host in self.outputs.items()
        }

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Copy in, compute, copy out, wait.

        Raises:
            DataError: as `write`.
            EngineError: the engine fails.
        """
        self.write(feeds)
        self.copy_in()
        self.compute()
        self.copy_out()
        self.wait()
        return self.read()

    def graph(self, *parts: Part) -> Graph:
        """The parts as a CUDA graph, closed with the execution; one run before it lets the engine set itself up.

        Raises:
            EngineError: the engine cannot be captured.
            RequirementError: cuda-bindings is missing.
        """

        def enqueue() -> None:
            for part in parts:
                {"copy_in": self.copy_in, "compute": self.compute, "copy_out": self.copy_out}[part]()

        enqueue()
        self.wait()
        made = Graph.capture(self._loaded.device, self.stream, enqueue)
        self._graphs.append(made)
        return made

    def time_layers(self, iterations: int) -> list[LayerTime]:
        """Median time of every layer. Profiling serialises the layers: their sum exceeds the latency.

        Args:
            iterations: measured ones; a tenth as many go before them.
        """
        profiler = _make_profiler(self._loaded._trt)
        self._context.profiler = profiler
        try:
            for index in range(iterations + max(1, iterations // 10)):
                if index == max(1, iterations // 10):
                    profiler.times.clear()
                self.compute()
                self.wait()
        finally:
            # A context keeps its profiler for ever: an empty one costs least.
            profiler.is_on = False
        return [LayerTime(name, statistics.median(times)) for name, times in profiler.times.items()]

    def close(self) -> None:
        """Give buffers back to the pools; a second call does nothing."""
        context, self._context = self._context, None
        if context is None:
            return
        with contextlib.suppress(Exception):
            self.stream.synchronize()
        for graph in self._graphs:
            graph.close()
        self._loaded.give_profile_back(self._profile)
        for buffer in (*self._buffers.values(), self._scratch):
            if buffer is not None:
                buffer.free()
        self._buffers.clear()
        self.inputs.clear()
        self.outputs.clear()
        del context

    def __enter__(self) -> Execution:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _pageable(shape: Shape, dtype: str) -> Array:
    return np.empty(shape, dtype)


def feeds_of_shape(loaded: LoadedEngine, shapes: Mapping[str, Shape], seed: int = 0) -> dict[str, Array]:
    """Random inputs: floats standard normal, bytes any, other whole numbers 0 or 1."""
    generator = np.random.default_rng(seed)
    feeds = {}
    for spec in loaded.inputs:
        shape = shapes[spec.name]
        if np.dtype(spec.dtype).kind == "f":
            feeds[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
        else:
            feeds[spec.name] = generator.integers(0, 256 if spec.dtype == "uint8" else 2, shape).astype(spec.dtype)
    return feeds


def as_engine_inputs(inputs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Feeds of the model in the dtypes that the engine takes: I/O formats ask for FP16, TensorRT 8 has no INT64.

    Raises:
        DataError: a whole number does not fit.
    """
    given = {}
    for spec in inputs:
        value = feeds[spec.name]
        cast = value.astype(spec.dtype, copy=False)
        if value.dtype.kind in "iu" and not np.array_equal(cast, value):
            raise DataError(
                f"input '{spec.name}' holds values that {spec.dtype}, which the engine takes, cannot",
                "Keep whole numbers below 2^31.",
            )
        given[spec.name] = cast
    return given


def _make_profiler(trt: Any) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        """Collects every layer's times, milliseconds."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}
            self.is_on = True

        def report_layer_time(self, name: str, milliseconds: float) -> None:
            if self.is_on:
                self.times.setdefault(name, []).append(milliseconds)

    return Profiler()


def iterate_profiles(loaded: LoadedEngine, shapes: Mapping[str, Shape]) -> Iterator[int]:
    """Every profile that admits the shapes."""
    for index, profile in enumerate(loaded.profiles):
        if all(profile[name].admits(tuple(shape)) for name, shape in shapes.items()):
            yield index
