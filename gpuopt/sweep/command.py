"""`gpuopt sweep` without its command line: a file in, bundles, a table and a plot out."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpuopt
from gpuopt import errors
from gpuopt.compile import now, with_defaults
from gpuopt.errors import GpuoptError
from gpuopt.pipeline import model_sha256
from gpuopt.progress import Progress
from gpuopt.recipe import Recipe
from gpuopt.report.model import Failure
from gpuopt.storage import sha256_file, sha256_json
from gpuopt.sweep import cluster, local, plan, plot, render
from gpuopt.sweep.plan import Combination, SweepFile
from gpuopt.sweep.results import Row, SweepReport, with_front
from gpuopt.sweep.store import Store, is_url, open_store
from gpuopt.sweep.task import Task, key_on, this_machine

_KINDS = {kind.kind: kind for kind in errors.KINDS}


@dataclass(frozen=True)
class Request:
    """What the command line asks for; None: what the sweep's file says, or the default.

    Attributes:
        processes: tasks at a time on this machine.
        ray: address of a cluster; None: on this machine.
        timeout: of each combination, as `gpuopt compile --timeout` takes it.
        wait_for_nodes: seconds, where no node of the cluster could make a combination.
    """

    file: Path
    output: str | None = None
    processes: int | None = None
    memory: int | None = None
    retries: int | None = None
    ray: str | None = None
    timeout: str | None = None
    cache_dir: Path | None = None
    wait_for_nodes: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a sweep ends in; `error` is None if every combination passed."""

    report: SweepReport
    error: GpuoptError | None


def planned(request: Request) -> list[Combination]:
    """The combinations, without making any.

    Raises:
        StorageError, UsageError: of the file.
    """
    return plan.combinations(plan.read(request.file))


