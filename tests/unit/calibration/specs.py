"""What the reader tests share."""

from __future__ import annotations

from gpuopt.calibration.readers import SampleReader
from gpuopt.shapes import TensorSpec


def sample_specs(reader: SampleReader) -> list[TensorSpec]:
    """Names, dtypes and concrete shapes of the first sample."""
    feed = next(iter(reader))
    return [TensorSpec(name, array.dtype.name, array.shape) for name, array in feed.items()]
