"""Calibration as a whole: ranges that depend on the data alone, within the memory that is allowed."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from gpuopt import onnx_model
from gpuopt.calibration.collectors import METHODS, RangeCollector, TensorRange
from gpuopt.calibration.memory import MIB
from gpuopt.calibration.run import Calibration, Estimate, RunOptions, Seen, calibrate
from gpuopt.errors import DataError, QuantizationError, RequirementError
from tests.unit.calibration.networks import TENSORS, Feed, Samples, images, network


def run(feeds: Sequence[Feed], folder: Path, method: str = "entropy", values: int = 0, **options: Any) -> Calibration:
    collector = RangeCollector(method, values_per_slice=values)
    return calibrate(network(), TENSORS, Samples(feeds), collector, folder / "watched", RunOptions(**options))


def in_a_fresh_process(test: Callable[[Path], None]) -> Callable[[Path], None]:
    """High-water marks of a process with a history hold what other tests left in its heap."""

    @functools.wraps(test)
    def wrapped(tmp_path: Path) -> None:
        script = (
            "import sys; from pathlib import Path; import tests.unit.calibration.test_run as tests; "
            "getattr(tests, sys.argv[1]).__wrapped__(Path(sys.argv[2]))"
        )
        root = Path(__file__).parent.parent.parent.parent
        command = [sys.executable, "-c", script, test.__name__, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
        assert done.returncode == 0, done.stderr

    return wrapped


def close(one: dict[str, TensorRange], other: dict[str, TensorRange]) -> bool:
    """Equal but for the order in which a convolution sums up, which ONNX Runtime chooses by batch and optimization."""
    return one.keys() == other.keys() and all(np.isclose(one[n].amax, other[n].amax, rtol=1e-3) for n in one)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", [0, 500])
def test_neither_order_nor_batch_size_matter(method: str, values: int, tmp_path: Path) -> None:
    feeds = images(6)
    alone = run(feeds, tmp_path / "a", method, values)
    backwards = run(feeds[::-1], tmp_path / "b", method, values)
    batches = [{"x": np.concatenate([f["x"] for f in feeds[i : i + 3]])} for i in (0, 3)]
    batched = run(batches, tmp_path / "c", method, values)
    assert backwards.ranges == alone.ranges
    assert close(batched.ranges, alone.ranges)
    assert run(feeds, tmp_path / "d", method, values).ranges == alone.ranges


def test_sizes_may_change_from_sample_to_sample(tmp_path: Path) -> None:
    feeds = [*images(2, 16), *images(2, 40, seed=1), *images(1, 7, seed=2)]
    found = run(feeds, tmp_path, "minmax")
    assert found.samples == 5
    assert found.ranges["x"].amax == max(float(np.abs(f["x"]).max()) for f in feeds)


def test_short_slices_of_open_length_are_not_stretched(tmp_path: Path) -> None:
    """Sequence first, as in torch's attention: thousands of slices shorter than the share."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["length", "n", 4]) for name in "xy"]
    nodes = [helper.make_node("Neg", ["x"], ["t"]), helper.make_node("Neg", ["t"], ["y"])]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:])
    model = onnx_model.with_types(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10))
    feeds = [{"x": np.random.default_rng(0).standard_normal((2000, 1, 4), dtype=np.float32)}]
    collector = RangeCollector("entropy", values_per_slice=1 << 14)
    found = calibrate(model, ["t"], Samples(feeds), collector, tmp_path / "w", RunOptions(max_memory=40 * MIB))
    # Of 16384 values each they would take 125 MiB.
    assert found.peak_bytes <= 40 * MIB


@pytest.mark.parametrize("values", [0, 100])
@pytest.mark.parametrize("method", ["minmax", "entropy"])
def test_a_sample_may_leave_an_activation_empty(method: str, values: int, tmp_path: Path) -> None:
    feeds = images(2)
    empty = {"x": np.zeros((0, 3, 24, 24), np.float32)}
    assert (
        run([empty, *feeds], tmp_path / "a", method, values).ranges == run(feeds, tmp_path / "b", method, values).ranges
    )
    assert run([empty], tmp_path / "c", method, values).ranges == {}


def test_minmax_equals_that_of_the_whole_activations(tmp_path: Path) -> None:
    from gpuopt.backends.onnxruntime import Session

    model = network()
    model.graph.output.append(next(v for v in model.graph.value_info if v.name == "r0"))
    session = Session(onnx_model.save(model, tmp_path / "m"))
    feeds = images(4)
    whole = np.concatenate([session.run(feed)["r0"] for feed in feeds])
    found = run(feeds, tmp_path, "minmax").ranges["r0"]
    assert (found.low, found.high) == (float(whole.min()), float(whole.max()))


@in_a_fresh_process
def test_a_limit_costs_passes_and_changes_nothing(tmp_path: Path) -> None:
    model, feeds = network(channels=32, layers=6), images(3, size=512)
    tensors = ["x", *(f"r{index}" for index in range(5))]

    def limited(limit: int | None, name: str) -> Calibration:
        collector = RangeCollector("entropy")
        return calibrate(model, tensors, Samples(feeds), collector, tmp_path / name, RunOptions(max_memory=limit))

    free = limited(None, "free")
    assert free.passes == 1
    # Five activations of 32 MiB and room for three at most beside what plain inference takes.
    bound = limited(190 * MIB, "bound")
    assert bound.passes > 1
    assert close(bound.ranges, free.ranges)
    assert bound.peak_bytes <= 190 * MIB
    assert bound.samples == free.samples == 3


