"""Make the environment and install gpuopt into it, saying first how large that will be.

Called by the Makefile; it needs nothing but the standard library of any Python.

    python tools/install.py where          the path of the Python that everything is installed into
    python tools/install.py setup          what `gpuopt compile` and `make demo` need
    python tools/install.py test           the same, the test tools and the architectures of the tests

A torch that is already there, in the environment or in the Python that the environment is made
from, is used as it is and never replaced.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import util as import_util
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent

# Older versions fetch every wheel in a dry run, although only the metadata is needed.
GOOD_PIP = (25, 3)
# The first version with `--report`.
OLDEST_PIP = (22, 2)

# Packages that are pinned when they are there: a second build of either breaks the pair.
PINNED = ("torch", "torchvision")

# An install holds the archive and its unpacked files at the same time; a wheel of CUDA libraries
# unpacks to between one and a half times and twice its size.
SPACE_FACTOR = 3

# Runs in the target environment. `torch/version.py` tells the build without the seconds that
# importing torch takes.
PROBE = """
import importlib.metadata, importlib.util, json, os, runpy, sys
versions = {}
for name in ("pip", "torch", "torchvision", "onnxruntime", "onnxruntime-gpu"):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
build = ""
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin:
    try:
        values = runpy.run_path(os.path.join(os.path.dirname(spec.origin), "version.py"))
        build = ("CUDA " + values["cuda"] if values.get("cuda")
                 else "ROCm " + values["hip"] if values.get("hip") else "CPU")
    except Exception:
        build = "unknown"
print(json.dumps({"python": "%d.%d" % sys.version_info[:2], "prefix": sys.prefix,
                  "versions": versions, "torch_build": build}))
"""


class InstallError(Exception):
    """Why nothing more was installed, with at most two lines on what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ResolveError(InstallError):
    """pip found no set of packages that fits what was asked for."""


@dataclass(frozen=True)
class Download:
    """One package that pip would fetch and install."""

    name: str
    version: str
    url: str


@dataclass(frozen=True)
class Environment:
    """What the probe found in the environment that is installed into."""

    python: Path
    python_version: str
    prefix: Path
    versions: Mapping[str, str]
    torch_build: str


@dataclass(frozen=True)
class Attempt:
    """One set of requirements, and what it means for the user to have ended with this one."""

    requirements: tuple[str, ...]
    note: str = ""


def say(text: str) -> None:
    """One progress line. Standard output stays free for results."""
    sys.stderr.write(f"gpuopt: {text}\n")
    sys.stderr.flush()


# --- Pure functions ----------------------------------------------------------------------------


def format_size(size: int) -> str:
    """A size in decimal units with at most three digits: `3.1 GB`, `82 GB`, `405 MB`, `12 kB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        digits = 1 if unit == "GB" and value < 9.95 else 0
        if round(value, digits) < 1000:
            return f"{value:.{digits}f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `25.3.1b2` is (25, 3, 1)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def constraint_lines(versions: Mapping[str, str]) -> list[str]:
    """Pins for what must stay, to the exact version with its local part, such as `+cpu`."""
    return [f"{name}=={versions[name]}" for name in PINNED if name in versions]


def parse_report(report: Mapping[str, Any]) -> list[Download]:
    """The packages in pip's installation report, without local folders such as gpuopt itself."""
    downloads = []
    for item in report["install"]:
        source = item["download_info"]
        if "dir_info" not in source:
            metadata = item["metadata"]
            downloads.append(Download(metadata["name"], metadata["version"], source["url"]))
    return downloads


def size_line(sizes: Mapping[Download, int | None], free: int) -> str:
    """The line that the user reads before anything is fetched."""
    known = sorted(((size, download.name) for download, size in sizes.items() if size is not None), reverse=True)
    total = sum(size for size, _ in known)
    largest = ", ".join(f"{name} {format_size(size)}" for size, name in known[:2])
    count = f"{len(sizes)} package" + ("" if len(sizes) == 1 else "s")
    text = f"to install: {count}, {format_size(total)} to download"
    if largest:
        text += f" (largest: {largest})"
    unknown = len(sizes) - len(known)
    if unknown:
        text += f", {unknown} of unknown size"
    return f"{text}; free space {format_size(free)}"


