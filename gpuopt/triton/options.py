"""What the flags of `gpuopt triton` ask for, and their syntax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpuopt.durations import microseconds
from gpuopt.errors import UsageError

_KINDS = {"auto": "KIND_AUTO", "gpu": "KIND_GPU", "cpu": "KIND_CPU", "model": "KIND_MODEL"}
_ACTIONS = {"reject": "REJECT", "delay": "DELAY"}


@dataclass(frozen=True)
class QueuePolicy:
    """Triton's `ModelQueuePolicy`; 0: no limit.

    Attributes:
        action: `REJECT` or `DELAY`, for a request whose time in the queue is up.
    """

    max_queue_size: int = 0
    timeout_microseconds: int = 0
    action: str = "REJECT"
    allow_timeout_override: bool = False

    @property
    def is_default(self) -> bool:
        return self == QueuePolicy()


@dataclass(frozen=True)
class DynamicBatching:
    """Triton's `ModelDynamicBatching`."""

    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 0
    preserve_ordering: bool = False
    priority_levels: int = 0
    default_priority_level: int = 0
    default_queue_policy: QueuePolicy = QueuePolicy()
    priority_queue_policy: Mapping[int, QueuePolicy] = field(default_factory=dict)


@dataclass(frozen=True)
class InstanceGroup:
    """Triton's `ModelInstanceGroup`: `count` instances on each of `gpus`, on every GPU if there are none."""

    kind: str
    count: int
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Optimization:
    """How the backend runs the model.

    Attributes:
        accelerators: of ONNX Runtime: its execution providers `tensorrt` and `cuda`, with their parameters.
        cuda_graphs: of the tensorrt backend.
        pinned_memory: None: as Triton has it, which is on.
    """

    accelerators: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cuda_graphs: bool = False
    pinned_memory: bool | None = None


@dataclass(frozen=True)
class Options:
    """A whole configuration, as far as it is the user's choice.

    Attributes:
        max_batch_size: None: the largest that the profiles admit.
        dynamic_batching: None: no dynamic batcher.
        instances: empty: one, on a GPU if the backend needs one.
        engines_for: compute capabilities of further GPUs and the bundles with engines for them; an empty one: the only
            capability that the engine's record names.
        warm_up: whether warm-up requests are made of the reference's inputs.
        version_policy: `all`, `latest:N`, `specific:N,N`; empty: Triton's default, the latest one.
        latency_buckets: ends of the histogram of first responses, milliseconds.
        merged: a file of further fields, laid over the rest as `schema.lay_over` does it.
    """

    max_batch_size: int | None = None
    dynamic_batching: DynamicBatching | None = DynamicBatching()
    instances: tuple[InstanceGroup, ...] = ()
    optimization: Optimization = Optimization()
    engines_for: tuple[tuple[str, Path], ...] = ()
    warm_up: bool = False
    version_policy: str = ""
    response_cache: bool = False
    metric_tags: Mapping[str, str] = field(default_factory=dict)
    latency_buckets: tuple[float, ...] = ()
    merged: Path | None = None


def instance_group(text: str) -> InstanceGroup:
    """Parse `gpu:2`, `gpu:2:0,1`, `cpu:4`.

    Raises:
        UsageError: it is none.
    """
    kind, _, rest = text.partition(":")
    count, _, gpus = rest.partition(":")
    if (
        kind not in _KINDS
        or not (count or "1").isdecimal()
        or int(count or 1) < 1
        or not all(gpu.isdecimal() for gpu in gpus.split(",") if gpus)
    ):
        raise UsageError(
            f"--instances '{text}' is no instance group", "Write KIND:COUNT or gpu:COUNT:GPU,GPU, as in gpu:2:0,1."
        )
    if gpus and kind not in ("gpu", "auto"):
        raise UsageError(f"--instances '{text}': only instances on GPUs name GPUs", f"Write {kind}:{count or 1}.")
    return InstanceGroup(_KINDS[kind], int(count or 1), tuple(int(gpu) for gpu in gpus.split(",")) if gpus else ())


def queue_policy(
    max_queue_size: int | None, timeout: str | None, action: str | None, allow_override: bool
) -> QueuePolicy:
    """A policy from the flags of the default queue.

    Raises:
        UsageError: the timeout is no duration.
    """
    return QueuePolicy(
        max_queue_size or 0,
        microseconds(timeout, "--queue-timeout") if timeout else 0,
        _ACTIONS[action] if action else "REJECT",
        allow_override,
    )


def priority_queues(texts: Sequence[str]) -> dict[int, QueuePolicy]:
    """Parse `1:size=10,timeout=5ms,action=delay,override`, a level each.

    Raises:
        UsageError: a part of it is unknown.
    """
    found: dict[int, QueuePolicy] = {}
    for text in texts:
        level, _, rest = text.partition(":")
        parts = dict(part.partition("=")[::2] for part in rest.split(",") if part)
        size, action = parts.get("size", "0"), parts.get("action", "reject")
        known = set(parts) <= {"size", "timeout", "action", "override"}
        if not (known and level.isdecimal() and size.isdecimal() and action in _ACTIONS):
            raise UsageError(
                f"--priority-queue '{text}' is no queue policy",
                "Write LEVEL:size=N,timeout=TIME,action=reject|delay,override; each part may be left out.",
            )
        found[int(level)] = queue_policy(int(size), parts.get("timeout"), action, "override" in parts)
    return found


def accelerators(names: Sequence[str], parameters: Sequence[str]) -> dict[str, dict[str, str]]:
    """Accelerators of ONNX Runtime, and `NAME:KEY=VALUE` for each parameter.

    Raises:
        UsageError: a parameter names no accelerator that was asked for.
    """
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for text in parameters:
        name, _, setting = text.partition(":")
        key, equals, value = setting.partition("=")
        if name not in found or not key or not equals:
            raise UsageError(
                f"--accelerator-parameter '{text}' belongs to no --accelerator",
                "Write NAME:KEY=VALUE, as in tensorrt:precision_mode=FP16, beside --accelerator NAME.",
            )
        found[name][key] = value
    return found


def pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """Parse `KEY=VALUE`.

    Raises:
        UsageError: a text has no `=`.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"{flag} '{text}' is no KEY=VALUE", "Write both with a = between them.")
        found[key] = value
    return found


def numbers(text: str | None, flag: str) -> tuple[float, ...]:
    """Parse `0.5,1,5`.

    Raises:
        UsageError: a part is no number.
    """
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(f"{flag} '{text}' is no list of numbers", "Write them with commas: 0.5,1,5.") from None
