"""Gates: verdict, value, limit and margin of every limit, and the error of the first that does not pass."""

from __future__ import annotations

from typing import Any

import pytest

from gpuopt import errors, gates
from gpuopt.errors import AccuracyError, ResourceError, SpeedError
from gpuopt.report.model import GateReport, Report
from gpuopt.tolerance import Limits, problem
from tests.unit.report.samples import benchmark, gated, recipe
from tests.unit.report.test_rendering import passing


def by_name(found: Report | list[GateReport]) -> dict[str, list[GateReport]]:
    names: dict[str, list[GateReport]] = {}
    for gate in found.gates if isinstance(found, Report) else found:
        names.setdefault(gate.name, []).append(gate)
    return names


def test_accuracy_is_always_a_gate_and_its_worst_corner_is_named() -> None:
    found = by_name(gated(recipe()))
    cosine = {gate.target: gate for gate in found["cosine"]}
    assert set(cosine) == {"model.onnx", "engine.onnx"}
    assert cosine["model.onnx"].where == "profile0-max, output 'logits'"
    assert cosine["model.onnx"].value == pytest.approx(0.99875)
    assert cosine["model.onnx"].margin == pytest.approx(0.99875 - 0.95)
    assert {gate.verdict for gate in found["sqnr_db"]} == {"passed"}
    assert [gate.value for gate in found["batch_relative_error"]] == [1.5e-7]
    assert [gate.value for gate in found["verification_failures"]] == [0, 0]


@pytest.mark.parametrize(
    ("key", "good", "bad", "name", "exit_code"),
    [
        ("gates__max_latency_ms", {"p99": 4.0}, {"p99": 3.9}, "latency_p99_ms", 13),
        ("gates__max_latency_ms", {"p50": 2.0}, {"p50": 1.9}, "latency_p50_ms", 13),
        ("gates__min_throughput", 4000, 4001, "throughput_samples_per_second", 13),
        ("gates__max_engine_size", "1GiB", 100, "engine_size_bytes", 14),
        ("gates__max_calibration_warnings", 5, None, "calibration_warnings", 4),
    ],
)
def test_a_limit_is_kept_or_missed(key: str, good: Any, bad: Any, name: str, exit_code: int) -> None:
    for limit, verdict in ((good, "passed"), (bad, "failed")):
        if limit is None:
            continue
        for gate in by_name(gated(recipe(**{key: limit})))[name]:
            assert gate.verdict == verdict, gate
            assert gate.exit_code == exit_code
            assert gate.margin is not None
            assert (gate.margin >= 0) == (verdict == "passed")


@pytest.mark.parametrize(
    ("key", "limit", "name", "reason"),
    [
        ("gates__max_latency_ms", {"p99": 4.0}, "latency_p99_ms", "speed was not measured"),
        ("gates__min_throughput", 1, "throughput_samples_per_second", "speed was not measured"),
        ("gates__max_device_memory", "1GiB", "device_memory_bytes", "no engine was run on a GPU"),
        ("gates__max_build_seconds", 1, "build_seconds", "no engine was built"),
        ("gates__max_latency_vs_fp16", 1.0, "latency_vs_fp16", "FP16 was not timed beside it"),
        ("verify__min_precision_coverage", "80%", "precision_coverage", "no engine was run"),
        ("accuracy__max_drop", "1%", "accuracy_drop", "did not finish"),
    ],
)
def test_what_is_not_known_does_not_pass(key: str, limit: Any, name: str, reason: str) -> None:
    stages = [stage for stage in passing().stages if stage.name not in ("build", "fallback")]
    report = gated(recipe(**{key: limit}), benchmarks=[], stages=stages)
    (gate,) = by_name(report)[name]
    assert gate.verdict == "unknown"
    assert reason in gate.reason
    error = gates.first_failure(report.gates)
    assert error is not None
    assert reason in error.message
    assert "run it where the engine is built and runs, or drop the gate" in error.hint
    assert error.exit_code == gate.exit_code


