"""Metrics over samples and labels: the right numbers, and what is wrong told in three lines."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gpuopt import onnx_model, recipe, reference
from gpuopt.artifact import Artifact
from gpuopt.errors import AccuracyError, DataError, GpuoptError, UsageError
from gpuopt.progress import Silent
from gpuopt.quantization import evaluation
from gpuopt.quantization.evaluation import MeanCosine, TopOne, open_evaluation, within
from gpuopt.shapes import ShapeRange, TensorSpec
from gpuopt.stages import confirm
from gpuopt.stages.context import StageContext
from gpuopt.storage import write_json

Array = np.ndarray[Any, Any]
SAMPLES, FEATURES, CLASSES = 10, 6, 4


def linear(weight: Array, outputs: int = 1) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], [f"y{i}"], name=f"m{i}") for i in range(outputs)]
    values = [helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, ["n", CLASSES]) for i in range(outputs)]
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", FEATURES])]
    graph = helper.make_graph(nodes, "g", inputs, values, [numpy_helper.from_array(weight, "w")])
    return onnx_model.with_types(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10))


GENERATOR = np.random.default_rng(0)
WEIGHT = GENERATOR.standard_normal((FEATURES, CLASSES), dtype=np.float32)
OTHER = WEIGHT + 0.3 * GENERATOR.standard_normal(WEIGHT.shape, dtype=np.float32)
X = GENERATOR.standard_normal((SAMPLES, FEATURES), dtype=np.float32)
LABELS = np.arange(SAMPLES) % CLASSES


def context(tmp_path: Path, outputs: int = 1, samples: int | None = None, **accuracy: Any) -> StageContext:
    folder = tmp_path / "reference"
    folder.mkdir()
    specs = (TensorSpec("x", "float32", ("batch", FEATURES)),)
    shape = ShapeRange((1, FEATURES), (2, FEATURES), (2, FEATURES))
    names = tuple(f"y{i}" for i in range(outputs))
    reference.record(
        folder,
        reference.Interface(specs, names, ({"x": shape},)),
        lambda feed: [feed["x"] @ WEIGHT] * outputs,
        {f"profile0-{p}": {"x": X[:n]} for p, n in (("min", 1), ("opt", 2))},
        "PyTorch",
    )
    if not (tmp_path / "data.npz").exists():
        np.savez(tmp_path / "data.npz", x=X, labels=LABELS)
    return StageContext(
        recipe=recipe.resolve({"model": {"path": "m"}, "accuracy": {"max_drop": 0.1, **accuracy}}),
        artifacts={"reference": Artifact("reference", folder, "")},
        output=tmp_path,
        progress=Silent(),
        data=str(tmp_path / "data.npz"),
        samples=samples,
    )


def score(chosen: StageContext, weight: Array, outputs: int = 1) -> evaluation.Score:
    opened = open_evaluation(chosen, linear(WEIGHT, outputs), chosen.output / "scratch")
    return opened.score(linear(weight, outputs), chosen.output / "graph")


def refused(chosen: StageContext, outputs: int = 1) -> GpuoptError:
    with pytest.raises(GpuoptError) as caught:
        score(chosen, WEIGHT, outputs)
    assert len(caught.value.hint.splitlines()) <= 2
    assert len(caught.value.lines().splitlines()) in (2, 3)
    return caught.value


def test_top_one_accuracy_with_labels_beside_the_inputs(tmp_path: Path) -> None:
    found = score(context(tmp_path, labels="labels"), OTHER)
    assert found.samples == SAMPLES
    assert found.value == np.mean((X @ OTHER).argmax(1) == LABELS)


def test_top_one_agreement_without_labels(tmp_path: Path) -> None:
    found = score(context(tmp_path), OTHER)
    assert found.value == np.mean((X @ OTHER).argmax(1) == (X @ WEIGHT).argmax(1)) < 1


def test_mean_cosine_of_other_outputs(tmp_path: Path) -> None:
    found = score(context(tmp_path, outputs=2), OTHER, 2)
    got, want = X @ OTHER, X @ WEIGHT
    cosines = np.sum(got * want, 1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    assert found.value == pytest.approx(cosines.mean(), abs=1e-6)


@pytest.mark.parametrize("file", [False, True])
def test_labels_of_some_samples_are_those_of_these_samples(tmp_path: Path, file: bool) -> None:
    """3 of 10 samples stand at 0, 3 and 6."""
    np.save(tmp_path / "labels.npy", LABELS[:, np.newaxis])
    chosen = context(tmp_path, samples=3, labels=str(tmp_path / "labels.npy") if file else "labels")
    found = score(chosen, OTHER)
    assert found == evaluation.Score(np.mean((X @ OTHER).argmax(1)[[0, 3, 6]] == LABELS[[0, 3, 6]]), 3)


def test_samples_may_be_batches(tmp_path: Path) -> None:
    folder = tmp_path / "data.npz"
    folder.mkdir()
    for index in range(5):
        np.savez(folder / f"{index}.npz", x=X[2 * index : 2 * index + 2])
    np.save(tmp_path / "labels.npy", LABELS)
    chosen = context(tmp_path, labels=str(tmp_path / "labels.npy"), samples=2)
    picked = [0, 1, 4, 5]
    assert score(chosen, OTHER).value == np.mean((X @ OTHER).argmax(1)[picked] == LABELS[picked])


@pytest.mark.parametrize(("count", "accepted"), [(8, True), (9, False), (10, True), (11, False)])
def test_labels_of_rows_that_fill_no_batch_are_left_out(tmp_path: Path, count: int, accepted: bool) -> None:
    np.save(tmp_path / "labels.npy", np.resize(LABELS, count))
    chosen = context(tmp_path, labels=str(tmp_path / "labels.npy"))
    inputs = [TensorSpec("x", "float32", (4, FEATURES))]

    def found() -> list[int]:
        taken = evaluation._labels(chosen.recipe.accuracy, chosen, inputs, [4, 4])
        return [int(label) for label in taken]

    if accepted:
        assert found() == LABELS[:8].tolist()
    else:
        with pytest.raises(DataError, match=f"{count} labels for 8 evaluation samples"):
            found()


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> str:
    name = f"metric_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(f"import numpy as np\ndef metric(predictions, labels):\n    {code}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop(name, None)
    return f"{name}:metric"


def test_a_metric_gets_all_predictions_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(tmp_path, monkeypatch, "return predictions[:, 0].sum() + labels.sum()")
    found = score(context(tmp_path, metric=name, labels="labels"), OTHER)
    assert found.value == pytest.approx(float((X @ OTHER)[:, 0].sum() + LABELS.sum()), rel=1e-5)


def test_a_metric_gets_a_dict_of_several_outputs_and_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module(tmp_path, monkeypatch, "return len(predictions) * len(predictions['y1']) if labels is None else 0")
    assert score(context(tmp_path, outputs=2, metric=name), OTHER, 2).value == 2 * SAMPLES


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('no figures')", "fails: RuntimeError: no figures"),
        ("return float('nan')", "returned nan"),
        ("return float('inf')", "returned inf"),
        ("return 'good'", "fails: ValueError"),
        ("return None", "fails: TypeError"),
    ],
)
def test_a_metric_that_gives_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str) -> None:
    error = refused(context(tmp_path, metric=module(tmp_path, monkeypatch, code)))
    assert isinstance(error, UsageError)
    assert said in error.message


@pytest.mark.parametrize("metric", ["no_such_module:f", "gpuopt.errors:no_such_function", "gpuopt.errors:KINDS"])
def test_a_metric_that_is_not_there(tmp_path: Path, metric: str) -> None:
    assert metric in refused(context(tmp_path, metric=metric)).message


@pytest.mark.parametrize("count", [SAMPLES - 1, SAMPLES + 1])
@pytest.mark.parametrize("samples", [None, 4])
def test_labels_of_another_number(tmp_path: Path, count: int, samples: int | None) -> None:
    np.save(tmp_path / "labels.npy", np.zeros(count, np.int64))
    error = refused(context(tmp_path, labels=str(tmp_path / "labels.npy"), samples=samples))
    assert isinstance(error, DataError)
    assert f"{count} labels for {SAMPLES} evaluation samples" in error.message


def test_labels_that_are_not_there(tmp_path: Path) -> None:
    error = refused(context(tmp_path, labels="answers"))
    assert isinstance(error, DataError)
    assert "'answers' cannot be read" in error.message


def test_labels_that_are_no_class_numbers_need_a_metric(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.zeros((SAMPLES, 3)))
    error = refused(context(tmp_path, labels=str(tmp_path / "labels.npy")))
    assert "without a metric" in error.message
    assert "y0 batchx4" in error.message


def test_labels_of_several_outputs_need_a_metric(tmp_path: Path) -> None:
    assert "without a metric" in refused(context(tmp_path, outputs=2, labels="labels"), 2).message


def test_pickled_labels_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.array([{"a": 1}] * SAMPLES), allow_pickle=True)
    assert "cannot be read" in refused(context(tmp_path, labels=str(tmp_path / "labels.npy"))).message


def test_scores_of_nan_are_a_miss() -> None:
    metric = TopOne("y", np.array([0, 1]))
    metric.add({"y": np.array([[np.nan, 0.0], [0.0, 1.0]], np.float32)}, {})
    assert metric.value() == 0.5


def test_cosine_of_outputs_that_are_no_floats_is_the_share_of_equal_ones() -> None:
    metric = MeanCosine()
    metric.add({"y": np.array([1, 2, 3, 5])}, {"y": np.array([1, 2, 3, 4])})
    metric.add({"y": np.zeros(3, np.float32)}, {"y": np.zeros(3, np.float32)})
    assert metric.value() == pytest.approx((0.75 + 1) / 2)


def test_a_budget_that_is_just_held_is_held() -> None:
    assert within(0.9, 0.85, 0.05)
    assert not within(0.9, 0.8499, 0.05)
    assert within(0.9, 0.95, 0.0)


@pytest.mark.parametrize(("allowed", "holds"), [(0.9, True), (0.001, False)])
def test_the_budget_is_confirmed_of_the_graph_that_ships(tmp_path: Path, allowed: float, holds: bool) -> None:
    chosen = context(tmp_path, labels="labels", max_drop=allowed)
    artifacts = dict(chosen.artifacts)
    for kind, weight in (("float_onnx", WEIGHT), ("onnx", OTHER)):
        onnx_model.save(linear(weight), tmp_path / kind)
        artifacts[kind] = Artifact(kind, tmp_path / kind, "")
    write_json(tmp_path / "accuracy/accuracy.json", {"metric": "top-1 accuracy", "fp32": 1.0, "max_drop": allowed})
    artifacts["accuracy"] = Artifact("accuracy", tmp_path / "accuracy", "")
    chosen = dataclasses.replace(chosen, artifacts=artifacts)
    if not holds:
        with pytest.raises(AccuracyError, match="until the biases were corrected"):
            confirm.run(chosen)
        return
    assert confirm.run(chosen).facts["value"] == np.mean((X @ OTHER).argmax(1) == LABELS)
