"""`gpuopt triton` on what small real compiles make, and Triton's own schema, in an environment of its own.

tritonclient cannot be installed beside onnx (both pin protobuf), so that the test makes an environment for it, once.
GPUOPT_TRITON_PYTHON names one that is there already.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuopt.triton import schema
from tests.conftest import Gpuopt
from tests.integration import small, triton_probe
from tests.unit.inspection import bundles

pytest.importorskip("tensorrt_rtx")

EXAMPLE = (
    "--max-batch-size", "128", "--preferred-batch-size", "8,16,32", "--max-queue-delay", "100ms", "--preserve-ordering",
)  # fmt: skip
EVERYTHING = (
    "--max-batch-size", "4", "--preferred-batch-size", "2,4", "--max-queue-delay", "500us", "--priority-levels", "2",
    "--default-priority-level", "2", "--max-queue-size", "100", "--queue-timeout", "50ms", "--timeout-action", "delay",
    "--allow-timeout-override", "--priority-queue", "1:size=10,timeout=5ms,action=reject,override",
    "--instances", "gpu:2:0,1", "--instances", "gpu:1:2", "--no-pinned-memory", "--warm-up", "--version-policy",
    "latest:2", "--response-cache", "--metric-tag", "team=vision", "--latency-buckets", "1,5,25",
)  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    small.save("exported program", folder / "model.pt")
    small.save("torchscript", folder / "script.pt")
    small.save_data(folder / "calibration.npz", 32)
    return folder


@pytest.fixture(scope="module")
def rtx(gpuopt: Gpuopt, project: Path) -> Path:
    """An INT8 engine of TensorRT-RTX, built here, for batches of 1 to 8."""
    result = gpuopt("compile", project / "model.pt", "-t", "tensorrt-rtx", "-o", project / "rtx.gpuopt", "-q")
    assert result.code == 0, result.stderr
    return project / "rtx.gpuopt"


@pytest.fixture(scope="module")
def large(gpuopt: Gpuopt, project: Path) -> Path:
    """An ONNX model for batches of 1 to 128."""
    small.save_data(project / "large.npz", 4)
    arguments = (
        "-p", "fp32", "-t", "onnxruntime", "-q", "-o", project / "large.gpuopt", "--min-shapes", "1x3x16x16",
        "--opt-shapes", "8x3x16x16", "--max-shapes", "128x3x16x16",
    )  # fmt: skip
    result = gpuopt("compile", "tests.integration.small:small_net", *arguments)
    assert result.code == 0, result.stderr
    return project / "large.gpuopt"


@pytest.fixture(scope="module")
def tensorrt_85(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as it comes from a machine with an H100 and TensorRT 8.5.3.1, which needs that GPU to build.

    Its engine's bytes mean nothing: neither a configuration nor a rule reads them. Record, manifest, report and ONNX
    graph are as gpuopt writes them there.
    """
    return bundles.make(tmp_path_factory.mktemp("h100") / "model.gpuopt")


@pytest.fixture(scope="module")
def triton_python() -> Path:
    """A Python with tritonclient: installed once into a folder of this environment, whoever comes first."""
    if "GPUOPT_TRITON_PYTHON" in os.environ:
        return Path(os.environ["GPUOPT_TRITON_PYTHON"])
    folder = Path(sys.prefix) / "tritonclient-environment"
    python = folder / "bin" / "python"
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".complete").exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            command = [str(python), "-m", "pip", "install", "-q", "tritonclient[grpc]==2.73.*"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"tritonclient cannot be installed: {done.stderr.strip().splitlines()[-1]}")
            (folder / ".complete").touch()
    return python


