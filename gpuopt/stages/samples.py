"""The first calibration samples, kept as reference inputs and as a statement of the shapes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from gpuopt import reference
from gpuopt.artifact import StageOutcome
from gpuopt.errors import UsageError
from gpuopt.stages.context import StageContext

SAMPLES_FILE = "samples.npz"
COUNT = 8


def run(context: StageContext) -> StageOutcome:
    """Keep up to `COUNT` samples; without data the artifact is empty."""
    from gpuopt.calibration.reading import open_data, stated_inputs

    folder = context.made("samples")
    if context.data is None:
        return StageOutcome({"samples": 0})
    try:
        reader = open_data(context.data, [], context.recipe, COUNT)
    except UsageError:
        # Only images need to know the model's size. Where the recipe does not say it either, the
        # calibration stage knows it from the exported graph, and this run goes without samples.
        stated = stated_inputs(context.recipe)
        if len(stated) != 1:
            return StageOutcome({"samples": 0})
        reader = open_data(context.data, stated, context.recipe, COUNT)
    feeds = list(itertools.islice(iter(reader), COUNT))
    arrays = {f"{index}:{name}": value for index, feed in enumerate(feeds) for name, value in feed.items()}
    reference.save_arrays(folder / SAMPLES_FILE, arrays)
    return StageOutcome({"samples": len(feeds)})


def load(folder: Path) -> list[dict[str, Any]]:
    """The kept samples as feeds."""
    path = folder / SAMPLES_FILE
    if not path.exists():
        return []
    feeds: dict[int, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            index, _, name = key.partition(":")
            feeds.setdefault(int(index), {})[name] = archive[key]
    return [feeds[index] for index in sorted(feeds)]
