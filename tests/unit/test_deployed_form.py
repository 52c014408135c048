"""What is asked of inputs and outputs, and what samples and references become."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuopt import deployed_form
from gpuopt.deployed_form import Normalization, TensorForm
from gpuopt.errors import DataError, GpuoptError, UsageError
from gpuopt.recipe import LayoutSection
from gpuopt.shapes import ShapeRange, TensorSpec

IMAGE = TensorSpec("image", "float32", ("batch", 3, 8, 6))
MASK = TensorSpec("mask", "float32", ("batch", 4))
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def asked(**settings: Any) -> LayoutSection:
    return LayoutSection.model_validate(settings)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 4), (2, 3, 5, 4, 6)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_byte_comes_back(shape: tuple[int, ...], dtype: str) -> None:
    form = TensorForm(True, Normalization(IMAGENET["mean"], IMAGENET["std"], 1 / 255))
    every = np.resize(np.arange(256, dtype=np.uint8), (shape[0], *shape[2:], 3))
    original = form.original(every)
    assert original.shape == shape
    assert original.dtype == np.float32
    assert np.array_equal(form.deployed(original.astype(dtype)), every)


def test_the_normalisation_is_torchvision_s() -> None:
    torchvision = pytest.importorskip("torchvision")
    import torch

    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8)
    steps = torchvision.transforms.Compose(
        [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(IMAGENET["mean"], IMAGENET["std"])]
    )
    found = TensorForm(True, Normalization(IMAGENET["mean"], IMAGENET["std"], 1 / 255)).original(image[None])[0]
    assert torch.allclose(torch.from_numpy(found), steps(image), atol=1e-6)


def test_values_that_are_no_bytes_are_refused() -> None:
    with pytest.raises(GpuoptError, match="not what bytes are normalised to"):
        Normalization((0.0,), (1.0,), 1 / 255).invert(np.full((1, 3, 2, 2), 0.123456, np.float32))


def test_specs_and_profiles_have_their_channels_last() -> None:
    forms = deployed_form.input_forms(asked(input={"image": "nhwc"}, input_dtype={"image": "uint8"}), [IMAGE, MASK])
    assert forms["image"].spec(IMAGE) == TensorSpec("image", "uint8", ("batch", 8, 6, 3))
    assert forms["mask"].spec(MASK) == MASK
    profile = {
        "image": ShapeRange((1, 3, 8, 6), (2, 3, 8, 6), (4, 3, 8, 6)),
        "mask": ShapeRange((1, 4), (2, 4), (4, 4)),
    }
    (found,) = deployed_form.profiles(forms, [profile])
    assert found["image"] == ShapeRange((1, 8, 6, 3), (2, 8, 6, 3), (4, 8, 6, 3))
    assert found["mask"] == profile["mask"]


@pytest.mark.parametrize(
    ("settings", "inputs", "message"),
    [
        ({"input": "nhwc"}, [IMAGE, MASK], "input 'mask' is batchx4: only with 3 to 5 dimensions"),
        ({"input_dtype": "uint8"}, [MASK], "input 'mask' is batchx4"),
        ({"input": {"img": "nhwc"}}, [IMAGE], "'img' is no input of the model"),
        ({"input_dtype": "uint8"}, [TensorSpec("x", "int64", (1, 3, 8, 8))], "input 'x' of the model is int64"),
        ({"input_dtype": "uint8", "mean": (0.5, 0.5)}, [IMAGE], "have 2 numbers, input 'image' has 3 channels"),
        ({"input": "nhwc"}, [TensorSpec("x", "float32", (1, 224, 224, 3))], "its channels are last already"),
    ],
)
def test_what_cannot_be_asked_for_is_told_by_the_tensor_s_name(
    settings: dict[str, Any], inputs: list[TensorSpec], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        deployed_form.input_forms(asked(**settings), inputs)


def test_a_tensor_that_is_named_may_look_channels_last() -> None:
    spec = TensorSpec("x", "float32", (1, 224, 224, 3))
    assert deployed_form.input_forms(asked(input={"x": "nhwc"}), [spec])["x"].channels_last


def test_an_output_without_channels_is_refused() -> None:
    with pytest.raises(UsageError, match="output 'logits' is batchx1000"):
        deployed_form.output_forms(asked(output="nhwc"), [TensorSpec("logits", "float32", ("batch", 1000))])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            np.zeros((1, 3, 8, 6), np.float32),
            "float32 1x3x8x6, in the original model's form; .* bytes .*, channels last",
        ),
        (np.zeros((1, 8, 6, 3), np.float32), "in the original model's form"),
        (np.zeros((1, 3, 8, 6), np.uint8), "uint8 1x3x8x6, in the original model's layout"),
        (np.zeros((1, 8, 6, 4), np.uint8), "other channels than mean and std"),
        (np.zeros((8, 6), np.uint8), "no batch, channel and spatial axes"),
    ],
)
def test_samples_in_another_form_are_refused(value: Any, message: str) -> None:
    layout = asked(input="nhwc", input_dtype="uint8", **IMAGENET)
    with pytest.raises(DataError, match=message):
        deployed_form.samples_as_original(layout, [{"image": value}], [IMAGE])


def test_samples_of_other_inputs_stay() -> None:
    layout = asked(input={"image": "nhwc"})
    image, mask = np.random.default_rng(0).random((1, 8, 6, 3)).astype("f"), np.ones((1, 4), "f")
    (found,) = deployed_form.samples_as_original(layout, [{"image": image, "mask": mask}], [IMAGE, MASK])
    assert found["mask"] is mask
    assert np.array_equal(found["image"], np.moveaxis(image, -1, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (0.5,)}, "mean, std and scale are for bytes"),
        ({"input_dtype": "uint8", "std": (0.0,)}, "std has to be above zero"),
        ({"input_dtype": "uint8", "std": (1.0, 1.0), "mean": (0.0, 0.0, 0.0)}, "different numbers of channels"),
        ({"input_dtype": "uint8", "scale": "1/0"}, "write a factor as 1/255"),
        ({"input": "nwhc"}, "nchw"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(**settings)


def test_a_factor_may_be_a_fraction() -> None:
    assert asked(input_dtype="uint8", scale="1/127.5").scale == 1 / 127.5