def probe(python: Path, configs: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [str(python), triton_probe.__file__],
        input=json.dumps({"configs": configs}), capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_our_table_is_triton_s_schema_field_by_field(triton_python: Path) -> None:
    theirs = probe(triton_python, {})["table"]
    ours = json.loads(json.dumps(triton_probe.table(schema.descriptor())))
    assert set(ours) == set(theirs)
    assert len(theirs) > 50
    for name, fields in theirs.items():
        assert ours[name] == fields, name


def test_repositories_of_all_kinds_pass_the_schema_and_every_rule(
    gpuopt: Gpuopt, project: Path, rtx: Path, tensorrt_85: Path, large: Path, triton_python: Path, tmp_path: Path
) -> None:
    graphs = ("--cuda-graphs",)
    cases: dict[str, tuple[Path, tuple[object, ...]]] = {
        "rtx": (rtx, ()),
        "rtx-all": (rtx, (*EVERYTHING, *graphs)),
        "rtx-onnx": (rtx, ("--backend", "onnxruntime", "--instances", "cpu:4")),
        "rtx-torch": (rtx, ("--backend", "pytorch", "--torchscript", project / "script.pt", "--warm-up")),
        "tensorrt": (tensorrt_85, ()),
        "tensorrt-all": (tensorrt_85, (*EVERYTHING, *graphs)),
        "onnx": (large, ()),
        "onnx-all": (
            large,
            (*EVERYTHING, "--accelerator", "tensorrt", "--accelerator", "cuda", "--accelerator-parameter",
             "tensorrt:precision_mode=FP16"),
        ),
        "example": (large, EXAMPLE),
    }  # fmt: skip
    repository = tmp_path / "repository"
    configs = {}
    for name, (bundle, flags) in cases.items():
        result = gpuopt("triton", bundle, "-o", repository, "--name", name, *flags, "--json")
        assert result.code == 0, (name, result.stderr)
        written = result.report()
        assert [f for f in written["findings"] if f["severity"] == "error"] == [], name
        configs[name] = (repository / name / "config.pbtxt").read_text()
        backend = () if name != "rtx-torch" else ("--backend", "pytorch", "--torchscript", project / "script.pt")
        checked = gpuopt("triton", bundle, "--check", repository / name, *backend, "--json")
        assert checked.code == 0, (name, checked.stdout)
        assert checked.report()["passed"]
        assert checked.report()["rules"] > 40
    found = probe(triton_python, configs)
    assert found["errors"] == {}
    for name, text in found["texts"].items():
        assert schema.parse(text, name) == schema.parse(configs[name], name)
    # What has to fail, fails there, too: the schema check is none that lets everything through.
    assert set(probe(triton_python, {"bad": "max_batch: 3"})["errors"]) == {"bad"}


def test_the_example_s_settings_come_out_of_flags(gpuopt: Gpuopt, large: Path, tmp_path: Path) -> None:
    result = gpuopt("triton", large, "-o", tmp_path / "r", "--name", "m", *EXAMPLE)
    assert result.code == 0, result.stderr
    config = schema.parse((tmp_path / "r/m/config.pbtxt").read_text(), "it")
    assert config.max_batch_size == 128
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16, 32]
    assert config.dynamic_batching.max_queue_delay_microseconds == 100_000
    assert config.dynamic_batching.preserve_ordering


def test_fields_come_from_the_engine(gpuopt: Gpuopt, tensorrt_85: Path, tmp_path: Path) -> None:
    result = gpuopt("triton", tensorrt_85, "-o", tmp_path / "r", "--name", "m", "--cuda-graphs", "--warm-up", "--json")
    assert result.code == 0, result.stderr
    config = schema.parse(result.report()["config"], "it")
    image = config.input[0]
    assert (image.name, list(image.dims), image.is_non_linear_format_io) == ("x", [16, 8, 8], True)
    assert schema.value_name("", "DataType", image.data_type) == "TYPE_FP16"
    assert config.max_batch_size == 8
    assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == [1, 4, 8]
    assert "TensorRT is 8.5.3.1" in result.stderr
    record = json.loads((tmp_path / "r/m/1/model.plan.json").read_text())
    assert record["file"] == "model.plan"
    sample = np.fromfile(tmp_path / "r/m/warmup" / config.model_warmup[0].inputs["x"].input_data_file, np.float16)
    assert sample.size == 16 * 8 * 8


