"""What every reader is: its choice of samples, its description and the checked feeds."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gpuopt.calibration.readers.checks import Array, check_names, fit, listed
from gpuopt.errors import DataError
from gpuopt.shapes import TensorSpec

Feed = dict[str, Array]
"""One sample: every input by name, with its full rank."""

RawSample = tuple[Mapping[str, Array], str]
"""Unchecked arrays by name, and the words that say where they are from."""

Inputs = Mapping[str, TensorSpec]
"""The model's inputs by name, in its order; empty where they are unknown."""

KINDS_HINT = (
    "Give a .npz with one stack of samples for each input, a folder of .npy, .npz or image files,\n"
    "a .json of 'polygraphy run --save-inputs', or package.module:callable."
)


def spread(available: int, limit: int | None) -> Sequence[int]:
    """Positions of the samples to give: all, or `limit` of them at even distances, in order."""
    if limit is None or limit >= available:
        return range(available)
    return [index * available // limit for index in range(limit)]


class SampleReader(ABC):
    """A source of calibration samples; iterating gives checked feeds, each time from the first on.

    A subclass for a kind of data plans in `__init__` and yields what it finds from `_samples`.

    Attributes:
        description: one line for the report, such as `npz calibration.npz, 512 of 50000 samples`.
        total: the number of feeds, where it is known without reading the samples.
        rest: rows at the end of a stack, or images, that fill no whole sample.
    """

    def __init__(self, source: str, inputs: Inputs, available: int | None, limit: int | None) -> None:
        """
        Args:
            source: kind and name of the data, for the description.
            inputs: what feeds have to fit.
            available: number of samples in the data; None: not known before the end of the data.
            limit: the most samples to give.
        """
        self._inputs = inputs
        self.rest = 0
        self.total: int | None = None
        if available is None:
            self._positions: Sequence[int] = range(sys.maxsize if limit is None else limit)
            self.description = source if limit is None else f"{source}, at most {counted(limit)}"
        else:
            self._positions = spread(available, limit)
            self.total = len(self._positions)
            share = "" if self.total == available else f"{self.total} of "
            self.description = f"{source}, {share}{counted(available)}"

    def _leave(self, rest: int) -> None:
        """Note how many rows fill no whole sample."""
        self.rest = rest
        if rest:
            self.description += f" ({rest} left over)"

    def files(self) -> list[Path]:
        """The files that will be read, in reading order: their bytes decide the feeds. None for a callable."""
        return []

    @abstractmethod
    def _samples(self) -> Iterator[RawSample]:
        """The samples at `_positions`."""

    def __iter__(self) -> Iterator[Feed]:
        """All samples from the first on, checked: arrays of the inputs' dtypes, in C order.

        Raises:
            DataError: a sample does not fit the model's inputs or holds NaN or an infinity, a file
                is damaged, or there is no sample at all.
        """
        names = list(self._inputs)
        empty = True
        # Positions come first, so that no sample beyond the last is asked for.
        for position, (raw, source) in zip(self._positions, self._samples(), strict=False):
            where = f"sample {position} ({source})"
            if names:
                check_names(raw, names, where)
            elif raw:
                names = list(raw)
            else:
                raise DataError(f"{where} holds no array", "Give a sample an array for each input.")
            yield {name: fit(name, raw[name], self._inputs.get(name), where) for name in names}
            empty = False
        if empty:
            raise DataError(
                f"calibration data hold no sample: {self.description}",
                "Give at least one; a few hundred representative samples are usual.",
            )


def only_input(inputs: Inputs, what: str, hint: str) -> str:
    """The name of the model's one input, for data without names; `input` where it is unknown.

    Raises:
        DataError: the model has more inputs.
    """
    if len(inputs) > 1:
        raise DataError(f"{what} cannot feed a model with {len(inputs)} inputs: {listed(inputs)}", hint)
    return next(iter(inputs), "input")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError into a DataError that names the path."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}", "Check that the file is there and readable."
        ) from error


def counted(count: int) -> str:
    """`1 sample`, `2 samples`."""
    return f"{count} sample" if count == 1 else f"{count} samples"


def label(path: Path) -> str:
    """The last part of a path, also of `.` and `..`."""
    return path.resolve().name or str(path)
