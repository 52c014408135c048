"""NHWC, bytes and I/O formats: what each costs and saves, compute alone and end to end from host memory.

    python benchmarks/layout.py prepare     # with torch: bundles, without engines
    python benchmarks/layout.py cpu         # with torch: ONNX Runtime, PyTorch on the CPU; TensorRT-RTX engines built
    python benchmarks/layout.py build       # with TensorRT and a GPU, without torch: an engine for every format
    python benchmarks/layout.py measure     # the same, alone on the GPU: engines in turn
    python benchmarks/layout.py ort         # with onnxruntime-gpu and numpy, nothing else: alone on the GPU
    python benchmarks/layout.py torch       # with torch and a GPU, alone on it
    python benchmarks/layout.py tables      # benchmarks/results/layout.json and layout.md

Without a word: cpu and tables; on a machine with an NVIDIA GPU and TensorRT prepare, build and measure, too. Everything
lies in benchmarks/.work/layout or in --folder, which may be carried from one machine to another between the steps; what
is there already is not made again. Weights are random, so that accuracy says nothing beyond the distance to PyTorch.
With the BatchNorms that a network starts from the biases of its convolutions are 0 and are left out, which helps ONNX
Runtime's CUDA provider; `resnet50-with-biases` has statistics in them, as a trained network does.

Forms of a network: `float nchw`, as PyTorch has it; `float nhwc`, with the channels last at its ends; `bytes nhwc`, the
decoder's bytes, normalised in the graph; and `bytes nchw` for TensorRT, whose format `hwc` makes the same bytes of it
without a Transpose. TensorRT's engines compute in FP16 and are named by the formats of their inputs and outputs. End to
end is from the input in host memory (page-locked for TensorRT) to the output in host memory; bytes moved are those of
inputs and outputs. All subjects of a table run in turn, round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work/layout"
RESULTS = HERE / "results"
sys.path[:0] = [str(HERE.parent), str(HERE)]

from gpu_steps import (  # noqa: E402
    LEGACY_SOURCES,
    Limit,
    gpu_name,
    gpuopt,
    has_tensorrt_8,
    legacy_flags,
    run,
    say,
    table,
    together,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INPUT = "x"
ROUNDS = 15


@dataclass(frozen=True)
class Network:
    """What is compiled: a factory without arguments, the shape of a sample, and whether its output has a layout."""

    name: str
    factory: str
    shape: tuple[int, int, int]
    batch: int
    is_dense: bool

    def size(self) -> str:
        return "x".join(map(str, (self.batch, *self.shape)))


NETWORKS = tuple(
    Network(f"{name}-b{batch}", factory, (3, side, side), batch, is_dense)
    for name, factory, side, is_dense in (
        ("resnet50", "torchvision.models:resnet50", 224, False),
        ("resnet50-with-biases", "networks:imagenet_resnet50", 224, False),
        ("unet", "unet:unet", 256, True),
    )
    for batch in (1, 32)
)
FORMS = ("float nchw", "float nhwc", "bytes nhwc", "bytes nchw")


@dataclass(frozen=True)
class Engine:
    """An engine to build: of a form, with I/O formats of the input and of a dense output."""

    name: str
    form: str
    input: str
    output: str


ENGINES = (
    Engine("fp32 linear", "float nchw", "", ""),
    Engine("fp16 linear", "float nchw", "fp16:chw", "fp16:chw"),
    Engine("fp16 hwc8", "float nchw", "fp16:hwc8", "fp16:hwc8"),
    Engine("fp16 chw32", "float nchw", "fp16:chw32", "fp16:chw32"),
    Engine("bytes, Transpose in the graph", "bytes nhwc", "", ""),
    Engine("bytes hwc", "bytes nchw", "uint8:hwc", ""),
)


@dataclass(frozen=True)
class Bench:
    """Where things lie and which networks are asked for."""

    folder: Path
    networks: tuple[Network, ...]
    engines: tuple[Engine, ...]
    jobs: int
    seconds: float
    limit: Limit
    legacy: bool

    def home(self, network: Network) -> Path:
        return self.folder / network.name

    def bundle(self, network: Network, form: str, precision: str) -> Path:
        return self.home(network) / f"{form.replace(' ', '-')}-{precision}.gpuopt"

    def engine(self, network: Network, engine: Engine) -> Path:
        return self.home(network) / f"engine-{engine.name.replace(',', '').replace(' ', '-')}.gpuopt"


# prepare ------------------------------------------------------------------------------------------------------------


def prepare(bench: Bench) -> None:
    """A bundle in FP16 for every form, with a graph for TensorRT and for ONNX Runtime's CUDA provider."""
    steps = [lambda n=n, form=form: _compile(bench, n, form, "fp16") for n in bench.networks for form in FORMS]
    together(bench.jobs, bench.limit, steps)


