"""`gpuopt sweep`: a bundle a combination, in processes and on Ray, resumed, with failures that stop nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jsonschema
import numpy as np
import pytest
import yaml

from gpuopt import bundle, request
from gpuopt.sweep import cluster as sweep_cluster
from gpuopt.sweep.results import Row
from tests.conftest import Gpuopt, Run, python_path
from tests.unit.quantization.graphs import depthwise_block
from tests.unit.sweep.test_task import shadow_libraries, task

ROOT = Path(__file__).parents[2]
_Found = TypeVar("_Found")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models, which differ in their weights, and data."""
    for name, scale in (("one", 1.0), ("two", 0.5)):
        model = depthwise_block()
        weights = model.graph.initializer[0]
        values = np.frombuffer(weights.raw_data, np.float32) * np.float32(scale)
        weights.raw_data = values.tobytes()
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    values = np.random.default_rng(0).standard_normal((40, 16, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "data.npz", x=values)
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    """sweep.yaml with twelve combinations, unless changed."""
    tree = {
        "version": 1,
        "output": "out",
        "models": {
            name: {"model": {"path": str(folder / f"{name}.onnx")}, "inputs": {"x": {"shape": "1x16x8x8"}}}
            for name in ("one", "two")
        },
        "precisions": ["fp32", "fp16", "int8"],
        "targets": ["onnxruntime"],
        "batches": [1, 4],
        "recipe": {"calibrate": {"data": str(folder / "data.npz")}},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump({**tree, **changes}))
    return folder / "sweep.yaml"


def rows(result: Run) -> dict[str, dict[str, Any]]:
    document = result.report()
    jsonschema.validate(document, json.loads(request.schema("sweep")))
    return {row["name"]: row for row in document["rows"]}


def graphs(output: Path) -> dict[str, str]:
    """SHA-256 of the deployed graph of every bundle, each checked to be whole."""
    return {
        folder.name: bundle.open_bundle(folder)["files"]["model.onnx"]
        for folder in sorted(output.iterdir())
        if folder.is_dir() and folder.name != "rows"
    }


def test_combinations_are_made_once_and_one_that_fails_stops_no_other(gpuopt: Gpuopt, folder: Path) -> None:
    models = yaml.safe_load(write(folder).read_text())["models"]
    models["gone"] = {"model": {"path": str(folder / "gone.onnx")}, "inputs": {"x": {"shape": "1x16x8x8"}}}
    exclude = [{"model": "gone", "precision": "int8"}, {"model": "two"}]
    path = write(folder, models=models, precisions=["fp32", "int8"], batches=[2], exclude=exclude)
    first = gpuopt("sweep", path, "--json", "--processes", 2)
    assert first.code == 10, first.stderr
    assert "1 of 3 combinations failed; gone-fp32-onnxruntime-b2" in first.stderr
    found = rows(first)
    assert {name: row["status"] for name, row in found.items()} == {
        "one-fp32-onnxruntime-b2": "passed",
        "one-int8-onnxruntime-b2": "passed",
        "gone-fp32-onnxruntime-b2": "failed",
    }
    assert found["gone-fp32-onnxruntime-b2"]["error"]["kind"] == "storage"
    int8 = found["one-int8-onnxruntime-b2"]
    assert int8["lowest_sqnr_db"] > 20
    assert int8["size_bytes"] == (folder / "out/one-int8-onnxruntime-b2/model.onnx").stat().st_size
    assert {name for name, row in found.items() if row["on_front"]} == set(found) - {"gone-fp32-onnxruntime-b2"}
    for name in ("sweep.json", "sweep.md", "sweep.svg"):
        assert (folder / "out" / name).stat().st_size > 0
    assert "one-int8-onnxruntime-b2" in (folder / "out/sweep.md").read_text()

    # What is there is taken; a changed recipe, a changed input, a damaged bundle and what had failed are made anew.
    (folder / "gone.onnx").write_bytes((folder / "two.onnx").read_bytes())
    second = gpuopt("sweep", path, "--json")
    assert second.code == 0, second.stderr
    assert {name for name, row in rows(second).items() if not row["reused"]} == {"gone-fp32-onnxruntime-b2"}
    np.savez(folder / "data.npz", x=np.random.default_rng(1).standard_normal((40, 16, 8, 8), dtype=np.float32))
    with (folder / "out/gone-fp32-onnxruntime-b2/model.onnx").open("ab") as stream:
        stream.write(b"x")
    third = rows(gpuopt("sweep", path, "--json"))
    assert {name for name, row in third.items() if not row["reused"]} == set(third)
    changed = write(folder, models=models, precisions=["fp32", "int8"], batches=[2], exclude=exclude, recipe={
        "calibrate": {"data": str(folder / "data.npz"), "method": "percentile"}
    })  # fmt: skip
    assert {row["reused"] for row in rows(gpuopt("sweep", changed, "--json")).values()} == {False}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_sweep_that_is_ended_goes_on_where_it_was(
    how: signal.Signals, gpuopt: Gpuopt, folder: Path, cache_folder: Path
) -> None:
    path = write(folder, batches=[2], exclude=[{"model": "two"}])
    env = {**os.environ, "GPUOPT_CACHE_DIR": str(cache_folder)}
    process = subprocess.Popen([sys.executable, "-m", "gpuopt", "sweep", str(path), "-q", "--processes", "1"], env=env)
    wait_for(lambda: list((folder / "out/rows").glob("*.json")))
    process.send_signal(how)
    assert process.wait(timeout=30) == (-9 if how is signal.SIGKILL else 130)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in left.splitlines() if str(folder) in line and "compile" in line]
    done = {path.stem for path in (folder / "out/rows").glob("*.json")}
    assert not list(folder.glob("out/.one-*/bundle/manifest.json"))
    found = rows(gpuopt("sweep", path, "--json", "--processes", 2))
    assert done <= {name for name, row in found.items() if row["reused"]}
    assert len(found) == len(graphs(folder / "out")) == 3