def test_a_ratio_to_fp16_is_that_of_the_race() -> None:
    race: dict[str, Any] = {
        "target": "tensorrt", "shapes": {}, "includes": "", "candidates": [], "chosen": "int8",
        "ratio_to_fp16": {"int8": {"value": 0.8, "low": 0.78, "high": 0.83}},
    }  # fmt: skip
    found = by_name(gated(recipe(gates__max_latency_vs_fp16=0.79), race=race))
    assert found["latency_vs_fp16"][0].value == 0.8
    assert found["latency_vs_fp16"][0].verdict == "failed"
    assert found["int8_vs_fp16"][0].verdict == "passed"
    # What ships is what counts: an INT8 that lost the race says nothing of the mixed engine.
    race["ratio_to_fp16"] = {
        "int8": {"value": 1.2, "low": 1.15, "high": 1.25}, "mixed": {"value": 0.8, "low": 0.79, "high": 0.81},
    }  # fmt: skip
    mixed = by_name(gated(recipe(gates__max_latency_vs_fp16=0.9), race={**race, "chosen": "mixed"}))
    assert mixed["latency_vs_fp16"][0].value == 0.8
    assert "int8_vs_fp16" not in mixed
    lost = by_name(gated(recipe(gates__max_latency_vs_fp16=0.9), race=race))
    assert {lost[name][0].verdict for name in ("latency_vs_fp16", "int8_vs_fp16")} == {"failed"}
    fp16 = gated(recipe(gates__max_latency_vs_fp16=1.0), precision="fp16")
    assert by_name(fp16)["latency_vs_fp16"][0].value == 1.0


def test_device_memory_and_split_are_those_of_engines() -> None:
    engine = benchmark(target="tensorrt", file="model.tensorrt.engine", device_memory_bytes=3 << 20)
    asked = recipe(gates__max_device_memory="2MiB", build__target=["tensorrt", "onnxruntime"])
    found = by_name(gated(asked, benchmarks=[engine]))
    assert [gate.verdict for gate in found["device_memory_bytes"]] == ["failed"]
    assert gates.describe(found["device_memory_bytes"][0]) == (
        "device_memory_bytes of model.tensorrt.engine: 3 MiB, at most 2 MiB"
    )


def test_the_first_gate_decides_and_the_others_are_counted() -> None:
    asked = recipe(gates__max_latency_ms={"p99": 1, "p50": 1}, gates__max_engine_size=100)
    error = gates.first_failure(gated(asked).gates)
    assert isinstance(error, SpeedError)
    assert error.message.startswith(
        "gate latency_p50_ms of model.onnx (batch 8, CPU, Example 9000): 2 ms, at most 1 ms"
    )
    assert "more gates)" in error.message
    assert len(str(error).splitlines()) <= 3
    only_size = gates.first_failure(gated(recipe(gates__max_engine_size=100)).gates)
    assert isinstance(only_size, ResourceError)


def test_a_mode_that_warns_fails_nothing() -> None:
    asked = recipe(gates__max_latency_ms={"p99": 1})
    report = gated(asked)
    before = AccuracyError("too far", "")
    assert gates.settle(report.gates, "fail", before) == (before, [])
    error, said = gates.settle(report.gates, "warn", before)
    assert error is None
    assert said == [
        "gate latency_p99_ms of model.onnx (batch 8, CPU, Example 9000): 4 ms, at most 1 ms",
    ]
    assert gates.settle([], "warn", before) == (None, ["too far"])


def test_every_gate_has_an_exit_code_of_its_kind() -> None:
    known = {kind.exit_code for kind in errors.KINDS}
    assert {kind.exit_code for kind in gates._ERRORS.values()} <= known
    assert set(gates._HINTS) == set(gates._ERRORS.values())


def verification(**changes: Any) -> dict[str, Any]:
    """The passing one with its first row changed."""
    before = passing().verification or {}
    first, *rest = before["outputs"]
    return {**before, "outputs": [{**first, **changes}, *rest]}


def test_an_output_that_ought_to_be_zero_has_no_ratio() -> None:
    nothing = verification(cosine=0.0, sqnr_db=None, max_abs_error=1e-8)
    found = gated(recipe(), verification=nothing)
    assert gates.first_failure(found.gates) is None


@pytest.mark.parametrize(
    ("changes", "words"), [({"finite": False}, "NaN or infinity"), ({"shape_equal": False}, "shape")]
)
def test_an_output_that_is_broken_fails_whatever_its_cosine(changes: dict[str, Any], words: str) -> None:
    found = by_name(gated(recipe(), verification=verification(cosine=1.0, **changes)))
    gate = next(gate for gate in found["cosine"] if gate.target == "model.onnx")
    assert (gate.verdict, gate.value) == ("failed", None)
    assert words in gate.reason
    assert words in gates.describe(gate)


def test_a_drop_of_exactly_the_budget_holds() -> None:
    facts = {"fp32": 0.92, "final": 0.91, "metric": "top-1"}
    stages = [stage.model_copy(update={"name": "fallback", "facts": facts}) for stage in passing().stages[:1]]
    (gate,) = by_name(gated(recipe(accuracy__max_drop=0.01), stages=stages))["accuracy_drop"]
    assert 0.92 - 0.91 > 0.01, "in floating point"
    assert gate.verdict == "passed"


def test_limits_of_outputs_that_nobody_looked_at_are_unknown() -> None:
    found = by_name(gated(recipe(verify__enabled=False, verify__min_cosine=0.99), verification=None, engines=[]))
    assert [gate.verdict for gate in found["cosine"]] == ["unknown"]
    assert "sqnr_db" not in found