def test_other_versions_stay_as_they_are(gpuopt: Gpuopt, rtx: Path, large: Path, tmp_path: Path) -> None:
    repository = tmp_path / "r"
    add = ("triton", rtx, "-o", repository, "--name", "m")
    assert gpuopt(*add).code == 0
    before = {p: (p.read_bytes(), p.stat().st_ino) for p in (repository / "m/1").iterdir()}
    config = (repository / "m/config.pbtxt").read_bytes()
    second = gpuopt(*add, "--json").report()
    assert (second["version"], second["config_state"]) == (2, "unchanged")
    refused = gpuopt(*add, "--max-queue-delay", "1ms")
    assert refused.code == 19
    assert "--replace-config" in refused.stderr
    kept = gpuopt(*add, "--max-queue-delay", "1ms", "--keep-config", "--json").report()
    assert (kept["version"], kept["config_state"]) == (3, "kept")
    assert (repository / "m/config.pbtxt").read_bytes() == config
    replaced = gpuopt(*add, "--max-queue-delay", "1ms", "--replace-config", "--version", "10", "--json").report()
    assert (replaced["version"], replaced["config_state"]) == (10, "replaced")
    assert "max_queue_delay_microseconds: 1000" in (repository / "m/config.pbtxt").read_text()
    assert {p: (p.read_bytes(), p.stat().st_ino) for p in (repository / "m/1").iterdir()} == before
    assert sorted(p.name for p in (repository / "m").iterdir()) == ["1", "10", "2", "3", "config.pbtxt"]
    assert gpuopt(*add, "--version", "2").code == 2
    # Another model under the configuration of the first one: 128 rows where its engine has 8.
    other = gpuopt("triton", large, "-o", repository, "--name", "m", "--keep-config")
    assert other.code == 19
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r"]


def test_a_killed_run_leaves_nothing_half_written(rtx: Path, tmp_path: Path) -> None:
    repository = tmp_path / "r"
    command = [sys.executable, "-m", "gpuopt", "triton", str(rtx), "-o", str(repository), "--name", "m", "-q"]
    whole = {"model.plan", "model.plan.json"}
    for delay in np.linspace(0.05, 0.6, 12):
        process = subprocess.Popen(command)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        model = repository / "m"
        if model.exists():
            versions = [p for p in model.iterdir() if p.name.isdecimal()]
            assert (model / "config.pbtxt").is_file()
            assert all({p.name for p in version.iterdir()} == whole for version in versions)
        assert {p.name for p in repository.iterdir()} <= {"m"} if repository.exists() else True
    assert subprocess.run(command, check=False).returncode == 0
    assert not [p for p in tmp_path.iterdir() if p.name != "r"], "scratch folders of killed runs are removed"


@pytest.mark.parametrize(
    ("change", "field", "told"),
    [
        (lambda t: t.replace("max_batch_size: 8", "max_batch_size: 64"), "max_batch_size", "end at batch 8"),
        (lambda t: t.replace("dims: [3, 16, 16]", "dims: [8, 3, 16, 16]"), "input 'image'.dims", "counts the batch"),
        (lambda t: t.replace("TYPE_FP32", "TYPE_FP16", 1), "input 'image'.data_type", "float32"),
        (lambda t: t.replace('name: "image"', 'name: "images"'), "input 'images'", "no such input"),
        (lambda t: t.replace("KIND_GPU", "KIND_CPU"), "instance_group 0.kind", "GPUs alone"),
    ],
)
def test_check_finds_what_disagrees(
    gpuopt: Gpuopt, rtx: Path, tmp_path: Path, change: Callable[[str], str], field: str, told: str
) -> None:
    assert gpuopt("triton", rtx, "-o", tmp_path / "r", "--name", "m", "-q").code == 0
    path = tmp_path / "r/m/config.pbtxt"
    path.write_text(change(path.read_text()))
    result = gpuopt("triton", rtx, "--check", path)
    assert result.code == 19
    assert f"error {field}: " in result.stdout
    assert told in result.stdout
    assert len(result.stderr.splitlines()) <= 3
    found = gpuopt("triton", rtx, "--check", tmp_path / "r/m", "--json")
    assert found.code == 19
    assert field in [finding["field"] for finding in found.report()["findings"]]


