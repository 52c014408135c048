"""What an engine is made of, read from the JSON of TensorRT's engine inspector.

TensorRT 8.5 writes dtype and layout as one text under `Format/Datatype` and the ONNX nodes of a layer into its name,
joined by ` + `; later ones also write `Metadata` with `[ONNX Layer: NAME]`. Both are read, so that one reader serves
all releases. A layer's precision is the one it multiplies in: the type of its weights where it has some, else of its
first input that is no index.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gpuopt.errors import EngineError

Precision = Literal["int8", "fp8", "fp16", "bf16", "fp32", "int32", "other"]

_DTYPES: tuple[tuple[str, Precision], ...] = (
    (r"\bint8\b", "int8"),
    (r"\bfp8\b|float8", "fp8"),
    (r"\bbf16\b|bfloat", "bf16"),
    (r"\bfp16\b|\bhalf\b|float16", "fp16"),
    (r"\bfp32\b|\bfloat\b|float32|\btf32\b", "fp32"),
    (r"\bint32\b|\bint64\b", "int32"),
)
_ITEM_BYTES: tuple[tuple[str, int], ...] = (
    (r"\bu?int8\b|\bbool\b|\bfp8\b|float8", 1),
    (r"\bbf16\b|bfloat|\bfp16\b|\bhalf\b|float16", 2),
    (r"\bint64\b", 8),
)
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_QUANTIZES = re.compile(r"(^|[_/])(De)?[Qq]uantize(Linear)?(_\d+)?(_clone_\d+)?$")


@dataclass(frozen=True)
class LayerTensor:
    """An input or output of a layer, as the engine has it."""

    name: str
    shape: tuple[int, ...]
    format: str
    dtype: Precision


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        kind: TensorRT's, as `CaskConvolution`.
        precision: the one it computes in.
        tactic: name of the kernel; empty where none is told.
        onnx_nodes: names of what it was fused from: nodes and some constants.
        is_reformat: it only changes a layout or dtype, and nobody asked for it.
        is_quantization: a Q or DQ that was not fused with a neighbour.
        is_free: it launches nothing.
        weight_bytes: of its constants, as far as the inspector counts them.
    """

    name: str
    kind: str
    precision: Precision
    tactic: str
    inputs: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    onnx_nodes: tuple[str, ...]
    is_reformat: bool
    is_quantization: bool
    is_free: bool
    weight_bytes: int = 0

    @property
    def bytes_moved(self) -> int | None:
        """Inputs, outputs and weights, once each; None where a size is not known."""
        operands = (*self.inputs, *self.outputs)
        if any(size < 0 for operand in operands for size in operand.shape):
            return None
        return sum(math.prod(operand.shape) * _item_bytes(operand.format) for operand in operands) + self.weight_bytes

    @property
    def computes(self) -> bool:
        """Whether it is work of the network, rather than what the engine does between its layers."""
        return not (self.is_reformat or self.is_quantization or self.is_free)


@dataclass(frozen=True)
class Coverage:
    """Which precision an engine works in.

    Attributes:
        layers: computing layers by precision.
        layer_share, time_share: by precision, of the computing layers; times None where none were taken.
        reformats, quantizations: layers left over between them.
        overhead_time_share: their share of the whole time; None without times.
        milliseconds: of all layers, each timed alone; None without times.
    """

    layers: dict[str, int]
    layer_share: dict[str, float]
    time_share: dict[str, float] | None
    reformats: int
    quantizations: int
    overhead_time_share: float | None
    milliseconds: float | None


def layers(text: str) -> tuple[EngineLayer, ...]:
    """The layers of an engine, in order.

    Args:
        text: the inspector's answer for the whole engine; the engine has to be built with detailed profiling.

    Raises:
        EngineError: the text is no such JSON, or the engine tells its layers' names alone.
    """
    try:
        found = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"the engine's inspector gives no layers: {error}", "Build the engine with gpuopt."
        ) from error
    if any(isinstance(entry, str) for entry in found):
        raise EngineError(
            "the engine was built without detailed profiling: it tells the names of its layers alone",
            "Build the engine with gpuopt.",
        )
    return tuple(_layer(entry) for entry in found)


