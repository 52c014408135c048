"""Which nodes cost accuracy in INT8: each quantized alone, and all together.

One session a node; the time is linear in the nodes. On disk lie the samples and the FP32 outputs of
the model, in memory one sample and its activations, whatever the number of samples.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import helper, numpy_helper

from gpuopt import onnx_model
from gpuopt.backends.onnxruntime import Session
from gpuopt.comparison import Distance
from gpuopt.errors import DataError
from gpuopt.quantization import macs
from gpuopt.quantization.samples import StoredSamples
from gpuopt.quantization.variants import Variants, WeightsFile
from gpuopt.reference import Feed
from gpuopt.storage import sha256_json

SENSITIVITY_FILE = "sensitivity.json"
_VERSION = 1
_TWIN = "gpuopt.fp32."


@dataclass(frozen=True)
class Figures:
    """What INT8 does to the model's outputs.

    Attributes:
        own_sqnr_db: of the node's own output against FP32; None where it is exact or cannot be watched.
        output_sqnr_db: of the worst floating-point output of the model; None where all are exact.
        output_cosine: likewise.
        cost: error power over signal power of the model's worst output, for one that is no floating point the share of
            values that differ; outputs that ought to be zero throughout do not count. None: NaN or infinity came up.
    """

    own_sqnr_db: float | None
    output_sqnr_db: float | None
    output_cosine: float | None
    cost: float | None


@dataclass(frozen=True)
class Layer:
    """One quantized node; `rank` counts from 1 for the costliest, `position` is its place in the graph.

    `accumulated_sqnr_db` is that of its output inside the model quantized as a whole. `macs` are for one run of the
    shapes that the profile is tuned for.
    """

    rank: int
    position: int
    node: str
    op_type: str
    own_sqnr_db: float | None
    output_sqnr_db: float | None
    output_cosine: float | None
    cost: float | None
    accumulated_sqnr_db: float | None
    macs: int
    macs_share: float


@dataclass(frozen=True)
class Sensitivity:
    """The analysis of a model: its layers, costliest first, and all of them in INT8 at once."""

    samples: int
    data: str
    whole: Figures
    int8_macs_share: float
    layers: tuple[Layer, ...]

    def to_json(self) -> dict[str, Any]:
        return {"version": _VERSION, **asdict(self)}


def load(path: Path) -> Sensitivity:
    """Read what `Sensitivity.to_json` gave.

    Raises:
        DataError: it is something else.
    """
    try:
        document = json.loads(path.read_text())
        layers = tuple(Layer(**layer) for layer in document["layers"])
        whole = Figures(**document["whole"])
        return Sensitivity(document["samples"], document["data"], whole, document["int8_macs_share"], layers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no analysis: {error}", "Run it again with --no-cache.") from error


@dataclass(frozen=True)
class Measured:
    """What was measured: figures of every node alone and of the whole, and the SQNR (dB) of every node's output in
    the whole."""

    alone: Mapping[str, Figures]
    whole: Figures
    accumulated: Mapping[str, float | None]
    samples: int


def measure(
    variants: Variants,
    samples: Iterable[Feed],
    scratch: Path,
    journal: Journal,
    advance: Callable[[int, int | None], None] = lambda done, total: None,
) -> Measured:
    """Measure every node alone, then the whole.

    Args:
        samples: evaluation feeds, read once.
        scratch: a folder that is not there yet.
        journal: nodes that stand in it are not measured again, and those measured are added.
        advance: told of every node.

    Raises:
        DataError: of the samples.
        QuantizationError, BuildError: a variant cannot be made or run.
    """
    nodes, total = variants.nodes, len(variants.nodes) + 1
    stored = StoredSamples.record(variants.model, samples, scratch)
    weights = WeightsFile(variants.model, scratch / "variant")
    for done, node in enumerate(nodes):
        advance(done, total)
        if node not in journal.figures:
            model = variants.alone(node, weights)
            journal.add(node, _alone(variants.model, node, model, stored, scratch / "variant"))
    advance(total - 1, total)
    whole, accumulated = _together(variants, stored, scratch / "whole")
    advance(total, total)
    return Measured({node: journal.figures[node] for node in nodes}, whole, accumulated, len(stored))


def ranked(variants: Variants, measured: Measured, work: Mapping[str, int]) -> tuple[Layer, ...]:
    """The layers, costliest first; the graph's order decides between equals."""
    decided = {decision.node: decision.op_type for decision in variants.decisions}
    positions = {node: index for index, node in enumerate(variants.nodes)}

    def cost(node: str) -> float:
        found = measured.alone[node].cost
        return math.inf if found is None else found

    order = sorted(variants.nodes, key=lambda node: (-cost(node), positions[node]))
    return tuple(
        Layer(
            rank=rank,
            position=positions[node],
            node=node,
            op_type=decided[node],
            **asdict(measured.alone[node]),
            accumulated_sqnr_db=measured.accumulated.get(node),
            macs=work.get(node, 0),
            macs_share=macs.share(work, [node]),
        )
        for rank, node in enumerate(order, 1)
    )