def _flags(network: Network, form: str) -> list[str]:
    dtype, layout = form.split()
    flags: list[str] = []
    if layout == "nhwc":
        flags += ["--input-layout", "nhwc", *(("--output-layout", "nhwc") if network.is_dense else ())]
    if dtype == "bytes":
        flags += ["--input-dtype", "uint8"]
        flags += ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))]
    return flags


def _compile(bench: Bench, network: Network, form: str, precision: str) -> None:
    folder = bench.bundle(network, form, precision)
    if folder.is_dir():
        return
    target = ("-t", "tensorrt", "--no-build", *legacy_flags(bench.legacy))
    if precision != "fp16":
        target = ("-t", "onnxruntime")
    run(
        gpuopt(
            "compile", network.factory, "-p", precision, "--input", f"{INPUT}:{network.size()}",
            *_flags(network, form), *target, "--set", "export.exporters=[torchscript]", "-o", folder,
            "--cache-dir", bench.folder / "cache-prepare", "--json",
        ),
        bench.home(network) / f"prepare-{folder.stem}.log",
    )  # fmt: skip


# what is timed ------------------------------------------------------------------------------------------------------


def in_turn(
    subjects: Mapping[str, Callable[[], object]], seconds: float, wait: Callable[[], object] = lambda: None
) -> dict[str, dict[str, float]]:
    """Milliseconds of a call: median, lowest and highest of the rounds, by name.

    Args:
        wait: for all that the calls began; once a round.
    """
    counts = {}
    for name, call in subjects.items():
        started = time.perf_counter()
        while time.perf_counter() - started < 0.5:
            call()
            wait()
        started = time.perf_counter()
        call()
        wait()
        once = max(time.perf_counter() - started, 1e-6)
        counts[name] = max(1, min(1000, int(seconds / ROUNDS / len(subjects) / once)))
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(ROUNDS):
        for name, call in subjects.items():
            # Threads of the subject before may still be spinning, and would take half of a small machine.
            call()
            wait()
            started = time.perf_counter()
            for _ in range(counts[name]):
                call()
            wait()
            taken[name].append((time.perf_counter() - started) / counts[name] * 1000)
    return {n: {"ms": statistics.median(t), "lowest": min(t), "highest": max(t)} for n, t in taken.items()}


def pixels(network: Network) -> Any:
    """A decoder's bytes, N x H x W x 3."""
    import numpy as np

    channels, *spatial = network.shape
    return np.random.default_rng(0).integers(0, 256, (network.batch, *spatial, channels)).astype(np.uint8)


