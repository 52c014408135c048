"""The figures of a node alone against its definition, the ranking, and the journal of what is finished."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from gpuopt import onnx_model
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration.collectors import TensorRange
from gpuopt.comparison import Distance, compare
from gpuopt.onnx_model import watching, with_types
from gpuopt.quantization import macs
from gpuopt.quantization.sensitivity import Figures, Journal, _figures, measure, ranked
from gpuopt.quantization.variants import Variants, WeightsFile
from gpuopt.recipe import QuantizeSection
from tests.unit.stages.test_quantize import KNOWN, small_network

RANGES = {**KNOWN, "x": TensorRange(-5, 5, "minmax"), "m": TensorRange(-4, 4, "minmax")}


def subject(**ranges: TensorRange) -> Variants:
    model = with_types(small_network())
    known = {**RANGES, **ranges}
    section = QuantizeSection(min_channels=8)
    return Variants(model, section, known, True)


def feeds(count: int = 5) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    generator = np.random.default_rng(0)
    for _ in range(count):
        yield {"x": generator.standard_normal((2, 16, 8, 8), dtype=np.float32)}


def test_figures_are_those_of_the_node_quantized_alone(tmp_path: Path) -> None:
    variants = subject()
    measured = measure(variants, feeds(), tmp_path / "scratch", Journal(None))
    assert measured.samples == 5
    assert list(measured.alone) == ["c1", "c2", "s", "a", "head"]
    made = {"c1": "c1", "c2": "c2", "s": "s", "a": "a", "head": "y"}

    def values(model: onnx.ModelProto, name: str) -> list[dict[str, Any]]:
        folder = tmp_path / "check"
        folder.mkdir(exist_ok=True)
        path = folder / "m.onnx"
        onnx.save(watching(model, [name]), str(path))
        session = Session(path)
        return [session.run(feed) for feed in feeds()]

    for node, name in made.items():
        exact, alone = values(variants.model, name), values(variants.alone(node), name)
        together = values(variants.in_int8(variants.nodes), name)
        for found, output, actual in (
            (measured.alone[node].own_sqnr_db, name, alone),
            (measured.alone[node].output_sqnr_db, "y", alone),
            (measured.accumulated[node], name, together),
        ):
            stacks = [np.concatenate([v[output] for v in runs]) for runs in (actual, exact)]
            assert found == pytest.approx(compare(*stacks)["sqnr_db"], abs=1e-3), (node, output)
    # The last node's output is the model's.
    assert measured.alone["head"].own_sqnr_db == pytest.approx(measured.alone["head"].output_sqnr_db)
    assert measured.accumulated["head"] == pytest.approx(measured.whole.output_sqnr_db)


def test_a_node_with_a_bad_range_is_ranked_first_and_the_ranking_is_repeatable(tmp_path: Path) -> None:
    variants = subject(r1=TensorRange(-4000, 4000, "minmax"))
    work = macs.count(variants.model, None, tmp_path / "shapes")
    runs = [ranked(variants, measure(variants, feeds(), tmp_path / f"s{n}", Journal(None)), work) for n in range(2)]
    assert runs[0] == runs[1]
    assert (runs[0][0].node, runs[0][0].rank) == ("c2", 1)
    costs = [layer.cost for layer in runs[0]]
    assert costs == sorted(costs, key=lambda cost: -(cost or 0))
    assert sum(layer.macs_share for layer in runs[0]) == pytest.approx(1)


def test_the_number_of_sessions_is_linear_and_the_journal_saves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    real = Session.__init__

    def counting(self: Session, model: Path, *arguments: Any, **others: Any) -> None:
        opened.append(model)
        real(self, model, *arguments, **others)

    monkeypatch.setattr(Session, "__init__", counting)
    variants, journal = subject(), tmp_path / "journals/j.jsonl"
    first = measure(variants, feeds(), tmp_path / "a", Journal(journal))
    assert len(opened) == 1 + len(variants.nodes) + 2
    lines = journal.read_bytes().splitlines()
    # Cut off in the third node's line, as a kill in the middle of a write leaves it.
    kept = b"\n".join([*lines[:4], lines[5][:30]])
    journal.write_bytes(kept)
    opened.clear()
    again = measure(variants, feeds(), tmp_path / "b", Journal(journal))
    assert len(opened) == 1 + (len(variants.nodes) - 2) + 2
    assert again == first
    assert Journal(journal).figures == first.alone


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_damaged_line_is_passed_over_and_the_others_count(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        journal = Journal(path)
        for index in range(4):
            journal.add(f"n{index}", Figures(10.0 + index, 20.0, 0.99, 0.01))
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(bytes(content))
        found = Journal(path).figures
        assert all(journal.figures.get(node) == figures for node, figures in found.items())
        assert len(found) >= 2, "a line break that is gone takes two lines along"


def test_a_journal_that_is_no_text_is_empty(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"\xff\x00\n[1]\n{}\nnull\n")
    assert Journal(tmp_path / "j").figures == {}


def test_nan_in_the_outputs_is_the_worst_cost(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(16, dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="h"),
        helper.make_node("Sub", ["h", "limit"], ["d"], name="d"),
        helper.make_node("Sqrt", ["d"], ["y"], name="y"),
    ]
    limit = numpy_helper.from_array(np.float32(0.999), "limit")
    value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4, 16]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [weight, limit])
    model = with_types(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10))
    known = {"x": TensorRange(-100, 100, "minmax")}
    variants = Variants(model, QuantizeSection(), known, False)
    # 1 becomes 0.787 on a grid of 100/127, and what was the root of a small number becomes NaN.
    found = measure(variants, [{"x": np.ones((4, 16), np.float32)}], tmp_path / "s", Journal(None))
    assert (found.alone["h"].cost, found.alone["h"].output_sqnr_db) == (None, None)
    assert ranked(variants, found, {})[0].node == "h"


def test_a_variant_beside_the_weights_file_is_small_and_computes_the_same(tmp_path: Path) -> None:
    variants = subject()
    weights = WeightsFile(variants.model, tmp_path / "shared")
    for node in variants.nodes:
        values = []
        for model, folder in ((variants.alone(node), "own"), (variants.alone(node, weights), "shared")):
            path = onnx_model.save(model, tmp_path / folder)
            values.append([Session(path).run(feed)["y"] for feed in feeds()])
        assert np.array_equal(*values), node
        own = {tensor.name for tensor in model.graph.initializer if not tensor.HasField("data_location")}
        assert "w2" not in own or node == "c2", "only the node's own weights are in the file"


def test_what_depends_on_a_node_falls_back_with_it(tmp_path: Path) -> None:
    variants = subject()
    assert variants.in_int8([]) is variants.model
    assert [d.node for d in variants.placed({"s"}, "because") if not d.quantized] == ["s"], "the other one is fused"
    fallen = variants.placed({"c2", "s"}, "because")
    assert [(d.node, d.reason) for d in fallen if not d.quantized] == [
        ("c2", "because"),
        ("s", "because"),
        ("a", "Conv 's' behind it stays in floating point"),
    ]


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.floats(1e-6, 1e6))
def test_sums_over_samples_give_the_figures_of_all_samples_at_once(seed: int, count: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    want = (generator.standard_normal((count, 7)) * scale).astype(np.float32)
    got = (want + generator.standard_normal((count, 7)) * scale * 0.1).astype(np.float32)
    distance = Distance()
    for actual, expected in zip(got, want, strict=True):
        distance.add(actual, expected)
    figures = compare(got, want)
    assert distance.sqnr_db == pytest.approx(figures["sqnr_db"], abs=1e-6)
    assert distance.cosine == pytest.approx(figures["cosine"], abs=1e-9)


def test_what_is_undefined_has_no_figure() -> None:
    exact, broken, zero, whole = Distance(), Distance(), Distance(), Distance()
    one = np.ones(3, np.float32)
    exact.add(one, one)
    assert (exact.relative_error, exact.sqnr_db, exact.cosine) == (0.0, None, 1.0)
    broken.add(np.array([1, np.nan, 1], np.float32), one)
    assert (broken.relative_error, broken.sqnr_db, broken.cosine) == (math.inf, None, None)
    zero.add(one, one * 0)
    assert (zero.relative_error, zero.sqnr_db, zero.cosine) == (math.inf, None, None)
    whole.add(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]))
    assert (whole.relative_error, whole.sqnr_db, whole.cosine) == (0.25, None, None)


def test_integers_and_silent_outputs_do_not_hide_the_worst_sqnr() -> None:
    generator = np.random.default_rng(0)
    want = generator.standard_normal(100).astype(np.float32)
    numbers, silent, good, bad = Distance(), Distance(), Distance(), Distance()
    numbers.add(np.arange(10), np.arange(10) // 5 * 5)
    silent.add(np.full(3, 1e-9, np.float32), np.zeros(3, np.float32))
    good.add(want * np.float32(1.001), want)
    bad.add(want * np.float32(1.1), want)
    found = _figures(None, [numbers, silent, good, bad])
    assert (found.output_sqnr_db, found.cost) == (pytest.approx(20, abs=0.01), 0.8)
    assert _figures(None, [silent]) == Figures(None, None, None, 0.0)


def test_infinity_where_fp32_has_it_is_no_error() -> None:
    distance = Distance()
    values = np.array([1, -np.inf, 2], np.float32)
    distance.add(values, values)
    assert distance.relative_error == 0
