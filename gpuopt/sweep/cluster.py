"""A sweep on a Ray cluster: each task on a node with the GPU of its engine; one whose worker is lost, again."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gpuopt import environment
from gpuopt.errors import RequirementError, one_line
from gpuopt.sweep.results import Row
from gpuopt.sweep.task import Task, failed_row, run_to_end

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_ANSWER = 10.0


def run(tasks: Sequence[Task], address: str, retries: int, done: Callable[[Row], None]) -> None:
    """Make all of them; one that fails does not stop the others.

    Args:
        address: of the cluster, as `ray start` prints it, `auto` or `ray://...`; `local` starts one for the sweep.
        retries: how often a task is tried again whose worker or node was lost.
        done: told of each row, in the order in which they end.

    Raises:
        RequirementError: Ray is not installed, or the cluster does not answer.
    """
    environment.require("ray", "a sweep on a cluster")
    import ray

    # Ray's own threads print what they have to say on stdout, which is for data.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            _check_answers(address)
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
            _run(ray, tasks, retries, done)
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


def _run(ray: Any, tasks: Sequence[Task], retries: int, done: Callable[[Row], None]) -> None:
    known = {str(name).removeprefix("accelerator_type:") for name in ray.cluster_resources()}
    make = ray.remote(max_retries=retries, num_cpus=1)(run_to_end)
    waiting: dict[Any, Task] = {}
    for task in tasks:
        if task.gpu and task.gpu not in known:
            # Ray would wait for such a node for ever.
            done(failed_row(task, _no_node(task.gpu, known), 0.0, 0))
            continue
        options: dict[str, Any] = {"name": task.name}
        if task.gpu:
            options |= {"num_gpus": 1, "accelerator_type": task.gpu}
        if task.memory is not None:
            options["memory"] = task.memory
        waiting[make.options(**options).remote(task)] = task
    while waiting:
        ended, _ = ray.wait(list(waiting), timeout=_SECONDS_BETWEEN_LOOKS)
        for reference in ended:
            task = waiting.pop(reference)
            try:
                done(Row.model_validate_json(ray.get(reference)))
            except ray.exceptions.RayError as error:
                done(failed_row(task, _lost(error, retries), 0.0, retries + 1))


def _no_node(gpu: str, known: set[str]) -> RequirementError:
    usual = {"CPU", "GPU", "memory", "object_store_memory"}
    there = sorted(name for name in known if name not in usual and not name.startswith("node:"))
    return RequirementError(
        f"no node of the Ray cluster has the accelerator type {gpu}; it has {', '.join(there) or 'none'}",
        "Add such a node, or correct 'gpu' of the target in the sweep's file.",
    )


def _lost(error: Exception, retries: int) -> RequirementError:
    return RequirementError(
        f"its worker was lost {retries + 1} times, or could not run it: {one_line(error)}",
        "Look at the node's memory and at Ray's logs there.",
    )
