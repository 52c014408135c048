"""Opening the calibration data that a recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gpuopt.calibration.readers import ImageOptions, SampleReader, open_reader, random_reader
from gpuopt.deployed_form import BYTES, RANKS, form_of_input
from gpuopt.errors import DataError
from gpuopt.interface import value_bounds
from gpuopt.recipe import Recipe
from gpuopt.reference import load as load_reference
from gpuopt.shapes import TensorSpec
from gpuopt.stages.context import StageContext


def open_data(data: str, inputs: Sequence[TensorSpec], recipe: Recipe, limit: int | None) -> SampleReader:
    """A reader of at most `limit` samples in the deployed form, spread over the data.

    Args:
        inputs: of the deployed model; empty while they are not known.
    """
    return open_reader(data, inputs, _image_options(recipe, inputs), limit)


def _image_options(recipe: Recipe, inputs: Sequence[TensorSpec]) -> ImageOptions | None:
    """The recipe's; layout and normalisation are the deployed model's where it has its own."""
    layout, images = recipe.layout, recipe.calibrate.images
    name = inputs[0].name if inputs else next(iter(recipe.inputs), "")
    form = form_of_input(layout, name)
    options = ImageOptions(**images.model_dump()) if images else None
    if not form.changes or (options is None and not inputs):
        return options
    if options is None:
        channels = inputs[0].shape[-1 if form.channels_last else 1]
        options = ImageOptions(color="gray" if channels == 1 else "rgb")
    given = "nhwc" if form.channels_last else options.layout
    return replace(options, layout=given, as_bytes=form.normalization is not None)


def data_files(data: str, limit: int | None, images_per_sample: int = 1) -> list[Path] | None:
    """The files whose bytes decide the first `limit` samples; None where code makes them.

    Args:
        images_per_sample: of a folder of images; see `readers.images_per_sample`.
    """
    if not Path(data).expanduser().exists():
        return None
    if (path := Path(data).expanduser()).is_file():
        return [path]
    # How images are cut plays no part in which files are read.
    return open_reader(data, [], ImageOptions(crop=1, batch=images_per_sample), limit).files()


def stated_inputs(recipe: Recipe) -> list[TensorSpec]:
    """What a recipe says of its inputs' shapes, in the deployed form, for reading data before the model is loaded.

    The batch is left open: what is read then shows the shape of one sample.
    """
    specs = []
    for name, section in recipe.inputs.items():
        shapes = section.range()
        if shapes:
            rest = enumerate(shapes.opt[1:], start=1)
            sizes = ("batch", *(f"dim{axis}" if axis in shapes.dynamic_axes else size for axis, size in rest))
            spec = TensorSpec(name or "input", section.dtype or "float32", sizes)
            form = form_of_input(recipe.layout, spec.name)
            specs.append(form.spec(spec) if len(sizes) in RANKS else spec)
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
        layout = context.recipe.layout
        bytes_in = [spec.name for spec in inputs if layout.input_is_bytes(spec.name)]
        known = {**dict.fromkeys(bytes_in, BYTES), **value_bounds(context.recipe.inputs, inputs[0].name)}
        return random_reader(concrete, settings.samples, context.recipe.export.seed, known)
    if context.data is None:
        raise DataError("INT8 needs calibration data", "Give --calibration-data.")
    return open_data(context.data, inputs, context.recipe, settings.samples)