def test_a_mistake_has_its_exit_code_and_three_lines(gpuopt: Gpuopt, rtx: Path, project: Path, tmp_path: Path) -> None:
    broken = tmp_path / "config.pbtxt"
    broken.write_text("max_batch_size: eight")
    for code, arguments in (
        (2, (rtx,)),
        (2, (rtx, "-o", tmp_path / "r", "--max-batch-size", "16")),
        (2, (rtx, "-o", tmp_path / "r", "--preferred-batch-size", "16")),
        (2, (rtx, "-o", tmp_path / "r", "--max-queue-delay", "100")),
        (2, (rtx, "-o", tmp_path / "r", "--instances", "tpu:1")),
        (2, (rtx, "-o", tmp_path / "r", "--version-policy", "newest")),
        (2, (rtx, "-o", tmp_path / "r", "--name", "../m")),
        (2, (rtx, "-o", tmp_path / "r", "--backend", "pytorch")),
        (2, (rtx, "-o", tmp_path / "r", "--accelerator", "cuda")),
        (2, (rtx, "-o", tmp_path / "r", "--ensemble", "e", "--before", "nothing")),
        (2, (rtx, "-o", tmp_path / "r", "--ensemble", "../e", "--before", "rtx")),
        (2, (rtx, "-o", tmp_path / "r2", "--engine-for", rtx)),
        (10, (project, "-o", tmp_path / "r")),
        (19, (rtx, "--check", broken)),
        (19, (rtx, "-o", tmp_path / "r3", "--priority-levels", "2", "--default-priority-level", "3")),
    ):  # fmt: skip
        result = gpuopt("triton", *arguments)
        assert result.code == code, (arguments, result.stderr)
        errors = [line for line in result.stderr.splitlines() if not line.startswith("warning")]
        assert 1 <= len(errors) <= 3
        assert "Traceback" not in result.stderr
    for name in ("r", "r2", "r3"):
        assert not (tmp_path / name).exists()


def test_an_ensemble_of_steps_that_are_there(gpuopt: Gpuopt, rtx: Path, triton_python: Path, tmp_path: Path) -> None:
    repository = tmp_path / "r"
    for name, given, made in (
        ("decode", ("JPEG", "TYPE_UINT8", "[-1]"), ("pixels", "TYPE_FP32", "[3, 16, 16]")),
        ("top", ("scores", "TYPE_FP32", "[10]"), ("class", "TYPE_INT64", "[1]")),
    ):
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1" / "model.py").write_text("")
        (repository / name / "config.pbtxt").write_text(
            'backend: "python" max_batch_size: 4 '
            f'input {{ name: "{given[0]}" data_type: {given[1]} dims: {given[2]} }} '
            f'output {{ name: "{made[0]}" data_type: {made[1]} dims: {made[2]} }}'
        )
    steps = ("--ensemble", "pipeline", "--before", "decode", "--after", "top", "--map", "m.output=top.scores")
    result = gpuopt("triton", rtx, "-o", repository, "--name", "m", *steps, "--json")
    assert result.code == 0, result.stderr
    text = (repository / "pipeline/config.pbtxt").read_text()
    assert probe(triton_python, {"pipeline": text})["errors"] == {}
    config = schema.parse(text, "it")
    assert config.max_batch_size == 4
    assert [t.name for t in config.input] == ["JPEG"]
    assert [t.name for t in config.output] == ["class"]
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["decode", "m", "top"]
    assert dict(config.ensemble_scheduling.step[1].input_map) == {"image": "decode.pixels"}
    assert (repository / "pipeline/1").is_dir()
    checked = gpuopt("triton", rtx, "--check", repository / "pipeline", "--json")
    assert (checked.code, checked.report()["findings"]) == (0, [])
    wrong = gpuopt("triton", rtx, "-o", repository, "--name", "n", "--ensemble", "other", "--before", "top")
    assert wrong.code == 19
    assert sorted(path.name for path in repository.iterdir()) == ["decode", "m", "pipeline", "top"]
