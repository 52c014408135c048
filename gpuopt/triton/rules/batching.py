"""Batch size, dynamic batcher, queues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpuopt.durations import written
from gpuopt.triton.rules.finding import Finding, Subject, error, warning

_DELAY = 1
_DEFAULT = "default_queue_policy"


def max_batch_size(subject: Subject) -> Iterator[Finding]:
    """Not negative, and not beyond the profiles; 0 where requests cannot be put together."""
    size, served = subject.config.max_batch_size, subject.served
    if size < 0:
        yield error("max_batch_size", "max_batch_size", f"{size} is negative", "Write 0, or the largest batch.")
    if served is None or size <= 0:
        return
    if served.why_not_batched:
        yield error("max_batch_size", "max_batch_size", f"{size}, but {served.why_not_batched}", "Write 0.")
    elif size > served.largest_batch:
        yield error(
            "max_batch_size", "max_batch_size", f"{size}, the engine's profiles end at batch {served.largest_batch}",
            f"Write {served.largest_batch}, or build the engine for batch {size}.",
        )  # fmt: skip


def unused_batch(subject: Subject) -> Iterator[Finding]:
    """A smaller batch than the engine admits leaves throughput behind."""
    size, served = subject.config.max_batch_size, subject.served
    if served is not None and not served.why_not_batched and 0 <= size < served.largest_batch:
        yield warning(
            "unused_batch", "max_batch_size", f"{size}, the engine's profiles go to batch {served.largest_batch}",
            f"Write {served.largest_batch}, unless a latency target speaks against it: 'gpuopt plan-batching'.",
        )  # fmt: skip


def smallest_batch(subject: Subject) -> Iterator[Finding]:
    """A single request is a batch of 1: the profiles have to begin there."""
    served = subject.served
    if served is not None and subject.batched and served.smallest_batch > 1:
        yield error(
            "smallest_batch", "max_batch_size",
            f"the engine's profiles begin at batch {served.smallest_batch}, and a single request is a batch of 1",
            "Build the engine with --min-shapes of batch 1.",
        )  # fmt: skip


def scheduler_needs_batch(subject: Subject) -> Iterator[Finding]:
    """The dynamic batcher needs a max_batch_size; for 1 it has nothing to do."""
    if subject.config.HasField("dynamic_batching") and subject.config.max_batch_size == 0:
        yield error(
            "scheduler_needs_batch", "dynamic_batching", "max_batch_size is 0", "Leave it out, or write max_batch_size."
        )  # fmt: skip
    if subject.config.HasField("dynamic_batching") and subject.config.max_batch_size == 1:
        yield warning(
            "scheduler_needs_batch", "dynamic_batching", "max_batch_size is 1: there is nothing to put together",
            "Leave it out, or build the engine for larger batches.",
        )  # fmt: skip


def preferred_sizes(subject: Subject) -> Iterator[Finding]:
    """Preferred sizes are positive and at most max_batch_size."""
    sizes = list(subject.config.dynamic_batching.preferred_batch_size)
    sizes += list(subject.config.sequence_batching.oldest.preferred_batch_size)
    for size in sizes:
        if not 0 < size <= subject.config.max_batch_size:
            yield error(
                "preferred_sizes", "preferred_batch_size", f"{size}, max_batch_size is {subject.config.max_batch_size}",
                f"Write sizes from 1 to {subject.config.max_batch_size}, or none.",
            )  # fmt: skip


def priorities(subject: Subject) -> Iterator[Finding]:
    """With priority levels the default is one of them, and so is each policy's; without them policies do nothing."""
    batching = subject.config.dynamic_batching
    levels = batching.priority_levels
    if levels and not 1 <= batching.default_priority_level <= levels:
        yield error(
            "priorities", "default_priority_level", f"{batching.default_priority_level}, there are {levels} levels",
            f"Write one of 1 to {levels}; 1 is served first.",
        )  # fmt: skip
    for level in sorted(batching.priority_queue_policy):
        if not levels:
            yield warning(
                "priorities", f"priority_queue_policy {level}", "there are no priority_levels, and it does nothing",
                "Leave it out, or write them.",
            )  # fmt: skip
        elif not 1 <= level <= levels:
            yield error(
                "priorities", f"priority_queue_policy {level}", f"there are {levels} levels",
                "Write a level that is there, or raise priority_levels.",
            )  # fmt: skip
    if not levels and batching.default_priority_level:
        yield warning(
            "priorities", "default_priority_level", "there are no priority_levels", "Leave it out, or write them."
        )


