"""Opening the calibration data that a recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpuopt.calibration.readers import ImageOptions, SampleReader, open_reader, random_reader
from gpuopt.errors import DataError
from gpuopt.recipe import CalibrateSection
from gpuopt.reference import load as load_reference
from gpuopt.shapes import TensorSpec
from gpuopt.stages.context import StageContext


def open_data(data: str, inputs: Sequence[TensorSpec], settings: CalibrateSection) -> SampleReader:
    """A reader for the data; `inputs` is empty while the model's inputs are not known."""
    image = ImageOptions(**settings.images.model_dump()) if settings.images else None
    return open_reader(data, inputs, image)


def open_for_model(context: StageContext, inputs: Sequence[TensorSpec]) -> SampleReader:
    """A reader whose feeds fit the model's inputs: the recipe's data, or random samples if it asks for them.

    Raises:
        DataError: there is neither.
    """
    settings = context.recipe.calibrate
    if settings.random:
        profile = load_reference(context.folder("reference")).profiles[0]
        concrete = [replace(spec, shape=profile[spec.name].opt) for spec in inputs]
        bounds = {
            name or inputs[0].name: (section.low or 0.0, section.high if section.high is not None else 1.0)
            for name, section in context.recipe.inputs.items()
            if section.low is not None or section.high is not None
        }
        return random_reader(concrete, settings.samples, context.recipe.export.seed, bounds)
    if context.data is None:
        raise DataError("INT8 needs calibration data", "Give --calibration-data.")
    return open_data(context.data, inputs, settings)
