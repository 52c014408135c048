"""TensorRT's I/O formats: what an array of logical shape N, C, ... looks like in device memory.

The layouts are those of TensorRT's `TensorFormat`: CHW4, CHW16 and CHW32 keep groups of channels together behind the
spatial axes; HWC8 and HWC16 have channels last, padded to a multiple of 8 or 16; HWC has them last without padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gpuopt.errors import UsageError
from gpuopt.shapes import Shape

Array = npt.NDArray[Any]

LINEAR = "chw"
VECTORS = {"chw2": 2, "chw4": 4, "chw16": 16, "chw32": 32}
CHANNELS_LAST = {"hwc": 1, "hwc8": 8, "hwc16": 16}
NAMES = {
    LINEAR: "LINEAR", "chw2": "CHW2", "chw4": "CHW4", "chw16": "CHW16", "chw32": "CHW32",
    "hwc": "HWC", "hwc8": "HWC8", "hwc16": "HWC16",
}  # fmt: skip
"""Those that can be packed, in trtexec's names and TensorRT's."""


def packed_shape(shape: Shape, layout: str) -> Shape:
    """The shape of the array in memory.

    Raises:
        UsageError: a layout with channels for a tensor that is no batch of images.
    """
    if layout == LINEAR:
        return shape
    check_rank(len(shape), layout)
    batch, channels, *spatial = shape
    if layout in VECTORS:
        width = VECTORS[layout]
        return (batch, -(-channels // width), *spatial, width)
    width = CHANNELS_LAST[layout]
    return (batch, *spatial, -(-channels // width) * width)


def check_rank(rank: int, layout: str) -> None:
    """Let formats with channels be of batches of images alone.

    TensorRT counts the channels' axis from the end (NvInferRuntimeBase.h: "third to last" for CHW4, HWC8 and their
    like); with four dimensions it is the one after the batch, where everybody else has it, too.

    Raises:
        UsageError: another number of dimensions.
    """
    if layout != LINEAR and rank != 4:
        raise UsageError(
            f"format {layout} is for four dimensions, batch, channels, height and width: this tensor has {rank}",
            f"Use {LINEAR} for it.",
        )


def pack(array: Array, layout: str) -> Array:
    """An array of logical shape N, C, ... as it lies in memory; padded channels are zero."""
    if layout == LINEAR:
        return array
    batch, channels, *spatial = array.shape
    packed = np.zeros(packed_shape(array.shape, layout), array.dtype)
    if layout in VECTORS:
        width = VECTORS[layout]
        groups = packed.shape[1]
        padded = np.zeros((batch, groups * width, *spatial), array.dtype)
        padded[:, :channels] = array
        packed[...] = np.moveaxis(padded.reshape(batch, groups, width, *spatial), 2, -1)
    else:
        packed[..., :channels] = np.moveaxis(array, 1, -1)
    return packed


def unpack(packed: Array, shape: Shape, layout: str) -> Array:
    """The inverse of `pack`.

    Args:
        shape: the logical one.
    """
    if layout == LINEAR:
        return packed.reshape(shape)
    batch, channels, *spatial = shape
    packed = packed.reshape(packed_shape(shape, layout))
    if layout in VECTORS:
        merged = np.moveaxis(packed, -1, 2).reshape(batch, -1, *spatial)
        return np.ascontiguousarray(merged[:, :channels])
    return np.ascontiguousarray(np.moveaxis(packed[..., :channels], -1, 1))