def torch_line(versions: Mapping[str, str], build: str) -> str:
    """The line about the torch that is in place."""
    text = f"torch {versions['torch']} ({build} build)"
    if "torchvision" in versions:
        return f"{text} and torchvision {versions['torchvision']} are already installed and stay"
    return f"{text} is already installed and stays"


def pip_reason(output: str) -> str:
    """The one line of pip's output that says best what is wrong, shortened."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line[7:] for line in lines if line.lower().startswith("error: ")]
    # pip's names for its own steps, such as subprocess-exited-with-error, tell a user nothing.
    telling = [error for error in errors if " " in error]
    reason = (telling or errors or lines or ["no message"])[0]
    # The list of every version that exists fills a screen.
    reason = re.sub(r" *\(from versions: [^)]+\)", "", reason)
    return reason if len(reason) <= 200 else reason[:197] + "..."


def choose_backend(requested: str, versions: Mapping[str, str], has_gpu: bool) -> str:
    """`cpu` or `gpu`. The two bring packages that overwrite each other, so what is there decides."""
    present = [
        backend for backend, package in (("gpu", "onnxruntime-gpu"), ("cpu", "onnxruntime")) if package in versions
    ]
    if requested != "auto":
        if present and requested not in present:
            package = "onnxruntime-gpu" if requested == "cpu" else "onnxruntime"
            raise InstallError(
                f"EXTRAS={requested} does not go with {package}, which is installed in this environment",
                f"Uninstall it first (pip uninstall {package}), or choose another environment.",
            )
        return requested
    return present[0] if present else ("gpu" if has_gpu else "cpu")


def attempts(target: str, requested: str, backend: str, has_torch: bool) -> list[Attempt]:
    """What to try to install, best first."""
    no_gpu_packages = "the packages for the GPU cannot be installed here, those for the CPU were"
    no_models = "no torchvision fits the installed torch: the tests that need torchvision or timm will be skipped"
    if target == "setup":
        demo = "scikit-learn>=1.4"
        tries = [Attempt((f".[{backend}]", demo))]
        if backend == "gpu" and requested == "auto":
            tries.append(Attempt((".[cpu]", demo), no_gpu_packages))
        return tries
    tries = [Attempt((f".[{backend},dev,models]",))]
    if has_torch:
        tries.append(Attempt((f".[{backend},dev]",), no_models))
    if backend == "gpu" and requested == "auto":
        tries.append(Attempt((".[cpu,dev,models]",), no_gpu_packages))
    return tries


def stamp_key(project: bytes, *values: str) -> str:
    """Changes when the project's requirements or the request do."""
    return hashlib.sha256(project + "\0".join(("", *values)).encode()).hexdigest()


def target_python(venv: Path, environ: Mapping[str, str]) -> tuple[Path, bool]:
    """The Python to install into, and whether it belongs to the environment that we make."""
    if sys.prefix != sys.base_prefix:
        return Path(sys.executable), False
    active = environ.get("VIRTUAL_ENV", "")
    if active and (Path(active) / "bin/python").exists():
        return Path(active) / "bin/python", False
    return venv / "bin/python", True


# --- The machine -------------------------------------------------------------------------------