def test_every_engine_that_is_asked_for_has_its_verdict() -> None:
    limits: dict[str, Any] = {
        "gates__max_engine_size": "1GiB", "gates__max_latency_ms": {"p99": 100}, "gates__max_build_seconds": 100,
    }  # fmt: skip
    asked = recipe(**limits, build__target=["tensorrt", "tensorrt-rtx", "onnxruntime"])
    measured = benchmark(target="tensorrt", file="model.tensorrt.engine")
    engines = [engine.model_copy(update={"target": "tensorrt"}) for engine in passing().engines[:1]]
    stages = [stage for stage in passing().stages if stage.name != "build"]
    found = by_name(gated(asked, benchmarks=[measured], engines=engines, stages=stages))
    for name in ("engine_size_bytes", "latency_p99_ms"):
        assert {gate.target: gate.verdict for gate in found[name]}["tensorrt-rtx"] == "unknown"
        assert "passed" in {gate.verdict for gate in found[name]}
    assert {gate.target for gate in found["build_seconds"]} == {"tensorrt", "tensorrt-rtx"}
    nothing = by_name(gated(recipe(**limits, build__target=["tensorrt", "onnxruntime"]), engines=passing().engines[1:]))
    assert [(gate.target, gate.verdict) for gate in nothing["engine_size_bytes"]] == [("tensorrt", "unknown")]


def test_calibration_warnings_are_findings_about_the_data() -> None:
    calibrate = next(stage for stage in passing().stages if stage.name == "calibrate")
    facts = {**calibrate.facts, "findings": [{"message": "few samples"}]}
    noisy = calibrate.model_copy(update={"facts": facts, "warnings": ["few samples", "images are prepared as usual"]})
    (gate,) = by_name(gated(recipe(gates__max_calibration_warnings=1), stages=[noisy]))["calibration_warnings"]
    assert (gate.value, gate.verdict) == (1, "passed")
    native = recipe(
        gates__max_calibration_warnings=0, quantize__quantizer="tensorrt", build__target=["tensorrt", "onnxruntime"]
    )
    (unseen,) = by_name(gated(native, stages=[]))["calibration_warnings"]
    assert unseen.verdict == "unknown"


@pytest.mark.parametrize(
    ("facts", "verdict"), [({"ranges_file": {"name": "r.json"}}, "unknown"), ({"quantized_before": True}, "passed")]
)
def test_data_that_were_not_checked_are_not_known_to_be_good(facts: dict[str, Any], verdict: str) -> None:
    calibrate = next(stage for stage in passing().stages if stage.name == "calibrate")
    stages = [calibrate.model_copy(update={"facts": facts})]
    (gate,) = by_name(gated(recipe(gates__max_calibration_warnings=0), stages=stages))["calibration_warnings"]
    assert gate.verdict == verdict


def test_an_accuracy_budget_is_measured_by_the_compilation_alone() -> None:
    asked = recipe(accuracy__max_drop=0.01)
    names = [gate.name for gate in gates.accuracy_gates(gated(asked), asked)]
    assert "cosine" in names
    assert "accuracy_drop" not in names


def test_a_gate_of_an_engines_speed_says_when_the_cpu_stands_in() -> None:
    limits: dict[str, Any] = {"gates__max_latency_ms": {"p99": 100}}
    asked = recipe(**limits, build__target=["tensorrt-rtx", "onnxruntime"])
    report = gated(asked)
    assert by_name(report)["latency_p99_ms"][0].where == "batch 8, CPU, Example 9000"
    assert gates.stand_ins(report, asked) == [gates.ON_THE_CPU]
    assert gates.stand_ins(report, recipe(**limits)) == []
    assert gates.stand_ins(report, recipe(build__target=["tensorrt-rtx", "onnxruntime"])) == []
    engine = benchmark(target="tensorrt-rtx", file="model.tensorrt-rtx.engine")
    assert gates.stand_ins(gated(asked, benchmarks=[engine]), asked) == []


def test_a_cosine_close_to_its_limit_is_written_with_the_digits_that_tell_them_apart() -> None:
    gate = by_name(gated(recipe()))["cosine"][0].model_copy(update={"value": 0.999999901, "limit": 0.9999999999})
    assert gates.describe(gate).endswith(": 0.999999901, at least 0.9999999999")
    figures = {"shape_equal": True, "finite": True, "agreement": None, "max_abs_error": 1.0, "sqnr_db": 80.0}
    said = problem({**figures, "cosine": 0.999999901}, Limits(0.9999999999, 60.0, 0.9))
    assert said == "cosine 0.999999901 is below 0.9999999999"
