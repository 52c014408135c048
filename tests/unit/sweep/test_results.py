"""The document of a sweep: figures from reports, the front, the table and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpuopt.report.model import Failure
from gpuopt.storage import write_text
from gpuopt.sweep import plot, render, results
from gpuopt.sweep.results import Row, SweepReport
from gpuopt.sweep.store import Store, is_url, open_store
from tests.unit.comparing import samples


def row(name: str, **changes: Any) -> Row:
    base = {
        "name": name, "model": "a", "precision": "int8", "target": "tensorrt", "target_label": "h100", "gpu": "H100",
        "batch": 8, "key": "k", "status": "passed", "error": None, "reused": False, "file": "model.tensorrt.engine",
        "engine_status": "verified", "size_bytes": 1 << 20, "lowest_sqnr_db": 40.0, "lowest_cosine": 0.999,
        "latency_p50_ms": 2.0, "milliseconds_per_sample": 0.25, "measured_on": "H100", "bundle": "out/a",
        "manifest_sha256": "0" * 64, "seconds": 3.0, "attempts": 1,
    }  # fmt: skip
    return Row.model_validate({**base, **changes})


def front(*rows: Row) -> set[str]:
    return {one.name for one in results.with_front(rows) if one.on_front}


def test_figures_are_those_of_the_target_s_file() -> None:
    report = samples.report(samples.benchmark())
    found = results.figures(report, "tensorrt")
    benchmark = next(one for one in report.benchmarks if one.target == "tensorrt")
    assert found["latency_p50_ms"] == benchmark.latency_p50_ms.value
    assert found["milliseconds_per_sample"] == benchmark.latency_p50_ms.value / benchmark.batch
    assert found["measured_on"] == benchmark.where
    assert results.figures(report, "tensorrt-rtx") == {}


def test_what_did_not_run_has_the_figures_of_the_graph_that_it_was_built_from() -> None:
    report = samples.report()
    verification = {
        "outputs": [*samples.outputs(20.0, graph="model.onnx"), *samples.outputs(50.0, graph="engine.onnx")]
    }
    unproved = [engine.model_copy(update={"proof": None}) for engine in report.engines]
    changed = report.model_copy(update={"engines": unproved, "verification": verification})
    lowest = {name: results.figures(changed, name)["lowest_sqnr_db"] for name in ("tensorrt", "onnxruntime")}
    assert lowest["onnxruntime"] < 30 < lowest["tensorrt"]


def test_the_front_weighs_accuracy_against_time_a_sample() -> None:
    fast = row("fast", milliseconds_per_sample=0.1, lowest_sqnr_db=30.0)
    near = row("near", milliseconds_per_sample=0.4, lowest_sqnr_db=60.0)
    beaten = row("beaten", milliseconds_per_sample=0.5, lowest_sqnr_db=30.0)
    exact = row("exact", milliseconds_per_sample=0.9, lowest_sqnr_db=None)
    assert front(fast, near, beaten, exact) == {"fast", "near", "exact"}
    twin = row("twin", milliseconds_per_sample=0.1, lowest_sqnr_db=30.0)
    assert front(fast, twin, beaten) == {"fast", "twin"}


def test_the_front_is_one_of_size_where_not_all_were_timed_on_one_machine() -> None:
    slow_and_small = row("small", milliseconds_per_sample=9.0, size_bytes=10)
    fast_and_large = row("large", milliseconds_per_sample=0.1, size_bytes=99)
    assert front(slow_and_small, fast_and_large) == {"small", "large"} - {"small"}
    elsewhere = fast_and_large.model_copy(update={"measured_on": "A100"})
    assert front(slow_and_small, elsewhere) == {"small"}
    untimed = row("untimed", milliseconds_per_sample=None, measured_on=None, size_bytes=99)
    assert front(slow_and_small, untimed) == {"small"}


def test_models_have_a_front_each_and_failures_have_none() -> None:
    failed = row("failed", status="failed", milliseconds_per_sample=None, measured_on=None, size_bytes=None)
    other = row("other", model="b", milliseconds_per_sample=5.0, lowest_sqnr_db=1.0)
    assert front(row("one"), other, failed) == {"one", "other"}


def report(rows: list[Row]) -> SweepReport:
    return SweepReport(
        command=["gpuopt"], gpuopt_version="0.1.0", created="2026-01-02T03:04:05+00:00", status="failed", error=None,
        output="out", ran_on="this machine, 2 at a time", rows=results.with_front(rows), warnings=["a | warning"],
        seconds=9,
    )  # fmt: skip


def test_the_table_shows_every_row_and_what_failed() -> None:
    error = Failure(kind="build", exit_code=7, message="no kernel for | <b>", hint="", stage="build")
    exact = row("exact", lowest_sqnr_db=None, lowest_cosine=1.0, reused=True)
    found = report(
        [row("one"), exact, row("broken", status="failed", error=error, size_bytes=None, engine_status=None)]
    )
    text = render.terminal(found)
    assert [line.split()[0] for line in text.splitlines()] == [
        "combination", "one", "exact", "broken", "broken:", "report",
    ]  # fmt: skip
    assert "1.0 MiB" in text
    assert "verified, reused" in text
    page = render.markdown(found, has_plot=True)
    assert "2 of 3 combinations passed" in page
    assert "no kernel for \\| &lt;b>" in page
    assert page.count("\n| ") == 5


def test_the_plot_is_the_same_for_the_same_rows_and_absent_without_any() -> None:
    pytest.importorskip("matplotlib", reason="plots need it")
    rows = results.with_front([row("one"), row("two", precision="fp16", lowest_sqnr_db=70.0, model="$b$")])
    first = plot.draw(rows)
    assert first is not None
    assert first == plot.draw(rows)
    assert b"milliseconds a sample" in first
    assert plot.draw([row("x", status="failed")]) is None


def test_a_store_keeps_documents_and_bundles(tmp_path: Path) -> None:
    urls = [str(tmp_path / "folder")]
    try:
        import fsspec  # noqa: F401

        urls += [f"file://{tmp_path}/files", "memory://sweep"]
    except ImportError:
        pass
    from gpuopt import bundle
    from gpuopt.sweep.store import sha256_of_manifest

    for url in urls:
        store = open_store(url)
        assert is_url(url) == ("://" in url)
        assert store.read("rows/a.json") is None
        store.write("rows/a.json", b"1")
        store.write("rows/a.json", b"2")
        assert store.read("rows/a.json") == b"2"
        digests = []
        for text in ("old", "new"):
            with store.bundle_folder("a-int8") as folder:
                bundle.write(folder, {}, {f"{text}.txt": text}, {})
                digests.append(sha256_of_manifest(folder))
        assert not store.has_bundle("a-int8", digests[0])
        assert store.has_bundle("a-int8", digests[1])
        assert store.read("a-int8/old.txt") is None
        assert store.read("a-int8/new.txt") == b"new"
        with pytest.raises(KeyboardInterrupt):
            interrupted(store)
        assert store.read("half/manifest.json") is None


def interrupted(store: Store) -> None:
    with store.bundle_folder("half") as folder:
        write_text(folder / "part.txt", "x")
        raise KeyboardInterrupt
