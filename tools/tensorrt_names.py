"""Writes tests/api/tensorrt_names.txt: which public names each release of TensorRT's Python module has.

    python tools/tensorrt_names.py LABEL MODULE_OR_FOLDER

MODULE_OR_FOLDER is an importable module (tensorrt_rtx), or the unpacked folder of a bindings wheel, which installs
without TensorRT's libraries:

    pip download --no-deps tensorrt_cu13_bindings && unzip tensorrt_cu13_bindings-*.whl
    python tools/tensorrt_names.py 11 tensorrt_bindings

Its libraries are then replaced by empty ones, made with the C compiler, that are never called. The names of the
other labels in the file are kept. Use the Python version that the wheel is for.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

NAMES = Path(__file__).parent.parent / "tests/api/tensorrt_names.txt"


@dataclass(frozen=True)
class Release:
    """Version and public names of a release."""

    version: str
    names: set[str]


def read() -> dict[str, set[str]]:
    """The labels of the releases that have a name, by name (`Builder.create_network`)."""
    lines = [line.split() for line in NAMES.read_text().splitlines() if not line.startswith("#")]
    return {name: set(labels) for name, *labels in lines}


def releases() -> dict[str, str]:
    """The version of every label."""
    heads = [line.split() for line in NAMES.read_text().splitlines() if line.startswith("# release")]
    return {head[2]: head[3] for head in heads}


def names(module: ModuleType) -> set[str]:
    """Public names of the module and of its classes, without kinds of layers and the methods that add them."""
    found = set()
    for name, value in vars(module).items():
        if name.startswith("_") or isinstance(value, ModuleType):
            continue
        found.add(name)
        if isinstance(value, type) and not (name.endswith("Layer") and name != "ILayer"):
            found.update(f"{name}.{member}" for member in dir(value) if not member.startswith("_"))
    return {name for name in found if ".add_" not in name or "profile" in name}


def in_a_process_of_its_own(folder: Path) -> Release:
    """The names of the bindings in a folder, whose libraries are not there."""
    with tempfile.TemporaryDirectory() as stubs:
        _write_stubs(folder / "tensorrt.so", Path(stubs))
        environment = {**os.environ, "LD_LIBRARY_PATH": stubs}
        command = [sys.executable, __file__, "--print", folder.absolute()]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    document = json.loads(said)
    return Release(document["version"], set(document["names"]))


def _print(folder: Path) -> None:
    sys.path.insert(0, str(folder.parent))
    module = importlib.import_module(folder.name)
    print(json.dumps({"version": str(module.__version__), "names": sorted(names(module))}))


def _write_stubs(library: Path, folder: Path) -> None:
    """Empty libraries that satisfy the linker of `library`."""
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line]
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[1] for line in listed.stdout.splitlines() if line.split()[0] == "U"]
    marks = ("_INTERNAL", "Plugin", "nvuff", "nvcaffe", "getNvOnnxParserVersion")
    wanted = [name for name in symbols if "@" not in name and any(mark in name for mark in marks)]
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in wanted))
    for name in (name for name in needed if name.startswith("libnv")):
        subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, source], check=True)


def main() -> None:
    """Add or replace one release's names."""
    label, source = sys.argv[1:]
    if label == "--print":
        _print(Path(source))
        return
    if Path(source).is_dir():
        release = in_a_process_of_its_own(Path(source))
    else:
        module = importlib.import_module(source)
        release = Release(str(module.__version__), names(module))
    known = {name: labels - {label} for name, labels in read().items()} if NAMES.is_file() else {}
    versions = (releases() if NAMES.is_file() else {}) | {label: release.version}
    for name in release.names:
        known.setdefault(name, set()).add(label)
    lines = ["# Written by tools/tensorrt_names.py: a public name, then the releases that have it."]
    lines += [f"# release {name} {version}" for name, version in sorted(versions.items())]
    lines += [f"{name} {' '.join(sorted(labels))}" for name, labels in sorted(known.items()) if labels]
    NAMES.parent.mkdir(parents=True, exist_ok=True)
    NAMES.write_text("\n".join(lines) + "\n")
    print(f"{NAMES}: {len(release.names)} names of {release.version}")


if __name__ == "__main__":
    main()
