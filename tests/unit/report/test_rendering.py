"""The report's renderings against golden files: `pytest --update-golden` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpuopt.errors import DataError
from gpuopt.report import markdown, terminal
from gpuopt.report.model import EngineReport, Failure, ModelReport, Report, StageReport

GOLDEN = Path(__file__).parent.parent.parent / "golden"


def _row(graph: str, corner: str, batch: int, cosine: float) -> dict[str, object]:
    return {
        "graph": graph,
        "corner": corner,
        "output": "logits",
        "shape": [batch, 10],
        "shape_equal": True,
        "finite": True,
        "cosine": cosine,
        "sqnr_db": 31.25,
        "agreement": None,
        "max_abs_error": 0.0123,
    }


def passing() -> Report:
    invariance = {"checked": True, "batch": 8, "worst_relative_error": 1.5e-7, "failures": []}
    verification = {
        "runtime": "onnxruntime",
        "reference": "PyTorch",
        "passed": True,
        "failures": [],
        "limits": {"min_cosine": 0.95, "min_agreement": 0.9, "min_sqnr_db": 10.0, "batch_tolerance": 0.05},
        "outputs": [
            _row(graph, corner, batch, cosine)
            for graph in ("model.onnx", "engine.onnx")
            for corner, batch, cosine in (("profile0-min", 1, 0.9991), ("profile0-max", 8, 0.99875))
        ],
        "batch_invariance": {
            "model.onnx": invariance,
            "engine.onnx": {"checked": False, "reason": "the shapes have one batch size"},
        },
        "warnings": [],
    }
    facts = {
        "export": {
            "model_kind": "exported program",
            "exporter": "torchscript",
            "attempts": [
                {"exporter": "dynamo", "reason": "output 'logits' | has the shape (2, 10)"},
                {"exporter": "torchscript", "reason": ""},
            ],
            "opset": 20,
            "ir_version": 10,
            "inputs": [
                {
                    "name": "image",
                    "dtype": "float32",
                    "profiles": [{"min": "1x3x8x8", "opt": "4x3x8x8", "max": "8x3x8x8"}],
                }
            ],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": "batchx10"}],
        },
        "equalize": {
            "asked": "auto",
            "sites": 4,
            "samples": 64,
            "held_out": 16,
            "sqnr_db_before": 21.4,
            "method": "smooth",
            "alpha": 0.5,
            "sqnr_db_after": 24.9,
            "applied": True,
            "changed_nodes": ["norm1", "norm2"],
        },
        "correct": {"asked": "auto", "corrected_nodes": 0, "reason": "it gains less than 0.1 dB"},
        "calibrate": {"method": "entropy", "samples": 256, "data": "npz calibration.npz, 256 samples", "tensors": 9},
        "quantize": {
            "format": "qdq",
            "quantized_nodes": 7,
            "candidate_nodes": 9,
            "kept_in_floating_point": [
                {"node": "stem", "op_type": "Conv", "reason": "1 channels on a side, fewer than 16"},
                {"node": "head", "op_type": "Gemm", "reason": "10 channels on a side, fewer than 16"},
            ],
            "quantized": ["conv1", "conv2"],
            "qdq_pairs": 12,
            "scales_rounded_to_fp16": 12,
            "macs": 1_000_000,
            "int8_macs_share": 0.981,
        },
        "cast": {"kept_in_fp32": ["sum"], "cast_nodes": 4, "fp16_weights": 26, "fp32_weights": 1},
        "verify": verification,
    }
    return Report(
        command=["gpuopt", "compile", "model.pt", "--precision", "int8"],
        gpuopt_version="0.1.0",
        created="2026-01-02T03:04:05+00:00",
        status="passed",
        error=None,
        model=ModelReport(path="models/model.pt", factory=None, kind="exported program", sha256="ab" * 32),
        precision="int8",
        bundle="models/model.gpuopt",
        stages=[
            StageReport(name=name, target=None, cached=index == 0, reason="first run", seconds=1.25, facts=said)
            for index, (name, said) in enumerate(facts.items())
        ],
        engines=[
            EngineReport(
                target="tensorrt-rtx",
                file="model.tensorrt-rtx.engine",
                size_bytes=12_345_678,
                sha256="cd" * 32,
                status="built",
                library_version="1.7.1",
                compute_capabilities=["8.9"],
                note="needs an RTX GPU to run",
            ),
            EngineReport(
                target="onnxruntime",
                file="model.onnx",
                size_bytes=900,
                sha256="ef" * 32,
                status="verified",
                library_version="1.31.1",
                compute_capabilities=[],
                note="",
            ),
        ],
        verification=verification,
        warnings=["only 8 calibration samples"],
        environment={
            "python": "3.11.7",
            "platform": "Linux x86_64",
            "packages": {"onnx": "1.23.2"},
            "gpus": [{"name": "Some GPU", "compute_capability": "8.9"}],
        },
        seconds=9.5,
    )


def budgeted() -> Report:
    """One layer was not enough, three were, and one of them could go back."""
    whole = passing()
    facts = {
        "metric": "top-1 accuracy",
        "samples": 450,
        "data": "npz evaluation.npz, 450 samples",
        "max_drop": 0.005,
        "fp32": 0.9911,
        "int8": 0.9133,
        "held": False,
        "final": 0.9867,
        "fell_back": ["conv7", "conv3"],
        "steps": [
            {"in_fp16": ["conv7"], "metric": 0.96, "held": False},
            {"in_fp16": ["conv7", "conv2", "conv3"], "metric": 0.9889, "held": True},
            {"in_fp16": ["conv7", "conv3"], "metric": 0.9867, "held": True},
        ],
        "int8_macs_share_before": 0.981,
        "int8_macs_share": 0.9,
    }
    stage = StageReport(name="fallback", target=None, cached=False, reason="first run", seconds=2.0, facts=facts)
    return whole.model_copy(update={"stages": [*whole.stages, stage]})


def failing() -> Report:
    error = Failure(
        kind="data",
        exit_code=4,
        message="calibration.npz: input 'image' of sample 37 holds NaN",
        hint="Repair or leave out the sample.",
        stage="calibrate",
    )
    whole = passing()
    return whole.model_copy(
        update={
            "status": "failed",
            "error": error,
            "engines": [],
            "verification": None,
            "stages": whole.stages[:1],
            "warnings": [],
            "model": ModelReport(path=None, factory="package.module:factory", kind="factory", sha256=None),
        }
    )


REPORTS = {"passing": passing, "budgeted": budgeted, "failing": failing}
FORMS = {"md": markdown.render, "txt": lambda report: terminal.render(report, report.bundle) + "\n"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", REPORTS)
def test_the_rendering_is_the_golden_one(name: str, form: str, request: pytest.FixtureRequest) -> None:
    shown = FORMS[form](REPORTS[name]())
    golden = GOLDEN / f"report-{name}.{form}"
    if request.config.getoption("--update-golden"):
        golden.write_text(shown)
    assert shown == golden.read_text()


def test_agreement_within_a_batch_is_told_where_outputs_are_no_floats() -> None:
    report = passing()
    assert report.verification is not None
    report.verification["batch_invariance"]["model.onnx"]["lowest_agreement"] = 0.9991
    told = "differ by at most 1.5e-07 (relative); of outputs of other types at least 99.91% of the values agree."
    assert told in markdown.render(report)


def test_an_input_that_an_engine_takes_in_another_form_is_named_so() -> None:
    facts = {"file": "model.tensorrt.engine", "options": {"io_formats": {"image": "fp16:hwc8"}}}
    build = passing().stages[0].model_copy(update={"name": "build", "facts": facts})
    shown = terminal.render(passing().model_copy(update={"stages": [*passing().stages, build]}), "out")
    assert "image float32 1x3x8x8 .. 4x3x8x8 .. 8x3x8x8 (model.tensorrt.engine: fp16:hwc8)" in shown


def test_a_report_survives_json() -> None:
    assert Report.model_validate_json(passing().model_dump_json()) == passing()


def test_long_tables_are_counted_not_shown() -> None:
    shown = markdown.table(("n",), [(n,) for n in range(50)])
    assert "20 more rows" in shown
    assert "| 29 |" in shown
    assert "| 30 |" not in shown


@pytest.mark.parametrize(("size", "shown"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB")])
def test_sizes_have_binary_units(size: int, shown: str) -> None:
    assert markdown.format_bytes(size) == shown


def test_an_error_takes_three_lines_at_most() -> None:
    assert DataError("what", "one\ntwo\nthree").lines().splitlines() == [
        "gpuopt: data error: what",
        "one",
        "two",
    ]


def test_a_model_puts_no_markdown_into_the_report() -> None:
    evil = "y` <img src=x> ![p](http://evil/p.png) [Approved](http://evil) @team |"
    verification = passing().verification or {}
    rows = [{**verification["outputs"][0], "output": evil}]
    changes = {"verification": {**verification, "outputs": rows, "failures": [evil]}, "warnings": [evil]}
    shown = markdown.render(passing().model_copy(update=changes))
    # What is left of it is in code spans or escaped.
    outside = re.sub(r"`[^`\n]*`", "", shown.replace("\\`", ""))
    for pattern in (r"(?<!\\)<img", r"(?<!\\)\[", r"@team"):
        assert not re.search(pattern, outside), pattern
