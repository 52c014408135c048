"""The stage cache as users meet it, and how the command line behaves towards scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from tests.conftest import Gpuopt, Run
from tests.integration import small


@pytest.fixture
def model(tmp_path: Path) -> Path:
    small.save_data(tmp_path / "calibration.npz")
    return small.save("exported program", tmp_path / "model.pt")


def stages(result: Run) -> dict[str, bool]:
    """Which stages came from the cache."""
    assert result.code == 0, result.stderr
    return {stage["name"]: stage["cached"] for stage in result.report()["stages"]}


def test_what_changed_runs_again_and_nothing_before(gpuopt: Gpuopt, model: Path, tmp_path: Path) -> None:
    own = {"GPUOPT_CACHE_DIR": str(tmp_path / "cache")}

    def run(*flags: object) -> Run:
        return gpuopt("compile", model, "-t", "tensorrt-rtx", "--json", "--explain", *flags, env=own)

    assert not any(stages(run()).values())
    assert all(stages(run()).values())

    method = run("--calibration-method", "percentile")
    assert stages(method) == {
        "samples": True, "export": True, "simplify": True, "equalize": False, "calibrate": False,
        "quantize": False, "correct": False, "cast": False, "build": False, "verify": False,
    }  # fmt: skip
    assert 'calibrate.method changed from "auto" to "percentile"' in method.stderr
    assert "its input ranges changed" in method.stderr

    small.save_data(tmp_path / "calibration.npz", seed=1)
    data = run("--calibration-method", "percentile")
    assert stages(data)["equalize"] is False
    assert stages(data)["calibrate"] is False
    assert "its input calibration data changed" in data.stderr

    target = run("--calibration-method", "percentile", "--compute-capability", "8.6")
    assert [name for name, cached in stages(target).items() if not cached] == ["build"]


def test_a_damaged_entry_is_made_anew(gpuopt: Gpuopt, model: Path, tmp_path: Path) -> None:
    own = {"GPUOPT_CACHE_DIR": str(tmp_path / "cache")}
    arguments = ("compile", model, "-t", "onnxruntime", "--json")
    assert gpuopt(*arguments, env=own).code == 0
    whole = (tmp_path / "model.gpuopt/model.onnx").read_bytes()
    for damaged in (tmp_path / "cache/entries").glob("*/onnx/model.onnx"):
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 0xFF
        damaged.write_bytes(data)
    result = gpuopt(*arguments, env=own)
    assert {"export", "simplify", "quantize"} <= {name for name, cached in stages(result).items() if not cached}
    assert (tmp_path / "model.gpuopt/model.onnx").read_bytes() == whole


def test_user_code_is_part_of_the_key(gpuopt: Gpuopt, tmp_path: Path) -> None:
    code = tmp_path / "my_model.py"
    code.write_text("from torch import nn\nimport my_part\ndef build():\n    return nn.Sequential(my_part.layer())\n")
    part = tmp_path / "my_part.py"
    part.write_text("from torch import nn\ndef layer():\n    return nn.Linear(8, 8)\n")
    arguments = ("compile", "my_model:build", "-p", "fp32", "-i", "input:2x8", "-t", "onnxruntime", "--json")
    assert stages(gpuopt(*arguments, cwd=tmp_path))["export"] is False
    assert stages(gpuopt(*arguments, cwd=tmp_path))["export"] is True
    part.write_text("from torch import nn\ndef layer():\n    return nn.Linear(8, 4)\n")
    changed = gpuopt(*arguments, cwd=tmp_path)
    assert stages(changed)["export"] is False
    assert changed.report()["verification"]["outputs"][0]["shape"] == [2, 4]


def test_code_that_the_data_share_with_the_model_is_part_of_the_key(gpuopt: Gpuopt, tmp_path: Path) -> None:
    factor, code = tmp_path / "factor.txt", tmp_path / "both.py"
    factor.write_text("2")
    text = (
        "from pathlib import Path\nimport numpy as np\nfrom torch import nn\n"
        "FACTOR = float(Path('factor.txt').read_text())\n"
        "class Model(nn.Module):\n    def forward(self, x):\n        return x * FACTOR + 1\n"
        "def make():\n    return Model()\n"
        "def data():\n    yield {'x': np.ones((1, 4), np.float32)}\n"
    )
    code.write_text(text)
    arguments = ("compile", "both:make", "-c", "both:data", "-p", "fp32", "-t", "onnxruntime", "--json")
    assert stages(gpuopt(*arguments, cwd=tmp_path))["export"] is False
    assert stages(gpuopt(*arguments, cwd=tmp_path))["export"] is True
    code.write_text(text.replace("+ 1", "+ 3"))
    assert stages(gpuopt(*arguments, cwd=tmp_path))["export"] is False
    factor.write_text("5")
    assert stages(gpuopt(*arguments, cwd=tmp_path))["export"] is False
    assert stages(gpuopt(*arguments, cwd=tmp_path))["export"] is True


SHARED = {
    "m.py": (
        "from torch import nn\nimport common\nclass Model(nn.Module):\n"
        "    def forward(self, x):\n        return x * common.FACTOR\ndef make():\n    return Model()\n"
    ),
    "common.py": "import json\nfrom pathlib import Path\nFACTOR = json.loads(Path('common.json').read_text())\n",
    "common.json": "2.0",
    "d.py": (
        "import tempfile\nfrom pathlib import Path\nimport numpy as np\n"
        "with tempfile.NamedTemporaryFile('w') as file:\n    Path(file.name).read_text()\n"
        "def data():\n    import common\n    exec(Path('edit.txt').read_text())\n"
        "    yield {'x': np.ones((1, 4), np.float32)}\n"
    ),
    "edit.txt": "",
}


def test_code_that_is_imported_in_a_function_and_edited_meanwhile(gpuopt: Gpuopt, tmp_path: Path) -> None:
    for name, text in SHARED.items():
        (tmp_path / name).write_text(text)
    arguments = ("compile", "m:make", "-c", "d:data", "-p", "fp32", "-t", "onnxruntime", "--json")

    def is_cached() -> bool:
        return stages(gpuopt(*arguments, cwd=tmp_path))["export"]

    # A file that is gone again, as of tempfile, does not keep the export from being used again.
    assert [is_cached(), is_cached()] == [False, True]
    (tmp_path / "common.json").write_text("3.0")
    assert [is_cached(), is_cached()] == [False, True]
    # As an edit while the data are read: what runs is what was imported before, and is not what the file says.
    (tmp_path / "edit.txt").write_text("Path('common.py').write_text('FACTOR = 7.0\\n')")
    edited = gpuopt(*arguments, cwd=tmp_path)
    assert stages(edited)["export"] is False
    assert "common.py changed while it was used" in edited.stderr
    (tmp_path / "edit.txt").write_text("")
    assert [is_cached(), is_cached()] == [False, True]


def test_two_runs_at_once_do_not_harm_each_other(gpuopt: Gpuopt, model: Path, tmp_path: Path) -> None:
    own = {"GPUOPT_CACHE_DIR": str(tmp_path / "cache")}
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(gpuopt, "compile", model, "-t", "onnxruntime", "-o", tmp_path / name, env=own)
            for name in ("one", "two")
        ]
    for run in runs:
        assert run.result().code == 0, run.result().stderr
    assert (tmp_path / "one/model.onnx").read_bytes() == (tmp_path / "two/model.onnx").read_bytes()
    assert all(gpuopt("verify", tmp_path / name).code == 0 for name in ("one", "two"))


def test_no_cache_keeps_nothing(gpuopt: Gpuopt, model: Path, tmp_path: Path) -> None:
    own = {"GPUOPT_CACHE_DIR": str(tmp_path / "cache")}
    assert gpuopt("compile", model, "-t", "onnxruntime", "--no-cache", env=own).code == 0
    assert not (tmp_path / "cache").exists()


def test_the_cache_command_shows_and_clears(gpuopt: Gpuopt, model: Path, tmp_path: Path) -> None:
    own = {"GPUOPT_CACHE_DIR": str(tmp_path / "cache")}
    assert gpuopt("compile", model, "-p", "fp32", "-t", "onnxruntime", env=own).code == 0
    before = gpuopt("cache", "--json", env=own).report()
    assert before["entries"] == 4
    assert before["size_bytes"] > 10_000
    assert gpuopt("cache", "--clear", "--json", env=own).report()["entries"] == 0


def test_stdout_is_data_and_stderr_is_talk(gpuopt: Gpuopt, model: Path) -> None:
    result = gpuopt("compile", model, "-t", "onnxruntime", "--json")
    assert json.loads(result.stdout)["status"] == "passed"
    assert "export" in result.stderr
    assert "\x1b" not in result.stderr
    quiet = gpuopt("compile", model, "-t", "onnxruntime", "-q")
    assert (quiet.code, quiet.stdout, quiet.stderr) == (0, "", "")
    plain = gpuopt("compile", model, "-t", "onnxruntime")
    assert "verified" in plain.stdout
    assert "\x1b" not in plain.stdout


def test_a_closed_pipe_is_no_traceback(model: Path) -> None:
    command = [sys.executable, "-m", "gpuopt", "compile", str(model), "--dry-run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert b"Traceback" not in stderr


def test_dry_run_prints_a_recipe_that_reproduces_the_run(gpuopt: Gpuopt, model: Path, tmp_path: Path) -> None:
    flags = ("-t", "onnxruntime", "--calibration-method", "percentile", "--set", "calibrate.percentile=99.9")
    dry = gpuopt("compile", model, *flags, "--dry-run")
    assert dry.code == 0
    recipe = yaml.safe_load(dry.stdout)
    assert recipe["calibrate"]["method"] == "percentile"
    assert recipe["calibrate"]["percentile"] == 99.9
    assert "5. calibrate" in dry.stdout
    assert not (tmp_path / "model.gpuopt").exists()
    (tmp_path / "recipe.yaml").write_text(dry.stdout)
    assert gpuopt("compile", model, *flags).code == 0
    repeated = gpuopt("compile", "--recipe", tmp_path / "recipe.yaml", "--json")
    assert all(stages(repeated).values())


def test_a_wrong_recipe_key_names_the_right_one(gpuopt: Gpuopt, model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("calibrate:\n  methods: minmax\n")
    result = gpuopt("compile", model, "--recipe", tmp_path / "recipe.yaml")
    assert result.code == 2
    assert "Did you mean 'calibrate.method'?" in result.stderr


def test_help_loads_no_heavy_library() -> None:
    heavy = {"torch", "onnx", "onnxruntime", "numpy", "pydantic", "yaml"}
    script = f"import sys, gpuopt.cli; print(sorted({heavy} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_shell_completion_is_offered(gpuopt: Gpuopt) -> None:
    result = gpuopt("--show-completion", "bash", env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    assert result.code == 0
    assert "gpuopt" in result.stdout
