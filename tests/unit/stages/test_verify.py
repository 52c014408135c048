"""The figures of a comparison, and the verdict on graphs that are right, wrong, or leak between rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from gpuopt import recipe, reference
from gpuopt.artifact import Artifact
from gpuopt.comparison import batch_invariance, compare
from gpuopt.progress import Silent
from gpuopt.recipe import VerifySection
from gpuopt.reference import Interface, Reference
from gpuopt.shapes import ShapeRange, TensorSpec, corners
from gpuopt.stages import verify
from gpuopt.stages.context import StageContext
from gpuopt.stages.verify import check

NAN, INF = math.nan, math.inf


def figures(actual: Any, expected: Any, dtype: str = "float32") -> dict[str, Any]:
    found = compare(np.array(actual, dtype), np.array(expected, dtype))
    json.dumps(found, allow_nan=False)
    return found


def test_an_exact_result_has_cosine_one_and_no_sqnr() -> None:
    found = figures([1, -2, 3], [1, -2, 3])
    assert (found["cosine"], found["sqnr_db"], found["max_abs_error"]) == (1.0, None, 0.0)
    assert (found["finite"], found["shape_equal"], found["agreement"]) == (True, True, None)


def test_known_figures() -> None:
    found = figures([3, 5], [3, 4])
    assert found["cosine"] == pytest.approx(29 / (5 * math.sqrt(34)))
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(25))
    assert found["max_abs_error"] == 1
    assert figures([1, 0], [0, 1])["cosine"] == 0
    assert figures([-1, -2], [1, 2])["cosine"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("actual", "expected", "cosine", "sqnr"),
    [
        ([0, 0], [0, 0], 1.0, None),
        ([1, 0], [0, 0], 0.0, None),
        ([0, 0], [1, 0], 0.0, 0.0),
        ([], [], 1.0, None),
    ],
)
def test_zeros_and_nothing(actual: list[float], expected: list[float], cosine: float, sqnr: float | None) -> None:
    found = figures(actual, expected)
    assert (found["cosine"], found["sqnr_db"]) == (cosine, sqnr)


@pytest.mark.parametrize(
    ("actual", "expected", "finite"),
    [
        ([NAN, 1], [NAN, 1], True),
        ([INF, 1], [INF, 1], True),
        ([-INF, 1], [-INF, 1], True),
        ([NAN, 1], [2, 1], False),
        ([2, 1], [NAN, 1], False),
        ([INF, 1], [2, 1], False),
        ([INF, 1], [-INF, 1], False),
        ([NAN, 1], [INF, 1], False),
        ([1, NAN], [NAN, 1], False),
    ],
)
def test_nan_and_infinity_must_lie_in_the_same_places(actual: list[float], expected: list[float], finite: bool) -> None:
    found = figures(actual, expected)
    assert found["finite"] is finite
    if finite:
        assert found["cosine"] == 1.0


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
def test_other_types_are_compared_by_agreement(dtype: str) -> None:
    found = figures([1, 0, 1, 1], [1, 1, 1, 1], dtype)
    assert found["agreement"] == 0.75
    assert (found["cosine"], found["sqnr_db"], found["max_abs_error"]) == (None, None, None)
    assert figures([], [], dtype)["agreement"] == 1.0


def test_different_shapes_have_no_figures() -> None:
    found = compare(np.ones((2, 3), np.float32), np.ones((3, 2), np.float32))
    assert (found["shape"], found["shape_equal"], found["cosine"]) == ([2, 3], False, None)


def test_half_precision_is_compared_in_double() -> None:
    found = figures([60000] * 4, [60000, 60000, 60000, -60000], "float16")
    assert found["cosine"] == pytest.approx(0.5)
    assert found["max_abs_error"] == 120000


@pytest.mark.parametrize("unit", [1e-300, 1e-30, 1e30, 1e200])
def test_the_unit_does_not_matter(unit: float) -> None:
    found = figures([3 * unit, 5 * unit], [3 * unit, 4 * unit], "float64")
    assert found["cosine"] == pytest.approx(29 / (5 * math.sqrt(34)))
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(25))
    assert found["max_abs_error"] == pytest.approx(unit)


arrays = hnp.arrays(np.float32, 5, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


@settings(deadline=None)
@given(arrays, arrays)
def test_figures_stay_within_their_bounds(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    found = compare(actual, expected)
    assert -1 - 1e-9 <= found["cosine"] <= 1
    assert found["sqnr_db"] is None or math.isfinite(found["sqnr_db"])
    assert found["max_abs_error"] >= 0
    assert compare(expected, expected)["cosine"] == pytest.approx(1)


# Graphs ------------------------------------------------------------------------------------------

PROFILE = {"x": ShapeRange((1, 3), (2, 3), (4, 3))}
INPUTS = (TensorSpec("x", "float32", ("batch", 3)),)
Model = Callable[[Mapping[str, Any]], Sequence[Any]]


def doubled(feed: Mapping[str, Any]) -> Sequence[Any]:
    return [feed["x"] * 2]


def centred(feed: Mapping[str, Any]) -> Sequence[Any]:
    return [feed["x"] - feed["x"].mean(axis=0, keepdims=True)]


def stored(folder: Path, model: Model = doubled, low: int = 1, samples: Sequence[Mapping[str, Any]] = ()) -> Reference:
    folder.mkdir()
    profile = {"x": ShapeRange((low, 3), (max(low, 2), 3), (4, 3))}
    tensors = Interface(INPUTS, ("y",), (profile,))
    feeds = {c.name: reference.make_feed(c, INPUTS, samples, {}, i) for i, c in enumerate(corners([profile]))}
    return reference.record(folder, tensors, model, feeds, "PyTorch")


def graph(path: Path, *nodes: onnx.NodeProto, kind: int = TensorProto.FLOAT, **constants: Any) -> Path:
    values = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    made = helper.make_graph(list(nodes), "g", [shape], [helper.make_tensor_value_info("y", kind, None)], values)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def node(op_type: str, *names: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, names[:-1], names[-1:], **attributes)


TWO = np.float32(2)
LEAK = (
    node("ReduceMean", "x", "axes", "m", keepdims=1),
    node("Mul", "m", "little", "l"),
    node("Mul", "x", "two", "d"),
    node("Add", "d", "l", "y"),
)


def leaking(path: Path, share: float) -> Path:
    return graph(path, *LEAK, two=TWO, little=np.float32(share), axes=np.array([0]))


def verdict(
    tmp_path: Path, path: Path, model: Model = doubled, low: int = 1, precision: Any = "fp32", **settings: Any
) -> dict[str, Any]:
    result = check({"model.onnx": path}, stored(tmp_path / "stored", model, low), VerifySection(**settings), precision)
    json.dumps(result, allow_nan=False)
    return result


def test_an_equal_graph_passes(tmp_path: Path) -> None:
    result = verdict(tmp_path, graph(tmp_path / "m.onnx", node("Mul", "x", "two", "y"), two=TWO))
    assert (result["passed"], result["failures"], result["warnings"]) == (True, [], [])
    assert [(r["graph"], r["corner"], r["output"], r["shape"]) for r in result["outputs"]] == [
        ("model.onnx", "profile0-min", "y", [1, 3]),
        ("model.onnx", "profile0-opt", "y", [2, 3]),
        ("model.onnx", "profile0-max", "y", [4, 3]),
    ]
    assert all(row["cosine"] > 0.99999 for row in result["outputs"])
    assert result["batch_invariance"]["model.onnx"] == {
        "checked": True,
        "batch": 4,
        "worst_relative_error": 0.0,
        "tolerance": 0.0001,
        "failures": [],
    }


def test_both_graphs_are_checked_and_named(tmp_path: Path) -> None:
    good = graph(tmp_path / "good.onnx", node("Mul", "x", "two", "y"), two=TWO)
    bad = graph(tmp_path / "bad.onnx", node("Neg", "x", "y"))
    result = check({"model.onnx": good, "engine.onnx": bad}, stored(tmp_path / "stored"), VerifySection(), "int8")
    assert not result["passed"]
    assert len(result["failures"]) == 3
    assert all(failure.startswith("engine.onnx, output 'y' at profile0-") for failure in result["failures"])
    assert set(result["batch_invariance"]) == {"model.onnx", "engine.onnx"}


def test_a_wrong_shape_fails(tmp_path: Path) -> None:
    result = verdict(tmp_path, graph(tmp_path / "m.onnx", node("ReduceSum", "x", "axes", "y"), axes=np.array([1])))
    assert not result["passed"]
    assert "output 'y' at profile0-max: has the shape (4, 1), the reference another" in result["failures"][2]


def test_a_wrong_rank_of_a_batched_output_fails_without_an_exception(tmp_path: Path) -> None:
    whole = graph(tmp_path / "m.onnx", node("ReduceSum", "x", "y", keepdims=0))
    result = verdict(tmp_path, whole, batch_invariance=False)
    assert "has the shape ()" in result["failures"][0]


def test_nan_fails(tmp_path: Path) -> None:
    result = verdict(tmp_path, graph(tmp_path / "m.onnx", node("Sqrt", "x", "y")), batch_invariance=False)
    assert any("has NaN or infinity where the reference has other values" in failure for failure in result["failures"])


def test_a_low_cosine_fails_at_the_limit_of_the_precision_or_the_users(tmp_path: Path) -> None:
    noisy = graph(
        tmp_path / "m.onnx",
        node("Mul", "x", "two", "d"),
        node("Add", "d", "c", "y"),
        two=TWO,
        c=np.array([0.1, -0.1, 0.1], np.float32),
    )
    found = stored(tmp_path / "stored")
    outcomes = {p: check({"model.onnx": noisy}, found, VerifySection(), p)["passed"] for p in ("fp32", "fp16", "int8")}
    assert outcomes == {"fp32": False, "fp16": False, "int8": True}
    assert check({"model.onnx": noisy}, found, VerifySection(min_cosine=0.5, min_sqnr_db=0), "fp32")["passed"]
    strict = check({"model.onnx": noisy}, found, VerifySection(min_cosine=1.0), "int8")
    assert "is below 1" in strict["failures"][0]
    loud = check({"model.onnx": noisy}, found, VerifySection(min_sqnr_db=60), "int8")
    assert "dB is below 60" in loud["failures"][0]


def test_integers_are_judged_by_agreement(tmp_path: Path) -> None:
    path = graph(tmp_path / "m.onnx", node("ArgMax", "x", "y", axis=1, keepdims=0), kind=TensorProto.INT64)
    equal = verdict(tmp_path, path, lambda feed: [np.argmax(feed["x"], axis=1)])
    assert equal["passed"]
    assert all(row["agreement"] == 1 for row in equal["outputs"])
    other = check(
        {"model.onnx": path},
        stored(tmp_path / "other", lambda feed: [np.argmin(feed["x"], axis=1)]),
        VerifySection(batch_invariance=False),
        "int8",
    )
    assert "only 0.0% of the values agree" in other["failures"][0]


def test_rows_that_leak_into_each_other_fail_though_every_cosine_is_good(tmp_path: Path) -> None:
    result = verdict(tmp_path, leaking(tmp_path / "m.onnx", 0.05), precision="fp16", min_cosine=0.9)
    assert not result["passed"]
    assert not any("cosine" in failure for failure in result["failures"])
    assert "row 0 of a batch of 4 differs from the row alone by" in result["failures"][0]


def test_a_leak_below_the_tolerance_of_int8_is_its_noise(tmp_path: Path) -> None:
    result = verdict(tmp_path, leaking(tmp_path / "m.onnx", 0.01), precision="int8")
    assert result["passed"]
    assert 0 < result["batch_invariance"]["model.onnx"]["worst_relative_error"] < 0.05


def test_invariance_is_checked_only_where_it_can_be(tmp_path: Path) -> None:
    path = leaking(tmp_path / "m.onnx", 0.05)
    off = check({"model.onnx": path}, stored(tmp_path / "a"), VerifySection(batch_invariance=False), "int8")
    assert off["batch_invariance"] == {}
    fixed = check({"model.onnx": path}, stored(tmp_path / "b", low=2), VerifySection(), "int8")
    assert fixed["batch_invariance"]["model.onnx"] == {"checked": False, "reason": "the shapes have one batch size"}
    mean = graph(
        tmp_path / "mean.onnx",
        node("ReduceMean", "x", "axes", "m", keepdims=1),
        node("Sub", "x", "m", "y"),
        axes=np.array([0]),
    )
    mixing = check({"model.onnx": mean}, stored(tmp_path / "c", centred), VerifySection(), "fp32")
    assert mixing["passed"]
    assert mixing["batch_invariance"]["model.onnx"]["checked"] is False
    assert "in PyTorch too" in mixing["batch_invariance"]["model.onnx"]["reason"]


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_one_sample_alone_shows_whether_rows_leak(tmp_path: Path, share: float) -> None:
    found = stored(tmp_path / "stored", samples=[{"x": np.array([[1, 2, 3]], np.float32)}])
    graphs = {"model.onnx": leaking(tmp_path / "m.onnx", share)}
    result = check(graphs, found, VerifySection(min_cosine=0.9, min_sqnr_db=0), "fp16")
    assert result["batch_invariance"]["model.onnx"]["checked"]
    assert result["passed"] is (share == 0)


def test_one_sample_of_zeros_shows_nothing(tmp_path: Path) -> None:
    found = stored(tmp_path / "stored", samples=[{"x": np.zeros((1, 3), np.float32)}])
    result = check({"model.onnx": leaking(tmp_path / "m.onnx", 0.05)}, found, VerifySection(), "fp16")
    assert result["batch_invariance"]["model.onnx"] == {
        "checked": False,
        "reason": "all rows of the reference inputs are the same one",
    }


class Answers:
    """A session whose outputs depend on the batch as the function says."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip("y", self._model(feed), strict=True))


