"""A sweep on a Ray cluster: each task on a node with the GPU of its engine; one whose worker is lost, again."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpuopt
from gpuopt import environment
from gpuopt.errors import GpuoptError, RequirementError, one_line
from gpuopt.sweep.results import Row
from gpuopt.sweep.store import open_store
from gpuopt.sweep.task import Task, attempts, failed_row, run_to_end, this_node

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_ANSWER = 10.0
_SECONDS_TO_TELL = 60.0
# A node whose Ray is started again is away for some seconds.
_SECONDS_TO_COME_BACK = 10.0
_MOST_NODES_TOLD = 4
_ACCELERATOR = "accelerator_type:"


@contextlib.contextmanager
def joined(address: str) -> Iterator[Cluster]:
    """The cluster, left at the end.

    Args:
        address: as `ray start` prints it, `auto` or `ray://...`; `local` starts one for the sweep.

    Raises:
        RequirementError: Ray is not installed, or the cluster does not answer.
    """
    environment.require("ray", "a sweep on a cluster")
    import ray

    # Ray's own threads print what they have to say on stdout, which is for data.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            _check_answers(address)
            with _outside_of_the_current_folder():
                ray.init(
                    address=address,
                    include_dashboard=False if address == "local" else None,
                    log_to_driver=False,
                    logging_level="ERROR",
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise RequirementError(
                f"the Ray cluster {address} does not answer: {one_line(error)}",
                "Start it with 'ray start --head', or name another address with --ray.",
            ) from error
        try:
            yield Cluster(ray)
        finally:
            # The driver's end cancels what it has begun.
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray would try for minutes, and end the process.

    Raises:
        OSError: nobody listens there.
        ValueError: it is no address.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        with socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER):
            pass


@contextlib.contextmanager
def _outside_of_the_current_folder() -> Iterator[None]:
    """Ray has its workers search the folder in which it is called first of all: `interpreter` says why ours may not be
    that, unless gpuopt itself lies there."""
    here = Path.cwd()
    if here != Path(gpuopt.__file__).parent.parent:
        os.chdir(here.anchor)
    try:
        yield
    finally:
        os.chdir(here)


class Cluster:
    """A Ray cluster that was joined."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._machines: dict[str, str | None] = {}

    def machines(self, task: Task) -> set[str]:
        """What `this_node` says on the nodes that could make a task; one that does not answer is left out."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        able = [node["NodeID"] for node in self._nodes() if _has(node["Resources"], _needs(task))]
        tell = self._ray.remote(num_cpus=0, max_retries=0)(_this_node)
        asked = {
            tell.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
            for node in able
            if node not in self._machines
        }
        if asked:
            ended, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=_SECONDS_TO_TELL)
            for reference, node in asked.items():
                self._machines[node] = None
                # gpuopt is not installed there, is another version, or the node was lost.
                with contextlib.suppress(self._ray.exceptions.RayError):
                    if reference in ended:
                        self._machines[node] = self._ray.get(reference)
                    else:
                        self._ray.cancel(reference)
        return {machine for node in able if (machine := self._machines[node]) is not None}

    def run(
        self, tasks: Sequence[Task], retries: int, done: Callable[[Row], None], wait_for_nodes: float | None = None
    ) -> None:
        """Make all of them; one that fails does not stop the others.

        Args:
            retries: how often a task is tried again whose worker or node was lost.
            done: told of each row, in the order in which they end.
            wait_for_nodes: seconds that a task waits while no node could make it, for a cluster that grows on demand;
                None: it fails at once, and after a few seconds where there was one.
        """
        patience = _SECONDS_TO_COME_BACK if wait_for_nodes is None else wait_for_nodes
        make = self._ray.remote(max_retries=retries, num_cpus=1)(run_to_end)
        waiting: dict[Any, Task] = {}
        nodes = self._nodes()
        for task in tasks:
            if wait_for_nodes is None and not _could_make(nodes, task):
                # Ray would wait for such a node for ever.
                done(failed_row(task, _no_node(task, nodes), 0.0, 0))
                continue
            options: dict[str, Any] = {"name": task.name}
            if task.gpu:
                options |= {"num_gpus": 1, "accelerator_type": task.gpu}
            if task.memory is not None:
                options["memory"] = task.memory
            waiting[make.options(**options).remote(task)] = task
        homeless_since: dict[Any, float] = {}
        while waiting:
            ended, _ = self._ray.wait(list(waiting), timeout=_SECONDS_BETWEEN_LOOKS)
            for reference in ended:
                task = waiting.pop(reference)
                try:
                    done(Row.model_validate_json(self._ray.get(reference)))
                except self._ray.exceptions.RayError as error:
                    done(failed_row(task, _lost(error, retries), 0.0, retries + 1))
            nodes, now = self._nodes(), time.monotonic()
            for reference, task in list(waiting.items()):
                if _could_make(nodes, task):
                    homeless_since.pop(reference, None)
                elif now - homeless_since.setdefault(reference, now) >= patience:
                    self._ray.cancel(reference)
                    del waiting[reference]
                    done(failed_row(task, _no_node(task, nodes), 0.0, _attempts(task)))

    def _nodes(self) -> list[Mapping[str, Any]]:
        """Those that are up."""
        return [node for node in self._ray.nodes() if node["Alive"]]


def _this_node() -> str:
    return this_node()


def _needs(task: Task) -> dict[str, float]:
    """What a node has to have of Ray's resources, all of it, for Ray to run a task there."""
    needs = {"CPU": 1.0}
    if task.gpu:
        # Of the type a task asks for a trace, so that it does not keep others away.
        needs |= {"GPU": 1.0, f"{_ACCELERATOR}{task.gpu}": 0.001}
    if task.memory is not None:
        needs["memory"] = task.memory
    return needs


def _has(resources: Mapping[str, float], needs: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0.0) >= amount for name, amount in needs.items())


def _could_make(nodes: Sequence[Mapping[str, Any]], task: Task) -> bool:
    """Whether a node has what a task needs, be it in use or not."""
    needs = _needs(task)
    return any(_has(node["Resources"], needs) for node in nodes)


def _no_node(task: Task, nodes: Sequence[Mapping[str, Any]]) -> RequirementError:
    kinds = Counter(_described(node["Resources"]) for node in nodes)
    told = [f"{count} with {kind}" for kind, count in kinds.most_common(_MOST_NODES_TOLD)]
    more = "; ..." if len(kinds) > len(told) else ""
    return RequirementError(
        f"no node of the Ray cluster has {_described(_needs(task))}; it has {'; '.join(told) or 'none'}{more}",
        "Start such a node (ray start: --num-gpus, --resources, --memory), or correct gpu or memory in the sweep's "
        "file.",
    )


def _described(resources: Mapping[str, float]) -> str:
    words = [name.removeprefix(_ACCELERATOR) for name in sorted(resources) if name.startswith(_ACCELERATOR)]
    words += [f"{resources.get(name, 0):g} {name}" for name in ("GPU", "CPU") if resources.get(name) or name == "CPU"]
    words += [f"{int(resources['memory']) >> 20} MiB of memory"] if "memory" in resources else []
    return ", ".join(words)


def _lost(error: Exception, retries: int) -> RequirementError:
    return RequirementError(
        f"its worker was lost {retries + 1} times, or could not run it: {one_line(error)}",
        "Look at the node's memory and at Ray's logs there.",
    )


def _attempts(task: Task) -> int:
    try:
        return attempts(open_store(task.output), task)
    except GpuoptError:
        return 0
