"""Calibration data of every kind that users have, as a stream of checked feeds.

    calibration.npz            stacks of samples, keyed by input name              stacks.py
    calibration.npy            one stack, for a model with one input               stacks.py
    folder of .npz or .npy     a sample a file; or a subfolder for each input      folders.py
    folder of images           for a model with one image input                    images.py
    inputs.json                what `polygraphy run --save-inputs` writes; or a
                               folder of such files                                polygraphy.py
    package.module:callable    called without arguments, yields samples            callables.py
    random numbers             for smoke tests                                     generated.py

A sample is read when it is asked for and forgotten afterwards. Nothing is ever unpickled.
What all kinds share is in base.py (the reader), checks.py (of samples) and npy.py (file formats).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpuopt.calibration.readers import npy
from gpuopt.calibration.readers.base import KINDS_HINT, Feed, Inputs, SampleReader, only_input, reading
from gpuopt.calibration.readers.callables import CALLABLE, CallableReader
from gpuopt.calibration.readers.folders import NpyFolder, NpzFolder
from gpuopt.calibration.readers.generated import random_reader
from gpuopt.calibration.readers.images import IMAGE_SUFFIXES, ImageFolder, ImageOptions, images_per_sample
from gpuopt.calibration.readers.polygraphy import PolygraphyReader
from gpuopt.calibration.readers.stacks import NpyFile, NpzFile
from gpuopt.errors import DataError, UsageError
from gpuopt.shapes import TensorSpec

__all__ = [
    "IMAGE_SUFFIXES",
    "Feed",
    "ImageOptions",
    "SampleReader",
    "find_beside",
    "images_per_sample",
    "open_reader",
    "random_reader",
]


def open_reader(
    data: str, inputs: Sequence[TensorSpec], image: ImageOptions | None = None, limit: int | None = None
) -> SampleReader:
    """Recognise what `data` names by its content and open it; see the module's table of kinds.

    Samples whose rank is one less than the input's get a leading batch axis, except in a stack,
    where every element (or slice, as the input's rank says) is a sample. Where the first axis of an
    input is a fixed number n above 1, a sample is n elements of a stack or n images, and a rest is left over.

    Args:
        data: a path or `package.module:callable`; a path that exists wins.
        inputs: the model's inputs; empty where they are unknown. Then names are the data's own, and
            `input` (or `input0`, `input1`, ...) where the data have none.
        image: how images are prepared; by default as ImageNet models want them.
        limit: the most samples to give. Of stacks and folders they are taken at even distances, in
            order; of JSON and callables, whose length is unknown, they are the first. Other samples
            are neither checked nor, where they are files of their own, opened.

    Raises:
        DataError: nothing is there, it is of no known kind, or it does not fit the inputs.
        UsageError: `limit` is not positive, or images are to be read whose size neither the model
            nor `image` states.
        RequirementError: images are to be read and Pillow is not installed.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} samples leaves none", "Give one sample or more.")
    specs = {spec.name: spec for spec in inputs}
    path = Path(data).expanduser()
    with reading(path):
        if path.is_dir():
            return _open_folder(path, specs, image, limit)
        if path.exists():
            return _open_file(path, specs, limit)
    if CALLABLE.fullmatch(data):
        return CallableReader(data, specs, limit)
    raise DataError(f"calibration data '{data}' does not exist", KINDS_HINT)


def find_beside(model: Path) -> Path | None:
    """Calibration data in the model's folder: calibration.npz, calibration.json, calibration/."""
    folder = model.parent
    for name in ("calibration.npz", "calibration.json"):
        if (folder / name).is_file():
            return folder / name
    return folder / "calibration" if (folder / "calibration").is_dir() else None


def _open_file(path: Path, inputs: Inputs, limit: int | None) -> SampleReader:
    with path.open("rb") as stream:
        head = stream.read(64)
    if head.startswith(npy.NPZ_START):
        return NpzFile(path, inputs, limit)
    if head.startswith(npy.NPY_START):
        return NpyFile(path, inputs, limit)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{"):
        return PolygraphyReader(path, [path], inputs, limit)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise DataError(f"{path} is a single image", "Give the folder that holds the images.")
    problem = "is empty" if not head else "is neither .npz, .npy nor JSON"
    raise DataError(f"calibration data {path} {problem}", KINDS_HINT)


def _open_folder(folder: Path, inputs: Inputs, image: ImageOptions | None, limit: int | None) -> SampleReader:
    archives, arrays = _visible(folder, (".npz",)), _visible(folder, (".npy",))
    if archives and arrays:
        raise DataError(f"{folder} holds both .npz and .npy files", "Keep one kind in the folder.")
    if archives:
        return NpzFolder(folder, archives, inputs, limit)
    if arrays:
        name = only_input(
            inputs,
            f"a folder of .npy files ({folder})",
            "Make a subfolder of .npy files for each input, or .npz files keyed by input name.",
        )
        return NpyFolder(folder, {name: arrays}, inputs, limit)
    columns: dict[str, list[Path]] = {}
    for path in _visible(folder, (".npy",), "**/*"):
        columns.setdefault(path.parent.relative_to(folder).as_posix(), []).append(path)
    if columns:
        return NpyFolder(folder, columns, inputs, limit)
    if images := _visible(folder, IMAGE_SUFFIXES, "**/*"):
        return ImageFolder(folder, images, inputs, image, limit)
    if documents := _visible(folder, (".json",)):
        return PolygraphyReader(folder, documents, inputs, limit)
    raise DataError(f"folder {folder} holds no calibration data", KINDS_HINT)


def _visible(folder: Path, suffixes: tuple[str, ...], pattern: str = "*") -> list[Path]:
    """Files of the given kinds, sorted by their path below `folder`; hidden ones are left out."""
    found = [
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)
