"""A network with one convolution that INT8 cannot hold: `gpuopt analyze` finds it, a budget keeps it in FP16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from gpuopt.backends.onnxruntime import Session
from gpuopt.cache import Cache
from gpuopt.compile import with_defaults
from gpuopt.environment import has_module
from gpuopt.errors import RequirementError
from gpuopt.pipeline import Runner
from gpuopt.progress import Silent
from gpuopt.recipe import resolve
from tests.conftest import Gpuopt, Run
from tests.integration import hostile

HERE = "tests.integration.hostile"
HOSTILE = "node_conv2d_2"
ROOT = Path(__file__).parent.parent.parent
# Equalisation would take the outliers out of the hostile layer's input.
HOW = ("--calibration-method", "minmax", "--equalize", "off")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    hostile.save_project(folder)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache of these tests' own: small enough to copy."""
    return {"GPUOPT_CACHE_DIR": str(tmp_path_factory.mktemp("own-cache"))}


@pytest.fixture
def compiled(gpuopt: Gpuopt, project: Path, own: dict[str, str], tmp_path: Path) -> Any:
    def run(*flags: object, target: str = "onnxruntime") -> Run:
        return gpuopt(
            "compile", project / "model.pt", *HOW, "-t", target, "-o", tmp_path / "b", "--json", *flags,
            cwd=ROOT, env=own,
        )  # fmt: skip

    return run


def facts(result: Run, stage: str) -> dict[str, Any]:
    return next((s["facts"] for s in result.report()["stages"] if s["name"] == stage), {})


def test_the_hostile_layer_is_first_in_table_json_and_files(
    gpuopt: Gpuopt, project: Path, own: dict[str, str], tmp_path: Path
) -> None:
    command = ("analyze", project / "model.pt", *HOW, "--evaluation-data")
    table = gpuopt(*command, project / "evaluation.npz", "--samples", 8, "-o", tmp_path / "out", env=own)
    assert table.code == 0, table.stderr
    lines = table.stdout.splitlines()
    assert lines[0].split()[:3] == ["rank", "node", "operator"]
    assert lines[1].split()[:3] == ["1", HOSTILE, "Conv"]
    assert lines[-2].startswith(f"costliest: {HOSTILE}, ")
    assert f"--set 'quantize.nodes_to_exclude=[{HOSTILE}," in lines[-1]
    assert (tmp_path / "out/sensitivity.txt").read_text() == table.stdout
    assert list(Path(own["GPUOPT_CACHE_DIR"], "journals").iterdir()) == [], "the journal ends with the stage"
    again = gpuopt(*command, project / "evaluation.npz", "--samples", 8, "--json", "-q", env=own)
    document = again.report()
    assert (again.stderr, json.loads((tmp_path / "out/sensitivity.json").read_text())) == ("", document)
    layers = document["sensitivity"]["layers"]
    assert [layer["node"] for layer in layers] == [line.split()[1] for line in lines[1 : len(layers) + 1]]
    assert layers[0]["output_sqnr_db"] < 10 < layers[1]["output_sqnr_db"] - 20
    assert layers[0]["accumulated_sqnr_db"] < 3
    assert document["sensitivity"]["whole"]["output_sqnr_db"] < 10


def test_a_budget_keeps_the_hostile_layer_in_fp16_and_says_what_it_bought(compiled: Any, project: Path) -> None:
    flags = ("--evaluation-data", project / "evaluation.npz", "--labels", "labels", "--max-accuracy-drop", "8%")
    result = compiled(*flags, target="tensorrt-rtx")
    assert result.code == 0, result.stderr
    found, quantized = facts(result, "fallback"), facts(result, "quantize")
    assert (found["metric"], found["samples"], found["fp32"]) == ("top-1 accuracy", 200, 1.0)
    assert found["fell_back"] == [HOSTILE]
    assert found["int8"] < 0.5 < 0.92 <= found["final"] == found["steps"][-1]["metric"]
    assert found["int8_macs_share"] == quantized["int8_macs_share"] < found["int8_macs_share_before"] <= 1
    left = {entry["node"]: entry["reason"] for entry in quantized["kept_in_floating_point"]}
    assert left[HOSTILE] == "fell back to FP16 to hold the accuracy budget"
    # What is confirmed is the accuracy of the file in the bundle.
    data, session = np.load(project / "evaluation.npz"), Session(Path(result.report()["bundle"]) / "model.onnx")
    scores = np.concatenate([next(iter(session.run({"image": row[None]}).values())) for row in data["image"]])
    assert facts(result, "confirm")["value"] == np.mean(scores.argmax(1) == data["labels"])
    text = (Path(result.report()["bundle"]) / "report.md").read_text()
    assert "## Fallen back to FP16\n\ntop-1 accuracy over 200 samples" in text
    assert f"1. `{HOSTILE}`" in text
    page = (Path(result.report()["bundle"]) / "report.html").read_text()
    assert f"<li><code>{HOSTILE}</code></li>" in page
    assert "What each layer costs in INT8" in page
    assert facts(result, "analyze")["layers"][0]["node"] == HOSTILE
    # The bundle's recipe asks for the same.
    assert "max_drop: 0.08" in (Path(result.report()["bundle"]) / "recipe.yaml").read_text()
    # Only what the budget decides runs again for another one.
    other = compiled(*flags[:-1], "9%", target="tensorrt-rtx")
    ran = [stage["name"] for stage in other.report()["stages"] if not stage["cached"]]
    assert ran == ["measure", "fallback", "confirm"]


