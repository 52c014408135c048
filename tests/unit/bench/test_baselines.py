"""The process of a baseline: its answer, whatever lies in the current folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gpuopt.bench import baselines
from tests.unit.sweep.test_task import shadow_libraries


@pytest.mark.parametrize("python", [None, Path(sys.executable)])
def test_its_libraries_are_not_looked_for_in_the_current_folder(
    python: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    said = shadow_libraries(folder)
    monkeypatch.chdir(folder)
    answer = baselines._ask({}, python)
    assert not said.exists()
    assert answer == {"failed": "KeyError: 'kind'"}
