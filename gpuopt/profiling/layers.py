"""Layers with their times: of an engine on a GPU, of an ONNX graph in ONNX Runtime."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from gpuopt import engine_record, reference
from gpuopt.backends.tensorrt import inspector
from gpuopt.engine_record import Trust
from gpuopt.profiling.origins import modules
from gpuopt.profiling.peaks import Peak
from gpuopt.quantization import macs
from gpuopt.reference import Reference
from gpuopt.shapes import tuned_shapes

Bound = Literal["memory", "arithmetic", "latency", ""]
_FAR = 3.0
"""Where a layer takes so many times its floor, neither memory nor arithmetic bounds it: it is too small for the GPU."""


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        milliseconds: median, timed alone.
        precision: what it computes in; for ONNX Runtime the dtype of its first input.
        kernel: name of the tactic or of ONNX Runtime's operator.
        onnx_nodes, op_types: what it was fused from.
        module: path in the PyTorch model; empty where nothing tells.
        bytes_moved: inputs, outputs and weights, once each; None where not known.
        operations: two a multiply-accumulate; 0 for what has none.
        floor_milliseconds: the larger of bytes over bandwidth and operations over the precision's peak.
        bound_by: which of the two it is; `latency` where the layer is far above both; empty where not known.
    """

    name: str
    milliseconds: float
    precision: str
    kernel: str
    onnx_nodes: tuple[str, ...]
    op_types: tuple[str, ...]
    module: str
    bytes_moved: int | None = None
    operations: int = 0
    floor_milliseconds: float | None = None
    bound_by: Bound = ""


@dataclass(frozen=True)
class Profile:
    """A profiled model.

    Attributes:
        latency_ms: of the whole, unprofiled, back to back.
        layers: in order of execution.
    """

    subject: str
    where: str
    latency_ms: float
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Graph:
    """What an ONNX file tells about its nodes."""

    op_types: Mapping[str, str]
    modules: Mapping[str, str]
    operations: Mapping[str, int]

    @staticmethod
    def read(path: Path, stored: Reference, scratch: Path) -> Graph:
        """Look a graph up at the shapes that the first profile is tuned for."""
        model = onnx.load(str(path))
        counted = macs.of_reference(model, stored, scratch)
        return Graph(
            {node.name: node.op_type for node in model.graph.node},
            modules(model),
            {name: 2 * number for name, number in counted.items()},
        )


def of_engine(
    path: Path, graph: Graph | None, iterations: int, peak: Peak | None, trust: Trust | None = None
) -> Profile:
    """Time every layer of an engine at the first profile's optimum.

    Raises:
        EngineError: the engine does not belong here.
        RequirementError: pycuda, the library or the GPU is missing.
    """
    from gpuopt.backends.tensorrt.runtime import LoadedEngine, feeds_of_shape
    from gpuopt.bench.measuring import warm_up
    from gpuopt.bench.subjects import EngineSubject
    from gpuopt.cuda.device import Device

    with Device() as device, LoadedEngine.open(path, device, engine_record.read(path), trust=trust) as engine:
        shapes = tuned_shapes(engine.profiles)
        with engine.execution(shapes) as execution:
            execution.run(feeds_of_shape(engine, shapes))
            subject = EngineSubject(execution, cuda_graph=False)
            warm_up(subject)
            latency = subject.run_many(iterations)
            found = inspector.layers(engine.layer_information(execution))
            times = {time.name: time.milliseconds for time in execution.time_layers(iterations)}
        layers = tuple(_engine_layer(layer, times, graph, peak) for layer in found if not layer.is_free)
        return Profile(path.name, device.name, latency, layers)