def test_a_combination_that_takes_too_much_memory_or_time_is_ended(gpuopt: Gpuopt, folder: Path) -> None:
    path = write(folder, precisions=["fp32"], batches=[1], exclude=[{"model": "two"}])
    result = gpuopt("sweep", path, "--json", "--memory", "60MiB")
    assert result.code == 9, result.stderr
    (row,) = rows(result).values()
    assert "the sweep gives a task 60 MiB" in row["error"]["message"]
    result = gpuopt("sweep", path, "--json", "--timeout", "0.1s", "--memory", "8GiB")
    assert result.code == 18, result.stderr
    assert not (folder / "out/one-fp32-onnxruntime-b1").exists()


def test_results_can_lie_where_fsspec_reaches(gpuopt: Gpuopt, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="results at a URL need fsspec, of gpuopt[ray]")
    path = write(folder, precisions=["fp32"], batches=[1], output=f"file://{tmp_path}/shared")
    first = gpuopt("sweep", path, "--json", "--processes", 2)
    assert first.code == 0, first.stderr
    assert graphs(tmp_path / "shared").keys() == rows(first).keys()
    assert {row["reused"] for row in rows(gpuopt("sweep", path, "--json")).values()} == {True}
    assert rows(first)["one-fp32-onnxruntime-b1"]["bundle"] == f"file://{tmp_path}/shared/one-fp32-onnxruntime-b1"


def wait_for(look: Callable[[], _Found], seconds: float = 60) -> _Found:
    """What a look gives, as soon as it is true."""
    ends = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < ends, "it did not come about"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without CPUs, so that no task runs there, and three workers, one of which has another GPU, in name.

    Its nodes, and they alone, have a pycuda, in name; `packages` is where.
    """
    # Ray's own limits are for machines that do nothing else.
    patch = pytest.MonkeyPatch()
    for limit in ("raylet_start_wait_time_s", "py_gcs_connect_timeout_s", "gcs_rpc_server_connect_timeout_s"):
        patch.setenv(f"RAY_{limit}", "180")
    ray = pytest.importorskip("ray", reason="a sweep on a cluster needs ray, of gpuopt[ray]")
    from ray.cluster_utils import Cluster

    packages = tmp_path_factory.mktemp("packages")
    have_pycuda(packages, "1.0")
    with pytest.MonkeyPatch.context() as on_nodes:
        on_nodes.setenv("PYTHONPATH", python_path(packages, ROOT))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for gpu in ("A100", "A100", "T4"):
            made.node_of_another_gpu = made.add_node(num_cpus=1, num_gpus=1, resources={f"accelerator_type:{gpu}": 1})
        made.wait_for_nodes()
    made.packages = packages
    yield made
    made.shutdown()
    ray.shutdown()
    patch.undo()


def have_pycuda(packages: Path, version: str) -> None:
    """Install it as far as its version can be asked for."""
    shutil.rmtree(packages)
    folder = packages / f"pycuda-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pycuda\nVersion: {version}\n")


def workers_at_work(made: Any) -> list[tuple[Any, Any]]:
    """Nodes that have a compilation among the processes below their raylet, each with its process."""
    import psutil

    found: list[tuple[Any, Any]] = []
    for node in made.worker_nodes:
        (raylet,) = node.all_processes["raylet"]
        for process in psutil.Process(raylet.process.pid).children(recursive=True):
            # One that ends meanwhile is at work no more.
            with contextlib.suppress(psutil.Error):
                if "compile" in process.cmdline():
                    found.append((node, process))
                    break
    return found


def stopped(process: Any) -> bool:
    """Stop it; whether that was before its end."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process.suspend()
        wait_for(lambda: process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))
        return bool(process.status() == psutil.STATUS_STOPPED)
    return False


def two_at_work(made: Any) -> list[Any]:
    """Two nodes at work, the first with its compilation stopped; none if there are not two, or it ended before.

    A Ray worker outlives its raylet by up to a second, until it looks after it again. A compilation that ended in that
    second would be no loss, as its row would still reach the sweep. A stopped one is killed with the worker.
    """
    found = workers_at_work(made)
    return [node for node, _ in found] if len(found) == 2 and stopped(found[0][1]) else []


