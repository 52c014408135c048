"""`gpuopt inspect` and `gpuopt check` on what small real compiles make, and on every way to spoil it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Gpuopt, python_path
from tests.integration import small

pytest.importorskip("tensorrt_rtx")

ENGINE = "model.tensorrt-rtx.engine"
HEAVY = ("torch", "tensorrt", "tensorrt_rtx", "onnxruntime", "pycuda")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    small.save("exported program", folder / "model.pt")
    small.save("onnx", folder / "plain.onnx")
    small.save_data(folder / "calibration.npz", 32)
    return folder


@pytest.fixture(scope="module")
def int8(gpuopt: Gpuopt, project: Path) -> Path:
    result = gpuopt("compile", project / "model.pt", "-t", "tensorrt-rtx", "-o", project / "int8.gpuopt", "-q")
    assert result.code == 0, result.stderr
    return project / "int8.gpuopt"


@pytest.fixture(scope="module")
def fp16(gpuopt: Gpuopt, project: Path) -> Path:
    arguments = ("-p", "fp16", "-t", "tensorrt-rtx", "-o", project / "fp16.gpuopt", "-q")
    assert gpuopt("compile", project / "model.pt", *arguments).code == 0
    return project / "fp16.gpuopt"


@pytest.fixture
def copy(int8: Path, tmp_path: Path) -> Path:
    """A bundle to spoil."""
    return Path(shutil.copytree(int8, tmp_path / "model.gpuopt"))


def test_a_bundle(gpuopt: Gpuopt, int8: Path) -> None:
    found = gpuopt("inspect", int8, "--json").report()
    assert (found["kind"], found["bundle"]["status"], found["bundle"]["problems"]) == ("bundle", "passed", [])
    engine = found["bundle"]["engines"][0]
    assert engine["file"]["name"] == ENGINE
    assert engine["file"]["matches_record"]
    assert engine["file"]["matches_manifest"]
    assert engine["inputs"] == [
        {"name": "image", "dtype": "float32", "shape": ["batch", 3, 16, 16], "layout": None}
    ]  # fmt: skip
    assert engine["profiles"] == [{"image": {"min": "1x3x16x16", "opt": "8x3x16x16", "max": "8x3x16x16"}}]
    assert found["bundle"]["origin"]["exporter"] == "dynamo"
    assert found["bundle"]["origin"]["model_kind"] == "exported program"
    report = json.loads((int8 / "report.json").read_text())
    quantized = next(stage["facts"] for stage in report["stages"] if stage["name"] == "quantize")
    graphs = {graph["file"]["name"]: graph for graph in found["bundle"]["graphs"]}
    assert set(graphs) == {"model.onnx", "engine.onnx"}
    for graph in graphs.values():
        assert graph["int8_macs_share"] == pytest.approx(quantized["int8_macs_share"])
        assert graph["macs"] == quantized["macs"]
        assert graph["computing_nodes"]["int8"] == 3
        assert graph["loading"]["verdict"] == "yes"
    assert graphs["engine.onnx"]["qdq_pairs"] == quantized["qdq_pairs"]
    assert graphs["model.onnx"]["weights"]["int8"]["size_bytes"] > 9000
    text = gpuopt("inspect", int8).stdout
    assert f"files        {len(json.loads((int8 / 'manifest.json').read_text())['files'])}" in text
    assert f"{ENGINE}: TensorRT-RTX engine, int8" in text


def test_the_engine_alone_says_why_it_does_not_load_here(gpuopt: Gpuopt, int8: Path, tmp_path: Path) -> None:
    result = gpuopt("inspect", int8 / ENGINE, "--json")
    assert result.code == 0
    found = result.report()["engine"]
    assert found["origin"]["model_kind"] == "exported program"
    assert found["loading"]["verdict"] in ("yes", "no")
    if not Path("/proc/driver/nvidia").exists():
        assert "there is no NVIDIA GPU here, or no driver" in found["loading"]["reasons"]
    shutil.copyfile(int8 / ENGINE, tmp_path / "found.engine")
    bare = gpuopt("inspect", tmp_path / "found.engine")
    assert bare.code == 0
    assert "loads here   unknown, no record" in bare.stdout


def test_onnx_in_three_precisions(gpuopt: Gpuopt, project: Path, fp16: Path, int8: Path) -> None:
    def graph(path: Path) -> dict[str, Any]:
        found: dict[str, Any] = gpuopt("inspect", path, "--json").report()["graph"]
        return found

    assert graph(project / "plain.onnx")["computing_nodes"] == {"fp32": 3}
    assert set(graph(project / "plain.onnx")["weights"]) == {"float32"}
    name = "engine.onnx" if (fp16 / "engine.onnx").is_file() else "model.onnx"
    assert graph(fp16 / name)["computing_nodes"] == {"fp16": 3}
    assert graph(fp16 / name)["int8_macs_share"] == 0.0
    assert graph(int8 / "engine.onnx")["computing_nodes"] == {"int8": 3}
    assert graph(int8 / "engine.onnx")["macs_shapes"] == {"image": "8x3x16x16"}


def test_other_files_are_refused(gpuopt: Gpuopt, project: Path, int8: Path, tmp_path: Path) -> None:
    result = gpuopt("inspect", project / "model.pt")
    assert result.code == 3
    assert "its kind is exported program" in result.stderr
    (tmp_path / "cut.onnx").write_bytes((int8 / "model.onnx").read_bytes()[:5000])
    assert gpuopt("inspect", tmp_path / "cut.onnx").code == 3
    assert gpuopt("inspect", tmp_path / "absent").code == 10
    answer = gpuopt("inspect", tmp_path, "--json")
    assert (answer.code, answer.report()["error"]["kind"]) == (10, "storage")


def test_nothing_heavy_is_imported(int8: Path, project: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from gpuopt.inspection import command, integrity, render\n"
        "for path in map(Path, sys.argv[2:]):\n"
        "    render.inspection(command.inspect(path))\n"
        "render.integrity(integrity.check(Path(sys.argv[1])))\n"
        f"print(sorted(name for name in sys.modules if name.partition('.')[0] in {HEAVY}))\n"
    )
    paths = [int8, int8 / ENGINE, int8 / "model.onnx", project / "plain.onnx"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(int8), *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"


def test_a_whole_bundle_is_checked_without_torch_and_runtimes(
    gpuopt: Gpuopt, int8: Path, fp16: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nfor name in {HEAVY}:\n    sys.modules[name] = None\n"
    )  # fmt: skip
    env = {"PYTHONPATH": python_path(tmp_path)}
    for folder in (int8, fp16):
        result = gpuopt("check", folder, env=env)
        assert result.code == 0, result.stderr
        assert f"engine       {ENGINE}: its record fits the file and the manifest" in result.stdout
        assert "signature    none" in result.stdout
        assert gpuopt("inspect", folder, env=env).code == 0


def flip(folder: Path) -> None:
    content = bytearray((folder / ENGINE).read_bytes())
    content[1000] ^= 1
    (folder / ENGINE).write_bytes(content)


def tamper(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "status": "failed"}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a changed byte": (flip, f"{ENGINE} changed"),
    "a missing file": (lambda f: (f / "recipe.yaml").unlink(), "recipe.yaml is missing"),
    "an extra file": (lambda f: (f / "notes.txt").write_text("x"), "notes.txt is not in the manifest"),
    "a tampered manifest": (tamper, "status is failed in the manifest, passed in the report"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_an_error_of_check_and_described_by_inspect(
    gpuopt: Gpuopt, copy: Path, damage: Callable[[Path], Any], said: str
) -> None:
    damage(copy)
    result = gpuopt("check", copy)
    assert result.code == 10
    assert said in result.stderr
    assert result.stdout == ""
    answer = gpuopt("check", copy, "--json")
    assert (answer.code, answer.report()["error"]["kind"]) == (10, "storage")
    shown = gpuopt("inspect", copy, "--json")
    assert shown.code == 0
    if damage is not tamper:
        assert said in shown.report()["bundle"]["problems"]


def test_signatures(gpuopt: Gpuopt, copy: Path, project: Path, tmp_path: Path) -> None:
    minisign = pytest.importorskip("minisign", reason="py-minisign is not installed: pip install 'gpuopt[sign]'")
    pair, other = minisign.KeyPair.generate(), minisign.KeyPair.generate()
    (tmp_path / "release.pub").write_bytes(bytes(pair.public_key) + b"\n")
    key = ("--public-key", tmp_path / "release.pub")
    for command in ("check", "verify"):
        missing = gpuopt(command, copy, *key)
        assert missing.code == 17
        assert "there is no signature" in missing.stderr
    made = pair.secret_key.sign((copy / "manifest.json").read_bytes(), trusted_comment="release 7")
    (copy / "manifest.json.minisig").write_bytes(bytes(made) + b"\n")
    assert "signature    valid, key" in gpuopt("check", copy, *key).stdout
    assert gpuopt("verify", copy, *key, "-q").code == 0
    assert gpuopt("check", copy, "--public-key", "nonsense").code == 2
    wrong = ("--public-key", other.public_key.to_base64().decode())
    for command in ("check", "verify", "bench", "profile"):
        result = gpuopt(command, copy, *wrong)
        assert result.code == 17, result.stderr
    assert gpuopt("check", copy, *wrong, "--json").report()["error"]["kind"] == "signature"
    tamper(copy)
    assert gpuopt("check", copy, *key).code == 17


def test_a_bundle_built_anew_has_no_signature(gpuopt: Gpuopt, copy: Path) -> None:
    (copy / "manifest.json.minisig").write_text("x")
    assert gpuopt("build", copy, "-t", "tensorrt-rtx", "-q").code == 0
    assert not (copy / "manifest.json.minisig").exists()
    assert gpuopt("check", copy, "-q").code == 0
