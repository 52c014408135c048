"""The timing cache's file: names, refusals, replacement. That TensorRT reads it back is shown on a GPU."""

from __future__ import annotations

import fcntl
import multiprocessing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gpuopt.backends.tensorrt import timing_cache
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.environment import Gpu
from gpuopt.errors import BuildError, StorageError, UsageError

TRT = ModuleType("tensorrt")
TRT.__version__ = "8.5.3.1"  # type: ignore[attr-defined]
HEAD = b"timings:"


class Cache:
    """What the library's cache does with bytes, as its documentation says; TensorRT-RTX's does nothing.

    Entries are `tactic=time` or a tactic alone; of two times of one tactic the cache's own stays.
    """

    def __init__(self, content: bytes) -> None:
        self.entries: dict[bytes, bytes] = {}
        for word in content.removeprefix(HEAD).split(b","):
            if word:
                self.add(word)

    def add(self, word: bytes) -> None:
        self.entries[word.partition(b"=")[0]] = word

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        fits = b"foreign" not in other.entries
        for tactic, word in other.entries.items() if fits else ():
            self.entries.setdefault(tactic, word)
        return fits

    def serialize(self) -> bytes:
        return HEAD + b",".join(sorted(self.entries.values()))


class Config:
    """Refuses content without the head: of another release by `set_timing_cache`, damaged as a null pointer."""

    def create_timing_cache(self, content: bytes) -> Cache | None:
        if content == b"damaged":
            raise TypeError("factory returned nullptr")
        return Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        return not ignore_mismatch and b"foreign" not in cache.entries


class Config85(Config):
    """TensorRT 8.5 as seen on an H100: takes one cache, of any content, and tells in the log alone what it did."""

    def __init__(self) -> None:
        self.messages: dict[str, list[str]] = {"ERROR": ["an error of before"], "NOTED": []}
        self.taken = 0

    def create_timing_cache(self, content: bytes) -> Cache | None:
        if content:
            self.messages["ERROR"].append("4: The timing cache will not be used!")
        if content.startswith(HEAD):
            self.messages["NOTED"].append("Loaded 18 timing cache entries.")
        return Cache(content if content.startswith(HEAD) else b"")

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        self.taken += 1
        return self.taken == 1


