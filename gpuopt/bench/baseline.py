"""One baseline, in the process that measures it: a JSON request on stdin, a JSON answer on the last line of stdout."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpuopt.artifact import ONNX_FILE
from gpuopt.bench.measuring import Settings, measure
from gpuopt.bench.report import Row, row
from gpuopt.errors import GpuoptError, described

_WHOLE_CALL = "a whole call: inputs and outputs in host memory"
_ON_GPU = "compute alone, inputs and outputs stay on the GPU"
_ORT_ON_GPU = f"{_ON_GPU}; ONNX Runtime waits at the end of each call"


class _RefusedError(Exception):
    """Why this baseline cannot be measured."""


class _Calls:
    """A function that is called, and one that waits for all calls."""

    def __init__(self, call: Callable[[], Any], wait: Callable[[], Any] = lambda: None) -> None:
        self._call = call
        self._wait = wait

    def run(self) -> None:
        self._call()
        self._wait()

    def run_many(self, count: int) -> float:
        self._wait()
        started = time.perf_counter()
        for _ in range(count):
            self._call()
        self._wait()
        return (time.perf_counter() - started) / count * 1000


def main() -> None:
    """Answer the request on stdin."""
    request = json.load(sys.stdin)
    try:
        found = _measure(request)
        answer: dict[str, Any] = {"rows": [r.model_dump(exclude={"group", "batch"}) for r in found]}
    except _RefusedError as error:
        answer = {"failed": str(error)}
    except GpuoptError as error:
        answer = {"failed": error.message}
    except Exception as error:
        answer = {"failed": described(error)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def _measure(request: Mapping[str, Any]) -> list[Row]:
    kind, folder = request["kind"], Path(request["folder"])
    shapes = {name: tuple(shape) for name, shape in request["shapes"].items()}
    batch = int(request["batch"])
    settings = Settings(seconds=request["seconds"], warm_up_seconds=max(2.0, request["seconds"]))
    if kind.startswith("onnxruntime"):
        return _onnxruntime(kind, folder, shapes, settings, batch)
    return _torch(kind, folder, shapes, settings, batch)


def _inputs(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    from gpuopt import reference

    generator = np.random.default_rng(0)
    feed = {}
    for spec in reference.load(folder / "reference").inputs:
        shape, dtype = shapes[spec.name], np.dtype(spec.dtype)
        values = generator.integers(0, 256 if dtype == np.uint8 else 2, shape)
        feed[spec.name] = (generator.standard_normal(shape) if dtype.kind == "f" else values).astype(dtype)
    return feed


def _onnxruntime(
    kind: str, folder: Path, shapes: Mapping[str, tuple[int, ...]], settings: Settings, batch: int
) -> list[Row]:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise _RefusedError(f"onnxruntime is not installed: {error}") from error
    ort.set_default_logger_severity(4)
    from gpuopt.backends.onnxruntime import layout_kernels, optimizers_to_disable

    feed, model = _inputs(folder, shapes), folder / ONNX_FILE
    if kind == "onnxruntime cpu":
        options = ort.SessionOptions()
        options.log_severity_level = 4
        with tempfile.TemporaryDirectory(prefix="gpuopt-bench-") as scratch:
            options.optimized_model_filepath = str(Path(scratch) / ONNX_FILE)
            session = ort.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"],
                disabled_optimizers=list(optimizers_to_disable(model)),
            )  # fmt: skip
            layouts = layout_kernels(Path(scratch) / ONNX_FILE)
        found = measure(_Calls(lambda: session.run(None, feed)), settings)
        includes = f"{_WHOLE_CALL}; {layouts.nchwc} nodes NCHWc, {layouts.nhwc} NHWC"
        return [row("", f"{kind} {ort.__version__}", batch, includes, found)]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise _RefusedError(f"onnxruntime {ort.__version__} has no CUDA execution provider: install onnxruntime-gpu")
    ort.preload_dlls()
    with tempfile.TemporaryDirectory(prefix="gpuopt-bench-") as scratch:
        if " fp16 " in kind:
            model = _cast(folder, Path(scratch))
        return _onnxruntime_cuda(kind, model, feed, settings, batch)


def _cast(folder: Path, scratch: Path) -> Path:
    """The bundle's FP32 graph in FP16, inputs and outputs left as they are."""
    import onnx
    from onnxruntime.transformers import float16

    from gpuopt import onnx_model
    from gpuopt.recipe import load, resolve

    precision = resolve(load(folder / "recipe.yaml")).precision
    if precision != "fp32":
        raise _RefusedError(f"model.onnx is of an {precision.upper()} bundle: FP16 is made of FP32 alone")
    model = onnx_model.load(folder)
    cast = float16.convert_float_to_float16(model, keep_io_types=True)
    onnx.save(onnx_model.sort_topologically(cast), str(scratch / ONNX_FILE))
    return scratch / ONNX_FILE


def _onnxruntime_cuda(kind: str, model: Path, feed: Mapping[str, Any], settings: Settings, batch: int) -> list[Row]:
    # NCHW is not asked for fused biases: with onnxruntime 1.31 and FP16 no such kernel starts there.
    fusing = (True, False) if kind.endswith("nhwc") else (False,)
    rows = []
    outputs: dict[str, Any] = {}
    for graph in (False, True):
        for fused in fusing:
            made = _on_cuda(kind, model, feed, settings, batch, outputs, graph=graph, fused=fused)
            if not made.failed:
                break
        rows.append(made)
    return rows


