"""Which node of a cluster could make a task, by what Ray says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpuopt.sweep import cluster
from tests.unit.sweep.test_task import task

GIB = 1 << 30
NODES: list[dict[str, Any]] = [
    {"Resources": {"CPU": 8.0, "memory": 64.0 * GIB, "node:10.0.0.1": 1.0}},
    {"Resources": {"CPU": 4.0, "GPU": 1.0, "accelerator_type:A100": 1.0, "memory": 16.0 * GIB}},
    # Ray was told of the type, and not that there is a GPU.
    {"Resources": {"CPU": 4.0, "accelerator_type:H100": 1.0, "memory": 16.0 * GIB}},
    {"Resources": {"GPU": 1.0, "accelerator_type:T4": 1.0, "memory": 16.0 * GIB}},
]


@pytest.mark.parametrize(
    ("gpu", "memory", "found"),
    [
        ("", None, True),
        ("", 64 * GIB, True),
        ("", 65 * GIB, False),
        ("A100", 16 * GIB, True),
        # The memory is on another node than the GPU.
        ("A100", 17 * GIB, False),
        ("H100", None, False),
        # Every task takes a CPU.
        ("T4", None, False),
        ("L4", None, False),
    ],
)
def test_one_node_has_to_have_all_that_a_task_needs(gpu: str, memory: int | None, found: bool, tmp_path: Path) -> None:
    assert cluster._could_make(NODES, task("one", tmp_path, gpu=gpu, memory=memory)) is found


def test_what_is_missing_is_told_beside_what_there_is(tmp_path: Path) -> None:
    error = cluster._no_node(task("one", tmp_path, gpu="H100", memory=GIB), [*NODES, NODES[1]])
    assert "has H100, 1 GPU, 1 CPU, 1024 MiB of memory; it has 2 with A100, 1 GPU, 4 CPU, 16384 MiB" in error.message
    assert "1 with H100, 4 CPU, 16384 MiB of memory" in error.message
    assert len(error.lines().splitlines()) == 2
    assert cluster._no_node(task("one", tmp_path), []).message.endswith("has 1 CPU; it has none")
