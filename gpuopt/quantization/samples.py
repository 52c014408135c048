"""Evaluation samples: opened like calibration data, and kept on disk with the FP32 outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gpuopt import onnx_model
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration.readers import SampleReader, npy
from gpuopt.calibration.readers.stacks import NpzFile
from gpuopt.calibration.reading import open_for_model
from gpuopt.reference import Array, Feed, save_arrays
from gpuopt.shapes import TensorSpec
from gpuopt.stages.context import StageContext


def open_samples(context: StageContext, inputs: Sequence[TensorSpec], limit: int | None) -> SampleReader:
    """At most `limit` samples (None: all), spread over the data of a stage that evaluates.

    An `.npz` may hold other arrays beside the inputs: labels.

    Raises:
        DataError: there are none, or they do not fit the model.
    """
    if context.data is not None and (path := Path(context.data).expanduser()).is_file() and _is_npz(path):
        names = [spec.name for spec in inputs]
        with npy.open_archive(path, str(path)) as archive:
            found = list(npy.members(archive, str(path)))
        # Where an input is missing, the reader's own message says which array it could be.
        beside = [name for name in found if name not in names] if set(names) <= set(found) else []
        return NpzFile(path, {spec.name: spec for spec in inputs}, limit, beside)
    settings = context.recipe.calibrate
    settings = settings.model_copy(update={"samples": limit, "random": settings.random and context.data is None})
    recipe = context.recipe.model_copy(update={"calibrate": settings})
    return open_for_model(dataclasses.replace(context, recipe=recipe), inputs)


def _is_npz(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(npy.NPZ_START)) == npy.NPZ_START


class StoredSamples:
    """Samples and the FP32 graph's outputs on them, one file each; iterating holds one pair in memory."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count

    @classmethod
    def record(cls, model: onnx.ModelProto, samples: Iterable[Feed], scratch: Path) -> StoredSamples:
        """Run the graph on every sample and keep both in `scratch`, a folder that is not there yet."""
        session = Session(onnx_model.save(model, scratch / "fp32"))
        count = 0
        for feed in samples:
            save_arrays(scratch / f"{count}.feed.npz", feed)
            save_arrays(scratch / f"{count}.outputs.npz", session.run(feed))
            count += 1
        return cls(scratch, count)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Mapping[str, Array], Mapping[str, Array]]]:
        for index in range(self._count):
            yield _arrays(self._folder / f"{index}.feed.npz"), _arrays(self._folder / f"{index}.outputs.npz")


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
