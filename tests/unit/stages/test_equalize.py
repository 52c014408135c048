"""The stages that measure before they apply: equalisation before INT8, bias correction after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from gpuopt import onnx_model, recipe, reference
from gpuopt.artifact import Artifact, StageOutcome, folder_sha256
from gpuopt.calibration import held_out
from gpuopt.errors import DataError
from gpuopt.progress import Silent
from gpuopt.reference import Interface
from gpuopt.shapes import ShapeRange, TensorSpec
from gpuopt.stages import calibrate, choose, correct, equalize, quantize
from gpuopt.stages.context import StageContext
from tests.unit.quantization.graphs import Array, depthwise_block, model_of, normal, normalized_products, run


def even_network() -> onnx.ModelProto:
    """Weights of one magnitude, so that no channel differs from another but by chance."""
    g = np.random.default_rng(5)
    shapes = {"w1": (64, 16, 3, 3), "w2": (64, 64, 3, 3), "w3": (16, 64, 1, 1)}
    constants = {name: g.choice([-0.1, 0.1], shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("Conv", ["r2", "w3"], ["y"]),
    ]
    return model_of(nodes, constants, ("batch", 16, 8, 8))


class Pipeline:
    """The INT8 stages on one graph and one stack of samples."""

    def __init__(self, folder: Path, model: onnx.ModelProto, samples: Array, **sections: Any) -> None:
        self.folder, self.model = folder, model
        np.savez(folder / "data.npz", x=samples)
        self.recipe = recipe.resolve({"model": {"path": "m"}, **sections})
        onnx_model.save(model, folder / "onnx")
        (folder / "reference").mkdir()
        shape = samples.shape[1:]
        profile = {"x": ShapeRange((1, *shape), (2, *shape), (4, *shape))}
        names = tuple(value.name for value in model.graph.output)
        interface = Interface((TensorSpec("x", "float32", ("batch", *shape)),), names, (profile,))
        feeds = {corner.name: {"x": samples[: corner.shapes["x"][0]]} for corner in reference.corners((profile,))}
        reference.record(folder / "reference", interface, lambda feed: run(model, feed["x"]), feeds, "ONNX")
        self.artifacts = {kind: Artifact(kind, folder / kind, "") for kind in ("onnx", "reference")}

    def run(self, stage: Any) -> StageOutcome:
        output = self.folder / stage.__name__.rpartition(".")[2]
        output.mkdir()
        context = StageContext(self.recipe, self.artifacts, output, Silent(), str(self.folder / "data.npz"))
        outcome: StageOutcome = stage.run(context)
        made = {kind.name: Artifact(kind.name, kind, "") for kind in output.iterdir()}
        self.artifacts = {**self.artifacts, **made}
        return outcome

    def graph(self, kind: str) -> onnx.ModelProto:
        return onnx_model.load(self.artifacts[kind].path)

    def sqnr_db(self, x: Array) -> float:
        """Of the INT8 graph as it stands, on other samples."""
        pairs = zip(run(self.model, x), run(self.graph("onnx"), x), strict=True)
        return float(np.mean([10 * np.log10(np.sum(a**2) / np.sum((a - b) ** 2)) for a, b in pairs]))


def images(count: int, seed: int = 0) -> Array:
    return normal(np.random.default_rng(seed), count, 16, 8, 8)


def tokens(count: int, seed: int = 0) -> Array:
    return normal(np.random.default_rng(seed), count, 12, 64)


@pytest.mark.parametrize(("make", "data"), [(depthwise_block, images), (normalized_products, tokens)])
def test_auto_evens_out_channels_where_that_pays(tmp_path: Path, make: Any, data: Any) -> None:
    reached = {}
    for mode in ("auto", "off"):
        folder = tmp_path / mode
        folder.mkdir()
        pipeline = Pipeline(folder, make(), data(40), quantize={"equalize": mode, "min_channels": 8})
        facts = pipeline.run(equalize).facts
        assert facts["applied"] == (mode == "auto")
        pipeline.run(calibrate)
        pipeline.run(choose)
        pipeline.run(quantize)
        reached[mode] = pipeline.sqnr_db(data(40, seed=7))
        if mode == "auto":
            assert facts["method"] in ("cross-layer", "smooth")
            assert facts["sqnr_db_after"] > facts["sqnr_db_before"] + 3
            assert facts["changed_nodes"]
            assert {row["method"] for row in facts["tried"]} >= {"smooth"}
            x = data(3, seed=9)
            exact = run(pipeline.model, x)
            for one, other in zip(run(pipeline.graph("float_onnx"), x), exact, strict=True):
                assert np.allclose(one, other, rtol=1e-3, atol=1e-4)
    assert reached["auto"] > reached["off"] + 3


def test_auto_leaves_even_channels_alone(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, even_network(), images(64))
    facts = pipeline.run(equalize).facts
    assert (facts["applied"], facts["changed_nodes"], facts["sites"]) == (False, [], 2)
    assert "nothing gains" in facts["reason"]
    assert [row["method"] for row in facts["tried"]][:2] == ["cross-layer", "smooth"]
    assert pipeline.graph("onnx") == pipeline.model
    assert folder_sha256(pipeline.artifacts["onnx"].path) == folder_sha256(tmp_path / "onnx")


def without_sites() -> onnx.ModelProto:
    g = np.random.default_rng(0)
    constants = {"w1": normal(g, 32, 16, 1, 1), "w2": normal(g, 32, 32, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"]),
        helper.make_node("Sigmoid", ["c1"], ["a"]),
        helper.make_node("Conv", ["a", "w2"], ["y"]),
    ]
    return model_of(nodes, constants, ("batch", 16, 8, 8))


def with_pairs() -> onnx.ModelProto:
    model = depthwise_block()
    scale = onnx.numpy_helper.from_array(np.float32(0.1), "scale")
    zero = onnx.numpy_helper.from_array(np.int8(0), "zero")
    model.graph.initializer.extend([scale, zero])
    model.graph.node[0].input[0] = "dq"
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], name="dq"))
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="q"))
    return model


@pytest.mark.parametrize(
    ("make", "samples", "said"),
    [
        (without_sites, 40, "no two layers"),
        (with_pairs, 40, "holds Q/DQ already"),
        (depthwise_block, held_out.FEWEST_SAMPLES - 1, "too few"),
    ],
)
def test_nothing_is_run_where_nothing_can_come_of_it(
    tmp_path: Path, make: Any, samples: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("samples were run")

    monkeypatch.setattr("gpuopt.stages.equalize.calibrate", never)
    monkeypatch.setattr("gpuopt.quantization.measurement.channel_maxima", never)
    pipeline = Pipeline(tmp_path, make(), images(samples))
    facts = pipeline.run(equalize).facts
    assert said in facts["reason"]
    assert not facts["applied"]


@pytest.mark.parametrize("method", ["cross-layer", "smooth"])
def test_a_method_that_is_asked_for_is_applied_and_measured(tmp_path: Path, method: str) -> None:
    pipeline = Pipeline(tmp_path, depthwise_block(), images(32), quantize={"equalize": method, "smooth_alpha": 0.4})
    facts = pipeline.run(equalize).facts
    assert (facts["applied"], facts["method"], len(facts["tried"])) == (True, method, 1)
    assert facts["alpha"] == (0.4 if method == "smooth" else None)
    assert facts["sqnr_db_after"] > facts["sqnr_db_before"]


def test_a_method_that_is_asked_for_needs_no_more_than_a_sample(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, depthwise_block(), images(1), quantize={"equalize": "smooth"})
    facts = pipeline.run(equalize).facts
    assert facts["applied"]
    assert facts["sqnr_db_after"] is None


def test_bad_data_is_left_to_the_calibration_unless_a_method_is_asked_for(tmp_path: Path) -> None:
    for mode in ("auto", "smooth"):
        folder = tmp_path / mode
        folder.mkdir()
        pipeline = Pipeline(folder, depthwise_block(), images(20), quantize={"equalize": mode})
        np.savez(folder / "data.npz", x=np.full((20, 16, 8, 8), np.nan, np.float32))
        if mode == "auto":
            assert "could not be measured: DataError" in pipeline.run(equalize).facts["reason"]
        else:
            with pytest.raises(DataError):
                pipeline.run(equalize)


def test_a_graph_that_would_change_is_not_taken(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path, depthwise_block(), images(32), quantize={"equalize": "cross-layer"})
    for path in (tmp_path / "reference").glob("*.npz"):
        with np.load(path) as archive:
            arrays = {key: archive[key] + (1 if key.startswith("output:") else 0) for key in archive.files}
        reference.save_arrays(path, arrays)
    outcome = pipeline.run(equalize)
    assert not outcome.facts["applied"]
    assert "would change" in outcome.facts["reason"]
    assert outcome.warnings[0].startswith("the graph was not equalised: output 'y'")
    assert pipeline.graph("onnx") == pipeline.model


# Bias correction ---------------------------------------------------------------------------------


def skewed() -> onnx.ModelProto:
    """Few weights a row, all of one sign: rounding them shifts every output the same way."""
    g = np.random.default_rng(3)
    weight = np.full((32, 16, 1, 1), 0.0349, np.float32)
    weight[:, 0] = 10.0
    constants = {"w1": weight, "w2": normal(g, 32, 32, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"]),
        helper.make_node("Sigmoid", ["c1"], ["a"]),
        helper.make_node("Conv", ["a", "w2"], ["y"]),
    ]
    return model_of(nodes, constants, ("batch", 16, 8, 8))


def lopsided(count: int, seed: int = 0) -> Array:
    """Inputs with a mean, the first channel near zero."""
    found = images(count, seed) * 0.2 + 1
    found[:, 0] *= 0.01
    return found


def corrected(
    folder: Path, model: onnx.ModelProto, samples: Array, **settings: Any
) -> tuple[Pipeline, dict[str, Any], float]:
    """The pipeline up to bias correction, what that stage said, and the SQNR on other samples before it."""
    pipeline = Pipeline(folder, model, samples, quantize={"equalize": "off", **settings})
    for stage in (equalize, calibrate, choose, quantize):
        pipeline.run(stage)
    before = pipeline.sqnr_db(lopsided(32, seed=5))
    return pipeline, dict(pipeline.run(correct).facts), before


def test_auto_corrects_biases_where_that_pays(tmp_path: Path) -> None:
    pipeline, facts, before = corrected(tmp_path, skewed(), lopsided(64))
    assert facts["corrected_nodes"] == 2
    assert facts["sqnr_db_corrected"] > facts["sqnr_db_before"] + 3
    x = lopsided(32, seed=5)
    assert pipeline.sqnr_db(x) > before + 3
    for kind in ("onnx", "engine_onnx"):
        onnx_model.check(pipeline.artifacts[kind].path / "model.onnx")
    assert run(pipeline.graph("onnx"), x)[0].tobytes() == run(pipeline.graph("engine_onnx"), x)[0].tobytes()


def test_auto_leaves_biases_alone_where_it_does_not_pay(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": normal(g, 64, 64)}, ("batch", 12, 64))
    pipeline = Pipeline(tmp_path, model, tokens(32))
    for stage in (equalize, calibrate, choose, quantize):
        pipeline.run(stage)
    before = {kind: folder_sha256(pipeline.artifacts[kind].path) for kind in ("onnx", "engine_onnx")}
    facts = pipeline.run(correct).facts
    assert facts["corrected_nodes"] == 0
    assert facts["reason"]
    assert {kind: folder_sha256(pipeline.artifacts[kind].path) for kind in before} == before


def test_few_samples_leave_biases_alone_unless_it_is_asked_for(tmp_path: Path) -> None:
    for mode, count in (("auto", 0), ("on", 2)):
        folder = tmp_path / mode
        folder.mkdir()
        _, facts, _ = corrected(folder, skewed(), lopsided(6), bias_correction=mode)
        assert facts["corrected_nodes"] == count
        assert ("too few" in facts.get("reason", "")) == (mode == "auto")


def test_trials_keep_the_calibration_s_limit_in_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, limits = equalize.calibrate, []

    def watched(model: Any, tensors: Any, samples: Any, collector: Any, scratch: Path, options: Any) -> Any:
        limits.append(options.max_memory)
        # What several passes need.
        assert len(list(samples)) == len(list(samples)) == 30
        return measured(model, tensors, samples, collector, scratch, options)

    monkeypatch.setattr(equalize, "calibrate", watched)
    pipeline = Pipeline(tmp_path, even_network(), images(40), calibrate={"max_memory": "1GiB"})
    pipeline.run(equalize)
    assert set(limits) == {1 << 30}
