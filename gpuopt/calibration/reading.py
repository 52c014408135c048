"""Opening the calibration data that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gpuopt.calibration.readers import ImageOptions, SampleReader, open_reader, random_reader
from gpuopt.errors import DataError
from gpuopt.interface import value_bounds
from gpuopt.recipe import CalibrateSection, InputSection
from gpuopt.reference import load as load_reference
from gpuopt.shapes import TensorSpec
from gpuopt.stages.context import StageContext


def open_data(data: str, inputs: Sequence[TensorSpec], settings: CalibrateSection, limit: int | None) -> SampleReader:
    """A reader of at most `limit` samples, spread over the data; `inputs` is empty while they are not known."""
    image = ImageOptions(**settings.images.model_dump()) if settings.images else None
    return open_reader(data, inputs, image, limit)


def data_files(data: str, limit: int | None) -> list[Path] | None:
    """The files whose bytes decide the first `limit` samples; None where code makes them."""
    if not Path(data).expanduser().exists():
        return None
    if (path := Path(data).expanduser()).is_file():
        return [path]
    # How images are cut plays no part in which files are read.
    return open_reader(data, [], ImageOptions(crop=1), limit).files()


def stated_inputs(inputs: Mapping[str, InputSection]) -> list[TensorSpec]:
    """What a recipe says of its inputs' shapes, for reading data before the model is loaded."""
    specs = []
    for name, section in inputs.items():
        shapes = section.range()
        if shapes:
            sizes = tuple(f"dim{axis}" if axis in shapes.dynamic_axes else size for axis, size in enumerate(shapes.opt))
            specs.append(TensorSpec(name or "input", section.dtype or "float32", sizes))
    return specs


def open_for_model(context: StageContext, inputs: Sequence[TensorSpec]) -> SampleReader:
    """A reader whose feeds fit the model's inputs: the recipe's data, or random samples if it asks for them.

    Raises:
        DataError: there is neither.
    """
    settings = context.recipe.calibrate
    if settings.random:
        profile = load_reference(context.folder("reference")).profiles[0]
        concrete = [replace(spec, shape=profile[spec.name].opt) for spec in inputs]
        known = value_bounds(context.recipe.inputs, inputs[0].name)
        return random_reader(concrete, settings.samples, context.recipe.export.seed, known)
    if context.data is None:
        raise DataError("INT8 needs calibration data", "Give --calibration-data.")
    return open_data(context.data, inputs, settings, settings.samples)