def _on_cuda(
    kind: str, model: Path, feed: Mapping[str, Any], settings: Settings, batch: int, outputs: dict[str, Any], *,
    graph: bool, fused: bool,
) -> Row:  # fmt: skip
    """A session's row; `outputs` is filled by one without a graph, and one with a graph needs them."""
    import onnxruntime as ort

    nhwc = kind.endswith("nhwc")
    apart = ", biases apart" if nhwc and not fused else ""
    name = f"{kind} {ort.__version__}{apart}{', CUDA graph' if graph else ''}"
    options = {
        "prefer_nhwc": "1" if nhwc else "0",
        "fuse_conv_bias": "1" if fused else "0",
        "enable_cuda_graph": "1" if graph else "0",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
    }
    try:
        session = ort.InferenceSession(str(model), providers=[("CUDAExecutionProvider", options)])
        if session.get_providers()[0] != "CUDAExecutionProvider":
            raise _RefusedError("ONNX Runtime's CUDA execution provider does not start: no GPU, or no CUDA and cuDNN")
        if not graph:
            # Not of the session with a graph: its first run is the one that is captured, with the addresses it has.
            outputs |= {o.name: v for o, v in zip(session.get_outputs(), session.run(None, feed), strict=True)}
        binding = session.io_binding()
        for key, value in feed.items():
            binding.bind_ortvalue_input(key, ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0))
        for key, value in outputs.items():
            on_gpu = ort.OrtValue.ortvalue_from_shape_and_type(list(value.shape), value.dtype, "cuda", 0)
            binding.bind_ortvalue_output(key, on_gpu)
        found = measure(_Calls(functools.partial(session.run_with_iobinding, binding)), settings)
    except _RefusedError:
        raise
    except Exception as error:
        return Row(group="", name=name, batch=batch, includes="", failed=described(error))
    return row("", name, batch, _ORT_ON_GPU, found)


def _torch(kind: str, folder: Path, shapes: Mapping[str, tuple[int, ...]], settings: Settings, batch: int) -> list[Row]:
    from gpuopt.deployed_form import form_of_input
    from gpuopt.model_file import ModelKind, detect
    from gpuopt.recipe import load, resolve

    try:
        import torch
    except ImportError as error:
        raise _RefusedError(f"torch is not installed: {error}") from error
    recipe = resolve(load(folder / "recipe.yaml"))
    model_kind = detect(Path(recipe.model.path)) if recipe.model.path else ModelKind.FACTORY
    if model_kind is ModelKind.ONNX:
        raise _RefusedError("the model was compiled from ONNX: there is no PyTorch model")
    gpu = torch.cuda.is_available()
    if not gpu and not kind.removesuffix(", nchw") == "torch eager":
        raise _RefusedError("torch finds no NVIDIA GPU")
    from gpuopt import torch_model

    torch.manual_seed(recipe.export.seed)
    loaded = torch_model.load(recipe.model, model_kind)
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.float16 if gpu and recipe.precision in ("fp16", "int8") else torch.float32
    module = loaded.module
    if not isinstance(module, torch.nn.Module):
        raise _RefusedError("an exported program is not moved to another device")
    module = module.to(device)
    tensors = {}
    in_order = kind.endswith(", nchw")
    for name, value in _inputs(folder, shapes).items():
        # PyTorch's model has the original form.
        original = form_of_input(recipe.layout, name).original(value)
        tensor = torch.from_numpy(original).to(device)
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
            if tensor.ndim == 4 and not in_order:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
        tensors[name] = tensor
    if dtype is torch.float16:
        module = module.half()
    has_images = any(tensor.ndim == 4 for tensor in tensors.values())
    if in_order and not has_images:
        raise _RefusedError("no input has four dimensions: there is one layout")
    if has_images and not in_order:
        module = module.to(memory_format=torch.channels_last)
    loaded.module = module
    layout = ", nchw" if in_order else ", channels_last" if has_images else ""
    kind = kind.removesuffix(", nchw")
    what = f"{str(dtype).removeprefix('torch.')}{layout}"
    run: Callable[[], Any] = lambda: loaded.forward(tensors)  # noqa: E731
    if kind == "torch.compile":
        loaded.module = torch.compile(module, mode="reduce-overhead")
    elif kind == "torch eager, CUDA stream":
        stream = torch.cuda.Stream()

        def on_stream() -> Any:
            with torch.cuda.stream(stream):
                return loaded.forward(tensors)

        run = on_stream
    wait = torch.cuda.synchronize if gpu else (lambda: None)
    includes = _ON_GPU if gpu else _WHOLE_CALL
    with torch.inference_mode():
        for _ in range(5):
            run()
        found = measure(_Calls(run, wait), settings)
    mode = ' mode="reduce-overhead"' if kind == "torch.compile" else ""
    return [row("", f"{kind} {torch.__version__}{mode}, {what}", batch, includes, found)]


if __name__ == "__main__":
    main()
