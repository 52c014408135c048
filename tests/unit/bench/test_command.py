"""What `gpuopt bench` refuses before it measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuopt import environment
from gpuopt.bench import command
from gpuopt.errors import RequirementError
from gpuopt.progress import Silent
from tests.unit.inspection import bundles


@pytest.mark.parametrize("groups", [("batches",), ("latency", "memory")], ids=" ".join)
def test_where_no_engine_runs_there_is_no_empty_table(
    groups: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "gpus", list)
    folder = bundles.make(tmp_path / "a.gpuopt")
    with pytest.raises(RequirementError, match=r"nothing of model\.tensorrt\.engine can be measured here: no NVIDIA"):
        command.bench(command.Request(folder, groups), [], Silent())