def test_evaluation_data_without_a_budget_is_told(compiled: Any, project: Path) -> None:
    result = compiled("--evaluation-data", project / "evaluation.npz", "--set", "verify.enabled=false")
    assert result.code == 0, result.stderr
    assert any("evaluation data plays no part" in warning for warning in result.report()["warnings"])


def test_a_budget_that_holds_at_once_analyzes_nothing(compiled: Any) -> None:
    result = compiled("--set", f"quantize.nodes_to_exclude=[{HOSTILE}]", "--max-accuracy-drop", "0.1")
    assert result.code == 0, result.stderr
    found = facts(result, "fallback")
    assert (found["metric"], found["fell_back"], found["held"]) == ("top-1 agreement with FP32", [], True)
    assert "skipped" in facts(result, "analyze")
    assert any("on the calibration data" in warning for warning in result.report()["warnings"])
    assert "Nothing had to fall back" in (Path(result.report()["bundle"]) / "report.md").read_text()


def test_a_budget_that_cannot_be_held_says_how_near_it_came(compiled: Any, project: Path) -> None:
    flags = ("--evaluation-data", project / "evaluation.npz", "--metric", f"{HERE}:sharpness")
    result = compiled(*flags, "--max-accuracy-drop", "0.0000001")
    assert result.code == 8
    error = result.report()["error"]
    assert error["stage"] == "fallback"
    assert "cannot be held" in error["message"]
    assert "4 of 5 nodes in FP16" in error["message"]
    assert "too low" in error["message"]
    assert len(result.stderr.split("gpuopt: accuracy error")[1].splitlines()) <= 4