def has_nvidia_gpu() -> bool:
    """Whether a driver answers and lists a GPU."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        answer = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=60)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU" in answer.stdout


def runs(python: Path) -> bool:
    """Whether this interpreter is there and starts."""
    try:
        return subprocess.run([str(python), "-c", ""], capture_output=True).returncode == 0  # noqa: S603
    except OSError:
        return False


def make_environment(venv: Path) -> None:
    """Create the virtual environment, on top of the base Python's packages if torch is among them."""
    command = [sys.executable, "-m", "venv"]
    shared = import_util.find_spec("torch") is not None
    if shared:
        command.append("--system-site-packages")
    # A folder is there but its Python does not start: made by a Python that is gone, or cut short.
    if (venv / "pyvenv.cfg").exists():
        command.append("--clear")
    elif venv.exists() and any(venv.iterdir()):
        raise InstallError(
            f"{venv} exists and is no virtual environment", "Remove it, or name another: make setup VENV=..."
        )
    say(
        f"making the environment {venv} with Python {sys.version_info[0]}.{sys.version_info[1]}"
        + (", which sees the torch of that Python" if shared else "")
    )
    done = subprocess.run([*command, str(venv)], capture_output=True, text=True)  # noqa: S603
    if done.returncode != 0:
        raise InstallError(
            f"{sys.executable} cannot make a virtual environment: {pip_reason(done.stdout + done.stderr)}",
            "On Debian and Ubuntu: apt install python3-venv. Or choose another: make setup PYTHON=...",
        )


def probe(python: Path) -> Environment:
    """What is installed in the environment of this Python."""
    answer = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True)  # noqa: S603
    if answer.returncode != 0:
        raise InstallError(f"{python} does not run: {pip_reason(answer.stderr)}")
    found = json.loads(answer.stdout)
    return Environment(
        python=python,
        python_version=found["python"],
        prefix=Path(found["prefix"]),
        versions=found["versions"],
        torch_build=found["torch_build"],
    )


def pip(python: Path, *arguments: str, quiet: bool) -> subprocess.CompletedProcess[str]:
    """Run pip in the target environment; if not quiet, the user sees its progress on stderr."""
    command = [str(python), "-m", "pip", *arguments, "--disable-pip-version-check", "--no-input"]
    if quiet:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # noqa: S603
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, text=True)  # noqa: S603


def prepare_pip(python: Path, version: str | None) -> None:
    """Make sure that pip is there and can tell sizes without fetching the packages."""
    if version is None:
        command = [str(python), "-m", "ensurepip", "--upgrade"]
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
        if done.returncode != 0:
            raise InstallError(
                f"{python} has no pip, and ensurepip fails: {pip_reason(done.stdout + done.stderr)}",
                "On Debian and Ubuntu: apt install python3-venv python3-pip.",
            )
        version = "0"
    if version_tuple(version) < GOOD_PIP:
        say(f"upgrading pip in the environment: version {version} cannot tell sizes without downloading")
        good = ".".join(map(str, GOOD_PIP))
        done = pip(python, "install", "--quiet", "--upgrade", f"pip>={good}", quiet=True)
        if done.returncode != 0 and version_tuple(version) < OLDEST_PIP:
            raise InstallError(
                f"pip {version} is too old and cannot be upgraded: {pip_reason(done.stderr)}",
                "Is the package index reachable from here?",
            )


def resolve(python: Path, requirements: Sequence[str], constraints: Path) -> list[Download]:
    """Ask pip what it would install, without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = ["install", "--dry-run", "--quiet", "--report", str(report)]
        arguments = [*pip_requirements(requirements), "--constraint", str(constraints)]
        # With range requests pip reads the metadata out of a wheel of 500 MB without fetching it.
        done = pip(python, *command, "--use-feature=fast-deps", *arguments, quiet=True)
        # pip's code for a wrong option: a version that no longer, or not yet, has this feature.
        if done.returncode == 2:
            done = pip(python, *command, *arguments, quiet=True)
        if done.returncode != 0:
            raise ResolveError(f"pip finds no way to install {' '.join(requirements)}: {pip_reason(done.stderr)}")
        return parse_report(json.loads(report.read_text(encoding="utf-8")))


def pip_requirements(requirements: Iterable[str]) -> list[str]:
    """pip's arguments; the project itself, written `.[extras]`, is installed in place."""
    arguments: list[str] = []
    for requirement in requirements:
        if requirement.startswith("."):
            arguments.append("--editable")
        arguments.append(requirement)
    return arguments


def archive_size(url: str, context: ssl.SSLContext, timeout: float) -> int | None:
    """The size of one archive from its address, None if nobody says."""
    parts = urlsplit(url)
    try:
        if parts.scheme == "file":
            return Path(unquote(parts.path)).stat().st_size
        if parts.scheme not in ("http", "https"):
            return None
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - http(s), see above
        with urllib.request.urlopen(request, timeout=timeout, context=context) as answer:  # noqa: S310
            return int(answer.headers["Content-Length"])
    except (OSError, ValueError, TypeError):
        return None


