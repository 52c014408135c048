"""Classic mistakes in calibration data, made on purpose; and none found where there is none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from gpuopt import model_file, recipe, torch_model, torch_norms
from gpuopt.artifact import Artifact, StageOutcome
from gpuopt.calibration import data_checks, first_layers
from gpuopt.calibration.data_checks import DataChecks, Finding, refuse
from gpuopt.calibration.first_layers import FirstConv, Norm
from gpuopt.errors import DataError, StorageError
from gpuopt.progress import Silent
from gpuopt.stages import calibrate, export, simplify
from gpuopt.stages.context import StageContext

Array = np.ndarray[Any, Any]
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
COUNT, SIZE = 48, 32


class NormedNet(nn.Module):
    """BatchNorm behind every Conv, as in most networks for images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(image)).mean((2, 3)))


def photographs(count: int, seed: int) -> Array:
    """uint8, N x H x W x C: pieces of the two photographs that scikit-learn comes with, scaled and lit differently."""
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(seed)
    photos = load_sample_images().images
    pieces = []
    for index in range(count):
        y, x = (int(generator.integers(side - 2 * SIZE)) for side in photos[0].shape[:2])
        piece = photos[index % 2][y : y + 2 * SIZE, x : x + 2 * SIZE]
        piece = piece.reshape(SIZE, 2, SIZE, 2, 3).mean(axis=(1, 3))
        pieces.append((piece * generator.uniform(0.6, 1)).astype(np.uint8))
    return np.stack(pieces)


def prepared(images: Array) -> Array:
    return np.ascontiguousarray(((np.float32(images) / 255 - MEAN) / STD).transpose(0, 3, 1, 2))


@pytest.fixture(scope="module")
def images() -> Array:
    return photographs(COUNT, seed=1)


@functools.cache
def trained() -> NormedNet:
    torch.manual_seed(0)
    model = NormedNet().train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # The statistics of all data seen, after one pass too.
    with torch.no_grad():
        model(torch.from_numpy(prepared(photographs(64, seed=0))))
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """The artifacts that the calibrate stage reads, from the real export: the graph has no BatchNorm any more."""
    folder = tmp_path_factory.mktemp("exported")
    batch = torch.export.Dim("batch", max=8)
    program = torch.export.export(trained(), (torch.zeros(2, 3, SIZE, SIZE),), dynamic_shapes=({0: batch},))
    with (folder / "model.pt").open("wb") as stream:
        torch.export.save(program, stream)
    (folder / "samples").mkdir()
    artifacts = {"samples": Artifact("samples", folder / "samples", "")}
    for stage in (export, simplify):
        output = folder / stage.__name__
        output.mkdir()
        chosen = recipe.resolve({"model": {"path": str(folder / "model.pt")}})
        stage.run(StageContext(chosen, artifacts, output, Silent()))
        artifacts |= {path.name: Artifact(path.name, path, "") for path in output.iterdir()}
    return artifacts


Calibrated = Callable[..., StageOutcome]


@pytest.fixture
def calibrated(exported: dict[str, Artifact], tmp_path: Path) -> Calibrated:
    """Runs the calibrate stage on samples; keyword arguments are recipe keys of its section."""

    def run(samples: Array, **section: Any) -> StageOutcome:
        np.savez(tmp_path / "data.npz", image=samples)
        output = tmp_path / "output"
        output.mkdir()
        chosen = recipe.resolve({"model": {"factory": "a:b"}, "calibrate": section})
        return calibrate.run(StageContext(chosen, exported, output, Silent(), data=str(tmp_path / "data.npz")))

    return run


def test_clean_data_give_no_finding(calibrated: Calibrated, images: Array) -> None:
    outcome = calibrated(prepared(images), strict=True)
    assert (outcome.warnings, outcome.facts["findings"]) == ((), [])


def with_sample(samples: Array, number: int, value: Any) -> Array:
    changed = samples.copy()
    changed[number] = value
    return changed


def with_channel(samples: Array, number: int, value: float) -> Array:
    changed = samples.copy()
    changed[:, number] = value
    return changed


