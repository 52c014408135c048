"""tools/install.py: what it tells the user, what it pins, and what it asks of pip."""

from __future__ import annotations

import importlib.util
import ssl
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpuopt_install", ROOT / "tools/install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


install = load()

# Two entries as pip 26 writes them, and the project's own.
REPORT: dict[str, Any] = {
    "version": "1",
    "install": [
        {
            "download_info": {"url": "file:///src/gpuopt", "dir_info": {"editable": True}},
            "metadata": {"name": "gpuopt", "version": "0.1.0"},
        },
        {
            "download_info": {
                "url": "file:///opt/wheels/torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl",
                "archive_info": {"hash": "sha256=6746"},
            },
            "metadata": {"name": "torch", "version": "2.13.0+cpu"},
        },
        {
            "download_info": {"url": "https://example.invalid/filelock-4.2.12-py3-none-any.whl"},
            "metadata": {"name": "filelock", "version": "4.2.12"},
        },
    ],
}


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (404_900_000, "405 MB"),
        (999_900_000, "1.0 GB"),
        (3_120_000_000, "3.1 GB"),
        (9_960_000_000, "10 GB"),
        (80_400_000_000, "80 GB"),
        (2_000_000_000_000, "2.0 TB"),
    ],
)
def test_sizes_are_short(size: int, text: str) -> None:
    assert install.format_size(size) == text


@pytest.mark.parametrize(
    ("version", "numbers"), [("23.2.1", (23, 2, 1)), ("25.3b1", (25, 3)), ("26", (26,)), ("dev", ())]
)
def test_version_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert install.version_tuple(version) == numbers


def test_constraints_keep_the_exact_build_and_pin_nothing_else() -> None:
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu", "pip": "26.3", "onnxruntime": "1.31.1"}
    assert install.constraint_lines(versions) == ["torch==2.13.0+cpu", "torchvision==0.28.0+cpu"]
    assert install.constraint_lines({"torch": "2.9.0a0+50eac811a6.nv25.9"}) == ["torch==2.9.0a0+50eac811a6.nv25.9"]
    assert install.constraint_lines({"pip": "26.3"}) == []


def test_report_without_the_project_itself() -> None:
    downloads = install.parse_report(REPORT)
    assert [(item.name, item.version) for item in downloads] == [
        ("torch", "2.13.0+cpu"),
        ("filelock", "4.2.12"),
    ]


def test_size_line_names_the_largest_and_counts_the_unknown() -> None:
    names = ("filelock", "torch", "nvidia-cublas", "odd")
    sizes = (222_000, 900_000_000, 600_000_000, None)
    measured = {
        install.Download(name, "1", f"https://example.invalid/{name}"): size
        for name, size in zip(names, sizes, strict=True)
    }
    assert install.size_line(measured, 80_000_000_000) == (
        "to install: 4 packages, 1.5 GB to download (largest: torch 900 MB, nvidia-cublas 600 MB), "
        "1 of unknown size; free space 80 GB"
    )


def test_torch_in_place_is_named_with_its_build() -> None:
    assert install.torch_line({"torch": "2.13.0"}, "CPU") == "torch 2.13.0 (CPU build) is already installed and stays"
    both = install.torch_line({"torch": "2.13.0", "torchvision": "0.28.0"}, "CUDA 13.0")
    assert both == "torch 2.13.0 (CUDA 13.0 build) and torchvision 0.28.0 are already installed and stay"


def test_pip_reason_is_one_short_line() -> None:
    output = (
        "WARNING: Location 'file:///x/' is ignored\n"
        "ERROR: Could not find a version that satisfies the requirement torch>=2.8 "
        "(from versions: 1.0, 1.1, 1.2)\n"
        "ERROR: No matching distribution found for torch>=2.8\n"
    )
    expected = "Could not find a version that satisfies the requirement torch>=2.8"
    assert install.pip_reason(output) == expected
    assert len(install.pip_reason("ERROR: " + "x" * 500)) == 200
    assert install.pip_reason("") == "no message"
    offline = "  error: subprocess-exited-with-error\n\n  x pip did not run\n      ERROR: No matching wheel\n"
    assert install.pip_reason(offline) == "No matching wheel"


@pytest.mark.parametrize(
    ("requested", "versions", "has_gpu", "backend"),
    [
        ("auto", {}, False, "cpu"),
        ("auto", {}, True, "gpu"),
        ("auto", {"onnxruntime": "1.31"}, True, "cpu"),
        ("auto", {"onnxruntime-gpu": "1.31"}, False, "gpu"),
        ("cpu", {}, True, "cpu"),
        ("gpu", {"onnxruntime-gpu": "1.31"}, False, "gpu"),
    ],
)
def test_backend(requested: str, versions: dict[str, str], has_gpu: bool, backend: str) -> None:
    assert install.choose_backend(requested, versions, has_gpu) == backend