def measure(downloads: Sequence[Download], timeout: float = 10) -> dict[Download, int | None]:
    """The size of each archive, asked for side by side."""
    # The variables by which pip is given the certificate of a company's proxy.
    names = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
    bundles = [os.environ[name] for name in names if os.environ.get(name)]
    try:
        context = ssl.create_default_context(cafile=bundles[0] if bundles else None)
    except OSError:
        context = ssl.create_default_context()
    with ThreadPoolExecutor(max_workers=16) as pool:
        sizes = pool.map(lambda download: archive_size(download.url, context, timeout), downloads)
        return dict(zip(downloads, sizes))  # noqa: B905 - `strict` would fail on the Python we turn away


def check_space(total: int, prefix: Path) -> int:
    """The free space of the environment's disk; an error if the install would fill it."""
    free = shutil.disk_usage(prefix).free
    if free < SPACE_FACTOR * total:
        raise InstallError(
            f"too little disk space: {format_size(total)} to download needs about "
            f"{format_size(SPACE_FACTOR * total)} on the disk of {prefix}, {format_size(free)} are free",
            "Free some space, or place the environment on another disk: make setup VENV=/path/to/venv",
        )
    scratch = Path(tempfile.gettempdir())
    # pip keeps all downloads there until the last one has come, often a small disk in memory.
    if scratch.stat().st_dev != prefix.stat().st_dev and shutil.disk_usage(scratch).free < total:
        raise InstallError(
            f"too little space in {scratch} for {format_size(total)} of downloads",
            "Set TMPDIR to a folder on a larger disk.",
        )
    return free


def drop_broken_torchvision(environment: Environment, installed: Iterable[Download]) -> str:
    """Take a torchvision out again that came now and does not load; returns what that means.

    The index's torchvision is built for the index's torch. Its version number also fits a torch of
    another build (`2.13.0+cpu`), where its operators do not load, and then neither does timm.
    """
    if "torchvision" not in {download.name for download in installed}:
        return ""
    command = [str(environment.python), "-c", "import torchvision"]
    if subprocess.run(command, capture_output=True).returncode == 0:  # noqa: S603
        return ""
    pip(environment.python, "uninstall", "--quiet", "--yes", "torchvision", quiet=True)
    return (
        "the index's torchvision does not load beside the installed torch and was taken out again: "
        "the tests that need torchvision or timm will be skipped"
    )


# --- The two targets ---------------------------------------------------------------------------


def install(environment: Environment, attempt: Attempt, constraints: Path) -> list[Download]:
    """Say what will be installed, then install it."""
    say("asking pip what is missing (this can take a minute)")
    started = time.monotonic()
    downloads = resolve(environment.python, attempt.requirements, constraints)
    say(f"pip answered after {time.monotonic() - started:.0f} s")
    if downloads:
        sizes = measure(downloads)
        free = check_space(sum(size or 0 for size in sizes.values()), environment.prefix)
        say(size_line(sizes, free))
    else:
        say("all packages are already installed")
    # Without new packages there is only gpuopt's own entry to renew, which needs no resolution.
    arguments = [*pip_requirements(attempt.requirements), "--constraint", str(constraints)]
    if not downloads:
        arguments = ["--quiet", "--no-deps", "--editable", "."]
    done = pip(environment.python, "install", *arguments, quiet=not downloads)
    if done.returncode != 0:
        reason = f": {pip_reason(done.stderr)}" if done.stderr else ", its messages are above"
        gpu = "gpu" in attempt.requirements[0]
        raise InstallError(
            f"pip failed{reason}",
            "Without the packages for the GPU: make setup EXTRAS=cpu" if gpu else "",
        )
    return downloads