def ordering(subject: Subject) -> Iterator[Finding]:
    """Responses in order go with one priority level, and with no request that is put back."""
    batching = subject.config.dynamic_batching
    if not batching.preserve_ordering:
        return
    if batching.priority_levels > 1:
        yield error(
            "ordering", "preserve_ordering", f"it excludes priority_levels {batching.priority_levels}",
            "Leave one of the two out.",
        )  # fmt: skip
    # Those of priorities as well: Triton refuses them even where it does not use them.
    for path, policy in _policies(batching):
        if policy.timeout_action == _DELAY and policy.default_timeout_microseconds:
            yield error("ordering", path, "preserve_ordering excludes timeout_action DELAY", "Write REJECT.")


def timeouts(subject: Subject) -> Iterator[Finding]:
    """A timeout below the queue delay drops what the batcher still holds; an action without a timeout does nothing."""
    batching = subject.config.dynamic_batching
    delay = batching.max_queue_delay_microseconds
    for path, policy in _used_policies(batching):
        timeout = policy.default_timeout_microseconds
        if timeout and timeout <= delay and policy.timeout_action != _DELAY:
            yield error(
                "timeouts", f"{path}.default_timeout_microseconds",
                f"{written(timeout)}, and the batcher may hold a request for {written(delay)}",
                "Write more than max_queue_delay_microseconds.",
            )  # fmt: skip
        if not timeout and policy.timeout_action == _DELAY and not policy.allow_timeout_override:
            yield warning(
                "timeouts", f"{path}.timeout_action", "DELAY without a timeout does nothing",
                "Write default_timeout_microseconds, or leave it out.",
            )  # fmt: skip
        if not timeout and policy.allow_timeout_override:
            yield warning(
                "timeouts", f"{path}.allow_timeout_override",
                "a request can only shorten a default timeout, and there is none",
                "Write default_timeout_microseconds.",
            )  # fmt: skip


def queue_size(subject: Subject) -> Iterator[Finding]:
    """A queue shorter than a batch never fills one."""
    for path, policy in _used_policies(subject.config.dynamic_batching):
        if 0 < policy.max_queue_size < subject.config.max_batch_size:
            yield warning(
                "queue_size", f"{path}.max_queue_size",
                f"{policy.max_queue_size}, a batch has up to {subject.config.max_batch_size}",
                "Write at least max_batch_size, or lower that.",
            )  # fmt: skip


def queue_delay(subject: Subject) -> Iterator[Finding]:
    """A delay of zero with preferred sizes below the largest batch cuts batches short."""
    batching = subject.config.dynamic_batching
    sizes = list(batching.preferred_batch_size)
    if sizes and not batching.max_queue_delay_microseconds and max(sizes) < subject.config.max_batch_size:
        yield warning(
            "queue_delay", "preferred_batch_size",
            f"without a queue delay a batch is closed at {min(sizes)}, the first preferred size it reaches",
            "Leave the preferred sizes out, or write max_queue_delay_microseconds.",
        )  # fmt: skip


def response_cache(subject: Subject) -> Iterator[Finding]:
    """The response cache goes neither with sequences nor with decoupled models."""
    if not subject.config.response_cache.enable:
        return
    if subject.config.HasField("sequence_batching"):
        yield error("response_cache", "response_cache", "it excludes sequence_batching", "Leave one of the two out.")
    if subject.config.model_transaction_policy.decoupled:
        yield error("response_cache", "response_cache", "it excludes decoupled models", "Leave one of the two out.")
    if subject.config.HasField("ensemble_scheduling"):
        yield warning(
            "response_cache", "response_cache", "Triton caches an ensemble only if all its steps are not decoupled",
            "Or turn it on for the steps.",
        )  # fmt: skip


def decoupled(subject: Subject) -> Iterator[Finding]:
    """An engine answers every request exactly once."""
    if subject.config.model_transaction_policy.decoupled and subject.backend in ("tensorrt", "onnxruntime", "pytorch"):
        yield error(
            "decoupled", "model_transaction_policy.decoupled", f"{subject.backend} answers each request once",
            "Leave it out.",
        )  # fmt: skip


def stateful(subject: Subject) -> Iterator[Finding]:
    """gpuopt's models keep no state: the sequence batcher is not for them."""
    if subject.served is not None and subject.config.HasField("sequence_batching"):
        yield warning(
            "stateful", "sequence_batching", "the model keeps no state from request to request",
            "Write dynamic_batching { }.",
        )  # fmt: skip
    share = subject.config.sequence_batching.direct.minimum_slot_utilization
    if not 0 <= share <= 1:
        yield error("stateful", "minimum_slot_utilization", f"{share:g} is no share", "Write a number from 0 to 1.")


def _used_policies(batching: Any) -> Iterator[tuple[str, Any]]:
    return ((path, policy) for path, policy in _policies(batching) if path == _DEFAULT or batching.priority_levels)


def _policies(batching: Any) -> Iterator[tuple[str, Any]]:
    if batching.HasField("default_queue_policy"):
        yield _DEFAULT, batching.default_queue_policy
    for level in sorted(batching.priority_queue_policy):
        yield f"priority_queue_policy {level}", batching.priority_queue_policy[level]
