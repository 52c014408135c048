"""Two reports side by side: verdicts, refusals, and the renderings against golden files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpuopt.comparing import judge, limits, page, render
from gpuopt.comparing.command import document
from gpuopt.comparing.judge import Answer
from gpuopt.comparing.load import load
from gpuopt.comparing.model import Comparison, Row
from gpuopt.errors import ComparisonError, RegressionError, StorageError, UsageError
from gpuopt.report.model import Estimate, Report
from tests.conftest import Gpuopt
from tests.unit.comparing.samples import ENGINE, benchmark, gate, outputs, report

GOLDEN = Path(__file__).parent.parent.parent / "golden"
COMMAND = ("gpuopt", "compare", "old.gpuopt", "new.gpuopt")


def compared(old: Report, new: Report, *allowed: str, **given: Any) -> Answer:
    """The answer; limits by their flag, as `max_p99_regress="5%"`."""
    flags = {"--" + name.replace("_", "-"): value for name, value in given.items()}
    return judge.compare(
        (Path("old.gpuopt"), old), (Path("new.gpuopt"), new), limits.read(flags), allowed, command=COMMAND
    )


def row(answer: Answer, name: str, file: str = ENGINE) -> Row:
    return next(one for one in answer.comparison.rows if one.name == name and one.file == file)


def same() -> Answer:
    return compared(report(benchmark(1)), report(benchmark(2), warnings=[]))


def regression() -> Answer:
    worse = report(
        benchmark(3, 1.12, device_memory_bytes=60 << 20),
        sqnr_db=29.5,
        size_bytes=14_000_000,
        accuracy=0.98,
        gates=[gate(verdict="failed", value=1.17)],
    )
    return compared(report(benchmark(1)), worse)


def refused() -> Answer:
    other = benchmark(2, where="NVIDIA L4", driver_version="12.8", library_version="10.9.0", cuda_graph=False)
    return compared(report(benchmark(1)), report(other))


ANSWERS = {"same": same, "regression": regression, "refused": refused}
FORMS = {
    "md": render.markdown,
    "txt": lambda found: render.terminal(found) + "\n",
    "json": lambda found: document(found) + "\n",
    "html": page.page,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ANSWERS)
def test_the_rendering_is_the_golden_one(name: str, form: str, request: pytest.FixtureRequest) -> None:
    shown = FORMS[form](ANSWERS[name]().comparison)
    golden = GOLDEN / f"compare-{name}.{form}"
    if request.config.getoption("--update-golden"):
        golden.write_text(shown)
    assert shown == golden.read_text()


def test_the_outcomes_are_three() -> None:
    assert same().error is None
    worse, other = regression().error, refused().error
    assert isinstance(worse, RegressionError)
    assert worse.exit_code == 15
    assert "(and 11 more)" in worse.message
    assert isinstance(other, ComparisonError)
    assert other.exit_code == 16
    assert "NVIDIA H100 80GB HBM3, NEW NVIDIA L4 (and 3 more)" in other.message
    for error in (worse, other):
        assert len([error.message, *error.hint.splitlines()]) <= 3


def test_the_document_survives_json() -> None:
    for make in ANSWERS.values():
        found = make().comparison
        assert Comparison.model_validate_json(document(found)) == found


def test_equal_reports_give_equal_answers_and_nothing_worse() -> None:
    one = compared(report(benchmark(1)), report(benchmark(1)))
    assert one.error is None
    assert one.comparison == compared(report(benchmark(1)), report(benchmark(1))).comparison
    assert row(one, "latency_p99_ms").change == 0


@pytest.mark.parametrize(
    ("aspect", "changes"),
    [
        ("gpu", {"where": "CPU Some"}),
        ("library", {"library_version": "9.0"}),
        ("driver", {"driver_version": "12.0"}),
        ("shapes", {"shapes": {"image": "4x3x224x224"}, "batch": 4}),
        ("definition", {"cuda_graph": False}),
        ("definition", {"definition": 2}),
        ("definition", {"includes": "copies, too"}),
    ],
)
def test_what_differs_is_refused_unless_it_is_allowed(aspect: str, changes: dict[str, Any]) -> None:
    old, new = report(benchmark(1)), report(benchmark(2, **changes))
    answer = compared(old, new)
    assert isinstance(answer.error, ComparisonError)
    assert f"--allow-different {aspect}" in answer.error.hint
    assert not answer.comparison.rows
    other = "model" if aspect != "model" else "gpu"
    assert compared(old, new, other).error is not None
    for allowed in (aspect, "all"):
        answer = compared(old, new, allowed)
        assert answer.error is None
        assert "compared all the same" in render.terminal(answer.comparison)
        assert all(difference.allowed for difference in answer.comparison.differences)


def test_other_output_names_are_another_model() -> None:
    old, new = report(), report(output="scores")
    error = compared(old, new).error
    assert isinstance(error, ComparisonError)
    assert "outputs: OLD logits, NEW scores" in error.message
    answer = compared(old, new, "model")
    assert answer.error is None
    assert {one.reason for one in answer.comparison.rows if one.name == "sqnr_db"} == {
        "OLD: no such figure",
        "NEW: no such figure",
    }


def test_a_target_that_is_gone_is_refused() -> None:
    old = report()
    new = report(engines=old.engines[1:])
    assert isinstance(compared(old, new).error, ComparisonError)
    assert compared(new, old).error is None
    assert compared(old, new, "library").error is None


def test_a_benchmark_on_one_side_alone_is_told_and_a_demanded_limit_fails() -> None:
    old, new = report(), report(benchmark(1))
    answer = compared(old, new)
    assert answer.error is None
    assert row(answer, "latency_p99_ms").reason == "OLD: no benchmark"
    demanded = compared(old, new, max_p99_regress="5%").error
    assert isinstance(demanded, ComparisonError)
    assert "--max-p99-regress cannot be checked" in demanded.message
    assert isinstance(compared(old, old, max_p99_regress="5%").error, ComparisonError)
    assert isinstance(compared(old, old, max_throughput_regress="5%").error, ComparisonError)
    assert compared(new, new, max_p99_regress="5%", max_memory_regress="1%", max_accuracy_drop="1%").error is None


def test_too_few_timings_are_no_comparison() -> None:
    few = report(benchmark(1, count=300))
    found = row(compared(few, few), "latency_p99_ms")
    assert found.verdict == "not comparable"
    assert found.reason == "300 timings are too few to tell its spread: 500 are needed"
    assert row(compared(few, few), "latency_p95_ms").verdict == "same"


@pytest.mark.parametrize(
    ("flag", "name", "new", "loose"),
    [
        ("max_size_regress", "engine_size_bytes", report(size_bytes=14_000_000), "20%"),
        ("max_sqnr_drop", "sqnr_db", report(sqnr_db=29.0), 2.5),
        ("max_p50_regress", "latency_p50_ms", report(benchmark(2, 1.1)), "0.15"),
        ("max_memory_regress", "device_memory_bytes", report(benchmark(2, device_memory_bytes=58 << 20)), "20%"),
        ("max_throughput_regress", "throughput_samples_per_second", report(benchmark(2, 1.1)), "15%"),
    ],
)
def test_a_limit_decides(flag: str, name: str, new: Report, loose: str | float) -> None:
    old = report(benchmark(1))
    assert row(compared(old, new), name).verdict == "worse"
    assert row(compared(old, new, **{flag: loose}), name).verdict == "same"
    assert row(compared(new, old), name).verdict == "better"


def test_accuracy_may_not_drop_at_all() -> None:
    answer = compared(report(accuracy=0.99), report(accuracy=0.9899))
    assert isinstance(answer.error, RegressionError)
    assert row(answer, "accuracy", "").verdict == "worse"
    assert compared(report(accuracy=0.99), report(accuracy=0.9899), max_accuracy_drop="0.1%").error is None


def test_a_throughput_within_the_spread_of_its_rounds_is_not_worse() -> None:
    wide = Estimate(value=7500, low=7300, high=7990)
    answer = compared(report(benchmark(1)), report(benchmark(2, throughput_samples_per_second=wide)))
    found = row(answer, "throughput_samples_per_second")
    assert found.change_share is not None
    assert found.change_share < -0.05
    assert found.verdict == "same"
    assert found.reason == "beyond the limit, but not by more than its spread"


def test_speed_without_a_spread_is_not_judged() -> None:
    alone = Estimate(value=4000, low=None, high=None)
    answer = compared(report(benchmark(1)), report(benchmark(2, throughput_samples_per_second=alone)))
    assert answer.error is None
    assert row(answer, "throughput_samples_per_second").reason == "its spread was not measured"


def test_exact_outputs_do_not_regress_into_rounding() -> None:
    assert compared(report(sqnr_db=None), report(sqnr_db=118.0)).error is None
    assert isinstance(compared(report(sqnr_db=None), report(sqnr_db=60.0)).error, RegressionError)


def test_outputs_with_nan_are_worse() -> None:
    broken = {"outputs": [{**one, "finite": False} for one in outputs(31.0, graph="model.onnx")]}
    answer = compared(report(), report(verification=broken))
    assert isinstance(answer.error, RegressionError)
    assert row(answer, "sqnr_db", "model.onnx").verdict == "worse"
    assert row(compared(report(verification=broken), report()), "sqnr_db", "model.onnx").verdict == "better"


def test_a_gate_that_failed_before_does_not_fail_newly() -> None:
    open_gate = report(gates=[gate(verdict="unknown", value=None)])
    assert compared(open_gate, open_gate).error is None
    assert row(compared(open_gate, report()), "gates_not_passed", "").verdict == "better"
    error = compared(report(), open_gate).error
    assert isinstance(error, RegressionError)
    assert "gates not passed is worse: +1; newly unknown: latency_p99_ms of tensorrt" in error.message


def test_a_run_that_failed_is_worse() -> None:
    failed = report(status="failed", engines=[], verification=None, stages=[], gates=[])
    assert isinstance(compared(report(), failed).error, RegressionError)
    assert compared(failed, report()).error is None


def test_names_in_the_page_and_in_tables_are_escaped() -> None:
    name = "<script>alert('x')</script>|\x1b[31m**\n| a @everyone _b_ c_d"
    old, new = report(output=name), report(output=name, sqnr_db=20.0)
    answer = compared(old, new)
    assert answer.error is not None
    assert "\x1b" not in answer.error.message
    found = answer.comparison
    shown = page.page(found)
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    for forbidden in ("http://", "https://", "<link", "<img", "url("):
        assert forbidden not in shown
    table = render.markdown(found)
    assert "<script" not in table.replace("\\<", "")
    assert "\x1b" not in table + render.terminal(found)
    assert "@everyone" not in table
    assert "\\_b\\_ c_d" in table
    assert {line.replace("\\|", "").count("|") for line in table.splitlines() if line.startswith("|")} == {7}


@pytest.mark.parametrize("text", ["x", "-1", "nan", "inf", "-5%", ""])
def test_a_limit_that_is_no_share_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--max-p99-regress"):
        limits.read({"--max-p99-regress": text})


def test_shares_are_read_with_and_without_a_percent_sign() -> None:
    assert limits.read({"--max-p99-regress": "7.5%"}).values["--max-p99-regress"] == pytest.approx(0.075)
    assert limits.read({"--max-p99-regress": "0.075"}).demanded == {"--max-p99-regress"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        report().model_dump_json().replace('"schema_version":1', '"schema_version":2').encode(),
        report(benchmark(1, timings_ms=[1.0, -1.0])).model_dump_json().encode(),
        report().model_dump_json().replace('"seconds":9.5', '"seconds":9.5,"more":1').encode(),
    ],
)
def test_a_damaged_report_is_a_storage_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(StorageError):
        load(path)


def test_facts_of_another_kind_are_a_storage_error() -> None:
    broken = report(verification={"outputs": [{"graph": "model.onnx"}]})
    with pytest.raises(StorageError, match="NEW is damaged"):
        compared(report(), broken)


def test_the_command_writes_everything_and_ends_with_its_code(gpuopt: Gpuopt, tmp_path: Path) -> None:
    for name, made in (("old", report(benchmark(1))), ("new", report(benchmark(2, 1.12)))):
        (tmp_path / f"{name}.json").write_text(made.model_dump_json())
    files = ("--markdown", "c.md", "--html", "c.html", "-o", "c.json")
    result = gpuopt("compare", "old.json", "new.json", "--json", *files, cwd=tmp_path)
    assert result.code == 15
    assert json.loads(result.stdout) == json.loads((tmp_path / "c.json").read_text())
    assert result.report()["status"] == "regressed"
    assert result.report()["error"]["exit_code"] == 15
    assert (tmp_path / "c.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "c.md").read_text().startswith("# gpuopt compare: ")
    assert len(result.stderr.splitlines()) <= 3
    better = gpuopt("compare", "new.json", "old.json", cwd=tmp_path)
    assert better.code == 0
    assert "nothing is worse" in better.stdout
    assert gpuopt("compare", "new.json", "none.json", cwd=tmp_path).code == 10
    assert gpuopt("compare", "new.json", "old.json", "--max-p99-regress", "x", cwd=tmp_path).code == 2


def engines_changed(found: Report, **changes: Any) -> Report:
    """The report with its engines changed; nothing was measured."""
    engines = [one if one.target == "onnxruntime" else one.model_copy(update=changes) for one in found.engines]
    return found.model_copy(update={"engines": engines, "benchmarks": []})


@pytest.mark.parametrize(
    ("changes", "aspect"), [({"library_version": "8.6.1"}, "library"), ({"compute_capabilities": ["7.5"]}, "gpu")]
)
def test_engines_of_another_library_or_gpu_are_refused_also_without_a_benchmark(
    changes: dict[str, Any], aspect: str
) -> None:
    old, new = engines_changed(report()), engines_changed(report(), **changes)
    assert isinstance(compared(old, new).error, ComparisonError)
    assert compared(old, new, aspect).error is None
    assert compared(old, engines_changed(report())).error is None


def test_a_gate_that_is_gone_is_no_better() -> None:
    old = report(gates=[gate(verdict="failed", value=1.17)])
    gone, passed = report(gates=[gate().model_copy(update={"name": "cosine"})]), report(gates=[gate()])
    assert row(compared(old, gone), "gates_not_passed", "").verdict == "same"
    assert row(compared(old, passed), "gates_not_passed", "").verdict == "better"
