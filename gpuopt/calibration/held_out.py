"""Calibration samples in two parts: some to choose by, others to judge the choice by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gpuopt.calibration.readers.base import Feed, counted
from gpuopt.calibration.reading import open_for_model
from gpuopt.shapes import TensorSpec
from gpuopt.stages.context import StageContext

MOST_SAMPLES = 96
"""Samples that a measurement takes from the calibration data, spread over it.

By ten outputs of trained networks, 48 that judge found 99 of 100 gains of 1 to 2 dB to be more than chance, and
16 found 70; of changes that lose 0.2 dB or more both took less than 2.
"""

FEWEST_SAMPLES = 16
"""With fewer, the half held out decides nothing."""

_HELD_OUT_EACH = 2


@dataclass(frozen=True)
class Split:
    """Every other sample to choose by, those between to judge by.

    Attributes:
        samples: gives the samples anew with each iteration, in the same order.
        count: how many they are.
        after_sample: called once for every sample that was taken.
    """

    samples: Iterable[Feed]
    count: int
    after_sample: Callable[[], None] = lambda: None

    @property
    def enough(self) -> bool:
        """Whether a verdict can be based on them."""
        return self.count >= FEWEST_SAMPLES

    @property
    def too_few(self) -> str:
        """Why there is no verdict where they are not enough."""
        return f"{counted(self.count)}: too few to measure whether it helps, fewer than {FEWEST_SAMPLES}"

    @property
    def held_out_count(self) -> int:
        """How many samples judge."""
        return self.count // _HELD_OUT_EACH

    def chosen_by(self) -> Iterable[Feed]:
        """The samples that may decide ranges, factors and corrections."""
        return _Part(self, False)

    def held_out(self) -> Iterable[Feed]:
        """The samples that judge."""
        return _Part(self, True)


@dataclass(frozen=True)
class _Part:
    """One part of a split; gives its samples anew with each iteration, as passes need it."""

    split: Split
    held_out: bool

    def __iter__(self) -> Iterator[Feed]:
        for index, feed in enumerate(itertools.islice(self.split.samples, self.split.count)):
            if (index % _HELD_OUT_EACH == _HELD_OUT_EACH - 1) == self.held_out:
                yield feed
                self.split.after_sample()


def open_split(context: StageContext, inputs: Sequence[TensorSpec], passes: int) -> Split:
    """At most `MOST_SAMPLES` of the recipe's calibration data, or random ones, spread over it.

    Args:
        inputs: of the model.
        passes: how often the samples will be run, for the progress bar.

    Raises:
        DataError: there are none, or the first do not fit the model.
    """
    settings = context.recipe.calibrate
    fewer = settings.model_copy(update={"samples": min(settings.samples, MOST_SAMPLES)})
    recipe = context.recipe.model_copy(update={"calibrate": fewer})
    reader = open_for_model(replace(context, recipe=recipe), inputs)
    # Code that yields samples does not say how many: they have to be counted.
    count = reader.total if reader.total is not None else sum(1 for _ in itertools.islice(reader, fewer.samples))
    done = itertools.count(1)
    return Split(reader, count, lambda: context.progress.advance(min(next(done), passes * count), passes * count))
