"""I/O formats: values survive packing, and the memory layout is TensorRT's."""

from __future__ import annotations

import numpy as np
import pytest

from gpuopt.backends.tensorrt import formats
from gpuopt.errors import UsageError


@pytest.mark.parametrize("layout", formats.NAMES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 33, 4, 4), (2, 16, 3, 1)])
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


@pytest.mark.parametrize("shape", [(4, 10), (1, 128, 768), (1, 8, 4, 16, 16)])
def test_formats_with_channels_are_of_images(shape: tuple[int, ...]) -> None:
    for layout in sorted(formats.NAMES):
        if layout == formats.LINEAR:
            assert formats.packed_shape(shape, layout) == shape
        else:
            with pytest.raises(UsageError, match=f"this tensor has {len(shape)}"):
                formats.packed_shape(shape, layout)