def test_a_metric_of_the_user_and_its_code_count(
    gpuopt: Gpuopt, project: Path, own: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "factor.txt").write_text("1")
    code = tmp_path / "my_metric.py"
    text = (
        "def metric(predictions, labels):\n"
        "    factor = {} * float(open('factor.txt').read())\n"
        "    return factor * float((predictions.argmax(1) == labels).mean())\n"
    )
    code.write_text(text.format(1))

    def run() -> Run:
        return gpuopt(
            "compile", project / "model.pt", *HOW, "-t", "onnxruntime", "-o", tmp_path / "b", "--json",
            "--max-accuracy-drop", "8%", "--metric", "my_metric:metric",
            "--evaluation-data", project / "evaluation.npz", "--labels", project / "labels.npy",
            cwd=tmp_path, env={**own, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    first = run()
    assert first.code == 0, first.stderr
    assert facts(first, "fallback")["fp32"] == 1.0
    again = run()
    assert all(stage["cached"] for stage in again.report()["stages"])
    code.write_text(text.format(2))
    changed = run()
    assert [s["name"] for s in changed.report()["stages"] if not s["cached"]][:2] == ["measure", "fallback"]
    assert facts(changed, "fallback")["fp32"] == 2.0
    (tmp_path / "factor.txt").write_text("3")
    assert facts(run(), "fallback")["fp32"] == 6.0


@pytest.mark.parametrize(
    ("flags", "exit_code", "said"),
    [
        (("--metric", f"{HERE}:failing"), 2, "RuntimeError: no figures today"),
        (("--metric", f"{HERE}:not_a_number"), 2, "returned nan"),
        (("--metric", "no function"), 2, "package.module:function"),
        (("--labels", "answers"), 4, "labels 'answers' are neither a file nor an array"),
        (("--evaluation-data", "nowhere.npz"), 4, "'nowhere.npz' does not exist"),
        (("--labels", "short.npy"), 4, "3 labels for 40 evaluation samples"),
    ],
)
def test_what_is_wrong_with_a_budget_is_told_in_three_lines(
    gpuopt: Gpuopt,
    project: Path,
    own: dict[str, str],
    tmp_path: Path,
    flags: tuple[str, ...],
    exit_code: int,
    said: str,
) -> None:
    np.save(tmp_path / "short.npy", np.zeros(3, np.int64))
    result = gpuopt(
        "compile", project / "model.pt", "-t", "onnxruntime", "-o", tmp_path / "b", "-q",
        "--max-accuracy-drop", "1%", *flags, cwd=tmp_path, env={**own, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.code == exit_code, result.stderr
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max-accuracy-drop", "1%", "-p", "fp16"), "only INT8 falls back"),
        (("--metric", "a:b"), "need max_drop"),
        (("--max-accuracy-drop", "a%"), "write a share as 0.5% or 0.005"),
        (("--max-accuracy-drop", "-0.1"), "greater than or equal to 0"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(compiled: Any, flags: tuple[str, ...], said: str) -> None:
    result = compiled(*flags)
    assert result.code == 2
    assert said in result.stderr


class KillsAtLayer(Silent):
    """Kills the worker once the stage `analyze` is at a layer."""

    def __init__(self, layer: int) -> None:
        self.layer, self.at = layer, ""

    def stage(self, name: str) -> Any:
        self.at = name
        return super().stage(name)

    def advance(self, done: int, total: int | None) -> None:
        if self.at.endswith("analyze") and done == self.layer:
            for child in psutil.Process().children():
                child.kill()


def test_a_killed_analysis_goes_on_where_it_was(project: Path, own: dict[str, str], tmp_path: Path) -> None:
    tree = {
        "model": {"path": str(project / "model.pt")},
        "build": {"target": "onnxruntime"},
        "calibrate": {"method": "minmax"},
        "quantize": {"equalize": "off"},
        "analyze": {"enabled": True, "samples": 200},
        "accuracy": {"data": str(project / "evaluation.npz")},
    }
    uninterrupted = Cache(tmp_path / "uninterrupted")
    if (entries := Path(own["GPUOPT_CACHE_DIR"], "entries")).is_dir():
        shutil.copytree(entries, uninterrupted.folder / "entries")
    cache = Cache(Path(own["GPUOPT_CACHE_DIR"]))

    def runner(progress: Silent, where: Cache = cache) -> Runner:
        return Runner(with_defaults(resolve(tree)), where, progress, "analyze")

    with pytest.raises(RequirementError, match="analyze stage was killed"):
        runner(KillsAtLayer(2)).run(until="analyze")
    (journal,) = (cache.folder / "journals").iterdir()
    finished = len(journal.read_text().split())
    second = runner(Silent())
    second.run(until="analyze")
    said = second.results[-1].entry.facts
    assert said["nodes"] == 5
    assert said["resumed_nodes"] >= 2
    assert finished > 0
    assert not journal.exists()
    resumed = (second.results[-1].entry.artifacts["sensitivity"].path / "sensitivity.json").read_text()
    whole = runner(Silent(), uninterrupted)
    whole.run(until="analyze")
    assert whole.results[-1].entry.facts["resumed_nodes"] == 0
    assert (whole.results[-1].entry.artifacts["sensitivity"].path / "sensitivity.json").read_text() == resumed


@pytest.mark.skipif(not has_module("matplotlib"), reason="the extra 'plot' is not installed")
@pytest.mark.parametrize("suffix", ["svg", "png", "html"])
def test_the_plot_names_the_nodes(
    gpuopt: Gpuopt, project: Path, own: dict[str, str], tmp_path: Path, suffix: str
) -> None:
    file = tmp_path / f"plot.{suffix}"
    result = gpuopt("analyze", project / "model.pt", "--plot", file, "--samples", 4, "-q", env=own)
    assert (result.code, result.stdout) == (0, ""), result.stderr
    content = file.read_bytes()
    if suffix == "png":
        assert content.startswith(b"\x89PNG")
    else:
        assert HOSTILE.encode() in content
        assert content.startswith(b"<!DOCTYPE html>" if suffix == "html" else b"<?xml")


def test_a_plot_that_cannot_be_made_is_told_before_the_work(gpuopt: Gpuopt, project: Path, tmp_path: Path) -> None:
    result = gpuopt("analyze", project / "model.pt", "--plot", tmp_path / "plot.pdf")
    assert result.code == 2
    assert ".svg, .png, .html" in result.stderr
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'matplotlib' else found(name, *a)\n"
    )
    result = gpuopt("analyze", project / "model.pt", "--plot", tmp_path / "p.svg", env={"PYTHONPATH": f"{hook}:{ROOT}"})
    assert result.code == 9
    assert "pip install 'gpuopt[plot]'" in result.stderr
