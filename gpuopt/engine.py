"""Running what gpuopt compiled, from Python: `with gpuopt.load("model.gpuopt") as engine: engine.infer(feeds)`.

Needs no torch. An engine of TensorRT needs tensorrt, pycuda and the GPU it was built for; ONNX Runtime needs neither.
"""

from __future__ import annotations

import abc
import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from gpuopt import bundle, engine_record, environment, reference
from gpuopt.artifact import ONNX_FILE
from gpuopt.engine_record import EngineRecord, Trust
from gpuopt.errors import DataError, RequirementError, UsageError
from gpuopt.shapes import Profile, Shape, TensorSpec, format_shape
from gpuopt.storage import storage_errors

if TYPE_CHECKING:
    from typing_extensions import Self

    from gpuopt.backends.tensorrt.runtime import Execution
    from gpuopt.cuda.graph import Graph

Array = npt.NDArray[Any]
EngineTarget = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
_MOST_EXECUTIONS = 8


class Engine(abc.ABC):
    """A compiled model, ready to run; a context manager. One thread at a time.

    Attributes:
        target: what runs it.
        inputs, outputs: names, numpy dtypes and shapes; a dynamic dimension is a string.
        profiles: min / opt / max of every input.
    """

    target: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]

    @abc.abstractmethod
    def infer(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        """Outputs by name for inputs by name.

        Args:
            feeds: numpy arrays, or anything that numpy makes one of without a change of dtype.

        Raises:
            DataError: an input is missing or unknown, or has a wrong dtype or shape.
            UsageError: ONNX Runtime's engine is closed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Let the engine and its memory go; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def load(
    path: str | Path,
    *,
    target: EngineTarget | None = None,
    device: int = 0,
    cuda_graph: bool = False,
    plugins: Sequence[str | Path] = (),
    allow_host_code: bool = False,
    public_key: str | Path | None = None,
) -> Engine:
    """Open a bundle's folder or a serialized engine.

    Args:
        path: what `gpuopt compile` wrote, or `model.tensorrt.engine` with its record `.json` beside it.
        target: which of a bundle's engines; None: that of TensorRT, or of TensorRT-RTX, where the GPU, the library and
            pycuda are there, else ONNX Runtime. An engine that this machine refuses is an error even then: to run
            something slower in its place would go unnoticed. A file has to be an engine for it.
        device: index of the GPU, for ONNX Runtime with CUDA, too.
        cuda_graph: run each shape as a CUDA graph: less work for the CPU, the same results.
        plugins: libraries of TensorRT plugins that the engine was built with; loading them runs their code.
        allow_host_code: let a version-compatible engine run the runtime that it carries.
        public_key: of minisign, as a file or as text: the bundle, or the one that the engine lies in, has to be signed
            with it. That is checked before anything is deserialised.

    Raises:
        SignatureError: the signature is missing, damaged or of another key.
        StorageError: nothing there, or the bundle is damaged.
        EngineError: the engine was changed, or was built for another library, GPU or driver.
        RequirementError: a package or the GPU is missing.
        UsageError: the bundle has no such engine, or the file is another one.
    """
    path = Path(path)
    with storage_errors("read", path):
        path.stat()
    bundle.open_subject(path, None if public_key is None else str(public_key))
    if path.is_dir():
        present: dict[EngineTarget, Path] = {
            kind: path / name for kind, name in engine_record.ENGINE_FILES.items() if (path / name).is_file()
        }
        chosen = target or _best(present, device)
        if chosen == "onnxruntime":
            return _OnnxRuntimeEngine(path, device)
        if chosen not in present:
            raise UsageError(
                f"{path} holds no engine for {chosen}",
                f"It holds {', '.join(present) or 'no engine'}; see gpuopt build.",
            )
        path = present[chosen]
    elif target == "onnxruntime":
        raise UsageError(f"{path} is a file: ONNX Runtime runs the model of a bundle", "Name the bundle's folder.")
    record = engine_record.read(path)
    if target not in (None, record.target):
        raise UsageError(f"{path} is an engine for {record.target}, not {target}", "Leave the target out.")
    return _TensorRTEngine(path, record, device, cuda_graph, Trust([Path(name) for name in plugins], allow_host_code))


def _best(present: Mapping[EngineTarget, Path], device: int) -> EngineTarget:
    return next((kind for kind in present if not environment.why_not_run(kind, device)), "onnxruntime")


def as_arrays(feeds: Mapping[str, Any], inputs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """Feeds as contiguous numpy arrays, names and dtypes checked.

    Raises:
        DataError: an input is missing, unknown, or of another dtype.
    """
    expected = {spec.name for spec in inputs}
    if unknown := sorted(set(feeds) - expected):
        raise DataError(f"the model has no input '{unknown[0]}'", f"Its inputs: {', '.join(sorted(expected))}.")
    arrays = {}
    for spec in inputs:
        if spec.name not in feeds:
            raise DataError(f"input '{spec.name}' is missing", f"Give {', '.join(sorted(expected))}.")
        array = np.ascontiguousarray(feeds[spec.name]).reshape(np.shape(feeds[spec.name]))
        if array.dtype != np.dtype(spec.dtype):
            raise DataError(
                f"input '{spec.name}' is {array.dtype}, the model takes {spec.dtype}", "Convert it before the call."
            )
        arrays[spec.name] = array
    return arrays


class _TensorRTEngine(Engine):
    def __init__(self, path: Path, record: EngineRecord, index: int, cuda_graph: bool, trust: Trust) -> None:
        from gpuopt.backends.tensorrt.runtime import LoadedEngine
        from gpuopt.cuda.device import Device

        self._device = Device(index)
        try:
            with self._device.activate():
                self._engine = LoadedEngine.open(path, self._device, record, trust=trust)
        except BaseException:
            self._device.close()
            raise
        self._cuda_graph = cuda_graph
        self._ready: collections.OrderedDict[tuple[Shape, ...], tuple[Execution, Graph | None]] = (
            collections.OrderedDict()
        )
        self.record = record
        self.target: str = record.target
        self.inputs = self._engine.inputs
        self.outputs = self._engine.outputs
        self.profiles = self._engine.profiles

    def infer(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        arrays = as_arrays(feeds, self.inputs)
        with self._device.activate():
            execution, graph = self._execution({name: value.shape for name, value in arrays.items()})
            execution.write(arrays)
            if graph is not None:
                graph.launch(execution.stream)
            else:
                execution.copy_in()
                execution.compute()
                execution.copy_out()
            execution.wait()
            return execution.read()

    def _execution(self, shapes: Mapping[str, Shape]) -> tuple[Execution, Graph | None]:
        key = tuple(tuple(shapes[spec.name]) for spec in self.inputs)
        if key in self._ready:
            self._ready.move_to_end(key)
            return self._ready[key]
        profile = self._engine.profile_for(shapes)
        dynamic = any(bounds.dynamic_axes for bounds in self.profiles[profile].values())
        # Older TensorRT gives a profile to one context only, so that the last shape makes room for the next.
        keep = _MOST_EXECUTIONS if self._engine.shares_profiles or not dynamic else 1
        while len(self._ready) >= keep:
            _, (old, old_graph) = self._ready.popitem(last=False)
            if old_graph is not None:
                old_graph.close()
            old.close()
        execution = self._engine.execution(shapes)
        try:
            graph = execution.graph("copy_in", "compute", "copy_out") if self._cuda_graph else None
        except BaseException:
            # It would keep its profile from the next one.
            execution.close()
            raise
        self._ready[key] = execution, graph
        return execution, graph

    def close(self) -> None:
        self._device.close()
        self._ready.clear()

    def __del__(self) -> None:
        # Memory of the GPU must not go without its context, whatever the order in which Python forgets things.
        if hasattr(self, "_device"):
            self._device.close()


class _OnnxRuntimeEngine(Engine):
    def __init__(self, folder: Path, index: int) -> None:
        environment.require("onnxruntime", "running model.onnx")
        # The driver is not asked without need: a process that has is not to be forked any more.
        if index and index not in range(there := len(environment.gpus())):
            raise RequirementError(
                f"there is no GPU {index}: the driver reports {there}", "'gpuopt doctor' lists them."
            )
        from gpuopt.backends.onnxruntime import Session, execution_providers, optimizers_to_disable

        stored = reference.load(folder / "reference")
        model = folder / ONNX_FILE
        providers = [
            (name, {"device_id": index}) if name == "CUDAExecutionProvider" else name
            for name in execution_providers("auto")
        ]
        self._session: Session | None = Session(model, providers, disabled=optimizers_to_disable(model))
        self.target = "onnxruntime"
        self.inputs, self.outputs, self.profiles = stored.inputs, stored.outputs, stored.profiles

    def infer(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        arrays = as_arrays(feeds, self.inputs)
        for spec in self.inputs:
            shape = arrays[spec.name].shape
            fits = len(shape) == len(spec.shape) and all(
                not isinstance(size, int) or size == given for size, given in zip(spec.shape, shape, strict=True)
            )
            if not fits:
                raise DataError(
                    f"input '{spec.name}' has the shape {format_shape(shape)}, "
                    f"the model takes {format_shape(spec.shape)}",
                    "Change the input.",
                )
        if self._session is None:
            raise UsageError("the engine is closed", "Load it again with gpuopt.load.")
        return self._session.run(arrays)

    def close(self) -> None:
        self._session = None