def test_a_sweep_on_ray_with_a_worker_killed_equals_the_local_one(
    gpuopt: Gpuopt, folder: Path, cluster: Any, tmp_path: Path
) -> None:
    targets = [{"target": "onnxruntime", "gpu": "A100"}]
    local = gpuopt("sweep", write(folder), "--json", "--processes", 2, "-o", tmp_path / "local", timeout=300)
    assert local.code == 0, local.stderr
    path = write(folder, targets=targets, exclude=[])
    command = [sys.executable, "-m", "gpuopt", "sweep", str(path), "--json", "-o", str(tmp_path / "ray")]
    command += ["--ray", cluster.address, "--cache-dir", str(tmp_path / "cache")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    busy = wait_for(lambda: list((tmp_path / "ray/rows").glob("*.json")) and two_at_work(cluster), 300)
    assert cluster.node_of_another_gpu not in busy
    cluster.remove_node(busy[0], allow_graceful=False)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    there, here = rows(Run(0, stdout, stderr)), rows(local)
    assert len(there) == 12
    assert sorted(there) == sorted(here)
    assert max(row["attempts"] for row in there.values()) == 2, "the killed worker's task was begun again"
    assert graphs(tmp_path / "ray") == graphs(tmp_path / "local")
    for name, row in there.items():
        same = ("status", "size_bytes", "lowest_sqnr_db", "lowest_cosine", "on_front", "engine_status")
        assert {key: row[key] for key in same} == {key: here[name][key] for key in same}

    # What the nodes have decides what is made anew, not what the machine of the sweep has.
    write(folder, targets=targets, precisions=["fp32"], batches=[1], exclude=[{"model": "two"}])
    assert reused(command) == {"one-fp32-onnxruntime-b1": True}
    have_pycuda(cluster.packages, "2.0")
    assert reused(command) == {"one-fp32-onnxruntime-b1": False}


def reused(command: list[str]) -> dict[str, bool]:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return {name: row["reused"] for name, row in rows(Run(0, done.stdout, done.stderr)).items()}


def test_what_no_node_can_make_is_told_at_once_and_nothing_of_the_current_folder_runs(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    said = shadow_libraries(downloaded)
    monkeypatch.chdir(downloaded)
    wanted: dict[str, dict[str, Any]] = {
        "gpu": {"gpu": "H100"},
        "memory": {"memory": 1 << 50},
        "model": {"gpu": "A100"},
    }
    tasks = [task(name, tmp_path, folder=str(downloaded), **needs) for name, needs in wanted.items()]
    done: list[Row] = []
    with sweep_cluster.joined(cluster.address) as nodes:
        nodes.run(tasks, 2, done.append)
        assert Path.cwd() == downloaded
    assert not said.exists()
    assert [row.name for row in done] == ["gpu", "memory", "model"]
    told = [row.error.message for row in done if row.error is not None]
    assert "no node of the Ray cluster has H100, 1 GPU, 1 CPU; it has" in told[0]
    assert "no node of the Ray cluster has 1 CPU, 1073741824 MiB of memory; it has" in told[1]
    assert "model.onnx" in told[2]


def test_a_task_is_given_up_when_the_last_node_for_it_is_lost(
    cluster: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_cluster, "_SECONDS_TO_COME_BACK", 1.0)
    shutil.copy(folder / "one.onnx", tmp_path / "lost.onnx")
    done: list[Row] = []
    with sweep_cluster.joined(cluster.address) as nodes:
        tasks = [task("lost", tmp_path, gpu="T4")]
        running = threading.Thread(target=nodes.run, args=(tasks, 2, done.append), daemon=True)
        running.start()
        wait_for(lambda: [process for _, process in workers_at_work(cluster) if stopped(process)], 120)
        cluster.remove_node(cluster.node_of_another_gpu)
        running.join(120)
        assert not running.is_alive()
    (row,) = done
    assert row.error is not None
    assert row.error.kind == "environment"
    assert "no node of the Ray cluster has T4, 1 GPU, 1 CPU; it has" in row.error.message
    assert row.attempts == 1


def test_a_cluster_that_grows_on_demand_is_waited_for(cluster: Any, tmp_path: Path) -> None:
    done: list[Row] = []
    with sweep_cluster.joined(cluster.address) as nodes:
        arguments = ([task("later", tmp_path, gpu="L4")], 2, done.append, 120.0)
        running = threading.Thread(target=nodes.run, args=arguments, daemon=True)
        running.start()
        time.sleep(2)
        assert not done
        cluster.add_node(num_cpus=1, num_gpus=1, resources={"accelerator_type:L4": 1})
        running.join(120)
        assert not running.is_alive()
    (row,) = done
    assert row.error is not None
    # It ran: there is no such file.
    assert "later.onnx" in row.error.message


def test_a_cluster_that_does_not_answer(gpuopt: Gpuopt, folder: Path) -> None:
    pytest.importorskip("ray", reason="a sweep on a cluster needs ray, of gpuopt[ray]")
    result = gpuopt("sweep", write(folder), "--ray", "127.0.0.1:1", timeout=120)
    assert result.code == 9, result.stderr
    assert "Traceback" not in result.stderr