def test_a_cache_that_the_log_alone_refuses_is_not_said_to_be_read(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(b"damaged")
    config = Config85()
    found = timing_cache.attach(config, TRT, BuildOptions(timing_cache=path), config.messages)
    assert found is not None
    assert found.read_bytes == 0
    assert "does not fit TensorRT 8.5.3.1" in found.warnings[0]
    found.cache.add(b"a")
    timing_cache.save(config, found, path, {})
    assert path.read_bytes() == HEAD + b"a"
    path.write_bytes(b"damaged")
    required = BuildOptions(timing_cache=path, require_timing_cache=True)
    with pytest.raises(BuildError, match="does not fit"):
        timing_cache.attach(config, TRT, required, config.messages)


def test_a_cache_of_which_only_myelin_s_part_is_refused_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(HEAD + b"a")
    config = Config85()
    required = BuildOptions(timing_cache=path, require_timing_cache=True)
    found = timing_cache.attach(config, TRT, required, config.messages)
    assert found is not None
    assert (found.read_bytes, found.warnings) == (len(HEAD) + 1, ())


def test_there_is_one_file_for_each_release_and_gpu() -> None:
    gpu = Gpu("NVIDIA H100 80GB HBM3", "9.0", "13.0", 1)
    assert timing_cache.file_name("tensorrt", "8.5.3.1", gpu) == "tensorrt-8.5.3.1-NVIDIA_H100_80GB_HBM3-9.0.timing"
    assert "/" not in timing_cache.file_name("tensorrt", "1", Gpu("a/b ../c", "8.6"))


def test_no_file_means_no_cache() -> None:
    assert timing_cache.attach(Config(), TRT, BuildOptions()) is None
    with pytest.raises(UsageError, match="require_timing_cache needs a timing cache"):
        timing_cache.attach(Config(), TRT, BuildOptions(require_timing_cache=True))


def test_a_build_s_own_timings_are_without_those_of_others(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(HEAD + b"a=1")
    config = Config()
    attached = timing_cache.attach(config, TRT, BuildOptions(timing_cache=path))
    assert attached is not None
    attached.cache.add(b"b=2")
    path.write_bytes(HEAD + b"a=1,c=3")
    assert timing_cache.serialized(attached) == HEAD + b"a=1,b=2"
    timing_cache.save(config, attached, path, {})
    assert path.read_bytes() == HEAD + b"a=1,b=2,c=3"


def test_a_library_that_gives_no_timings_costs_no_engine() -> None:
    class Null(Cache):
        def serialize(self) -> Any:
            return None

    assert timing_cache.serialized(timing_cache.Attached(Null(b""), 0, ())) is None


def test_a_file_too_large_to_be_a_timing_cache_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_cache, "_MOST_BYTES", 1 << 20)
    path = tmp_path / "cache"
    path.write_bytes(HEAD.ljust((1 << 20) + 1))
    with pytest.raises(StorageError, match="has more than 1 MiB"):
        timing_cache.attach(Config(), TRT, BuildOptions(timing_cache=path))


def test_a_cache_grows_with_what_other_builds_added_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "folder/cache"
    config = Config()
    first = timing_cache.attach(config, TRT, BuildOptions(timing_cache=path))
    assert first is not None
    assert (first.read_bytes, first.warnings) == (0, ())
    first.cache.add(b"a")
    use, warnings = timing_cache.save(config, first, path, {})
    assert (use.read_bytes, use.written_bytes, use.hits, warnings) == (0, len(HEAD) + 1, None, ())
    second = timing_cache.attach(config, TRT, BuildOptions(timing_cache=path, require_timing_cache=True))
    assert second is not None
    assert second.read_bytes == len(HEAD) + 1
    path.write_bytes(HEAD + b"a,c")
    second.cache.add(b"b")
    line = "Deleting timing cache: 174 entries, served 118 hits since creation."
    use, _ = timing_cache.save(config, second, path, {"NOTED": [line]})
    assert use.hits == 118
    assert path.read_bytes() == HEAD + b"a,b,c"


def _save_many(path: Path, barrier: Any, mark: bytes) -> None:
    barrier.wait()
    for turn in range(40):
        attached = timing_cache.Attached(Cache(b""), 0, ())
        attached.cache.add(mark + str(turn).encode())
        timing_cache.save(Config(), attached, path, {})


def test_simultaneous_savers_keep_each_other_s_entries(tmp_path: Path) -> None:
    path = tmp_path / "folder/cache"
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    workers = [context.Process(target=_save_many, args=(path, barrier, mark)) for mark in (b"a", b"b", b"c")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert set(Cache(path.read_bytes()).entries) == {
        mark + str(n).encode() for mark in (b"a", b"b", b"c") for n in range(40)
    }


def test_a_lock_that_is_not_let_go_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_cache, "_LOCK_SECONDS", 0.1)
    path = tmp_path / "cache"
    attached = timing_cache.Attached(Cache(HEAD + b"a"), 0, ())
    with (tmp_path / "cache.lock").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        use, (warning,) = timing_cache.save(Config(), attached, path, {})
        assert "may be lost: another process has held" in warning
        assert (use.written_bytes, path.read_bytes()) == (len(HEAD) + 1, HEAD + b"a")
    assert timing_cache.save(Config(), attached, path, {})[1] == ()
    (tmp_path / "cache.lock").unlink()
    (tmp_path / "cache.lock").mkdir()
    assert "cannot be locked" in timing_cache.save(Config(), attached, path, {})[1][0]


@pytest.mark.parametrize("content", [b"damaged", HEAD + b"foreign"])
def test_a_cache_that_does_not_fit_is_replaced_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cache"
    path.write_bytes(content)
    attached = timing_cache.attach(Config(), TRT, BuildOptions(timing_cache=path))
    assert attached is not None
    assert attached.read_bytes == 0
    assert "does not fit TensorRT 8.5.3.1 and this GPU, or is damaged; it is replaced" in attached.warnings[0]
    attached.cache.add(b"a")
    timing_cache.save(Config(), attached, path, {})
    assert path.read_bytes() == HEAD + b"a"
    path.write_bytes(content)
    with pytest.raises(BuildError, match="does not fit"):
        timing_cache.attach(Config(), TRT, BuildOptions(timing_cache=path, require_timing_cache=True))


def test_a_required_cache_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    options = BuildOptions(timing_cache=tmp_path / "cache", require_timing_cache=True)
    with pytest.raises(BuildError, match="there is no timing cache"):
        timing_cache.attach(Config(), TRT, options)
    (tmp_path / "cache").touch()
    with pytest.raises(BuildError, match="does not fit"):
        timing_cache.attach(Config(), TRT, options)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file/cache"
    attached = timing_cache.Attached(Cache(b""), 0, ())
    use, (warning,) = timing_cache.save(Config(), attached, path, {})
    assert use.written_bytes == 0
    assert "is not written" in warning
