"""What is timed: an engine's execution, an ONNX Runtime session."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuopt.backends.tensorrt.runtime import Execution, Part
from gpuopt.cuda.stream import Event

Array = npt.NDArray[Any]
ALL_PARTS: tuple[Part, ...] = ("copy_in", "compute", "copy_out")


class EngineSubject:
    """An execution of an engine, with or without its copies, with or without a CUDA graph.

    Args:
        execution: its inputs are filled.
        parts: what one inference is: `compute` alone has inputs and outputs stay on the device.
        cuda_graph: whether the parts are launched as one graph.
    """

    def __init__(self, execution: Execution, parts: Sequence[Part] = ("compute",), cuda_graph: bool = True) -> None:
        self._execution = execution
        self._calls = [getattr(execution, part) for part in parts]
        self._graph = execution.graph(*parts) if cuda_graph else None

    def enqueue(self) -> None:
        """Put one inference on the execution's stream."""
        if self._graph is not None:
            self._graph.launch(self._execution.stream)
        else:
            for call in self._calls:
                call()

    def wait(self) -> None:
        """Wait for what was enqueued."""
        self._execution.wait()

    def record(self) -> Event:
        """An event behind what was enqueued."""
        return self._execution.stream.record()

    def run(self) -> None:
        self.enqueue()
        self.wait()

    def run_many(self, count: int) -> float:
        stream = self._execution.stream
        before = stream.record()
        for _ in range(count):
            self.enqueue()
        after = stream.record()
        after.synchronize()
        return after.milliseconds_since(before) / count


class SessionSubject:
    """A session of ONNX Runtime on the CPU.

    Args:
        model: the ONNX file.
        feed: inputs by name.
    """

    def __init__(self, model: Path, feed: Mapping[str, Array]) -> None:
        from gpuopt.backends.onnxruntime import Session, optimizers_to_disable

        self._session = Session(model, disabled=optimizers_to_disable(model))
        self._feed = {name: np.ascontiguousarray(value) for name, value in feed.items()}

    def run(self) -> None:
        self._session.run(self._feed)

    def run_many(self, count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            self._session.run(self._feed)
        return (time.perf_counter() - started) / count * 1000
