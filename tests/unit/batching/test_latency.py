"""Latencies from bench reports and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuopt.batching import latency
from gpuopt.bench.report import BenchReport, PercentileReport, Row
from gpuopt.errors import DataError, UsageError


def row(group: str, name: str, batch: int, **fields: Any) -> Row:
    times = fields.pop("times", {})
    return Row(
        group=group, name=name, batch=batch, includes="", **fields,
        latency_ms={key: PercentileReport(value=value, low=None, high=None) for key, value in times.items()},
    )  # fmt: skip


BATCHES = [row("batches", f"batch {size}", size, times={"p50": time, "p99": time * 1.1}) for size, time in
           ((1, 1.0), (8, 2.0), (32, 6.0))]  # fmt: skip
PHASES = [
    row("phases", "host to device", 8, back_to_back_ms=0.4),
    row("phases", "compute", 8, back_to_back_ms=2.0),
    row("phases", "device to host", 8, back_to_back_ms=0.08),
]
STREAMS = [
    row("streams", "1 stream", 8, back_to_back_ms=2.0, lowest_ms=1.99, highest_ms=2.01),
    row("streams", "2 streams", 8, back_to_back_ms=1.25, lowest_ms=1.24, highest_ms=1.26),
    row("streams", "4 streams", 8, back_to_back_ms=1.0, lowest_ms=0.99, highest_ms=1.01),
]
OVERLAP = [row("overlap", f"depth {depth}", 8, back_to_back_ms=time) for depth, time in ((1, 2.5), (2, 2.0))]


def report(rows: list[Row]) -> str:
    return BenchReport(
        command=[], gpuopt_version="0.1.0", created="", subject="model.tensorrt.engine", sha256="", target="tensorrt",
        library_version="10.13", gpu="NVIDIA H100", shapes={}, rows=rows, memory={}, conditions={}, warnings=[],
        environment={}, seconds=1.0,
    ).model_dump_json()  # fmt: skip


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "it"
    path.write_text(text)
    return path


def test_a_bench_report(tmp_path: Path) -> None:
    found = latency.read(written(tmp_path, report([*BATCHES, *PHASES, *STREAMS, *OVERLAP])))
    assert found.largest_batch == 32
    assert not found.on_cpu
    assert found.warnings == ()
    # Copies grow with the batch; the compute between measured sizes lies between their times.
    assert found.milliseconds(8)[50.0] == pytest.approx(2.48)
    assert found.milliseconds(20)[50.0] == pytest.approx(4.0 + 20 * 0.06)
    assert found.streams == {1: 1.0, 2: 1.6, 4: 2.0}
    assert found.streams_spread[2][0] == pytest.approx(1.99 / 1.26)
    assert found.slowdown(4) == pytest.approx((1.0, 1.25, 3 / 1.8, 2.0))
    assert found.depths == {1: 2.5, 2: 2.0}
    # Eight instances bring what four do.
    assert found.service(8, 0.0, instances=8).slowdown[7] == pytest.approx(8 / 2.0)
    assert len(found.service(8, 0.0).slowdown) == 4


def test_service_times_follow_the_percentiles(tmp_path: Path) -> None:
    found = latency.read(written(tmp_path, report([*BATCHES, *PHASES])))
    service = found.service(32, constant_ms=3)
    assert service.constant == pytest.approx(0.003)
    assert service.largest_batch == 32
    assert np.percentile(service.seconds[8], 50) == pytest.approx(2.48e-3, rel=0.01)
    assert service.seconds[8].max() == pytest.approx(2.68e-3, rel=0.01)


def test_what_a_report_lacks_is_told(tmp_path: Path) -> None:
    failed = row("streams", "2 streams", 8, failed="TensorRT 8.5 gives a profile to one execution")
    found = latency.read(written(tmp_path, report([*BATCHES, STREAMS[0], failed])))
    assert found.streams == {}
    assert any("--only phases" in warning for warning in found.warnings)
    assert any("gives a profile to one execution" in warning for warning in found.warnings)
    assert found.slowdown(3) == (1.0, 1.0, 1.0)
    with pytest.raises(UsageError, match="no latencies of batch sizes"):
        latency.read(written(tmp_path, report(PHASES)))


def test_tables(tmp_path: Path) -> None:
    found = latency.read(written(tmp_path, "batch,p50_ms,p99_ms\n1,1.0,1.5\n\n4,2.0,2.5\n"))
    assert found.batches == {1: {50.0: 1.0, 99.0: 1.5}, 4: {50.0: 2.0, 99.0: 2.5}}
    table = {"batches": {"1": 1.0, "8": {"p50": 3.0, "p99": 4.0}}, "streams": {"2": 1.4}, "on_cpu": True}
    found = latency.read(written(tmp_path, json.dumps(table)))
    assert found.on_cpu
    assert found.streams == {1: 1.0, 2: 1.4}
    assert found.milliseconds(8) == {50.0: 3.0}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no table"),
        ("size,time\n1,2\n", "no table"),
        ("batch,p50\n1,two\n", "line 2"),
        ("batch,p50\n1\n", "line 2"),
        ("batch,p50\nnan,1\n", "line 2: batch nan"),
        ("batch,p50\ninf,1\n", "line 2: batch inf"),
        ("batch,p50\n1.5,1\n", "line 2: batch 1.5"),
        ("batch,p50\n1," + 200_000 * "1" + "\n", "no table"),
        ("batch,p500\n1,2\n", "no percentile"),
        ("batch,p50\n1,0\n", "no time above zero"),
        ("batch,p50\n0,1\n", "no time above zero"),
        ("batch,p50,p99\n1,2,1\n", "percentiles of batch 1 fall"),
        ('{"batches": {}}', "batches"),
        ('{"batches": {"1": "x"}}', "batches"),
        ('{"batches": {"1": 1.0}, "stream": {}}', "stream"),
        ('{"batches": {"1": 1.0}, "streams": {"2": 0}}', "gain of streams"),
        ('{"rows": 3}', "no report"),
        ("{", "no JSON"),
    ],
)
def test_what_is_none_of_these(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        latency.read(written(tmp_path, text))
