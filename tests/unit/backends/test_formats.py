"""I/O formats: values survive packing, and the memory layout is TensorRT's."""

from __future__ import annotations

import numpy as np
import pytest

from gpuopt.backends.tensorrt import formats
from gpuopt.errors import UsageError


@pytest.mark.parametrize("layout", formats.NAMES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 33, 4, 4), (2, 16, 3)])
def test_what_is_packed_comes_back(layout: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    packed = formats.pack(array, layout)
    assert packed.shape == formats.packed_shape(shape, layout)
    np.testing.assert_array_equal(formats.unpack(packed, shape, layout), array)


def test_where_a_value_lies() -> None:
    array = np.arange(2 * 5 * 2 * 3).reshape(2, 5, 2, 3)
    chw4 = formats.pack(array, "chw4")
    assert chw4.shape == (2, 2, 2, 3, 4)
    assert chw4[1, 1, 0, 2, 0] == array[1, 4, 0, 2]
    assert not chw4[:, 1, :, :, 1:].any()
    hwc8 = formats.pack(array, "hwc8")
    assert hwc8.shape == (2, 2, 3, 8)
    assert hwc8[1, 1, 2, 4] == array[1, 4, 1, 2]
    assert not hwc8[..., 5:].any()


def test_channels_need_a_place() -> None:
    with pytest.raises(UsageError, match="needs a batch"):
        formats.packed_shape((4, 10), "hwc8")