@in_a_fresh_process
def test_a_larger_sample_later_on_splits_the_groups_again(tmp_path: Path) -> None:
    model, tensors = network(channels=32, layers=6), ["r0", "r1", "r2", "r3", "r4"]
    feeds = [*images(1, size=64), *images(1, size=512, seed=1), *images(1, size=64, seed=2)]
    passes: list[tuple[int, int]] = []

    def seen(sample: Seen) -> None:
        passes.append((sample.this_pass, sample.number))

    free = calibrate(model, tensors, Samples(feeds), RangeCollector("mse"), tmp_path / "a")
    options = RunOptions(max_memory=190 * MIB, seen=seen)
    bound = calibrate(model, tensors, Samples(feeds), RangeCollector("mse"), tmp_path / "b", options)
    assert close(bound.ranges, free.ranges)
    assert bound.passes > 1
    assert bound.peak_bytes <= 190 * MIB
    # The first attempt saw the small sample and turned back before the large one ran.
    assert passes[0] == (1, 1)
    assert passes[1] == (1, 1)


@in_a_fresh_process
def test_a_share_of_the_values_needs_little_more_than_plain_inference(tmp_path: Path) -> None:
    model, tensors = network(channels=32, layers=6), ["r0", "r1", "r2", "r3", "r4"]

    def limited(values: int, limit: int) -> Calibration:
        collector = RangeCollector("entropy", values_per_slice=values)
        options = RunOptions(max_memory=limit)
        return calibrate(model, tensors, Samples(images(3, size=512)), collector, tmp_path / str(values), options)

    # 160 MiB of activations: they are not held beside each other where the graph itself takes the statistics.
    share = limited(1000, 140 * MIB)
    assert share.passes == 1
    assert share.peak_bytes <= 140 * MIB
    assert limited(0, 190 * MIB).passes > 1


def test_every_pass_needs_the_same_samples(tmp_path: Path) -> None:
    class Fewer(Samples):
        passes = 0

        def __iter__(self) -> Iterator[Feed]:
            self.passes += 1
            return iter(self.feeds[: 4 - self.passes])

    model, tensors = network(channels=32, layers=6), ["r0", "r1", "r2", "r3", "r4"]
    options = RunOptions(max_memory=190 * MIB)
    with pytest.raises(DataError, match="pass 2 over the calibration data has 1 samples, the first 2"):
        calibrate(model, tensors, Fewer(images(3, size=512)), RangeCollector("entropy"), tmp_path / "w", options)


def test_too_small_a_limit_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(RequirementError, match=r"calibration needs \d+ MiB on a sample of x \(1, 3, 512, 512\)"):
        calibrate(
            network(channels=32),
            ["r0"],
            Samples(images(1, size=512)),
            RangeCollector("minmax"),
            tmp_path / "w",
            RunOptions(max_memory=MIB),
        )


def test_the_estimate_comes_after_two_samples_and_once(tmp_path: Path) -> None:
    estimates: list[tuple[int, Estimate]] = []
    numbers: list[int] = []
    run(
        images(6),
        tmp_path,
        total=6,
        seen=lambda sample: numbers.append(sample.number),
        estimated=lambda estimate: estimates.append((len(numbers), estimate)),
    )
    ((after, estimate),) = estimates
    assert after == 2
    assert estimate.seconds is not None
    assert estimate.seconds > 0
    assert estimate.peak_bytes > 0
    assert numbers == [1, 2, 3, 4, 5, 6]


def test_every_sample_tells_its_largest_magnitudes(tmp_path: Path) -> None:
    feeds, seen = images(3), list[Seen]()
    run(feeds, tmp_path, values=100, seen=seen.append)
    assert [set(s.magnitudes) for s in seen] == [set(TENSORS)] * 3
    assert [s.magnitudes["x"] for s in seen] == [float(np.abs(f["x"]).max()) for f in feeds]


@pytest.mark.parametrize("values", [0, 10])
def test_nan_inside_the_graph_names_tensor_and_sample(values: int, tmp_path: Path) -> None:
    feeds = images(3)
    feeds[1]["x"][:] = 3e38
    with pytest.raises(QuantizationError, match=r"in 'r\d' on sample 1"):
        run(feeds, tmp_path, values=values)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_shapes_are_those_that_onnxruntime_gives(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    from gpuopt.backends.onnxruntime import Session

    model = network(layers=2)
    shape = (data.draw(st.integers(1, 3)), 3, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    inferred = onnx_model.concrete_shapes(model, {"x": shape})
    model.graph.output.extend(v for v in model.graph.value_info if v.name in ("c0", "r0"))
    session = Session(onnx_model.save(model, tmp_path_factory.mktemp("m")))
    values = session.run({"x": np.zeros(shape, np.float32)})
    assert {name: value.shape for name, value in values.items()} == {name: inferred[name] for name in values}


def test_the_scales_of_a_resize_are_seen() -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, "h", "w"]) for name in "xy"]
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest")
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    graph = helper.make_graph([node], "g", value[:1], value[1:], [scales])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    assert onnx_model.concrete_shapes(model, {"x": (2, 3, 5, 7)})["y"] == (2, 3, 10, 14)