def run(target: str, venv: Path, requested: str) -> None:
    """Bring the environment to where `target` needs it; nothing if it is there already."""
    python, ours = target_python(venv, os.environ)
    # The environment's folder, before its Python has been started: that takes longer than the rest.
    stamp = python.parent.parent / f".gpuopt-{target}"
    project = (ROOT / "pyproject.toml").read_bytes()
    key = stamp_key(project, target, requested, str(ROOT), str(python.parent))
    if stamp.exists() and python.exists():
        found, _, remembered = stamp.read_text(encoding="utf-8").partition("\n")
        if found == key:
            for note in remembered.splitlines():
                say(note)
            say(f"the environment is ready: {python.parent / 'gpuopt'}")
            return

    if ours and not runs(python):
        make_environment(venv)
    environment = probe(python)
    say(f"environment {environment.prefix} with Python {environment.python_version}")
    if ours and environment.python_version != "{}.{}".format(*sys.version_info[:2]):
        say(f"{sys.executable} is not used; for it, remove that folder or name another: VENV=...")

    backend = choose_backend(requested, environment.versions, requested == "auto" and has_nvidia_gpu())
    say(f"packages for the {backend.upper()}" + ("" if requested != "auto" else " (to choose: EXTRAS=cpu or gpu)"))
    if "torch" in environment.versions:
        say(torch_line(environment.versions, environment.torch_build))
    prepare_pip(python, environment.versions.get("pip"))

    tries = attempts(target, requested, backend, "torch" in environment.versions)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join([*constraint_lines(environment.versions), ""]), encoding="utf-8")
        attempt, installed = install_first(environment, tries, constraints)
    notes = [note for note in (attempt.note, drop_broken_torchvision(environment, installed)) if note]
    for note in notes:
        say(note)
    stamp.write_text("\n".join([key, *notes, ""]), encoding="utf-8")
    say(f"the environment is ready: {python.parent / 'gpuopt'}")


def install_first(
    environment: Environment, tries: Sequence[Attempt], constraints: Path
) -> tuple[Attempt, list[Download]]:
    """Install the first of these that pip can resolve."""
    for attempt in tries[:-1]:
        try:
            return attempt, install(environment, attempt, constraints)
        except ResolveError as error:
            say(error.message)
    try:
        return tries[-1], install(environment, tries[-1], constraints)
    except ResolveError as error:
        raise InstallError(error.message, resolve_hint(environment)) from error


def resolve_hint(environment: Environment) -> str:
    """What to try when pip finds no solution."""
    if "torch" in environment.versions:
        return (
            f"Is the package index reachable, and is torch {environment.versions['torch']} one that gpuopt "
            "supports?\nA Python without torch gets a fitting one: make setup PYTHON=... VENV=..."
        )
    return f"Is the package index reachable, and does it serve Python {environment.python_version}?"


def fail(message: str, hint: str = "") -> NoReturn:
    """End with a message of at most three lines."""
    sys.stderr.write("\n".join(filter(None, (f"gpuopt: error: {message}", hint))) + "\n")
    sys.exit(1)


def main() -> None:
    """Read the command line and run."""
    # An older Python gets this far, thanks to postponed annotations, to be told what is wrong.
    if sys.version_info < (3, 10):  # noqa: UP036
        fail(
            "gpuopt needs Python 3.10 or newer, {} is {}.{}".format(sys.executable, *sys.version_info[:2]),
            "Name another one: make setup PYTHON=/path/to/python3",
        )
    parser = argparse.ArgumentParser(description="Make the environment of gpuopt's Makefile.")
    parser.add_argument("target", choices=("where", "setup", "test"))
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="environment to make if none is active")
    parser.add_argument("--extras", choices=("auto", "cpu", "gpu"), default="auto", help="packages to install")
    options = parser.parse_args()
    venv = ROOT / options.venv.expanduser()
    if options.target == "where":
        sys.stdout.write(f"{target_python(venv, os.environ)[0]}\n")
        return
    try:
        run(options.target, venv, options.extras)
    except InstallError as error:
        fail(error.message, error.hint)
    except OSError as error:
        fail(f"cannot install: {error.strerror or error}: {error.filename or venv}")
    except KeyboardInterrupt:
        sys.stderr.write("gpuopt: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