@pytest.mark.parametrize(("requested", "there"), [("cpu", "onnxruntime-gpu"), ("gpu", "onnxruntime")])
def test_the_two_runtimes_are_never_mixed(requested: str, there: str) -> None:
    with pytest.raises(install.InstallError, match=f"{there}, which is installed"):
        install.choose_backend(requested, {there: "1.31"}, False)


def test_attempts_end_with_what_can_do_without() -> None:
    def requirements(*arguments: Any) -> list[str]:
        return [attempt.requirements[0] for attempt in install.attempts(*arguments)]

    assert requirements("setup", "auto", "cpu", False) == [".[cpu]"]
    assert requirements("setup", "auto", "gpu", False) == [".[gpu]", ".[cpu]"]
    assert requirements("setup", "gpu", "gpu", False) == [".[gpu]"]
    assert requirements("test", "auto", "cpu", False) == [".[cpu,dev,models]"]
    assert requirements("test", "auto", "cpu", True) == [".[cpu,dev,models]", ".[cpu,dev]"]


def test_stamp_key_follows_the_project_and_the_request() -> None:
    keys = {
        install.stamp_key(b"a", "test", "auto"),
        install.stamp_key(b"b", "test", "auto"),
        install.stamp_key(b"a", "setup", "auto"),
        install.stamp_key(b"a", "test", "cpu"),
    }
    assert len(keys) == 4
    assert install.stamp_key(b"a", "test", "auto") in keys


def test_target_is_the_active_environment_or_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tmp_path / "ours"
    active = tmp_path / "active"
    (active / "bin").mkdir(parents=True)
    (active / "bin/python").touch()

    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/bin/python3"))
    environ = {"VIRTUAL_ENV": str(active)}
    assert install.target_python(ours, environ) == (tmp_path / "venv/bin/python3", False)

    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert install.target_python(ours, environ) == (active / "bin/python", False)
    assert install.target_python(ours, {"VIRTUAL_ENV": str(tmp_path / "gone")}) == (ours / "bin/python", True)
    assert install.target_python(ours, {}) == (ours / "bin/python", True)


def test_a_full_disk_stops_before_the_download(tmp_path: Path) -> None:
    with pytest.raises(install.InstallError, match="too little disk space") as caught:
        install.check_space(10**18, tmp_path)
    assert "VENV=" in caught.value.hint
    assert install.check_space(0, tmp_path) > 0


def test_sizes_of_local_and_unreachable_archives(tmp_path: Path) -> None:
    archive = tmp_path / "torch-2.13.0+cpu-py3-none-any.whl"
    archive.write_bytes(b"x" * 1234)
    context = ssl.create_default_context()
    assert install.archive_size(archive.as_uri(), context, 1) == 1234
    assert install.archive_size(archive.as_uri().replace("torch", "gone"), context, 1) is None
    assert install.archive_size("git+https://example.invalid/x", context, 1) is None
    # Nothing listens on the port that is reserved for discarding.
    assert install.archive_size("http://127.0.0.1:9/x.whl", context, 1) is None


def write_wheel(folder: Path, name: str, version: str, requires: str = "") -> Path:
    """A wheel with metadata and one module: all that pip's resolver looks at."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    if requires:
        metadata += f"Requires-Dist: {requires}\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place pip looks for packages."""
    done = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if done.returncode != 0:
        pytest.skip("this Python has no pip")
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_real_pip_resolves_and_keeps_the_pinned_build(tmp_path: Path, index: Path) -> None:
    top = write_wheel(index, "tinytop", "1.0", requires="tinybase>=1.0")
    base = write_wheel(index, "tinybase", "1.0+cpu")
    newer = write_wheel(index, "tinybase", "2.0")
    python = Path(sys.executable)

    free = tmp_path / "free.txt"
    free.write_text("")
    sizes = install.measure(install.resolve(python, ["tinytop"], free))
    assert {(item.name, item.version): size for item, size in sizes.items()} == {
        ("tinytop", "1.0"): top.stat().st_size,
        ("tinybase", "2.0"): newer.stat().st_size,
    }

    pinned = tmp_path / "pinned.txt"
    pinned.write_text("tinybase==1.0+cpu\n")
    sizes = install.measure(install.resolve(python, ["tinytop"], pinned))
    assert {(item.name, item.version): size for item, size in sizes.items()} == {
        ("tinytop", "1.0"): top.stat().st_size,
        ("tinybase", "1.0+cpu"): base.stat().st_size,
    }


def test_real_pip_says_why_it_finds_nothing(tmp_path: Path, index: Path) -> None:
    write_wheel(index, "tinytop", "1.0", requires="tinybase>=3.0")
    write_wheel(index, "tinybase", "2.0")
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("")
    with pytest.raises(install.ResolveError) as caught:
        install.resolve(Path(sys.executable), ["tinytop"], constraints)
    assert "tinybase>=3.0" in caught.value.message
    assert "\n" not in caught.value.message