def noisy_twice(images: Array) -> Array:
    half = prepared(images)[: COUNT // 2]
    return np.concatenate([half, half + np.random.default_rng(0).normal(0, 0.003, half.shape).astype(np.float32)])


def misread(images: Array) -> Array:
    """Prepared as HWC, then cut as if it were CHW: the classic reshape where a transpose belongs."""
    return ((np.float32(images) / 255 - MEAN) / STD).reshape(-1, 3, SIZE, SIZE)


def growing(images: Array) -> Array:
    return prepared(images) * np.linspace(0.5, 2.5, COUNT, dtype=np.float32)[:, None, None, None]


MISTAKES: dict[str, tuple[Callable[[Array], Array], str, dict[str, Any]]] = {
    "8-bit pixels": (
        lambda images: np.float32(images.transpose(0, 3, 1, 2)),
        "scale",
        {"whole_numbers": True, "norm": "stem.1", "low": 0.0},
    ),
    "pixels in 0..1": (
        lambda images: np.float32(images.transpose(0, 3, 1, 2)) / 255,
        "scale",
        {"whole_numbers": False, "low": 0.0},
    ),
    "no transpose": (misread, "layout", {"input": "image", "period": 3}),
    "constant channel": (
        lambda images: with_channel(prepared(images), 1, 0.25),
        "constant-channel",
        {"channels": [1], "value": 0.25},
    ),
    "empty sample": (
        lambda images: with_sample(prepared(images), 7, 0),
        "all-zero",
        {"count": 1, "samples": [7]},
    ),
    "duplicates": (
        lambda images: np.concatenate([prepared(images)[:40], prepared(images)[3:11]]),
        "duplicates",
        {"count": 8, "pairs": [(40 + i, 3 + i) for i in range(8)]},
    ),
    "near-duplicates": (noisy_twice, "near-duplicates", {"count": COUNT // 2}),
    "few samples": (lambda images: prepared(images)[:8], "few-samples", {"samples": 8, "at_least": 32}),
    "growing": (growing, "growing-ranges", {"samples": COUNT, "since_sample": 32}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_with_its_evidence(mistake: str, calibrated: Calibrated, images: Array) -> None:
    make, check, evidence = MISTAKES[mistake]
    outcome = calibrated(make(images))
    found = {finding["check"]: finding for finding in outcome.facts["findings"]}
    assert set(found) == {check}
    assert found[check]["message"] in outcome.warnings
    assert "\n" not in found[check]["message"]
    assert found[check]["evidence"] | evidence == found[check]["evidence"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_strict_run_makes_an_error_of_it_and_leaves_nothing(
    mistake: str, calibrated: Calibrated, images: Array, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        calibrated(MISTAKES[mistake][0](images), strict=True)
    assert error.value.exit_code == 4
    assert "--strict-calibration" in error.value.hint
    assert not (tmp_path / "output/ranges").exists()


def test_a_strict_run_stops_at_a_wrong_scale_long_before_the_end() -> None:
    """Scale and layout need few samples: the samples after them are never asked for."""
    checks = DataChecks([conv_with(Norm("n", np.zeros(4), np.full(4, 0.01)))])
    for index in range(8):
        checks.sample(index, {"x": sample(index) * 100})
    (finding,) = checks.early()
    assert finding.check == "scale"
    with pytest.raises(DataError, match="not scaled as in training"):
        refuse(checks.early())


def test_random_data_are_refused_by_a_strict_run_before_the_first_sample(calibrated: Calibrated) -> None:
    with pytest.raises(DataError, match="random data"):
        calibrated(np.zeros((1, 3, SIZE, SIZE), np.float32), random=True, strict=True)


# The first layers ----------------------------------------------------------------------------------


def conv_with(norm: Norm | None, size: int = 3) -> FirstConv:
    weight = np.random.default_rng(0).normal(size=(4, 3, size, size)).astype(np.float32)
    return FirstConv("x", weight, np.zeros(4, np.float32), (1, 1), (1, 1), (1, 1), norm)


def sample(seed: int, shape: tuple[int, ...] = (1, 3, 16, 16)) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
    st.integers(1, 3),
)
def test_outputs_at_places_are_outputs_of_the_conv(
    kernel: int, stride: int, pad: int, dilation: int, groups: int, axes: int
) -> None:
    generator = np.random.default_rng(kernel + 10 * stride)
    weight = generator.normal(size=(4, 4 // groups, *[kernel] * axes)).astype(np.float32)
    bias = generator.normal(size=4).astype(np.float32)
    values = generator.normal(size=(2, 4, *[6] * axes)).astype(np.float32)
    conv = FirstConv("x", weight, bias, (stride,) * axes, (pad,) * axes, (dilation,) * axes)
    run = (torch.conv1d, torch.conv2d, torch.conv3d)[axes - 1]
    whole = run(*map(torch.from_numpy, (values, weight, bias)), stride, pad, dilation, groups)
    expected = np.moveaxis(whole.numpy(), 1, -1).reshape(-1, 4)
    found = conv.outputs_at(values, 20, 0)
    assert found is not None
    nearest = np.abs(found[:, None] - expected[None]).max(axis=2).min(axis=1)
    assert nearest.max() < 1e-4


def test_inputs_that_do_not_fit_the_weight_are_left_out() -> None:
    conv = conv_with(None, size=5)
    assert conv.outputs_at(sample(0, (1, 3, 2, 2)), 4, 0) is None
    assert conv.outputs_at(sample(0, (1, 3, 16)), 4, 0) is None
    assert conv.outputs_at(sample(0, (1, 2, 16, 16)), 4, 0) is None


def scripted(model: nn.Module) -> torch_model.TorchModel:
    script = torch.jit.trace(model, torch.zeros(2, 3, SIZE, SIZE))
    return torch_model.TorchModel(script, model_file.ModelKind.TORCHSCRIPT, ("image",))


def programmed(model: nn.Module) -> torch_model.TorchModel:
    program = torch.export.export(model, (torch.zeros(2, 3, SIZE, SIZE),))
    return torch_model.TorchModel(program, model_file.ModelKind.EXPORTED_PROGRAM, ("image",))


def plain(model: nn.Module) -> torch_model.TorchModel:
    return torch_model.TorchModel(model, model_file.ModelKind.FACTORY, ("image",))


@pytest.mark.parametrize("kind", [plain, scripted, programmed])
def test_the_norm_behind_the_first_conv_is_found_in_every_kind_of_model(
    kind: Callable[[nn.Module], torch_model.TorchModel], tmp_path: Path
) -> None:
    model = trained()
    (found,) = torch_norms.first_convs(kind(model), {"image": np.zeros((2, 3, SIZE, SIZE), np.float32)})
    assert found.norm is not None
    assert np.array_equal(found.norm.mean, model.stem[1].running_mean.numpy())
    assert np.array_equal(found.norm.variance, model.stem[1].running_var.numpy())
    assert (found.input, found.norm.name, found.pads) == ("image", "stem.1", (1, 1))
    first_layers.save(tmp_path, [found])
    (read,) = first_layers.load(tmp_path)
    assert read.norm is not None
    assert np.array_equal(read.weight, found.weight)
    assert (read.norm.name, read.strides, read.dilations) == ("stem.1", (1, 1), (1, 1))


def test_an_untrained_norm_says_nothing() -> None:
    torch.manual_seed(0)
    feed = {"image": np.zeros((2, 3, SIZE, SIZE), np.float32)}
    assert torch_norms.first_convs(plain(NormedNet().eval()), feed) == []


def graph(variance: float) -> onnx.ModelProto:
    constants = {
        "w": np.ones((4, 3, 3, 3), np.float32),
        "s": np.ones(4, np.float32),
        "m": np.zeros(4, np.float32),
        "v": np.full(4, variance, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[2, 1], pads=[1, 0, 1, 0]),
        helper.make_node("BatchNormalization", ["c", "s", "m", "m", "v"], ["y"], name="norm"),
    ]
    value = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [value("x", TensorProto.FLOAT, [1, 3, 8, 8])],
            [value("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
    )


def test_an_onnx_graph_is_read_like_a_torch_model() -> None:
    (conv,) = first_layers.of_graph(graph(2.0))
    assert (conv.input, conv.strides, conv.pads) == ("x", (2, 1), (1, 0))
    assert conv.norm is not None
    assert (conv.norm.name, set(conv.norm.variance.tolist())) == ("norm", {2.0})
    (untrained,) = first_layers.of_graph(graph(1.0))
    assert untrained.norm is None


def test_sums_beyond_fp16_are_held() -> None:
    weight = numpy_helper.from_array(np.full((4, 3, 8, 8), 4, np.float16), "w")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in "xy"]
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    (conv,) = first_layers.of_graph(helper.make_model(helper.make_graph([node], "g", value[:1], value[1:], [weight])))
    outputs = conv.outputs_at(np.full((1, 3, 8, 8), 255, np.float16), 2, 0)
    assert outputs is not None
    assert np.all(outputs == 3 * 64 * 4 * 255)


def test_stored_norms_come_before_the_graph_s(tmp_path: Path) -> None:
    stored, left = conv_with(Norm("n", np.ones(4), np.ones(4))), conv_with(None)
    assert list(first_layers.merged([stored], [left])) == [stored]
    assert list(first_layers.merged([], [left])) == [left]
    assert first_layers.load(tmp_path) == []
    (tmp_path / first_layers.FILE).write_bytes(b"PK")
    with pytest.raises(StorageError, match="first_layers"):
        first_layers.load(tmp_path)


# Silence where there is nothing to say -------------------------------------------------------------


def checked(samples: Iterable[dict[str, Array]], *convs: FirstConv) -> dict[str, Finding]:
    checks = DataChecks(convs)
    for index, feed in enumerate(samples):
        checks.sample(index, feed)
    return {finding.check: finding for finding in checks.findings()}


@given(st.integers(0, 1000), st.booleans())
@settings(deadline=None, max_examples=20)
def test_random_normal_data_give_no_finding(seed: int, large: bool) -> None:
    shape = (1, 3, 96, 96) if large else (1, 3, 12, 12)
    generator = np.random.default_rng(seed)
    feeds = ({"x": generator.standard_normal(shape, dtype=np.float32)} for _ in range(34))
    assert checked(feeds, conv_with(None)) == {}


def test_digits_give_no_finding_and_none_of_them_is_another_s_duplicate() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits().images.astype(np.float32)[:, None]
    conv = FirstConv("x", np.ones((4, 1, 3, 3), np.float32), np.zeros(4), (1, 1), (1, 1), (1, 1))
    assert checked(({"x": one[None]} for one in digits), conv) == {}


def test_tokens_and_masks_and_states_give_no_finding() -> None:
    generator = np.random.default_rng(0)
    feeds = (
        {
            "ids": generator.integers(0, 1000, (1, 16)),
            "mask": np.ones((1, 16), np.int64),
            "float_mask": np.ones((1, 1, 16, 16), np.float32),
            "state": np.zeros((1, 32), np.float32),
            # Added to attention scores: zeros where nothing is padded.
            "bias": np.where(np.arange(16) < 14 + index % 3, 0, -1e4).astype(np.float32)[None],
            "time": np.full((), index, np.float32),
        }
        for index in range(40)
    )
    assert checked(feeds) == {}


def test_a_batch_is_as_many_samples_as_it_holds() -> None:
    generator = np.random.default_rng(0)
    batches = [{"x": generator.standard_normal((8, 3, 16, 16), dtype=np.float32)} for _ in range(4)]
    assert checked(batches, conv_with(None)) == {}
    assert checked(batches[:3], conv_with(None))["few-samples"].evidence["samples"] == 24


@pytest.mark.filterwarnings("error")
def test_fp16_pixels_do_not_overflow() -> None:
    generator = np.random.default_rng(0)
    images = [{"x": generator.integers(0, 256, (1, 3, 64, 64)).astype(np.float16)} for _ in range(32)]
    found = checked(images, conv_with(None))
    assert set(found) == {"scale"}
    assert found["scale"].evidence["mean"] == pytest.approx(127.5, rel=0.01)


def test_a_network_that_takes_pixels_as_they_are_is_believed() -> None:
    """Its BatchNorm saw 0..255, or its first weights are small enough for them."""
    images = [{"x": np.float32(np.random.default_rng(i).integers(0, 256, (1, 3, 16, 16)))} for i in range(40)]
    conv = conv_with(None)
    outputs = np.concatenate([conv.outputs_at(feed["x"], 64, i) for i, feed in enumerate(images)])  # type: ignore[arg-type]
    norm = Norm("n", outputs.mean(axis=0), outputs.var(axis=0))
    assert checked(images, conv_with(norm)) == {}
    small = FirstConv("x", conv.weight / 255, conv.bias, (1, 1), (1, 1), (1, 1))
    assert checked(images, small) == {}
    assert set(checked(images, conv)) == {"scale"}


def test_repeated_tokens_are_found() -> None:
    feeds = [{"ids": np.arange(16).reshape(1, 16) + index % 20} for index in range(40)]
    found = checked(feeds)
    assert found["duplicates"].evidence["count"] == 20


def test_equal_bytes_under_another_shape_or_name_are_no_duplicate() -> None:
    values = sample(0)
    feeds = [{"x": values}, {"x": values.reshape(1, 3, 8, 32)}, {"y": values}]
    assert set(checked(feeds)) == {"few-samples"}


def test_nhwc_in_a_cube_is_found() -> None:
    """32 bands of 32 x 32: both layouts fit, and only one is smooth along height and width alike."""
    generator = np.random.default_rng(0)
    weight = np.zeros((4, 32, 3, 3), np.float32)
    conv = FirstConv("x", weight, np.zeros(4), (1, 1), (1, 1), (1, 1))
    right = []
    for _ in range(33):
        smooth = generator.normal(size=(1, 32, 32, 32)).cumsum(axis=2).cumsum(axis=3)
        right.append({"x": smooth.astype(np.float32)})
    wrong = [{"x": np.ascontiguousarray(feed["x"].transpose(0, 2, 3, 1))} for feed in right]
    assert checked(right, conv) == {}
    assert set(checked(wrong, conv)) == {"layout"}


# Growth --------------------------------------------------------------------------------------------


def grown(amax: Iterable[float]) -> Finding | None:
    checks = DataChecks()
    for value in amax:
        checks.activations({"a": value, "b": 2 * value})
    return next((f for f in checks.findings() if f.check == "growing-ranges"), None)


def test_settled_ranges_are_no_finding_and_growing_ones_say_how_many_more() -> None:
    assert grown([1.0] * 100) is None
    assert grown([0.0] * 100) is None
    found = grown(np.linspace(1, 3, 100))
    assert found is not None
    assert 50 <= found.evidence["further_samples"] < 1000
    assert f"about {found.evidence['further_samples']} more samples" in found.message


def test_the_further_samples_settle_a_range_that_grows_as_the_model_says() -> None:
    """For amax = a + b log n the answer is exact: that many more, and 32 others widen it by less than 1 %."""
    start, slope, count = 1.0, 2.0, 40
    found = grown(start + slope * np.log(np.arange(1, count + 1)))
    assert found is not None
    total = count + found.evidence["further_samples"]

    def widened(n: int) -> float:
        return slope * float(np.log1p(32 / n)) / (start + slope * float(np.log(n)))

    assert widened(total) < 0.01 <= widened(total - 2)


def test_what_would_take_too_many_is_said_so() -> None:
    found = grown(float(n**6) for n in range(1, 65))
    assert found is not None
    further = found.evidence["further_samples"]
    assert (further is None) == ("more than 10000 more samples" in found.message)


@given(st.lists(st.floats(0, 1e30, allow_nan=False), min_size=1, max_size=80))
@settings(deadline=None)
def test_any_magnitudes_can_be_judged(amax: list[float]) -> None:
    found = grown(amax)
    assert found is None or found.evidence["growing_tensors"] > 0


def test_memory_does_not_grow_with_the_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept a sample, its hash and its points, ends at limits; here lower ones than usual."""
    import tracemalloc

    monkeypatch.setattr(data_checks, "_MOST_REMEMBERED", 400)
    monkeypatch.setattr(data_checks, "_MOST_COMPARED", 200)
    checks = DataChecks([conv_with(None)])
    sizes = []
    tracemalloc.start()
    for index in range(1200):
        checks.sample(index, {"x": sample(index, (1, 3, 10, 10))})
        if index in (450, 1199):
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] - sizes[0] < 750 * 16, "less than a hash for each further sample"