def sweep(request: Request, command: Sequence[str], progress: Progress) -> Outcome:
    """Make every combination that an earlier sweep has not made of the same, then the table and the plot.

    Raises:
        UsageError: the file is wrong.
        StorageError: the output cannot be written.
        RequirementError: Ray or what a URL needs is missing.
    """
    started = time.monotonic()
    asked = plan.read(request.file)
    found = plan.combinations(asked)
    output = _output(request, asked)
    store = open_store(output)
    # Refused now, not after hours of work.
    store.write("rows/.writable", b"")
    rows: dict[str, Row] = {}

    def done(row: Row) -> None:
        rows[row.name] = row
        state = "passed" if row.error is None else f"{row.error.kind} error: {row.error.message}"
        progress.line(f"{row.name:<40}{row.seconds:>7.1f} s  {state}")
        progress.advance(len(rows), len(found))

    memory = request.memory if request.memory is not None else asked.memory
    with _where(request) as nodes:
        fingerprints: dict[str, str] = {}
        tasks, run = [], uuid.uuid4().hex
        for one in found:
            task = _task(one, _key(one, fingerprints), output, run, request, asked)
            earlier = _earlier(store, task, nodes)
            if earlier is not None:
                rows[one.name] = earlier
                progress.line(f"{one.name:<40}  reused")
            else:
                tasks.append(task)
        with progress.stage(f"sweep, {len(found)} combinations"):
            progress.advance(len(rows), len(found))
            if not tasks:
                ran_on = "nothing was left to do"
            elif nodes is not None:
                retries = request.retries if request.retries is not None else asked.retries
                ran_on = "a Ray cluster"
                nodes.run(tasks, retries, done, request.wait_for_nodes)
            else:
                processes = local.processes_that_fit(request.processes or max(1, (os.cpu_count() or 1) // 2), memory)
                ran_on = f"this machine, {processes} at a time"
                local.run(tasks, processes, done)
    ordered = with_front([rows[one.name] for one in found])
    error = _verdict(ordered)
    picture = plot.draw(ordered)
    report = SweepReport(
        command=list(command),
        gpuopt_version=gpuopt.__version__,
        created=now(),
        status="failed" if error else "passed",
        error=None if error is None else Failure(
            kind=error.kind, exit_code=error.exit_code, message=error.message, hint=error.hint, stage=None
        ),
        output=store.place(""),
        ran_on=ran_on,
        rows=ordered,
        warnings=_warnings(found, picture is not None),
        seconds=round(time.monotonic() - started, 3),
    )  # fmt: skip
    if picture is not None:
        store.write("sweep.svg", picture)
    store.write("sweep.md", render.markdown(report, picture is not None).encode())
    store.write("sweep.json", (report.model_dump_json(indent=2) + "\n").encode())
    return Outcome(report, error)


def _where(request: Request) -> contextlib.AbstractContextManager[cluster.Cluster | None]:
    """The cluster; None: this machine."""
    return cluster.joined(request.ray) if request.ray is not None else contextlib.nullcontext()


def _output(request: Request, asked: SweepFile) -> str:
    """A folder is beside the sweep's file, unless it is named on the command line."""
    if request.output is not None:
        return request.output if is_url(request.output) else str(Path(request.output).absolute())
    return asked.output if is_url(asked.output) else str((request.file.absolute().parent / asked.output).absolute())


def _task(
    one: Combination, key: str | None, output: str, run: str, request: Request, asked: SweepFile
) -> Task:  # fmt: skip
    recipe = _with_absolute_paths(one.recipe)
    return Task(
        name=one.name,
        recipe=recipe.to_yaml(),
        key=key,
        about={
            "name": one.name,
            "model": one.model,
            "precision": one.precision,
            "target": one.target,
            "target_label": one.target_label,
            "gpu": one.gpu,
            "batch": one.batch,
        },
        output=output,
        run=run,
        version=gpuopt.__version__,
        folder=str(Path.cwd()),
        gpu=one.gpu,
        cache_dir=str(request.cache_dir.absolute()) if request.cache_dir is not None else None,
        timeout=request.timeout,
        memory=request.memory if request.memory is not None else asked.memory,
    )


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """A worker of a cluster has another current folder; the target is decided where the task runs."""
    model, calibrate, accuracy = recipe.model, recipe.calibrate, recipe.accuracy
    return recipe.model_copy(
        update={
            "model": model.model_copy(update={"path": _absolute(model.path)}),
            "calibrate": calibrate.model_copy(
                update={"data": _absolute(calibrate.data), "ranges": _absolute(calibrate.ranges)}
            ),
            "accuracy": accuracy.model_copy(
                update={"data": _absolute(accuracy.data), "labels": _absolute(accuracy.labels)}
            ),
        }
    )


def _absolute(path: str | None) -> str | None:
    """A path that exists; anything else, such as package.module:callable, stays."""
    return str(Path(path).expanduser().absolute()) if path is not None and Path(path).expanduser().exists() else path


def _earlier(store: Store, task: Task, nodes: cluster.Cluster | None) -> Row | None:
    """The row of an earlier sweep that made the same where it would be made now, if its bundle is still there."""
    if task.key is None:
        return None
    try:
        row = Row.model_validate_json(store.read(f"rows/{task.name}.json") or b"")
    except ValueError:
        return None
    if row.status != "passed" or row.name != task.name or row.manifest_sha256 is None:
        return None
    machines = {this_machine()} if nodes is None else nodes.machines(task)
    same = row.key in {key_on(task.key, machine) for machine in machines}
    if not same or not store.has_bundle(task.name, row.manifest_sha256):
        return None
    return row.model_copy(update={"reused": True, "on_front": False})


def _key(one: Combination, known: dict[str, str]) -> str | None:
    """Hash of what decides a bundle, but for the machine; None where code does, whose files the stage cache knows."""
    try:
        recipe = with_defaults(one.recipe)
        if recipe.model.factory or recipe.model.trust_pickle or recipe.accuracy.metric or not recipe.model.path:
            return None
        tree = recipe.model_dump(mode="json")
        # Where files lie is no part of what they are.
        tree["model"]["path"] = _hashed(recipe.model.path, known, model_sha256)
        tree["output"] = None
        for section, field in (("calibrate", "data"), ("accuracy", "data")):
            told = tree[section][field]
            if told is not None:
                digest = _data_sha256(told, known)
                if digest is None:
                    return None
                tree[section][field] = digest
        for section, field in (("calibrate", "ranges"), ("accuracy", "labels")):
            told = tree[section][field]
            if told is not None and Path(told).is_file():
                tree[section][field] = _hashed(told, known, sha256_file)
        tree["build"]["plugins"] = [
            [Path(told).name, _hashed(told, known, sha256_file)] if Path(told).is_file() else told
            for told in recipe.build.plugins
        ]
    except (GpuoptError, OSError):
        # The task itself says what is wrong.
        return None
    return sha256_json({"recipe": tree, "gpu": one.gpu})


def _hashed(path: str, known: dict[str, str], hashed: Any) -> str:
    if path not in known:
        known[path] = hashed(Path(path))
    return known[path]


def _data_sha256(data: str, known: dict[str, str]) -> str | None:
    from gpuopt.calibration.reading import data_files

    if data not in known:
        files = data_files(data, None)
        if files is None:
            return None
        known[data] = sha256_json([[os.path.relpath(file, data), sha256_file(file)] for file in files])
    return known[data]


def _verdict(rows: Sequence[Row]) -> GpuoptError | None:
    """The first failure, as what it is, with the number of all."""
    failed = [row for row in rows if row.error is not None]
    if not failed or failed[0].error is None:
        return None
    first = failed[0].error
    return _KINDS.get(first.kind, GpuoptError)(
        f"{len(failed)} of {len(rows)} combinations failed; {failed[0].name}: {first.message}", first.hint
    )


def _warnings(found: Sequence[Combination], drawn: bool) -> list[str]:
    warnings = []
    if not drawn:
        warnings.append(
            "no plot was drawn: nothing passed, or matplotlib is not installed (pip install 'gpuopt[plot]')"
        )
    if any(one.recipe.model.factory or one.recipe.model.trust_pickle for one in found):
        warnings.append("models that come from code are compiled each time: only the stage cache knows their files")
    return warnings


def describe(found: Sequence[Combination], as_json: bool) -> str:
    """The combinations, as `--dry-run` prints them."""
    if as_json:
        rows = [{"name": one.name, "gpu": one.gpu, "recipe": one.recipe.model_dump(mode="json")} for one in found]
        return json.dumps({"combinations": rows}, indent=2) + "\n"
    return "".join(f"{one.name}{f'   (on {one.gpu})' if one.gpu else ''}\n" for one in found)
