"""The stage cache: never believed unchecked, safe for several runs at once."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuopt.artifact import folder_sha256
from gpuopt.cache import Cache, default_folder, explain
from gpuopt.errors import StorageError, UsageError
from gpuopt.storage import sha256_json

PARTS = {"stage": "export", "input.model": "abc"}
RECORD = {"facts": {"n": 1}, "warnings": ["w"], "seconds": 1.5}


def fill(cache: Cache, parts: dict[str, str] = PARTS, content: str = "weights") -> Any:
    with cache.scratch() as scratch:
        staged = scratch / "result"
        (staged / "onnx" / "below").mkdir(parents=True)
        (staged / "onnx" / "model.onnx").write_text(content)
        (staged / "onnx" / "below" / "data").write_text("more")
        (staged / "ranges").mkdir()
        (staged / "ranges" / "ranges.json").write_text("{}")
        return cache.store(parts, staged, RECORD)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def only_entry(cache: Cache) -> Path:
    (entry,) = (cache.folder / "entries").iterdir()
    return entry


def test_what_was_stored_is_found_again_under_the_same_parts_only(cache: Cache) -> None:
    assert cache.lookup(PARTS) is None
    stored = fill(cache)
    found = cache.lookup(dict(reversed(PARTS.items())))
    assert found == stored
    assert found is not None
    assert (found.facts, found.warnings, found.seconds) == ({"n": 1}, ("w",), 1.5)
    assert sorted(found.artifacts) == ["onnx", "ranges"]
    for kind, artifact in found.artifacts.items():
        assert artifact.kind == kind
        assert artifact.sha256 == folder_sha256(artifact.path)
    assert (found.artifacts["onnx"].path / "model.onnx").read_text() == "weights"
    assert cache.lookup({**PARTS, "stage": "simplify"}) is None
    assert list((cache.folder / "scratch").iterdir()) == []


def flip_byte(entry: Path) -> None:
    path = entry / "onnx" / "model.onnx"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def truncate_record(entry: Path) -> None:
    (entry / "entry.json").write_text((entry / "entry.json").read_text()[:-20])


def change_record(**changes: Any) -> Callable[[Path], None]:
    def change(entry: Path) -> None:
        content = {**json.loads((entry / "entry.json").read_text())["content"], **changes}
        sealed = {"sha256": sha256_json(content), "content": content}
        (entry / "entry.json").write_text(json.dumps(sealed))

    return change


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped byte": flip_byte,
    "truncated file": lambda entry: (entry / "onnx" / "model.onnx").write_text("weight"),
    "missing file": lambda entry: (entry / "onnx" / "below" / "data").unlink(),
    "extra file": lambda entry: (entry / "onnx" / "extra").touch(),
    "file replaced by a link": lambda entry: (
        (entry / "ranges" / "ranges.json").rename(entry / "elsewhere"),
        (entry / "ranges" / "ranges.json").symlink_to(entry / "elsewhere"),
    )[-1],
    "truncated record": truncate_record,
    "empty record": lambda entry: (entry / "entry.json").write_text(""),
    "missing record": lambda entry: (entry / "entry.json").unlink(),
    "binary record": lambda entry: (entry / "entry.json").write_bytes(b"\xff\xfe\x80"),
    "record of another kind": lambda entry: (entry / "entry.json").write_text("[1]"),
    "flipped digit in what it says": lambda entry: (entry / "entry.json").write_text(
        (entry / "entry.json").read_text().replace("1.5", "1.7")
    ),
    "of another key": change_record(parts={"stage": "another"}),
    "artifacts of another kind": change_record(artifacts=[1]),
    "no facts": lambda entry: (entry / "entry.json").write_text('{"artifacts": {}}'),
    "record is a folder": lambda entry: ((entry / "entry.json").unlink(), (entry / "entry.json").mkdir())[-1],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_a_miss_is_discarded_and_can_be_made_again(
    cache: Cache, damage: Callable[[Path], None]
) -> None:
    fill(cache)
    damage(only_entry(cache))
    assert cache.lookup(PARTS) is None
    assert list((cache.folder / "entries").iterdir()) == []
    assert list((cache.folder / "scratch").iterdir()) == []
    fill(cache)
    assert cache.lookup(PARTS) is not None


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_storing_replaces_an_entry_damaged_meanwhile(cache: Cache, damage: Callable[[Path], None]) -> None:
    fill(cache)
    damage(only_entry(cache))
    stored = fill(cache)
    assert cache.lookup(PARTS) == stored


def test_who_comes_second_gets_the_entry_that_lies_there(cache: Cache) -> None:
    """Two runs may make different bytes of one key; facts and hashes must be those of the files."""
    first = fill(cache, content="first")
    second = fill(cache, content="second")
    assert second == first
    assert second.artifacts["onnx"].sha256 == folder_sha256(second.artifacts["onnx"].path)


def test_who_comes_second_to_a_damaged_entry_that_another_run_replaces_meanwhile(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cache)
    flip_byte(only_entry(cache))
    lookup, other = Cache.lookup, Cache(cache.folder)

    def and_then_another_run_stores(self: Cache, parts: Any) -> Any:
        found = lookup(self, parts)
        if found is None and self is cache:
            fill(other, content="of the other run")
        return found

    monkeypatch.setattr(Cache, "lookup", and_then_another_run_stores)
    stored = fill(cache)
    assert (stored.artifacts["onnx"].path / "model.onnx").read_text() == "of the other run"
    assert stored == lookup(cache, PARTS)


def _store_many(folder: Path, barrier: Any, results: Any, content: str) -> None:
    cache = Cache(folder)
    barrier.wait()
    for turn in range(30):
        entry = fill(cache, {"turn": str(turn)}, content)
        results.put((turn, entry.artifacts["onnx"].sha256))


def test_two_processes_that_store_the_same_keys_both_succeed(cache: Cache) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_store_many, args=(cache.folder, barrier, results, content)) for content in ("a", "b")
    ]
    for worker in workers:
        worker.start()
    told = [results.get(timeout=60) for _ in range(60)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    for turn in range(30):
        found = cache.lookup({"turn": str(turn)})
        assert found is not None
        assert {sha for number, sha in told if number == turn} == {found.artifacts["onnx"].sha256}
    assert list((cache.folder / "scratch").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "cache")
    assert cache.recall("last", "run") is None
    with pytest.raises(StorageError):
        fill(cache)
    with pytest.raises(StorageError):
        cache.remember("last", "run", {})


def test_a_store_that_fails_leaves_no_entry(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="No space left"):
        fill(cache)
    monkeypatch.undo()
    assert cache.lookup(PARTS) is None
    assert fill(cache)


def test_documents_are_recalled_by_shelf_and_name(cache: Cache) -> None:
    cache.remember("last", "a/run", {"x": [1]})
    cache.remember("sources", "a/run", ["file"])
    assert cache.recall("last", "a/run") == {"x": [1]}
    assert cache.recall("sources", "a/run") == ["file"]
    assert cache.recall("last", "another") is None


def test_a_damaged_document_is_forgotten(cache: Cache) -> None:
    cache.remember("last", "run", {"x": 1})
    (document,) = (cache.folder / "last").iterdir()
    whole = document.read_bytes()
    for content in (b"", b'{"x"', b"\xff", whole.replace(b": 1", b": 3"), b"[" * 100_000):
        document.write_bytes(content)
        assert cache.recall("last", "run") is None


def test_clear_deletes_everything_and_counts_entries(cache: Cache) -> None:
    fill(cache)
    fill(cache, {"stage": "other"})
    cache.remember("last", "run", {})
    assert cache.clear() == 2
    assert cache.lookup(PARTS) is None
    assert cache.recall("last", "run") is None
    assert cache.clear() == 0


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GPUOPT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == tmp_path / ".cache" / "gpuopt"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_folder() == Path("/xdg/gpuopt")
    monkeypatch.setenv("GPUOPT_CACHE_DIR", "/own")
    assert default_folder() == Path("/own")


def test_without_a_home_the_user_hears_where_a_cache_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GPUOPT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(UsageError, match="no home folder") as raised:
        default_folder()
    assert "GPUOPT_CACHE_DIR" in raised.value.hint


@pytest.mark.parametrize(
    ("before", "now", "text"),
    [
        (None, {"a": "1"}, "first run"),
        ({"a": "1"}, {"a": "1"}, "its cache entry is gone"),
        ({"input.onnx": "1", "a": "1"}, {"input.onnx": "2", "a": "1"}, "its input onnx changed"),
        ({"export.opset": "18"}, {"export.opset": "20"}, "export.opset changed from 18 to 20"),
        ({}, {"version of torch": "2"}, "version of torch changed from nothing to 2"),
        ({"target": "x"}, {}, "target changed from x to nothing"),
        ({"b": "1", "input.a": "1"}, {"b": "2"}, "b changed from 1 to 2; its input a changed"),
    ],
)
def test_explain_says_what_differs(before: dict[str, str] | None, now: dict[str, str], text: str) -> None:
    assert explain(before, now) == text


def test_a_journal_belongs_to_its_key_and_goes_with_the_result(cache: Cache) -> None:
    journal, other = cache.journal(PARTS), cache.journal({**PARTS, "more": "1"})
    assert journal != other
    for path in (journal, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("finished\n")
    fill(cache)
    assert not journal.exists()
    assert other.exists()
    cache.clear()
    assert not other.exists()


def test_tidying_removes_what_a_killed_run_left_and_nothing_of_one_at_work(cache: Cache) -> None:
    cache.tidy()
    finished = multiprocessing.get_context("fork").Process(target=int)
    finished.start()
    finished.join()
    with cache.scratch() as ours:
        theirs = ours.with_name(ours.name.replace(f".{os.getpid()}.", f".{finished.pid}."))
        theirs.mkdir()
        cache.tidy()
        assert [path.name for path in (cache.folder / "scratch").iterdir()] == [ours.name]
