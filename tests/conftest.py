"""What the tests share: the command line in a process of its own, on a cache of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Run:
    """A finished `gpuopt` process."""

    code: int
    stdout: str
    stderr: str

    def report(self) -> dict[str, Any]:
        """The one JSON document that `--json` prints."""
        document: dict[str, Any] = json.loads(self.stdout)
        return document


def python_path(*first: Path) -> str:
    """PYTHONPATH with these folders in front. It has no empty part: that would stand for the current folder."""
    return os.pathsep.join(filter(None, (*map(str, first), os.environ.get("PYTHONPATH"))))


if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # How long an example takes depends on what else the machine does.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")


Gpuopt = Callable[..., Run]


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def gpuopt(cache_folder: Path) -> Gpuopt:
    """Runs `gpuopt ARGUMENTS...` for real; keyword arguments: `cwd`, `env` (added), `timeout` in seconds."""

    def run(
        *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 600
    ) -> Run:
        finished = subprocess.run(
            [sys.executable, "-m", "gpuopt", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "GPUOPT_CACHE_DIR": str(cache_folder), "NO_COLOR": "1", "COLUMNS": "100", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Run(finished.returncode, finished.stdout, finished.stderr)

    return run
