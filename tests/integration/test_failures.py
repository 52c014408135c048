"""What users get wrong: each its own message and exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Gpuopt, python_path
from tests.integration import small


@pytest.fixture
def project(tmp_path: Path, saved_program: Path) -> Path:
    """A folder with a model and calibration data beside it."""
    (tmp_path / "model.pt").write_bytes(saved_program.read_bytes())
    small.save_data(tmp_path / "calibration.npz")
    return tmp_path


@pytest.fixture(scope="module")
def saved_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save("exported program", tmp_path_factory.mktemp("saved") / "model.pt")


def leftovers(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {"model.pt", "calibration.npz"}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 0.999])
def test_a_truncated_model(share: float, gpuopt: Gpuopt, project: Path) -> None:
    model = project / "model.pt"
    data = model.read_bytes()
    model.write_bytes(data[: int(len(data) * share)])
    result = gpuopt("compile", model, "--json")
    assert result.code == 3
    assert "truncated or damaged" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 3
    assert leftovers(project) == set(), "no stage ran, so there is nothing to report on disk"
    report = result.report()
    assert (report["status"], report["error"]["kind"], report["error"]["exit_code"]) == ("failed", "model", 3)


def test_a_missing_model(gpuopt: Gpuopt, tmp_path: Path) -> None:
    result = gpuopt("compile", tmp_path / "folder/model.pt", "-p", "fp16")
    assert result.code == 10
    assert not (tmp_path / "folder").exists()
    assert "No such file" in result.stderr


def test_a_shape_the_model_does_not_take(gpuopt: Gpuopt, project: Path) -> None:
    result = gpuopt("compile", project / "model.pt", "--input", "image:1x4x16x16")
    assert result.code == 2
    assert "not 1x4x16x16" in result.stderr
    result = gpuopt("compile", project / "model.pt", "--input", "picture:1x3x16x16")
    assert result.code == 2
    assert "it has image" in result.stderr


def test_calibration_data_of_a_wrong_shape(gpuopt: Gpuopt, project: Path) -> None:
    np.savez(project / "calibration.npz", image=np.zeros((4, 1, 16, 16), np.float32))
    result = gpuopt("compile", project / "model.pt")
    assert result.code == 4
    assert "image" in result.stderr
    assert leftovers(project) == {"model.gpuopt.failed"}
    assert f"report: {project}/model.gpuopt.failed/report.md" in result.stderr
    report = json.loads((project / "model.gpuopt.failed/report.json").read_text())
    assert (report["status"], report["error"]["kind"], report["error"]["exit_code"]) == ("failed", "data", 4)
    assert "Data error in stage" in (project / "model.gpuopt.failed/report.html").read_text()


def test_nan_in_the_calibration_data(gpuopt: Gpuopt, project: Path) -> None:
    data = np.zeros((40, 3, 16, 16), np.float32)
    data[37, 0, 0, 0] = np.nan
    np.savez(project / "calibration.npz", image=data)
    result = gpuopt("compile", project / "model.pt")
    assert result.code == 4
    assert "37" in result.stderr
    assert "NaN" in result.stderr
    assert leftovers(project) == {"model.gpuopt.failed"}


def test_int8_without_data_shows_the_ways_to_give_it(gpuopt: Gpuopt, project: Path) -> None:
    (project / "calibration.npz").unlink()
    result = gpuopt("compile", project / "model.pt")
    assert result.code == 4
    for way in ("calibration.npz", "--calibration-data PATH", "package.module:callable"):
        assert way in result.stderr


def test_random_calibration_marks_the_report(gpuopt: Gpuopt, project: Path) -> None:
    (project / "calibration.npz").unlink()
    flags = ("--random-calibration", "--calibration-samples", 4, "-t", "onnxruntime", "--json")
    result = gpuopt("compile", project / "model.pt", *flags)
    assert result.code == 0, result.stderr
    assert any("random data" in warning for warning in result.report()["warnings"])


def test_an_output_folder_that_cannot_be_made(gpuopt: Gpuopt, project: Path) -> None:
    (project / "file").write_text("in the way")
    result = gpuopt("compile", project / "model.pt", "-o", project / "file" / "bundle")
    assert result.code == 10
    assert f"{project}/file" in result.stderr
    assert leftovers(project) == {"file"}


def test_an_output_folder_with_other_files_is_left_alone(gpuopt: Gpuopt, project: Path) -> None:
    (project / "work").mkdir()
    (project / "work/thesis.tex").write_text("years")
    result = gpuopt("compile", project / "model.pt", "-o", project / "work")
    assert result.code == 2
    assert (project / "work/thesis.tex").read_text() == "years"


def test_a_missing_package(gpuopt: Gpuopt, project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    # A finder that denies the package stands for an environment without it.
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'tensorrt_rtx' else found(name, *a)\n"
    )
    env = {"PYTHONPATH": str(hook)}
    result = gpuopt("compile", project / "model.pt", "-t", "tensorrt-rtx", env=env)
    assert result.code == 9
    assert "pip install tensorrt-rtx-cu13" in result.stderr
    doctor = gpuopt("doctor", "--json", env=env).report()
    state = {target["target"]: target["ready"] for target in doctor["targets"]}
    assert state["tensorrt-rtx"] is False
    if not state["tensorrt"]:
        left_open = gpuopt("compile", project / "model.pt", "--json", env=env)
        assert left_open.code == 0, left_open.stderr
        assert any("no engine is built" in warning for warning in left_open.report()["warnings"])


def test_without_onnxslim_the_graph_stays_as_it_is_with_a_warning(
    gpuopt: Gpuopt, project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'onnxslim' else found(name, *a)\n"
    )
    own = {
        "PYTHONPATH": python_path(hook),
        "GPUOPT_CACHE_DIR": str(hook),
    }
    result = gpuopt("compile", project / "model.pt", "-p", "fp32", "-t", "onnxruntime", "--json", env=own)
    assert result.code == 0, result.stderr
    (warning,) = [w for w in result.report()["warnings"] if "was not simplified" in w]
    assert "pip install onnxslim" in warning


def test_tensorrt_without_a_gpu_says_what_it_needs(gpuopt: Gpuopt, project: Path) -> None:
    from gpuopt.environment import gpus

    if gpus():
        pytest.skip("this machine has a GPU: the refusal cannot be seen here")
    result = gpuopt("compile", project / "model.pt", "-t", "tensorrt")
    assert result.code == 9
    assert "tensorrt cannot be built here" in result.stderr


def test_an_unknown_compute_capability(gpuopt: Gpuopt, project: Path) -> None:
    result = gpuopt("compile", project / "model.pt", "-t", "tensorrt-rtx", "--compute-capability", "6.1")
    assert result.code == 2
    assert "8.9" in result.stderr
    chosen = gpuopt("compile", project / "model.pt", "--compute-capability", "8.9", "-t", "tensorrt-rtx", "--json")
    assert chosen.code == 0, chosen.stderr
    build = next(stage for stage in chosen.report()["stages"] if stage["name"] == "build")
    assert build["facts"]["compute_capabilities"] == ["8.9"]


def test_qoperator_is_for_onnx_runtime_only(gpuopt: Gpuopt, project: Path) -> None:
    refused = gpuopt("compile", project / "model.pt", "--quant-format", "qoperator", "-t", "tensorrt-rtx")
    assert refused.code == 2
    assert "QLinearConv" in refused.stderr
    result = gpuopt("compile", project / "model.pt", "--quant-format", "qoperator", "-t", "onnxruntime")
    assert result.code == 0, result.stderr
    import onnx

    operators = {node.op_type for node in onnx.load(str(project / "model.gpuopt/model.onnx")).graph.node}
    assert "QLinearConv" in operators


def test_the_native_quantizer_is_for_tensorrt_s_engines_only(gpuopt: Gpuopt, project: Path) -> None:
    from gpuopt.environment import default_targets

    model = project / "model.pt"
    refused = gpuopt("compile", model, "--quantizer", "tensorrt", "-t", "onnxruntime")
    assert refused.code == 2
    assert "nothing would be INT8" in refused.stderr
    if "tensorrt" not in default_targets():
        assert gpuopt("compile", model, "--quantizer", "tensorrt").code == 2, "the targets are this machine's"
    for command in ("quantize", "analyze"):
        refused = gpuopt(command, model, "--set", "quantize.quantizer=tensorrt", "--set", "build.target=tensorrt")
        assert refused.code == 2, refused.stderr
        assert "gpuopt's own quantizer" in refused.stderr
    assert leftovers(project) == set()


def test_the_graph_beside_tensorrt_s_own_quantizer_is_called_fp32(gpuopt: Gpuopt, project: Path) -> None:
    arguments = ("--quantizer", "tensorrt", "-t", "tensorrt", "--no-build", "--json")
    result = gpuopt("compile", project / "model.pt", *arguments)
    assert result.code == 0, result.stderr
    report = result.report()
    (graph,) = report["engines"]
    assert graph["note"].startswith("FP32: ")
    assert report["verification"]["limits"]["min_cosine"] == 0.99999
    assert any("nothing is INT8 yet" in warning for warning in report["warnings"])
    checked = gpuopt("verify", project / "model.gpuopt", "--json").report()
    assert checked["engines"][0]["note"].startswith("FP32: ")
    assert checked["verification"]["limits"]["min_cosine"] == 0.99999


def test_a_demanded_share_that_no_engine_can_show_is_not_passed(gpuopt: Gpuopt, project: Path) -> None:
    from gpuopt.environment import gpus

    demand = ("--min-precision-coverage", "80%")
    ways = [("-t", "onnxruntime"), ("-t", "tensorrt-rtx", "--no-build")]
    ways += [("-t", "tensorrt-rtx", "--set", "verify.enabled=false")]
    if not gpus():
        ways += [("-t", "tensorrt-rtx"), ("-t", "tensorrt-rtx", "-p", "auto")]
    for way in ways:
        result = gpuopt("compile", project / "model.pt", *way, *demand, "--json")
        assert result.code == 12, (way, result.stderr)
        assert "nothing can be proved here" in result.stderr
        assert result.report()["error"]["kind"] == "precision"
    assert leftovers(project) == set(), "it is told before any work"
    assert gpuopt("compile", project / "model.pt", "-t", "tensorrt-rtx", "--no-build").code == 0
    if not gpus():
        built = gpuopt("build", project / "model.gpuopt", "--set", "verify.min_precision_coverage=80%")
        assert built.code == 12, built.stderr
        assert "does not run: no NVIDIA GPU" in built.stderr


def test_verify_warns_of_a_demanded_share_that_it_cannot_check(gpuopt: Gpuopt, project: Path) -> None:
    from gpuopt import bundle
    from gpuopt.recipe import load, resolve, set_value

    folder = project / "model.gpuopt"
    assert gpuopt("compile", project / "model.pt", "-p", "fp32", "-t", "onnxruntime").code == 0
    recipe = load(folder / "recipe.yaml")
    set_value(recipe, "verify.min_precision_coverage", "80%")
    files = {path.name: path for path in folder.iterdir() if path.name not in ("recipe.yaml", bundle.MANIFEST_FILE)}
    bundle.write(folder, files, {"recipe.yaml": resolve(recipe).to_yaml()}, {})
    result = gpuopt("verify", folder, "--json")
    assert result.code == 0, result.stderr
    assert any("min_precision_coverage was not checked here" in warning for warning in result.report()["warnings"])


def test_an_accuracy_limit_that_is_missed_keeps_the_old_bundle(gpuopt: Gpuopt, project: Path) -> None:
    model, bundle = project / "model.pt", project / "model.gpuopt"
    assert gpuopt("compile", model, "-t", "onnxruntime").code == 0
    before = (bundle / "manifest.json").read_bytes()
    result = gpuopt("compile", model, "-t", "onnxruntime", "--min-cosine", "1.0", "--json")
    assert result.code == 8
    report = result.report()
    assert report["error"]["kind"] == "accuracy"
    assert report["verification"]["failures"]
    assert (bundle / "manifest.json").read_bytes() == before
    assert (project / "model.gpuopt.failed/model.onnx").exists()
    assert gpuopt("compile", model, "-t", "onnxruntime").code == 0
    assert not (project / "model.gpuopt.failed").exists()


def test_auto_without_a_winner_leaves_its_report(gpuopt: Gpuopt, project: Path) -> None:
    loud = small.small_net()
    with torch.no_grad():
        loud.head.weight.mul_(1e6)  # rounding beyond what is negligible, so that FP32 misses the limit, too
    torch.export.save(torch.export.export(loud, (torch.randn(2, 3, 16, 16),)), project / "model.pt")
    arguments = ("-p", "auto", "-t", "onnxruntime", "--set", "verify.min_sqnr_db=500", "--json")
    result = gpuopt("compile", project / "model.pt", *arguments)
    assert result.code == 8, result.stderr
    assert leftovers(project) == {"model.gpuopt.failed"}
    report = json.loads((project / "model.gpuopt.failed/report.json").read_text())
    assert (report["status"], report["precision"], report["error"]["stage"]) == ("failed", "auto", "verify")
    assert {"fp32 is out", "fp16 is out", "int8 is out"} <= {w.partition(":")[0] for w in report["warnings"]}
    assert report["verification"]["failures"]


def test_auto_that_a_stage_of_all_candidates_ends_leaves_its_report(gpuopt: Gpuopt, project: Path) -> None:
    np.savez(project / "calibration.npz", image=np.zeros((4, 1, 16, 16), np.float32))
    result = gpuopt("compile", project / "model.pt", "-p", "auto", "-t", "onnxruntime")
    assert result.code == 4
    assert leftovers(project) == {"model.gpuopt.failed"}
    report = json.loads((project / "model.gpuopt.failed/report.json").read_text())
    assert (report["status"], report["error"]["kind"]) == ("failed", "data")
    assert report["error"]["stage"] is not None


def test_a_changed_bundle_is_not_verified(gpuopt: Gpuopt, project: Path) -> None:
    assert gpuopt("compile", project / "model.pt", "-t", "onnxruntime").code == 0
    bundle = project / "model.gpuopt"
    assert gpuopt("verify", bundle).code == 0
    with (bundle / "model.onnx").open("r+b") as stream:
        stream.seek(100)
        byte = stream.read(1)
        stream.seek(100)
        stream.write(bytes([byte[0] ^ 1]))
    result = gpuopt("verify", bundle)
    assert result.code == 10
    assert "model.onnx changed" in result.stderr


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_nothing_half_written(
    signal_number: signal.Signals, gpuopt: Gpuopt, project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("own-cache")
    env = {**os.environ, "GPUOPT_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "gpuopt", "compile", str(project / "model.pt"), "-t", "onnxruntime"]
    # A shell's background job ignores Ctrl-C, and so do its children, unless told otherwise.
    process = subprocess.Popen(
        command,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("samples")
    time.sleep(0.5)
    process.send_signal(signal_number)
    _, stderr = process.communicate(timeout=30)
    if signal_number is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert "interrupted" in stderr
        assert "Traceback" not in stderr
    assert not (project / "model.gpuopt").exists()
    again = gpuopt("compile", project / "model.pt", "-t", "onnxruntime", env={"GPUOPT_CACHE_DIR": str(cache)})
    assert again.code == 0, again.stderr
    assert leftovers(project) == {"model.gpuopt"}
    assert list((cache / "scratch").iterdir()) == []


def test_no_error_shows_a_traceback_unless_asked(gpuopt: Gpuopt, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_text("not a model")
    plain = gpuopt("compile", tmp_path / "model.pt", "-p", "fp16")
    assert plain.code == 3
    assert "Traceback" not in plain.stderr
    assert "Traceback" in gpuopt("--debug", "compile", tmp_path / "model.pt", "-p", "fp16").stderr


def test_a_trace_that_cannot_be_taken_is_told_before_the_profile(gpuopt: Gpuopt, tmp_path: Path) -> None:
    engine = tmp_path / "model.tensorrt.engine"
    engine.write_bytes(b"a plan")
    result = gpuopt("profile", engine, "--trace", tmp_path / "trace.json")
    assert result.code == 2
    assert "model.tensorrt.engine is no bundle" in result.stderr
    result = gpuopt("profile", engine, "--trace", tmp_path / "trace.txt")
    assert result.code == 2
    assert "a trace is a .json or .json.gz file" in result.stderr
    small.save("onnx", tmp_path / "model.onnx")
    assert gpuopt("compile", tmp_path / "model.onnx", "-p", "fp32", "-t", "onnxruntime").code == 0
    result = gpuopt("profile", tmp_path / "model.gpuopt", "--trace", tmp_path / "trace.json", "--json")
    assert result.code == 2
    assert "compiled from ONNX" in result.stderr
    assert "profile" not in result.stderr.partition("gpuopt:")[0], "nothing was profiled"


def test_a_trace_stands_beside_the_profile(gpuopt: Gpuopt, project: Path) -> None:
    assert gpuopt("compile", project / "model.pt", "-p", "fp32", "-t", "onnxruntime").code == 0
    result = gpuopt(
        "profile", project / "model.gpuopt", "--trace", project / "trace.json.gz", "--json", "--iterations", 2
    )
    assert result.code == 0, result.stderr
    assert result.report()["layers"]
    assert (project / "trace.json.gz").stat().st_size > 0
