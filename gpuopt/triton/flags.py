"""From the command line's words to a request."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpuopt.batching.report import SettingsReport, read
from gpuopt.durations import microseconds
from gpuopt.errors import UsageError
from gpuopt.request import sizes
from gpuopt.triton.command import EnsembleRequest
from gpuopt.triton.options import (
    DynamicBatching,
    InstanceGroup,
    Optimization,
    Options,
    QueuePolicy,
    accelerators,
    instance_group,
    numbers,
    pairs,
    priority_queues,
    queue_policy,
)
from gpuopt.triton.served import Backend

# A path may have a `=` of its own.
_CAPABILITY = re.compile(r"(\d+\.\d+)=")
_BACKENDS: Mapping[str, Backend] = {"tensorrt": "tensorrt", "onnxruntime": "onnxruntime", "pytorch": "pytorch"}


@dataclass(frozen=True)
class Batching:
    """The flags of the dynamic batcher, as they were written; None, 0 or empty: not given."""

    max_batch_size: int | None = None
    preferred_batch_size: str | None = None
    max_queue_delay: str | None = None
    preserve_ordering: bool = False
    priority_levels: int = 0
    default_priority_level: int = 0
    max_queue_size: int | None = None
    queue_timeout: str | None = None
    timeout_action: str | None = None
    allow_timeout_override: bool = False
    priority_queue: tuple[str, ...] = ()
    disabled: bool = False


@dataclass(frozen=True)
class Running:
    """The other flags of a configuration."""

    instances: tuple[str, ...] = ()
    engine_for: tuple[str, ...] = ()
    accelerator: tuple[str, ...] = ()
    accelerator_parameter: tuple[str, ...] = ()
    cuda_graphs: bool = False
    pinned_memory: bool | None = None
    warm_up: bool = False
    version_policy: str = ""
    response_cache: bool = False
    metric_tag: tuple[str, ...] = ()
    latency_buckets: str | None = None
    merge: Path | None = None


def backend(name: str | None) -> Backend | None:
    """The backend of a flag."""
    return _BACKENDS[name] if name else None


def repository(output: Path | None) -> Path:
    """The repository to write into.

    Raises:
        UsageError: none was named.
    """
    if output is None:
        raise UsageError("there is no model repository to write into", "Name one with --output, or use --check PATH.")
    return output


def check_alone(output: Path | None) -> None:
    """Refuse to check and to write at once.

    Raises:
        UsageError: both were asked for.
    """
    if output is not None:
        raise UsageError("--check writes nothing, and --output was given", "Give one of the two.")


def existing(keep: bool, replace: bool) -> Literal["same", "keep", "replace"]:
    """What becomes of a configuration that is there.

    Raises:
        UsageError: both were asked for.
    """
    if keep and replace:
        raise UsageError("--keep-config and --replace-config exclude each other", "Give one of the two.")
    return "keep" if keep else "replace" if replace else "same"


def ensemble(
    name: str | None, before: Sequence[str], after: Sequence[str], mapping: Sequence[str]
) -> EnsembleRequest | None:
    """The pipeline that was asked for.

    Raises:
        UsageError: steps without a name for the whole, or none.
    """
    if name is None:
        if before or after or mapping:
            raise UsageError("--before, --after and --map are steps of an ensemble", "Name it with --ensemble.")
        return None
    if not before and not after:
        raise UsageError(f"--ensemble {name} has no step but the model", "Name some with --before and --after.")
    return EnsembleRequest(name, tuple(before), tuple(after), _mapped(mapping))


def _mapped(texts: Sequence[str]) -> dict[str, str]:
    """Outputs by the inputs that take them: an output may go to several inputs, an input has one source."""
    found: dict[str, str] = {}
    for text in texts:
        ((source, target),) = pairs([text], "--map").items()
        if target in found:
            raise UsageError(
                f"--map: '{target}' has two sources, {found[target]} and {source}", "Leave one of them out."
            )
        found[target] = source
    return found


def options(batching: Batching, running: Running, plan: Path | None) -> Options:
    """A configuration's options; a plan's settings first, and over them what was given.

    Raises:
        UsageError: a flag cannot be read, or contradicts another.
        StorageError: the plan cannot be read.
    """
    asked = _batching(batching)
    max_batch_size = batching.max_batch_size
    groups = tuple(instance_group(text) for text in running.instances)
    if plan is not None:
        if asked != DynamicBatching():
            raise UsageError("--plan and flags of the dynamic batcher exclude each other", "Leave one of the two out.")
        found = read(plan)
        asked = _planned(found.settings)
        max_batch_size = found.settings.max_batch_size if max_batch_size is None else max_batch_size
        groups = groups or (InstanceGroup("KIND_CPU" if found.on_cpu else "KIND_GPU", found.settings.instances),)
    return Options(
        max_batch_size=max_batch_size,
        dynamic_batching=asked,
        instances=groups,
        optimization=Optimization(
            accelerators=accelerators(running.accelerator, running.accelerator_parameter),
            cuda_graphs=running.cuda_graphs,
            pinned_memory=running.pinned_memory,
        ),
        engines_for=_engines(running.engine_for),
        warm_up=running.warm_up,
        version_policy=running.version_policy,
        response_cache=running.response_cache,
        metric_tags=pairs(running.metric_tag, "--metric-tag"),
        latency_buckets=numbers(running.latency_buckets, "--latency-buckets"),
        merged=running.merge,
    )


def _batching(given: Batching) -> DynamicBatching | None:
    made = DynamicBatching(
        preferred_batch_size=sizes(given.preferred_batch_size),
        max_queue_delay_microseconds=(
            microseconds(given.max_queue_delay, "--max-queue-delay") if given.max_queue_delay else 0
        ),
        preserve_ordering=given.preserve_ordering,
        priority_levels=given.priority_levels,
        default_priority_level=given.default_priority_level,
        default_queue_policy=queue_policy(
            given.max_queue_size, given.queue_timeout, given.timeout_action, given.allow_timeout_override
        ),
        priority_queue_policy=priority_queues(given.priority_queue),
    )
    if given.disabled and made != DynamicBatching():
        raise UsageError("--no-dynamic-batching excludes the batcher's other flags", "Leave one of the two out.")
    return None if given.disabled else made


def _engines(texts: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    found = []
    for text in texts:
        capability = _CAPABILITY.match(text)
        found.append((capability[1], Path(text[capability.end() :])) if capability else ("", Path(text)))
    return tuple(found)


def _planned(found: SettingsReport) -> DynamicBatching:
    return DynamicBatching(
        preferred_batch_size=found.preferred_batch_size,
        max_queue_delay_microseconds=found.max_queue_delay_microseconds,
        preserve_ordering=found.preserve_ordering,
        default_queue_policy=QueuePolicy(
            max_queue_size=found.max_queue_size,
            timeout_microseconds=found.queue_timeout_microseconds,
            action=found.timeout_action,
        ),
    )
