"""benchmarks/coverage.py: its list, its order, its limits and what it says of a row."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    pytest.importorskip("torch", reason="the architectures are torch's")
    spec = importlib.util.spec_from_file_location("coverage_benchmark", FOLDER / "coverage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["coverage_benchmark"] = module
    spec.loader.exec_module(module)
    return module


def test_the_list_is_long_enough_and_no_two_have_one_key(coverage: ModuleType) -> None:
    import architectures

    listed = [*architectures.TORCHVISION, *architectures.TIMM, *architectures.TRANSFORMERS, *architectures.OWN]
    assert len(listed) == len(coverage.ARCHITECTURES) >= 120
    tasks = {architecture.task for architecture in listed}
    assert {
        "detection",
        "segmentation",
        "super-resolution",
        "audio",
        "text encoder",
        "text decoder",
        "recurrent",
    } <= tasks
    assert sum(bool(architecture.refused) for architecture in listed) >= 3


def test_the_order_has_every_architecture_once_and_all_kinds_early(coverage: ModuleType) -> None:
    keys = list(coverage.ARCHITECTURES)
    order = coverage.interleaved(keys)
    assert sorted(order) == sorted(keys)
    assert {coverage.ARCHITECTURES[key].source for key in order[:12]} == {"torchvision", "timm", "transformers", "own"}


@pytest.mark.parametrize(("seconds", "memory", "said"), [(1.0, 4096, "time limit"), (60.0, 40, "memory limit")])
def test_a_compilation_that_takes_too_much_is_ended(
    seconds: float, memory: int, said: str, coverage: ModuleType, tmp_path: Path
) -> None:
    bench = coverage.Bench(tmp_path, seconds, memory, {})
    script = "import time; held = bytearray(200 << 20); time.sleep(30)"
    done = coverage.run([sys.executable, "-c", script], tmp_path, bench, {})
    assert said in done.stopped
    assert done.seconds < 30


def test_rows_that_are_there_are_not_measured_again_and_stand_in_the_table(
    coverage: ModuleType, tmp_path: Path
) -> None:
    bench = coverage.Bench(tmp_path, 1, 64, {})
    for precision, outcome in (("fp16", coverage.PASSED), ("int8", "build")):
        path = bench.row("own_LSTM", precision)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"outcome": outcome, "message": "no Foo", "hint": "change it", "code": "1"}))
    coverage.measure(["own_LSTM"], bench, 1)
    text = "\n".join(coverage.lines_of(["own_LSTM"], bench, {"command": "c", "machine": "m", "versions": {}}))
    assert "| own | recurrent | LSTM | yes | build |" in text
    assert "| FP16 | 1 | 1 | 100.0% | 0 | 0 |" in text
    assert "LSTM, INT8: build: no Foo. Next step: change it" in text