def _engine_layer(
    layer: inspector.EngineLayer, times: Mapping[str, float], graph: Graph | None, peak: Peak | None
) -> Layer:
    # What TensorRT 8.5 gets spelled out has the name of its node in front.
    written = dict.fromkeys(
        name if graph is None or name in graph.op_types else name.rpartition("/")[0] for name in layer.onnx_nodes
    )
    nodes = tuple(name for name in written if graph is None or name in graph.op_types)
    computing = [name for name in nodes if graph and graph.op_types[name] not in ("QuantizeLinear", "DequantizeLinear")]
    operations = sum(graph.operations.get(name, 0) for name in nodes) if graph else 0
    spent = times.get(layer.name, 0.0)
    floor, bound = floor_of(layer.bytes_moved, operations, layer.precision, spent, peak)
    return Layer(
        name=layer.name,
        milliseconds=spent,
        precision="-" if not layer.computes else layer.precision,
        kernel=layer.tactic or layer.kind,
        onnx_nodes=nodes,
        op_types=tuple(dict.fromkeys(graph.op_types[name] for name in computing)) if graph else (),
        module=next((graph.modules[name] for name in nodes if name in graph.modules), "") if graph else "",
        bytes_moved=layer.bytes_moved,
        operations=operations,
        floor_milliseconds=floor,
        bound_by=bound,
    )


def floor_of(
    bytes_moved: int | None, operations: int, precision: str, milliseconds: float, peak: Peak | None
) -> tuple[float | None, Bound]:
    """The least time that a layer can take, and what bounds it (the roofline model: S. Williams, A. Waterman,
    D. Patterson, Communications of the ACM 52(4), 2009).

    Returns:
        Milliseconds, and `memory`, `arithmetic`, or `latency` where the layer takes over three times the floor.
    """
    if peak is None or bytes_moved is None or milliseconds <= 0:
        return None, ""
    memory = bytes_moved / peak.bytes_per_second * 1000
    arithmetic = operations / peak.operations_per_second.get(precision, float("inf")) * 1000
    floor = max(memory, arithmetic)
    if milliseconds > _FAR * floor:
        return floor, "latency"
    return floor, "memory" if memory >= arithmetic else "arithmetic"


def of_session(folder: Path, graph: Graph, iterations: int, scratch: Path) -> Profile:
    """Time every node of `model.onnx` in ONNX Runtime on the CPU, fused as it runs there.

    Args:
        folder: a bundle.
        scratch: an existing folder for ONNX Runtime's own profile.
    """
    import time

    import onnxruntime as ort

    from gpuopt.backends.onnxruntime import optimizers_to_disable

    path = folder / "model.onnx"
    stored = reference.load(folder / "reference")
    corner = next((c for c in stored.corners if c.name == "profile0-opt"), stored.corners[0])
    feed = stored.feed(corner)
    disabled = list(optimizers_to_disable(path))
    plain = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    plain.run(None, feed)
    started = time.perf_counter()
    for _ in range(iterations):
        plain.run(None, feed)
    latency = (time.perf_counter() - started) / iterations * 1000
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(scratch / "onnxruntime")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    for _ in range(iterations + 1):
        session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    return Profile(path.name, "the CPU", latency, _session_layers(events, graph))


def _session_layers(events: Sequence[Mapping[str, Any]], graph: Graph) -> tuple[Layer, ...]:
    times: dict[str, list[float]] = defaultdict(list)
    about: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[name].append(event["dur"] / 1000)
            about[name] = event.get("args", {})
    return tuple(_session_layer(name, spent, about[name], graph) for name, spent in times.items())


def _session_layer(name: str, times: Sequence[float], about: Mapping[str, Any], graph: Graph) -> Layer:
    shapes = about.get("input_type_shape") or [{}]
    dtype = next(iter(shapes[0]), "")
    # Fused nodes keep the name of one of theirs, with a word behind it.
    node = name if name in graph.op_types else next((n for n in graph.op_types if n and name.startswith(n)), "")
    return Layer(
        name=name,
        milliseconds=statistics.median(times[1:] or times),
        precision={"float": "fp32", "float16": "fp16"}.get(dtype, dtype or "-"),
        kernel=str(about.get("op_name", "")),
        onnx_nodes=(node,) if node else (),
        op_types=(graph.op_types[node],) if node else (),
        module=graph.modules.get(node, ""),
        operations=graph.operations.get(node, 0),
    )


def by_module(layers: Sequence[Layer]) -> list[tuple[str, float, int]]:
    """Time and number of layers by module, longest first; what has no module stands under `-`."""
    spent: dict[str, list[float]] = defaultdict(list)
    for layer in layers:
        spent[layer.module or "-"].append(layer.milliseconds)
    return sorted(((name, sum(times), len(times)) for name, times in spent.items()), key=lambda entry: -entry[1])
