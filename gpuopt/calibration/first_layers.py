"""The Conv that reads an input, and the statistics that the BatchNorm behind it saw in training.

A BatchNorm's running mean and variance say how the Conv's outputs were distributed over the training
data: the one trace that a trained model keeps of how its inputs were scaled. Exporters and simplifiers
fold BatchNorm into the Conv, so the export stage stores both with the reference, before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from gpuopt import onnx_model
from gpuopt.errors import StorageError
from gpuopt.reference import save_arrays

FILE = "first_layers.npz"

_Array = npt.NDArray[Any]
_FIELDS = ("weight", "bias", "strides", "pads", "dilations", "mean", "variance", "norm")


@dataclass(frozen=True)
class Norm:
    """What a BatchNorm keeps of its training; both arrays have the Conv's output channels.

    Attributes:
        name: of the layer; empty where it is not known.
        mean, variance: the running statistics of its input.
    """

    name: str
    mean: _Array
    variance: _Array

    @property
    def is_trained(self) -> bool:
        """Whether the statistics are others than those that every BatchNorm starts with."""
        return bool(np.any(self.mean != 0) or np.any(self.variance != 1))


@dataclass(frozen=True)
class FirstConv:
    """A Conv that reads an input directly.

    Attributes:
        input: the model's input, N x C x spatial axes.
        weight: output channels x (C / groups) x kernel.
        bias: output channels.
        strides, pads, dilations: one a spatial axis; of the pads those at the beginning.
        norm: of the BatchNorm that reads its output directly; None if there is none.
    """

    input: str
    weight: _Array
    bias: _Array
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    norm: Norm | None = None

    def outputs_at(self, values: _Array, count: int, seed: int) -> _Array | None:
        """The Conv's outputs at `count` pseudo-random places, the padding's zeros included.

        Args:
            values: float, N x C x spatial axes.
            count: number of places, drawn with replacement.
            seed: equal seeds choose equal places.

        Returns:
            float64, count x output channels; None if `values` does not fit the weight.
        """
        kernel = self.weight.shape[2:]
        groups = values.shape[1] // self.weight.shape[1] if values.ndim > 1 else 0
        if values.ndim != self.weight.ndim or not groups or self.weight.shape[0] % groups:
            return None
        generator = np.random.default_rng(seed)
        batch = generator.integers(0, values.shape[0], count)
        index: list[_Array] = [batch.reshape(-1, *[1] * len(kernel))]
        inside = np.ones((count, *kernel), bool)
        for axis, size in enumerate(values.shape[2:]):
            # As many outputs as with equal padding on both sides, which is what nearly all Convs have.
            reach = (kernel[axis] - 1) * self.dilations[axis] + 1
            outputs = (size + 2 * self.pads[axis] - reach) // self.strides[axis] + 1
            if outputs < 1:
                return None
            starts = generator.integers(0, outputs, count) * self.strides[axis] - self.pads[axis]
            places = starts[:, None] + np.arange(kernel[axis]) * self.dilations[axis]
            shape = [count] + [1] * len(kernel)
            shape[axis + 1] = kernel[axis]
            places = places.reshape(shape)
            inside &= (places >= 0) & (places < size)
            index.append(np.clip(places, 0, size - 1))
        patches = np.moveaxis(values, 1, -1)[tuple(index)] * inside[..., None]
        patches = np.moveaxis(patches, -1, 1).reshape(count, groups, -1)
        filters = self.weight.reshape(groups, self.weight.shape[0] // groups, -1)
        found = np.einsum("pgk,gok->pgo", patches, filters).reshape(count, -1)
        return np.asarray(found.astype(np.float64) + self.bias)


def of_graph(model: onnx.ModelProto) -> list[FirstConv]:
    """The Convs that read the graph's inputs, the first of each input, with a trained BatchNorm where one follows."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {value.name for value in graph.input} - set(constants)
    norms = {node.input[0]: node for node in graph.node if node.op_type == "BatchNormalization"}
    found: dict[str, FirstConv] = {}
    for node in graph.node:
        if node.op_type != "Conv" or node.input[0] not in inputs - set(found) or node.input[1] not in constants:
            continue
        weight = _array(constants[node.input[1]])
        attributes = onnx_model.attributes(node)
        axes = weight.ndim - 2
        if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            continue
        bias = constants.get(node.input[2]) if len(node.input) > 2 else None
        found[node.input[0]] = FirstConv(
            node.input[0],
            weight,
            _array(bias) if bias is not None else np.zeros(weight.shape[0], np.float32),
            tuple(attributes.get("strides", [1] * axes)),
            tuple(attributes.get("pads", [0] * axes)[:axes]),
            tuple(attributes.get("dilations", [1] * axes)),
            _norm_of(norms.get(node.output[0]), constants),
        )
    return list(found.values())


def _norm_of(node: onnx.NodeProto | None, constants: Mapping[str, onnx.TensorProto]) -> Norm | None:
    if node is None or any(name not in constants for name in node.input[3:5]):
        return None
    mean, variance = (_array(constants[name]) for name in node.input[3:5])
    norm = Norm(node.name, mean, variance)
    return norm if norm.is_trained else None


def _array(tensor: onnx.TensorProto) -> _Array:
    """In single precision: what a first Conv makes of unscaled pixels is beyond FP16."""
    return np.asarray(numpy_helper.to_array(tensor), np.float32)


def save(folder: Path, convs: Iterable[FirstConv]) -> None:
    """Store the Convs that have a norm in `folder`; nothing is written where there is none."""
    arrays: dict[str, _Array] = {}
    for conv in convs:
        if conv.norm is not None:
            norm = conv.norm
            layer: list[Any] = [conv.weight, conv.bias, conv.strides, conv.pads, conv.dilations]
            for field, value in zip(_FIELDS, [*layer, norm.mean, norm.variance, norm.name], strict=True):
                arrays[f"{field}:{conv.input}"] = np.asarray(value)
    if arrays:
        save_arrays(folder / FILE, arrays)


def load(folder: Path) -> list[FirstConv]:
    """What `save` stored.

    Raises:
        StorageError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [key.removeprefix("weight:") for key in archive.files if key.startswith("weight:")]
            return [_stored(name, [archive[f"{field}:{name}"] for field in _FIELDS]) for name in names]
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"{path} cannot be read: {error}", "The bundle is damaged: compile again.") from error


def _stored(name: str, values: Sequence[_Array]) -> FirstConv:
    weight, bias, strides, pads, dilations, mean, variance, norm = values
    return FirstConv(
        name, weight, bias, _sizes(strides), _sizes(pads), _sizes(dilations), Norm(str(norm), mean, variance)
    )


def _sizes(values: _Array) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def merged(stored: Iterable[FirstConv], graph: Iterable[FirstConv]) -> Iterator[FirstConv]:
    """One Conv an input: the stored one with its norm before the one that is left in the graph."""
    known = {conv.input: conv for conv in graph}
    known.update({conv.input: conv for conv in stored})
    yield from known.values()
