"""The timing cache: what each kernel took on this GPU, kept in a file between builds."""

from __future__ import annotations

import contextlib
import fcntl
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.environment import Gpu
from gpuopt.errors import BuildError, StorageError, UsageError
from gpuopt.storage import read_bytes, storage_errors, write_bytes

_LOCK_SECONDS = 10.0
"""How long a save waits for others, which hold the lock while they read, combine and write."""
_MOST_BYTES = 1 << 30
_NOT_USED = "timing cache will not be used"
_SILENT: Mapping[str, Sequence[str]] = {"ERROR": (), "NOTED": ()}
_LOADED = re.compile(r"Loaded [1-9]\d* timing cache entries")
_HITS = re.compile(r"(\d+) entries, served (\d+) hits")


@dataclass(frozen=True)
class TimingCacheUse:
    """What a build did with its timing cache.

    Attributes:
        file: where it lies.
        read_bytes: how much of it fitted; 0: none was there, or another GPU's or release's.
        written_bytes: its size after the build; 0: it could not be written.
        hits: timings that were taken from it, where the library says so.
    """

    file: Path
    read_bytes: int
    written_bytes: int
    hits: int | None


@dataclass(frozen=True)
class Attached:
    """A timing cache in use; `cache` has to live until the engine is built."""

    cache: Any
    read_bytes: int
    warnings: tuple[str, ...]


def file_name(target: str, library_version: str, gpu: Gpu) -> str:
    """The name of the cache for one target, release and kind of GPU."""
    words = f"{target}-{library_version}-{gpu.name}-{gpu.compute_capability}"
    return re.sub(r"[^\w.-]+", "_", words) + ".timing"


def attach(
    config: Any, trt: ModuleType, options: BuildOptions, messages: Mapping[str, Sequence[str]] = _SILENT
) -> Attached | None:
    """Give the builder the timing cache of `options`, or an empty one that is filled.

    Args:
        messages: the library's log by level, which grows: TensorRT 8 takes a cache that it cannot read, and says so
            there alone. It says the same of one whose timings it has loaded all but those of Myelin's.

    Raises:
        BuildError: `require_timing_cache`, and it is not there or does not fit.
        UsageError: `require_timing_cache` without a file.
        StorageError: it cannot be read.
    """
    path = options.timing_cache
    if path is None:
        if options.require_timing_cache:
            raise UsageError("build.require_timing_cache needs a timing cache", "Name it: --timing-cache FILE.")
        return None
    content = b""
    if path.is_file():
        content = read_bytes(path, _MOST_BYTES)
    elif options.require_timing_cache:
        raise BuildError(
            f"there is no timing cache {path}, and it is required",
            "Build once without --require-timing-cache on the same kind of GPU, and keep the file.",
        )
    errors, noted = len(messages["ERROR"]), len(messages["NOTED"])
    cache = _fitting(config, content)
    is_refused = any(_NOT_USED in line for line in messages["ERROR"][errors:])
    is_read = not is_refused or any(_LOADED.search(line) for line in messages["NOTED"][noted:])
    if cache is not None and is_read and (content or not options.require_timing_cache):
        return Attached(cache, len(content), ())
    reason = f"the timing cache {path} does not fit TensorRT {trt.__version__} and this GPU, or is damaged"
    if options.require_timing_cache:
        raise BuildError(reason, "Build once without --require-timing-cache, which replaces it.")
    # TensorRT 8 fills one that it could not read, and takes no other after it.
    empty = cache if is_refused else _fitting(config, b"")
    if empty is None:
        return None
    return Attached(empty, 0, (f"{reason}; it is replaced",))


def _fitting(config: Any, content: bytes) -> Any:
    """The cache with this content, in use; None if the library refuses it."""
    try:
        cache = config.create_timing_cache(content)
        return cache if cache is not None and config.set_timing_cache(cache, False) else None
    except (TypeError, ValueError, RuntimeError):  # a null pointer where the binding wants an object
        return None


def serialized(attached: Attached) -> bytes | None:
    """What `save` would write to a file that is not there; None if the library gives nothing."""
    try:
        return bytes(attached.cache.serialize())
    except (TypeError, ValueError, RuntimeError):  # a null pointer where the binding wants an object
        return None


def save(
    config: Any, attached: Attached, path: Path, messages: Mapping[str, Sequence[str]]
) -> tuple[TimingCacheUse, tuple[str, ...]]:
    """Write the cache after a build, with what another build may have added to the file meanwhile.

    Savers take turns by a lock on a file beside it. Where two builds of one layer chose different kernels, TensorRT
    takes the one that was timed faster from then on (seen with 8.5.3), so that the next engine may be neither's.

    Returns:
        What was done, and warnings: an engine is not lost because its cache cannot be written.
    """
    hits = max((int(match[2]) for line in messages.get("NOTED", ()) if (match := _HITS.search(line))), default=None)
    try:
        with storage_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _turn(path) as warnings:
            if path.is_file():
                _add(config, attached.cache, read_bytes(path, _MOST_BYTES))
            written = bytes(attached.cache.serialize())
            write_bytes(path, written)
    except (StorageError, OSError, TypeError, ValueError, RuntimeError) as error:
        warning = f"the timing cache {path} is not written: {error}"
        return TimingCacheUse(path, attached.read_bytes, 0, hits), (warning,)
    return TimingCacheUse(path, attached.read_bytes, len(written), hits), warnings


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[tuple[str, ...]]:
    """The only saver of a file inside it; without the lock after some seconds, and then with a warning."""
    lock = path.with_name(path.name + ".lock")
    deadline = time.monotonic() + _LOCK_SECONDS
    with contextlib.ExitStack() as stack:
        reason = f"another process has held {lock} for {_LOCK_SECONDS:g} s"
        try:
            stream = stack.enter_context(lock.open("ab"))
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    reason = ""
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        break
                    time.sleep(0.02)
        except OSError as error:  # no lock on this file system, or no right to the file
            reason = f"{lock} cannot be locked: {error.strerror or error}"
        lost = f"what another build adds to the timing cache {path} at this moment may be lost: {reason}"
        yield (lost,) if reason else ()


def _add(config: Any, cache: Any, content: bytes) -> None:
    """Add what another cache holds; one of another release or GPU, or a damaged one, adds nothing."""
    try:
        others = config.create_timing_cache(content)
        if others is not None:
            cache.combine(others, False)
    except (TypeError, ValueError, RuntimeError):  # a null pointer where the binding wants an object
        return
