"""ONNX Runtime: open a session, run a feed."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort

from gpuopt.errors import BuildError, QuantizationError, RequirementError, one_line

ort.set_default_logger_severity(3)


class Session:
    """An ONNX model ready to run.

    Args:
        model: path of the ONNX file (external data beside it).
        providers: execution providers, first choice first; a pair has options, by ONNX Runtime's names.
        optimization: `all`; `basic` where every tensor must stay visible; `none` to run the graph as written.
        disabled: optimizers to leave out, by ONNX Runtime's names.
        lean: memory before speed: nodes run in the graph's order and every tensor is freed behind its last use.
        optimized: where to write the graph that is run; None: nowhere.

    Raises:
        BuildError: ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: Path,
        providers: Sequence[str | tuple[str, Mapping[str, Any]]] = ("CPUExecutionProvider",),
        optimization: str = "all",
        disabled: Sequence[str] = (),
        lean: bool = False,
        optimized: Path | None = None,
    ) -> None:
        options = ort.SessionOptions()
        options.enable_cpu_mem_arena = options.enable_mem_pattern = not lean
        if lean:
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.log_severity_level = 3
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            # One protobuf file holds at most 2 GiB.
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
            )
        options.graph_optimization_level = {
            "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
            "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        }[optimization]
        try:
            self._session = ort.InferenceSession(
                str(model), options, providers=list(providers), disabled_optimizers=list(disabled)
            )
        except Exception as error:  # ONNX Runtime's errors share no base class below Exception
            raise BuildError(
                f"ONNX Runtime {ort.__version__} refuses {model.name}: {one_line(error)}",
                "Run with --debug for its full message.",
            ) from error
        self.provider: str = self._session.get_providers()[0]
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def run(self, feed: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Outputs by name for one feed of numpy arrays.

        Raises:
            QuantizationError: the model fails on this feed.
        """
        names = list(outputs) if outputs is not None else list(self.output_names)
        if not names:
            # ONNX Runtime takes an empty list for "all of them".
            return {}
        try:
            values = self._session.run(names, {n: np.asarray(feed[n]) for n in self.input_names})
        except Exception as error:
            shapes = ", ".join(f"{n} {tuple(np.shape(v))}" for n, v in feed.items())
            raise QuantizationError(
                f"ONNX Runtime fails on the inputs {shapes}: {one_line(error)}",
                "Check that the shapes and value ranges are ones that the model takes.",
            ) from error
        return dict(zip(names, values, strict=True))


@dataclass(frozen=True)
class LayoutKernels:
    """Which of a graph's nodes ONNX Runtime runs in a layout of its own, as it says itself in the optimized graph.

    Attributes:
        nchwc: nodes on blocks of channels (`com.microsoft.nchwc`), the CPU's for FP32.
        nhwc: nodes with the channels last: `com.ms.internal.nhwc` (CUDA's with `prefer_nhwc`), and the CPU's of
            `com.microsoft` for INT8.
        reorders: nodes that change from one of these layouts to another: what they cost.
        nodes: all of them.
    """

    nchwc: int
    nhwc: int
    reorders: int
    nodes: int


def layout_kernels(optimized: Path) -> LayoutKernels:
    """What an optimized graph runs in; `Session` writes one."""
    nodes = onnx.load(str(optimized), load_external_data=False).graph.node
    reorders = [node for node in nodes if node.op_type.startswith("Reorder") or node.op_type == "Transpose"]
    last = [n for n in nodes if n.domain == "com.ms.internal.nhwc" or n.op_type.startswith("Nhwc") or _is_last(n)]
    blocked = [n for n in nodes if n.domain == "com.microsoft.nchwc" and not n.op_type.startswith("Reorder")]
    return LayoutKernels(len(blocked), len(last), len(reorders), len(nodes))


def _is_last(node: onnx.NodeProto) -> bool:
    """QLinearConv and the like have the layout as an attribute; so has the change back from NCHWc."""
    return not node.op_type.startswith("Reorder") and any(
        attribute.name == "channels_last" and attribute.i == 1 for attribute in node.attribute
    )


def execution_providers(choice: Literal["auto", "cpu", "cuda"]) -> tuple[str, ...]:
    """ONNX Runtime's names, first choice first; `auto` takes CUDA where onnxruntime-gpu is installed.

    ONNX Runtime falls back to the next one where the first does not start: `Session.provider` is the one at work.

    Raises:
        RequirementError: `cuda`, and the installed package has no CUDA.
    """
    with_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if choice == "cuda" and not with_cuda:
        raise RequirementError(
            f"ONNX Runtime {ort.__version__} has no CUDA execution provider",
            "Install onnxruntime-gpu in place of onnxruntime.",
        )
    if choice == "cpu" or not with_cuda:
        return ("CPUExecutionProvider",)
    with contextlib.suppress(Exception):  # What is missing is told when the session opens.
        ort.preload_dlls()
    return ("CUDAExecutionProvider", "CPUExecutionProvider")


def optimizers_to_disable(model: Path) -> tuple[str, ...]:
    """The optimizers without which ONNX Runtime opens the model, found in processes of their own.

    On some FP16 graphs ONNX Runtime 1.31 and 1.32 end with a segmentation fault in `NchwcTransformer`.

    Raises:
        BuildError: it crashes with that optimizer left out, too.
    """
    script = (
        # Without the current folder on the path: a file there could stand in for a library.
        "import sys; sys.path[:1] == [''] and sys.path.pop(0)\n"
        "import onnxruntime as ort; ort.set_default_logger_severity(4); "
        "ort.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'], disabled_optimizers=sys.argv[2:])"
    )
    code = 0
    for disabled in ((), ("NchwcTransformer",)):
        code = subprocess.run(  # noqa: S603 - our own interpreter and script, no shell
            [sys.executable, "-c", script, str(model), *disabled], capture_output=True, check=False
        ).returncode
        if code >= 0:
            return disabled
    raise BuildError(
        f"ONNX Runtime {ort.__version__} crashes while it opens {model.name} ({signal.Signals(-code).name})",
        "Try another version of onnxruntime, or --precision fp32.",
    )