def by_hand(raw: Any) -> Any:
    """What a team writes without a way in: bytes to normalised float NCHW, in numpy."""
    import numpy as np

    scaled = (raw.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def in_form(form: str, raw: Any) -> Any:
    """The bytes as a form takes them."""
    import numpy as np

    dtype, layout = form.split()
    if dtype == "bytes":
        return raw if layout == "nhwc" else np.ascontiguousarray(raw.transpose(0, 3, 1, 2))
    floats = by_hand(raw)
    return floats if layout == "nchw" else np.ascontiguousarray(floats.transpose(0, 2, 3, 1))


# cpu ----------------------------------------------------------------------------------------------------------------


def cpu(bench: Bench) -> None:
    """ONNX Runtime FP32 and PyTorch end to end, batch 1; TensorRT-RTX builds every form and format, without speed."""
    for network in bench.networks:
        told = bench.home(network) / "cpu.json"
        if network.batch == 1 and not told.is_file():
            answer = _on_cpu(bench, network)
            told.write_text(json.dumps(answer, indent=1))
    for network in bench.networks:
        told = bench.home(network) / "rtx.json"
        if network.batch == 1 and not told.is_file():
            told.write_text(json.dumps(_rtx(bench, network), indent=1))


def _on_cpu(bench: Bench, network: Network) -> dict[str, Any]:
    import numpy as np
    import torch

    from gpuopt.backends.onnxruntime import Session, layout_kernels
    from gpuopt.environment import processor

    forms = ("float nchw", "float nhwc", "bytes nhwc")
    for form in forms:
        _compile(bench, network, form, "fp32")
    raw = pixels(network)
    subjects: dict[str, Callable[[], object]] = {}
    about: dict[str, dict[str, Any]] = {}
    outputs: dict[str, Any] = {}
    for form in forms:
        folder = bench.bundle(network, form, "fp32")
        optimized = bench.home(network) / "optimized.onnx"
        session = Session(folder / "model.onnx", optimized=optimized)
        value = in_form(form, raw)
        feed = {INPUT: value}
        found = session.run(feed)
        name = f"onnxruntime, {form}"
        subjects[name] = lambda s=session, f=feed: s.run(f)
        layouts = layout_kernels(optimized)
        moved = value.nbytes + sum(array.nbytes for array in found.values())
        about[name] = {"bytes": moved, "nchwc": layouts.nchwc, "nhwc": layouts.nhwc, "reorders": layouts.reorders}
        first = next(iter(found.values()))
        outputs[form] = first if form == "float nchw" or not network.is_dense else np.moveaxis(first, -1, 1)
        for left in bench.home(network).glob("optimized.onnx*"):
            left.unlink()
    session = Session(bench.bundle(network, "float nchw", "fp32") / "model.onnx")
    subjects["onnxruntime, float nchw, from bytes by hand"] = lambda: session.run({INPUT: by_hand(raw)})
    about["onnxruntime, float nchw, from bytes by hand"] = {**about["onnxruntime, float nchw"], "bytes": None}
    torch.manual_seed(0)
    sys.path.insert(0, str(HERE / "peers"))
    module, _, factory = network.factory.partition(":")
    model = getattr(__import__(module, fromlist=[factory]), factory)().eval()
    floats = torch.from_numpy(by_hand(raw))
    for layout, kind in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
        laid = getattr(__import__(module, fromlist=[factory]), factory)().eval()
        laid.load_state_dict(model.state_dict())
        laid = laid.to(memory_format=kind)
        value = floats.contiguous(memory_format=kind)

        def call(laid: Any = laid, value: Any = value) -> Any:
            with torch.inference_mode():
                return laid(value)

        subjects[f"PyTorch eager, {layout}"] = call
        about[f"PyTorch eager, {layout}"] = {"bytes": value.numel() * 4 + call().numel() * 4}
    times = in_turn(subjects, bench.seconds * len(subjects))
    scale = float(np.abs(outputs["float nchw"]).max())
    differences = {form: float(np.abs(outputs[form] - outputs["float nchw"]).max()) / scale for form in forms}
    return {
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "rows": {name: {**times[name], **about[name]} for name in subjects},
        "largest_difference": differences,
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
    }


def _version(package: str) -> str:
    from importlib import metadata

    for name in (package, f"{package}-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _rtx(bench: Bench, network: Network) -> list[dict[str, Any]]:
    rows = []
    formats = ("", "fp32:hwc", "fp32:chw32", "fp16:chw", "fp16:hwc8", "fp16:chw32")
    wanted = [("float nchw", f) for f in formats]
    wanted += [("float nhwc", ""), ("bytes nhwc", ""), ("bytes nchw", ""), ("bytes nchw", "uint8:hwc")]
    for form, asked in wanted:
        chosen = ("--io-format", f"{INPUT}={asked}") if asked else ()
        text = run(
            gpuopt(
                "compile", network.factory, "-p", "fp16", "--input", f"{INPUT}:{network.size()}",
                *_flags(network, form), *chosen, "-t", "tensorrt-rtx", "-o", bench.home(network) / "rtx.gpuopt",
                "--cache-dir", bench.folder / "cache-prepare", "--json",
            ),
            bench.home(network) / "rtx.log",
        )  # fmt: skip
        report = json.loads(text) if text else {}
        stages = {s["name"]: s["facts"] for s in report.get("stages", [])}
        sqnr = [row["sqnr_db"] for row in (report.get("verification") or {}).get("outputs", []) if row["sqnr_db"]]
        rows.append(
            {
                "form": form, "format": asked or "linear", "status": report.get("status", "failed"),
                "engine_bytes": stages.get("build", {}).get("size_bytes"),
                "transposes": stages.get("layout", {}).get("transposes"), "lowest_sqnr_db": min(sqnr, default=None),
            }
        )  # fmt: skip
    return rows


# build, measure: TensorRT -------------------------------------------------------------------------------------------


def build(bench: Bench) -> None:
    """Every engine; a bundle is copied for each, since `gpuopt build` puts the engine into it."""
    steps = [lambda n=n, e=e: _build(bench, n, e) for n in bench.networks for e in bench.engines]
    together(bench.jobs, bench.limit, steps)


def _build(bench: Bench, network: Network, engine: Engine) -> None:
    source, folder = bench.bundle(network, engine.form, "fp16"), bench.engine(network, engine)
    if not source.is_dir() or list(folder.glob("*.engine")):
        return
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    from gpuopt import reference

    formats = {INPUT: engine.input}
    if network.is_dense:
        formats |= {spec.name: engine.output for spec in reference.load(source / "reference").outputs}
    written = json.dumps({name: text for name, text in formats.items() if text})
    sources = ("--set", f"build.tactic_sources=[{', '.join(LEGACY_SOURCES)}]") if has_tensorrt_8() else ()
    text = run(
        gpuopt(
            "build", folder, "-t", "tensorrt", "--set", f"build.io_formats={written}", *sources,
            "--set", "verify.min_cosine=0.99", "--set", "verify.min_sqnr_db=0",
            "--cache-dir", bench.folder / "cache", "--json",
        ),
        folder.with_suffix(".log"),
    )  # fmt: skip
    folder.with_suffix(".json").write_text(text)


def measure(bench: Bench) -> None:
    """Engines in turn, as CUDA graphs: compute alone, then end to end."""
    for network in bench.networks:
        told = bench.home(network) / "tensorrt.json"
        if not told.is_file() and not bench.limit.reached():
            try:
                told.write_text(json.dumps(_measure(bench, network), indent=1))
            except Exception as error:  # one figure less, and the reason for it
                say(f"{network.name} failed: {error!r}")


def _measure(bench: Bench, network: Network) -> dict[str, Any]:
    from contextlib import ExitStack

    import numpy as np

    from gpuopt import engine_record
    from gpuopt.backends.tensorrt.runtime import LoadedEngine
    from gpuopt.bench.measuring import race
    from gpuopt.bench.subjects import ALL_PARTS, EngineSubject
    from gpuopt.cuda.device import Device

    raw, rows, library = pixels(network), dict[str, dict[str, Any]](), ""
    with Device() as device, ExitStack() as stack:
        alone: dict[str, Any] = {}
        whole: dict[str, Any] = {}
        answers: dict[str, Any] = {}
        for engine in bench.engines:
            files = list(bench.engine(network, engine).glob("*.engine"))
            if not files:
                rows[engine.name] = {"failed": _why(bench.engine(network, engine).with_suffix(".json"))}
                continue
            record = engine_record.read(files[0])
            library = record.library_version
            loaded = stack.enter_context(LoadedEngine.open(files[0], device, record))
            shapes = {name: bounds.opt for name, bounds in loaded.profiles[0].items()}
            value = in_form(engine.form, raw).astype(loaded.inputs[0].dtype)
            execution = stack.enter_context(loaded.execution(shapes))
            answers[engine.name] = next(iter(execution.run({INPUT: value}).values())).astype(np.float64)
            if network.is_dense and engine.form.endswith("nhwc"):
                answers[engine.name] = np.moveaxis(answers[engine.name], -1, 1)
            alone[engine.name] = EngineSubject(execution)
            second = stack.enter_context(loaded.execution(shapes))
            second.write({INPUT: value})
            whole[engine.name] = EngineSubject(second, ALL_PARTS)
            moved = sum(array.nbytes for array in (*second.inputs.values(), *second.outputs.values()))
            rows[engine.name] = {
                "form": engine.form, "formats": dict(loaded.io_formats), "bytes": moved,
                "input_bytes": sum(array.nbytes for array in second.inputs.values()),
            }  # fmt: skip
            if engine.name == "fp32 linear":
                third = stack.enter_context(loaded.execution(shapes))
                try:
                    kernel = _KernelInFront(third, raw)
                    stack.callback(kernel.close)
                    whole["bytes, a kernel by hand, fp32 linear"] = kernel
                    rows["bytes, a kernel by hand, fp32 linear"] = {"form": "bytes nhwc", **kernel.bytes_moved()}
                except Exception as error:  # nvcc may be missing
                    rows["bytes, a kernel by hand, fp32 linear"] = {"failed": repr(error)[:200]}
        found = race(alone, seconds=bench.seconds)
        both = race(whole, seconds=bench.seconds)
        alone.clear()
        whole.clear()
        gpu = device.name
    for name, row in rows.items():
        for key, result in (("compute", found), ("end_to_end", both)):
            if name in result.milliseconds:
                times = result.rounds[name]
                row[key] = {"ms": result.milliseconds[name], "lowest": min(times), "highest": max(times)}
        if name in answers and "fp32 linear" in answers:
            wanted = answers["fp32 linear"]
            row["largest_difference"] = float(np.abs(answers[name] - wanted).max() / np.abs(wanted).max())
    prepared = in_turn({"numpy": lambda: by_hand(raw)}, 1.0)["numpy"]
    return {
        "gpu": gpu, "library": f"TensorRT {library}", "rows": rows, "by_hand_on_the_cpu": prepared,
        "compute_alone": "CUDA graphs back to back, by the GPU's events",
    }  # fmt: skip


def _why(told: Path) -> str:
    try:
        error = json.loads(told.read_text()).get("error") or {}
        return str(error.get("message", "not built"))[:300]
    except (OSError, ValueError):
        return "not built"


class _KernelInFront:
    """Bytes copied, normalised and transposed by a kernel of one's own, then an engine that takes float NCHW."""

    SOURCE = """
    __global__ void prepare(const unsigned char *bytes, float *floats, int pixels, int total) {
        const float mean[3] = {%s}, std[3] = {%s};
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < total; i += gridDim.x * blockDim.x) {
            int image = i / pixels, pixel = i %% pixels;
            for (int c = 0; c < 3; ++c)
                floats[(image * 3 + c) * pixels + pixel] = (bytes[i * 3 + c] / 255.0f - mean[c]) / std[c];
        }
    }
    """

    def __init__(self, execution: Any, raw: Any) -> None:
        import numpy as np
        import pycuda.driver as driver
        from pycuda.compiler import SourceModule

        from gpuopt.cuda.graph import Graph

        self._execution, self._driver = execution, driver
        self._raw = driver.pagelocked_empty(raw.shape, np.uint8)
        self._raw[...] = raw
        self._bytes = driver.mem_alloc(raw.nbytes)
        numbers = [", ".join(f"{value}f" for value in values) for values in (MEAN, STD)]
        self._module = SourceModule(self.SOURCE % tuple(numbers))
        self._kernel = self._module.get_function("prepare")
        self._total = int(np.prod(raw.shape[:3]))
        self._sizes = (np.int32(raw.shape[1] * raw.shape[2]), np.int32(self._total))
        self._target = np.intp(execution._buffers[INPUT].address)
        self._put_on_the_stream()
        execution.wait()
        # A graph, as all others of its table are.
        self._graph = Graph.capture(execution._loaded.device, execution.stream, self._put_on_the_stream)

    def bytes_moved(self) -> dict[str, int]:
        outputs = sum(array.nbytes for array in self._execution.outputs.values())
        return {"bytes": self._raw.nbytes + outputs, "input_bytes": self._raw.nbytes}

    def close(self) -> None:
        """Give memory back while there is a context to give it back to."""
        self._graph.close()
        self._bytes.free()
        self._kernel = self._module = self._raw = None

    def enqueue(self) -> None:
        self._graph.launch(self._execution.stream)

    def _put_on_the_stream(self) -> None:
        stream = self._execution.stream
        self._driver.memcpy_htod_async(self._bytes, self._raw, stream._stream)
        blocks = (min(4096, -(-self._total // 256)), 1)
        self._kernel(self._bytes, self._target, *self._sizes, block=(256, 1, 1), grid=blocks, stream=stream._stream)
        self._execution.compute()
        self._execution.copy_out()

    def run(self) -> None:
        self.enqueue()
        self._execution.wait()

    def run_many(self, count: int) -> float:
        stream = self._execution.stream
        before = stream.record()
        for _ in range(count):
            self.enqueue()
        after = stream.record()
        after.synchronize()
        return float(after.milliseconds_since(before) / count)


# ort: ONNX Runtime's CUDA provider, with onnxruntime and numpy alone --------------------------------------------------


def ort(bench: Bench) -> None:
    """FP16, NCHW against `prefer_nhwc`, with CUDA graphs; compute alone and end to end from host memory."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        say(f"onnxruntime {onnxruntime.__version__} has no CUDA execution provider: install onnxruntime-gpu")
        return
    _one_process_each("ort", _ort_of, bench)


def _one_process_each(step: str, measure_one: Callable[[Bench, Network], dict[str, Any]], bench: Bench) -> None:
    """Each network in a process of its own: a library that ends it takes one network along, and none sees the last."""
    for network in bench.networks:
        told = bench.home(network) / f"{step}.json"
        if told.is_file() or bench.limit.reached():
            continue
        if len(bench.networks) > 1:
            asked = ("--folder", bench.folder, "--network", network.name, "--seconds", str(bench.seconds))
            run([sys.executable, Path(__file__), step, *asked], told.with_suffix(".log"))
            continue
        found = measure_one(bench, network)
        if any("compute" in row for row in found["rows"].values()):
            told.parent.mkdir(parents=True, exist_ok=True)
            told.write_text(json.dumps(found, indent=1))
            say(f"{network.name}/{step} done")
        else:
            say(f"{network.name}/{step}: nothing was measured: {found['rows']}")


def _timed(
    rows: dict[str, dict[str, Any]], key: str, subjects: Mapping[str, Callable[[], object]], seconds: float,
    wait: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Add the times of the subjects to their rows; one that fails is left out of the turns."""
    able = {}
    for name, call in subjects.items():
        try:
            call()
            wait()
            able[name] = call
        except Exception as error:  # one figure less, and the reason for it
            rows[name]["failed"] = repr(error)[:300]
    for name, times in in_turn(able, seconds, wait).items():
        rows[name][key] = times


def _ort_of(bench: Bench, network: Network) -> dict[str, Any]:
    import numpy as np
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    onnxruntime.preload_dlls()
    raw, rows = pixels(network), dict[str, dict[str, Any]]()
    alone: dict[str, Callable[[], object]] = {}
    whole: dict[str, Callable[[], object]] = {}
    answers: dict[str, Any] = {}
    for form in ("float nchw", "float nhwc", "bytes nhwc"):
        model = bench.bundle(network, form, "fp16") / "model.onnx"
        for nhwc in (False, True):
            plain: _OrtSubject | None = None
            for graph in (False, True):
                name = f"{form}, {'NHWC' if nhwc else 'NCHW'} kernels{', CUDA graph' if graph else ''}"
                try:
                    if graph and plain is None:
                        raise RuntimeError("it does not run without a graph")
                    one = _OrtSubject(model, in_form(form, raw), nhwc, plain)
                    plain = plain or one
                    answers[name] = one.answer().astype(np.float64)
                except Exception as error:  # one figure less, and the reason for it
                    rows[name] = {"failed": repr(error)[:300]}
                    continue
                if network.is_dense and form.endswith("nhwc"):
                    answers[name] = np.moveaxis(answers[name], -1, 1)
                alone[name], whole[name] = one.compute, one.end_to_end
                rows[name] = {"bytes": one.bytes, "input_bytes": one.input_bytes, "nhwc_nodes": one.nhwc_nodes}
    _timed(rows, "compute", alone, bench.seconds * 2)
    _timed(rows, "end_to_end", whole, bench.seconds * 2)
    wanted = answers.get("float nchw, NCHW kernels")
    if wanted is not None:
        for name, found in answers.items():
            rows[name]["largest_difference"] = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    return {
        "gpu": gpu_name(), "library": f"onnxruntime {onnxruntime.__version__}", "rows": rows,
        "compute_alone": "back to back; ONNX Runtime waits at the end of each call",
    }  # fmt: skip


class _OrtSubject:
    """A session with its input and outputs on the GPU.

    Args:
        plain: the same without a CUDA graph; with it, this one has a graph. The first run of a session with a graph is
            the one that is captured, with the addresses it has, so that it cannot be asked for its outputs' shapes.
    """

    def __init__(self, model: Path, value: Any, nhwc: bool, plain: _OrtSubject | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        provider = {
            "prefer_nhwc": "1" if nhwc else "0",
            # Not for NCHW: with onnxruntime 1.31 and FP16 no such kernel starts.
            "fuse_conv_bias": "1" if nhwc else "0",
            "enable_cuda_graph": "0" if plain is None else "1",
            "cudnn_conv_algo_search": "EXHAUSTIVE",
        }
        providers = [("CUDAExecutionProvider", provider)]
        self._session = onnxruntime.InferenceSession(str(model), options, providers=providers)
        if self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError("the CUDA execution provider does not start")
        self._value = value
        self._binding = self._session.io_binding()
        name = self._session.get_inputs()[0].name
        self._input = onnxruntime.OrtValue.ortvalue_from_numpy(value, "cuda", 0)
        self._binding.bind_ortvalue_input(name, self._input)
        # A CUDA graph is of the same nodes.
        self.nhwc_nodes = _nhwc_nodes(model, providers) if plain is None else plain.nhwc_nodes
        found = self._session.run(None, {name: value}) if plain is None else plain.end_to_end()
        self._outputs = []
        for output, array in zip(self._session.get_outputs(), found, strict=True):
            made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype, "cuda", 0)
            self._binding.bind_ortvalue_output(output.name, made)
            self._outputs.append(made)
        self.input_bytes = value.nbytes
        self.bytes = value.nbytes + sum(array.nbytes for array in found)
        for _ in range(3):
            self.compute()

    def compute(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def end_to_end(self) -> Any:
        self._input.update_inplace(self._value)
        self.compute()
        return [output.numpy() for output in self._outputs]

    def answer(self) -> Any:
        return self.end_to_end()[0]


def _nhwc_nodes(model: Path, providers: Any) -> int | None:
    """Nodes in ONNX Runtime's own NHWC domain; None where the optimized graph cannot be written."""
    import tempfile

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        try:
            onnxruntime.InferenceSession(str(model), options, providers=providers)
            content = Path(options.optimized_model_filepath).read_bytes()
        except Exception as error:  # not every graph can be written
            say(f"{model.parent.name}: its optimized graph cannot be looked into: {error!r}"[:200])
            return None
    return nodes_of_domain(content, "com.ms.internal.nhwc")


def nodes_of_domain(content: bytes, domain: str) -> int:
    """Nodes of a serialized graph in a domain, without onnx: NodeProto has it as field 7, a string (tag 0x3a)."""
    return content.count(b"\x3a" + bytes([len(domain)]) + domain.encode())


# torch: PyTorch on a GPU --------------------------------------------------------------------------------------------


def torch_step(bench: Bench) -> None:
    """PyTorch in FP16 on the GPU, NCHW and channels last, compute alone, eager and as a CUDA graph of torch.compile."""
    import torch

    if not torch.cuda.is_available():
        say("torch finds no NVIDIA GPU")
        return
    _one_process_each("torch", _torch_of, bench)


def _torch_of(bench: Bench, network: Network) -> dict[str, Any]:
    import torch

    sys.path.insert(0, str(HERE / "peers"))
    module, _, factory = network.factory.partition(":")
    floats = torch.from_numpy(by_hand(pixels(network))).cuda().half()
    subjects: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for layout, kind in (("NCHW", torch.contiguous_format), ("channels last", torch.channels_last)):
        model = getattr(__import__(module, fromlist=[factory]), factory)().eval().cuda().half()
        model = model.to(memory_format=kind)
        value = floats.contiguous(memory_format=kind)
        for mode in ("eager", "torch.compile"):
            # Not dynamic: the strides of the other layout would make this one's free, with another layout inside.
            compiled = mode == "torch.compile"
            ready = torch.compile(model, mode="reduce-overhead", dynamic=False) if compiled else model

            def call(ready: Any = ready, value: Any = value) -> None:
                with torch.inference_mode():
                    ready(value)

            name = f"PyTorch {mode}, {layout}"
            rows[name] = {}
            try:
                for _ in range(5):
                    call()
                torch.cuda.synchronize()
            except Exception as error:  # one figure less, and the reason for it
                rows[name] = {"failed": repr(error)[:300]}
                continue
            subjects[name] = call
    _timed(rows, "compute", subjects, bench.seconds * 2, torch.cuda.synchronize)
    return {
        "gpu": torch.cuda.get_device_name(), "library": f"torch {torch.__version__}", "rows": rows,
        "compute_alone": "back to back, one wait for all",
    }  # fmt: skip


# tables -------------------------------------------------------------------------------------------------------------

KINDS = ("cpu", "rtx", "tensorrt", "ort", "torch")


def tables(bench: Bench) -> None:
    """Write the results and their tables; what an earlier run measured and this folder lacks is kept."""
    path = RESULTS / "layout.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for network in bench.networks:
        for kind in KINDS:
            told = bench.home(network) / f"{kind}.json"
            if told.is_file():
                found.setdefault(network.name, {})[kind] = json.loads(told.read_text())
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "layout.md").write_text(render(found))


def render(found: Mapping[str, Any]) -> str:
    """The tables, of what was measured; a pure function of the results."""
    parts = [
        "# Layout, bytes and I/O formats\n\nWritten by `python benchmarks/layout.py`, whose first lines say what is "
        "measured and how. Times are medians of 15 rounds, in brackets the lowest and highest."
    ]
    for name, kinds in found.items():
        if "cpu" in kinds:
            parts += [f"## {name}, on the CPU, end to end", _cpu_table(kinds["cpu"])]
        if "rtx" in kinds:
            parts += [f"## {name}, engines that TensorRT-RTX builds (FP16)", _rtx_table(kinds["rtx"])]
        for kind, title in (("tensorrt", "TensorRT"), ("ort", "ONNX Runtime CUDA, FP16"), ("torch", "PyTorch, FP16")):
            if kind in kinds:
                parts += [f"## {name}, {title}", _gpu_table(kinds[kind])]
    return "\n\n".join(parts) + "\n"


def _time(entry: Mapping[str, float] | None) -> str:
    return f"{entry['ms']:.3f} ({entry['lowest']:.3f} to {entry['highest']:.3f})" if entry else ""


def _mib(size: int | None) -> str:
    return f"{size / 2**20:.2f}" if size else ""


def _difference(value: float | None) -> str:
    return "" if value is None else "none" if value == 0 else f"{value:.1e}"


_LAYOUTS = {"nchwc": "NCHWc", "nhwc": "NHWC", "reorders": "changes of layout"}


def _cpu_table(found: Mapping[str, Any]) -> str:
    rows = []
    for name, row in found["rows"].items():
        layouts = ", ".join(f"{row[key]} {word}" for key, word in _LAYOUTS.items() if key in row)
        rows.append((name, _time(row), _mib(row["bytes"]), layouts))
    told = ", ".join(f"{form} {_difference(value)}" for form, value in found["largest_difference"].items())
    about = f"{found['machine']}; onnxruntime {found['onnxruntime']}, torch {found['torch']}, FP32, batch 1. "
    about += f"Largest difference to float nchw, of the largest output: {told}."
    return table(("what", "ms", "MiB in and out", "nodes in ONNX Runtime's own layouts"), rows) + "\n\n" + about


def _rtx_table(found: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in found:
        moved = row["transposes"] or {}
        told = f"{moved['inserted']} inserted, {moved['left']} left" if moved else ""
        sqnr = f"{row['lowest_sqnr_db']:.1f}" if row["lowest_sqnr_db"] else ""
        state = "built" if row["status"] == "passed" else row["status"]
        rows.append((row["form"], row["format"], state, _mib(row["engine_bytes"]), told, sqnr))
    return table(("form", "input's format", "engine", "MiB", "Transposes", "SQNR of the graph, dB"), rows)


def _gpu_table(found: Mapping[str, Any]) -> str:
    rows = []
    for name, row in found["rows"].items():
        if "failed" in row:
            rows.append((name, f"failed: {row['failed']}", "", "", "", ""))
            continue
        nodes = f", {row['nhwc_nodes']} NHWC nodes" if row.get("nhwc_nodes") else ""
        rows.append(
            (
                name + nodes, _time(row.get("compute")), _time(row.get("end_to_end")), _mib(row.get("input_bytes")),
                _mib(row.get("bytes")), _difference(row.get("largest_difference")),
            )
        )  # fmt: skip
    head = ("what", "compute alone, ms", "end to end, ms", "MiB in", "MiB in and out", "largest difference")
    about = f"{found.get('gpu', '')} {found['library']}.".strip()
    if "compute_alone" in found:
        about += f" Compute alone: {found['compute_alone']}."
    if "by_hand_on_the_cpu" in found:
        about += f" Bytes to floats by hand in numpy, on the CPU: {_time(found['by_hand_on_the_cpu'])} ms."
    return table(head, rows) + "\n\n" + about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help="prepare, cpu, build, measure, ort, torch, tables")
    parser.add_argument("--folder", type=Path, default=WORK)
    names, engines = [network.name for network in NETWORKS], [engine.name for engine in ENGINES]
    parser.add_argument("--network", action="append", choices=names, help="repeatable, in this order; default: all")
    parser.add_argument("--begin-within", type=float, metavar="SECONDS", help="no new build or measurement after that")
    parser.add_argument("--legacy", action="store_true", help="prepare for TensorRT 8.5 or 8.6")
    parser.add_argument("--engine", action="append", choices=engines, help="repeatable; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="models prepared, engines built at a time")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each race")
    options = parser.parse_args()
    by_name = {network.name: network for network in NETWORKS}
    bench = Bench(
        options.folder.resolve(),
        tuple(by_name[name] for name in options.network or names),
        tuple(engine for engine in ENGINES if engine.name in (options.engine or engines)),
        options.jobs,
        options.seconds,
        Limit(options.begin_within),
        options.legacy,
    )
    steps: dict[str, Callable[[Bench], object]] = {
        "prepare": prepare, "cpu": cpu, "build": build, "measure": measure, "ort": ort, "torch": torch_step,
        "tables": tables,
    }  # fmt: skip
    asked = options.steps
    if not asked:
        from gpuopt import environment

        reason = environment.why_not_run("tensorrt")
        if reason:
            say(f"layout.py: nothing is measured on a GPU: {reason}")
        asked = ["cpu", "tables"] if reason else ["prepare", "cpu", "build", "measure", "tables"]
    for name in asked:
        if name not in steps:
            parser.error(f"there is no step '{name}'")
        steps[name](bench)


if __name__ == "__main__":
    main()
