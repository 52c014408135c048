"""Samples of random numbers, for smoke tests without data."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gpuopt.calibration.readers.base import RawSample, SampleReader
from gpuopt.calibration.readers.checks import Array, listed
from gpuopt.errors import UsageError
from gpuopt.shapes import DTYPES, TensorSpec, format_shape


def random_reader(
    inputs: Sequence[TensorSpec],
    count: int,
    seed: int,
    value_ranges: Mapping[str, tuple[float, float]],
) -> SampleReader:
    """Samples of random numbers; sample i depends on `inputs`, `seed` and i only.

    Args:
        inputs: with concrete shapes. Floats are drawn from the standard normal distribution,
            integers from {0, 1}, bools are true or false.
        count: number of samples.
        seed: not negative.
        value_ranges: by input name, (low, high): floats and integers are uniform in [low, high).

    Raises:
        UsageError: a shape is symbolic, a range is empty or names no input, or a number is negative.
    """
    if count < 1 or seed < 0:
        raise UsageError(
            f"{count} random samples with seed {seed} cannot be made",
            "Give one sample or more, and a seed of zero or more.",
        )
    for spec in inputs:
        if spec.dtype not in DTYPES:
            raise UsageError(
                f"no random samples can be made for input '{spec.name}' of dtype {spec.dtype}",
                f"dtypes: {', '.join(DTYPES)}.",
            )
        if any(isinstance(size, str) for size in spec.shape):
            raise UsageError(
                f"input '{spec.name}' has the symbolic shape {format_shape(spec.shape)}",
                f"Give its sizes, such as {spec.name}:1x3x224x224.",
            )
    specs = {spec.name: spec for spec in inputs}
    for name, (low, high) in value_ranges.items():
        if name not in specs:
            close = difflib.get_close_matches(name, specs, n=1)
            raise UsageError(
                f"a value range names '{name}', which is no input",
                f"Did you mean '{close[0]}'?" if close else f"The inputs are {listed(specs)}.",
            )
        _check_range(specs[name], low, high)
    return _RandomReader(specs, count, seed, value_ranges)


def _check_range(spec: TensorSpec, low: float, high: float) -> None:
    dtype = np.dtype(spec.dtype)
    fits = math.isfinite(low) and math.isfinite(high) and low < high
    if fits and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        fits = limits.min <= math.ceil(low) < math.ceil(high) <= limits.max + 1
    elif fits and dtype.kind == "f":
        fits = bool(max(-low, high) <= np.finfo(dtype).max)
    if not fits:
        raise UsageError(
            f"value range [{low}, {high}) of input '{spec.name}' is empty or beyond {dtype}",
            "Give a lower and a higher finite bound.",
        )


class _RandomReader(SampleReader):
    def __init__(
        self,
        inputs: Mapping[str, TensorSpec],
        count: int,
        seed: int,
        value_ranges: Mapping[str, tuple[float, float]],
    ) -> None:
        super().__init__("random", inputs, count, None)
        self.description = f"{count} random sample{'' if count == 1 else 's'}, seed {seed}"
        self._seed, self._ranges = seed, dict(value_ranges)

    def _samples(self) -> Iterator[RawSample]:
        for position in self._positions:
            generator = np.random.default_rng([self._seed, position])
            yield {name: self._draw(generator, spec) for name, spec in self._inputs.items()}, "random"

    def _draw(self, generator: np.random.Generator, spec: TensorSpec) -> Array:
        dtype = np.dtype(spec.dtype)
        shape = tuple(int(size) for size in spec.shape)
        limits = self._ranges.get(spec.name)
        drawn: Array
        if dtype.kind == "b":
            drawn = np.asarray(generator.integers(0, 2, shape))
        elif dtype.kind in "iu":
            low, high = limits or (0, 2)
            drawn = np.asarray(generator.integers(math.ceil(low), math.ceil(high), shape, dtype=dtype.type))
        elif limits:
            # In halves, for high - low itself may overflow.
            share = generator.random(shape)
            drawn = np.asarray(limits[0] * (1 - share) + limits[1] * share)
        else:
            drawn = np.asarray(generator.standard_normal(shape))
        return drawn.astype(dtype)