def coverage(found: Iterable[EngineLayer], milliseconds: Mapping[str, float] | None = None) -> Coverage:
    """Shares of the precisions.

    Args:
        milliseconds: time of each layer by its name.
    """
    found = tuple(found)
    computing = [one for one in found if one.computes]
    counts = Counter[str](one.precision for one in computing)
    times: dict[str, float] = defaultdict(float)
    overhead = 0.0
    for one in found:
        spent = (milliseconds or {}).get(one.name, 0.0)
        if one.computes:
            times[one.precision] += spent
        else:
            overhead += spent
    whole = sum(times.values()) + overhead
    return Coverage(
        layers=dict(counts),
        layer_share=_shares(counts),
        time_share=_shares(times) if milliseconds else None,
        reformats=sum(one.is_reformat for one in found),
        quantizations=sum(one.is_quantization for one in found),
        overhead_time_share=overhead / whole if milliseconds and whole else None,
        milliseconds=whole if milliseconds else None,
    )


def _shares(parts: Mapping[str, float]) -> dict[str, float]:
    whole = sum(parts.values())
    return {name: part / whole for name, part in parts.items()} if whole else {}


def _layer(entry: Mapping[str, Any]) -> EngineLayer:
    name, kind = str(entry.get("Name", "")), str(entry.get("LayerType", ""))
    inputs = tuple(_tensor(tensor) for tensor in entry.get("Inputs", ()))
    outputs = tuple(_tensor(tensor) for tensor in entry.get("Outputs", ()))
    quantizes = bool(_QUANTIZES.search(name)) or kind in ("Quantize", "Dequantize")
    quantizes = quantizes and kind in ("Reformat", "Scale", "Quantize", "Dequantize", "kgen")
    is_free = kind in ("NoOp", "Constant", "Signal", "Wait")
    return EngineLayer(
        name=name,
        kind=kind,
        precision=_precision(entry, inputs, outputs),
        tactic=str(entry.get("TacticName", "")),
        inputs=inputs,
        outputs=outputs,
        onnx_nodes=_onnx_nodes(name, str(entry.get("Metadata", ""))),
        is_reformat=kind == "Reformat" and not quantizes,
        is_quantization=quantizes,
        is_free=is_free,
        weight_bytes=_weight_bytes(entry),
    )


def _tensor(entry: Mapping[str, Any]) -> LayerTensor:
    text = " ".join(str(entry[key]) for key in ("Format/Datatype", "Format", "Datatype") if key in entry)
    sizes = tuple(int(size) for size in entry.get("Dimensions", ()))
    return LayerTensor(str(entry.get("Name", "")), sizes, text, _dtype(text))


def _dtype(text: str) -> Precision:
    lowered = text.lower()
    return next((dtype for pattern, dtype in _DTYPES if re.search(pattern, lowered)), "other")


def _item_bytes(text: str) -> int:
    """Of one element; 4 where no other size is told."""
    lowered = text.lower()
    return next((size for pattern, size in _ITEM_BYTES if re.search(pattern, lowered)), 4)


def _precision(
    entry: Mapping[str, Any], inputs: tuple[LayerTensor, ...], outputs: tuple[LayerTensor, ...]
) -> Precision:
    weights = entry.get("Weights")
    if isinstance(weights, dict) and "Type" in weights:
        found = _dtype(str(weights["Type"]))
        if found != "other":
            return found
    for tensor in (*inputs, *outputs):
        if tensor.dtype not in ("int32", "other"):
            return tensor.dtype
    return inputs[0].dtype if inputs else "other"


def _weight_bytes(entry: Mapping[str, Any]) -> int:
    found = 0
    for key in ("Weights", "Bias"):
        told = entry.get(key)
        if isinstance(told, dict) and isinstance(told.get("Count"), int):
            found += told["Count"] * _item_bytes(str(told.get("Type", "")))
    return found


def _onnx_nodes(name: str, metadata: str) -> tuple[str, ...]:
    if told := _ONNX_LAYER.findall(metadata):
        return tuple(dict.fromkeys(told))
    if name.startswith("Reformatting CopyNode"):
        return ()
    if block := re.search(r"ForeignNode\[(.+?)\.\.\.(.+?)\]", name):
        return block[1], block[2]
    bare = re.sub(r"\bPWN\(|\bPWN\b|^\(+|\)+$", "", name)
    parts = (part.strip("() ") for part in re.split(r" \+ |, ", bare))
    return tuple(dict.fromkeys(part for part in parts if part and not part.startswith("(Unnamed")))