def masked(feed: Mapping[str, Any]) -> Sequence[Any]:
    return [np.where(feed["x"] > 0, feed["x"], -np.inf)]


def labels(feed: Mapping[str, Any]) -> Sequence[Any]:
    return [np.tile(np.arange(1000) % 5, (len(feed["x"]), 1))]


def test_infinity_in_equal_places_is_invariant(tmp_path: Path) -> None:
    found = stored(tmp_path / "stored", masked)
    assert found.batched_outputs == ("y",)
    result = batch_invariance(Answers(masked), found, 1e-4, 0.99)
    assert (result["worst_relative_error"], result["failures"]) == (0.0, [])

    def moving(feed: Mapping[str, Any]) -> Sequence[Any]:
        return [np.where(feed["x"] > (0 if len(feed["x"]) > 1 else 9), feed["x"], -np.inf)]

    result = batch_invariance(Answers(moving), found, 1e-4, 0.99)
    assert result["worst_relative_error"] == math.inf
    assert result["failures"]


class Rounded:
    """Doubles; a row alone is off by `alone` of its largest value, a row in a batch by `together`."""

    def __init__(self, alone: float, together: float) -> None:
        self._errors = alone, together

    def run(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        y = feed["x"] * 2
        return {"y": y + self._errors[len(y) > 1] * np.abs(y).max(axis=1, keepdims=True)}


@pytest.mark.parametrize(
    ("alone", "together", "tolerance", "failures"),
    [
        (0.05, -0.03, 0.1, 0),
        (0.05, -0.06, 0.1, 2),
        # A row that is exact alone has no rounding to differ by, and a coarse one not any.
        (0.0, 0.06, 0.05, 2),
        (0.2, -0.1, 0.25, 2),
    ],
)
def test_coarse_rounding_may_differ_in_a_batch_by_twice_what_it_is_alone(
    tmp_path: Path, alone: float, together: float, tolerance: float, failures: int
) -> None:
    found = stored(tmp_path / "stored")
    result = batch_invariance(Rounded(alone, together), found, 0.05, 0.99, is_coarse=True)
    assert result["tolerance"] == pytest.approx(tolerance, rel=1e-5)
    assert len(result["failures"]) == failures
    strict = batch_invariance(Rounded(alone, together), found, 0.05, 0.99)
    assert strict["tolerance"] == 0.05
    assert len(strict["failures"]) == 2


def test_of_rows_that_were_made_distinct_the_first_has_an_original_to_be_coarse_against(tmp_path: Path) -> None:
    found = stored(tmp_path / "stored", samples=[{"x": np.array([[1, 2, 3]], np.float32)}])
    assert batch_invariance(Rounded(0.05, -0.03), found, 0.05, 0.99, is_coarse=True)["failures"] == []
    assert len(batch_invariance(Rounded(0.05, -0.06), found, 0.05, 0.99, is_coarse=True)["failures"]) == 2


@pytest.mark.parametrize(("flipped", "failures"), [(1, 0), (20, 2)])
def test_labels_that_flip_with_the_batch_are_judged_by_their_share(tmp_path: Path, flipped: int, failures: int) -> None:
    def flipping(feed: Mapping[str, Any]) -> Sequence[Any]:
        (found,) = labels(feed)
        found[:, :flipped] += len(feed["x"]) > 1
        return [found]

    result = batch_invariance(Answers(flipping), stored(tmp_path / "stored", labels), 1e-4, 0.99)
    assert result["lowest_agreement"] == 1 - flipped / 1000
    assert result["worst_relative_error"] == 0
    assert len(result["failures"]) == failures
    assert all("has only 98.0% of the values of the row alone" in failure for failure in result["failures"])


def test_the_stage_writes_what_it_tells(tmp_path: Path) -> None:
    stored(tmp_path / "stored")
    for name, nodes in (("onnx", [node("Mul", "x", "two", "y")]), ("engine_onnx", [node("Neg", "x", "y")])):
        (tmp_path / name).mkdir()
        graph(tmp_path / name / "model.onnx", *nodes, two=TWO)
    folders = {"reference": "stored", "onnx": "onnx", "engine_onnx": "engine_onnx"}
    (tmp_path / "out").mkdir()
    context = StageContext(
        recipe=recipe.resolve({"model": {"path": "m"}, "precision": "fp16"}),
        artifacts={kind: Artifact(kind, tmp_path / name, "") for kind, name in folders.items()},
        output=tmp_path / "out",
        progress=Silent(),
    )
    outcome = verify.run(context)
    assert json.loads((tmp_path / "out" / "verification" / "verification.json").read_text()) == outcome.facts
    assert not outcome.facts["passed"]
    assert {row["graph"] for row in outcome.facts["outputs"]} == {"model.onnx", "engine.onnx"}
    assert outcome.facts["limits"]["min_cosine"] == 0.999