class Journal:
    """Figures of the nodes that are finished, one JSON line each, on the disk before the next begins.

    A line carries a hash of what it says; one that was damaged or cut off is passed over.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.figures: dict[str, Figures] = {}
        if path is None or not path.is_file():
            return
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                if entry["sha256"] == sha256_json([entry["node"], entry["figures"]]):
                    self.figures[entry["node"]] = Figures(**entry["figures"])
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, node: str, figures: Figures) -> None:
        """Note a node's figures."""
        self.figures[node] = figures
        if self._path is None:
            return
        said = asdict(figures)
        line = json.dumps({"node": node, "figures": said, "sha256": sha256_json([node, said])})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as stream:
            # Behind a line that was cut off a new one has to begin.
            stream.write(f"\n{line}\n".encode())
            stream.flush()
            os.fsync(stream.fileno())


def _alone(
    original: onnx.ModelProto, name: str, model: onnx.ModelProto, stored: StoredSamples, folder: Path
) -> Figures:
    """One node in INT8. Its FP32 twin reads the same inputs in the same graph, so that no activation is stored."""
    node = next(n for n in original.graph.node if n.name == name)
    twin = _add_twin(model, original, node)
    outputs = [value.name for value in original.graph.output]
    session = Session(onnx_model.save(model, folder))
    own, distances = Distance(), {output: Distance() for output in outputs}
    for feed, expected in stored:
        values = session.run(feed)
        if twin:
            own.add(values[node.output[0]], values[twin])
        for output in outputs:
            distances[output].add(values[output], expected[output])
    return _figures(own.sqnr_db if twin else None, list(distances.values()))


def _add_twin(model: onnx.ModelProto, original: onnx.ModelProto, node: onnx.NodeProto) -> str:
    """Add the node as it is in FP32 to the quantized graph and watch both; its output's name, or nothing if it
    reads a tensor that the quantized graph has not kept."""
    made = {name for n in model.graph.node for name in n.output} | {value.name for value in model.graph.input}
    constants = {tensor.name: tensor for tensor in original.graph.initializer}
    reads = [name for name in node.input if name and name not in constants]
    if not set(reads) <= made or node.output[0] not in made:
        return ""
    for name in dict.fromkeys(name for name in node.input if name in constants):
        model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(constants[name]), _TWIN + name))
    twin = model.graph.node.add()
    twin.CopyFrom(node)
    twin.name = _TWIN + node.name
    for index, name in enumerate(node.input):
        twin.input[index] = _TWIN + name if name in constants else name
    for index, name in enumerate(node.output):
        twin.output[index] = _TWIN + name if name else name
    kinds = {value.name: value.type.tensor_type.elem_type for value in original.graph.value_info}
    kind = kinds.get(node.output[0]) or onnx.TensorProto.FLOAT
    watched = {value.name for value in model.graph.output}
    for name in (node.output[0], twin.output[0]):
        if name not in watched:
            model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return str(twin.output[0])


def _together(variants: Variants, stored: StoredSamples, folder: Path) -> tuple[Figures, dict[str, float | None]]:
    """All nodes in INT8 beside the FP32 graph, sample by sample: the outputs, and where error builds up."""
    made = {node.name: node.output[0] for node in variants.model.graph.node}
    int8 = variants.in_int8(variants.nodes)
    kept = {name for node in int8.graph.node for name in node.output}
    watched = {node: made[node] for node in variants.nodes if made[node] in kept}
    exact, quantized = (
        Session(onnx_model.save(onnx_model.watching(model, watched.values()), folder / name))
        for name, model in (("exact", variants.model), ("quantized", int8))
    )
    outputs = [value.name for value in variants.model.graph.output]
    distances = {name: Distance() for name in (*watched.values(), *outputs)}
    for feed, _ in stored:
        expected, values = exact.run(feed), quantized.run(feed)
        for name, distance in distances.items():
            distance.add(values[name], expected[name])
    figures = _figures(None, [distances[output] for output in outputs])
    return figures, {node: distances[name].sqnr_db for node, name in watched.items()}


def _figures(own: float | None, outputs: Sequence[Distance]) -> Figures:
    cost = max((distance.relative_error for distance in outputs if not distance.is_silent), default=0.0)
    cosines = [distance.cosine for distance in outputs if distance.cosine is not None]
    sqnrs = [distance.sqnr_db for distance in outputs if distance.sqnr_db is not None]
    return Figures(own, min(sqnrs, default=None), min(cosines, default=None), cost if math.isfinite(cost) else None)
