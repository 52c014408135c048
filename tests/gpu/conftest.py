"""These tests need an NVIDIA GPU; elsewhere they are skipped, with the reason."""

from __future__ import annotations

import functools

import pytest


@functools.cache
def why_no_cuda_provider() -> str:
    """Why ONNX Runtime cannot work on the GPU here; empty if it can."""
    import numpy as np
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    from gpuopt.backends.onnxruntime import execution_providers

    providers = execution_providers("auto")
    if providers[0] != "CUDAExecutionProvider":
        return f"onnxruntime {ort.__version__} has no CUDA execution provider"
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=list(providers))
    session.run(None, {"x": np.zeros(1, np.float32)})
    return "" if session.get_providers()[0] == providers[0] else "the CUDA execution provider does not start"


@functools.cache
def why_no_tensorrt() -> str:
    """Why TensorRT cannot build and run engines here; empty if it can."""
    from gpuopt import environment

    return environment.why_not_run("tensorrt")


@pytest.fixture
def tactic_sources() -> tuple[str, ...]:
    """Those that need no cuBLAS and cuDNN, with TensorRT 8; skips where TensorRT cannot run engines."""
    if reason := why_no_tensorrt():
        pytest.skip(reason)
    from gpuopt import environment

    version = environment.tensorrt_version()
    return ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS") if version is not None and version[0] == 8 else ()


@pytest.fixture
def cuda_provider() -> str:
    """ONNX Runtime's CUDA execution provider, by name."""
    if reason := why_no_cuda_provider():
        pytest.skip(reason)
    return "CUDAExecutionProvider"
