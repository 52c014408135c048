"""CUDA graphs: what a stream was asked to do once, launched again as one. pycuda has no calls for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from gpuopt.cuda.device import Device
from gpuopt.cuda.stream import Stream
from gpuopt.environment import install_hint
from gpuopt.errors import EngineError, RequirementError, one_line


class Graph:
    """An instantiated graph; the buffers that its work reads and writes must stay where they are."""

    def __init__(self, driver: Any, executable: Any) -> None:
        self._driver = driver
        self._executable = executable

    @staticmethod
    def capture(device: Device, stream: Stream, enqueue: Callable[[], None]) -> Graph:
        """Record what `enqueue` puts on the stream, which it must not wait for.

        Raises:
            RequirementError: cuda-bindings is missing.
            EngineError: the work cannot be captured.
        """
        driver = _driver()
        handle = driver.CUstream(stream.handle)
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        _checked(driver, driver.cuStreamBeginCapture(handle, relaxed))
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(EngineError):
                _checked(driver, driver.cuStreamEndCapture(handle))
            raise
        graph = _checked(driver, driver.cuStreamEndCapture(handle))
        try:
            made = Graph(driver, _checked(driver, driver.cuGraphInstantiate(graph, 0)))
        finally:
            driver.cuGraphDestroy(graph)
        device.own(made)
        return made

    def launch(self, stream: Stream) -> None:
        """Enqueue all of it."""
        (code,) = self._driver.cuGraphLaunch(self._executable, stream.handle)
        if code:
            raise EngineError(f"the CUDA graph cannot be launched: {code.name}", "Run without CUDA graphs.")

    def close(self) -> None:
        """Let the graph go; a second call does nothing."""
        executable, self._executable = self._executable, None
        if executable is not None:
            self._driver.cuGraphExecDestroy(executable)


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise RequirementError(
            f"CUDA graphs need cuda-bindings: {one_line(error)}", f"Install it: {install_hint('cuda.bindings')}."
        ) from error
    return driver


def _checked(driver: Any, answer: tuple[Any, ...]) -> Any:
    code, *values = answer
    if code != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(
            f"the work cannot be captured in a CUDA graph: {code.name}",
            "Run it without: cuda_graph=False.",
        )
    return values[0] if values else None
