"""Files that are either whole or not there, also when the disk fills up or the process dies."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gpuopt import storage
from gpuopt.errors import StorageError
from gpuopt.storage import (
    list_files,
    publish_folder,
    scratch_folder,
    sha256_file,
    sha256_json,
    storage_errors,
    write_json,
    write_text,
)


def refuse_with(number: int) -> Any:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_hashes_are_sha256(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = bytes(range(256)) * 5000
    path.write_bytes(content)
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()
    assert sha256_json({"b": [1, "é"], "a": None}) == hashlib.sha256(b'{"a":null,"b":[1,"\\u00e9"]}').hexdigest()


def test_files_are_listed_in_order_without_links(tmp_path: Path) -> None:
    for name in ("b/2", "b/1", "a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "folder-link").symlink_to(tmp_path / "b")
    assert list_files(tmp_path) == [tmp_path / "a", tmp_path / "b/1", tmp_path / "b/2"]


def test_write_text_makes_folders_and_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_text(path, "a long first content")
    write_text(path, "é")
    assert path.read_bytes() == "é".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert list_files(tmp_path) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
def test_write_text_that_fails_on_the_way_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    # Python 3.10's Path has its own copies of os.replace and os.chmod.
    monkeypatch.setattr(os if function == "fsync" else Path, function, refuse_with(errno.ENOSPC))
    with pytest.raises(StorageError, match="No space left") as caught:
        write_text(path, "new")
    assert str(path) in caught.value.message
    assert "Free some space" in caught.value.hint
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_write_text_interrupted_by_ctrl_c_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_write_text_on_a_really_full_disk_leaves_the_old_file_alone(tmp_path: Path) -> None:
    """A limit on file sizes is the one way for any user to make writes fail; the kernel says so by EFBIG."""
    write_text(tmp_path / "file", "old")
    script = (
        "import resource, signal, sys; from pathlib import Path; from gpuopt.errors import StorageError\n"
        "from gpuopt.storage import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_text(Path(sys.argv[1]), 'x' * 5000)\n"
        "except StorageError as error: print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    assert "cannot write" in done.stdout
    assert (tmp_path / "file").read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_write_text_below_a_file_or_in_proc_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "below", Path("/proc/gpuopt/file")):
        with pytest.raises(StorageError, match="cannot write"):
            write_text(path, "x")


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "permissions"),
        (errno.EIO, "Check"),
    ],
)
def test_the_hint_follows_the_systems_reason(number: int, hint: str) -> None:
    with pytest.raises(StorageError) as caught, storage_errors("read", Path("/a/b")):
        refuse_with(number)()
    assert caught.value.message == f"cannot read /a/b: {os.strerror(number)}"
    assert hint in caught.value.hint


def test_write_json_refuses_nan_and_leaves_the_old_file_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file", {"a": float("nan")})
    assert (tmp_path / "file").read_text() == '{\n  "a": 1\n}\n'


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_text(content)
    return path


@pytest.mark.parametrize("before", [None, {}, {"old": "1", "kept": "old"}])
def test_a_published_folder_replaces_what_was_there(tmp_path: Path, before: dict[str, str] | None) -> None:
    if before is not None:
        folder_with(tmp_path / "destination", **before)
    publish_folder(folder_with(tmp_path / "staged", kept="new"), tmp_path / "destination")
    assert names_in(tmp_path) == ["destination"]
    assert [(p.name, p.read_text()) for p in list_files(tmp_path / "destination")] == [("kept", "new")]


def test_where_the_kernel_cannot_exchange_the_folder_is_replaced_by_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_exchange", lambda first, second: False)
    folder_with(tmp_path / "destination", old="1")
    publish_folder(folder_with(tmp_path / "staged", new="1"), tmp_path / "destination")
    assert names_in(tmp_path) == ["destination"]
    assert names_in(tmp_path / "destination") == ["new"]


def test_a_reader_never_sees_the_destination_missing_or_mixed(tmp_path: Path) -> None:
    destination = folder_with(tmp_path / "destination", number="0")
    stop, seen, missing = threading.Event(), set[str](), 0

    def poll() -> None:
        nonlocal missing
        while not stop.is_set():
            try:
                folder = os.open(destination, os.O_RDONLY)
            except FileNotFoundError:
                missing += 1
                continue
            try:
                names = os.listdir(folder)  # noqa: PTH208 - of a descriptor, to stay with one folder
            finally:
                os.close(folder)
            # An opened folder that was replaced in the meantime may be half removed; it cannot be a mixture.
            assert len(names) <= 1
            seen.update(names)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        for turn in range(1, 60):
            publish_folder(folder_with(tmp_path / "staged", **{f"number{turn}": ""}), destination)
    finally:
        stop.set()
        thread.join()
    assert missing == 0
    assert len(seen) > 3, "the reader did not run beside the writer"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_publishing_over_something_that_is_no_folder_is_refused_and_leaves_it(tmp_path: Path, kind: str) -> None:
    destination = tmp_path / "destination"
    other = folder_with(tmp_path / "other", mine="1")
    if kind == "file":
        destination.write_text("mine")
    else:
        destination.symlink_to(other)
    with pytest.raises(StorageError, match="cannot write"):
        publish_folder(folder_with(tmp_path / "staged", new="1"), destination)
    assert destination.is_symlink() or destination.read_text() == "mine"
    assert names_in(other) == ["mine"]


def test_publishing_fails_whole_when_the_flush_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_with(tmp_path / "destination", old="1")
    staged = folder_with(tmp_path / "staged", new="1")
    monkeypatch.setattr(os, "fsync", refuse_with(errno.ENOSPC))
    with pytest.raises(StorageError, match="No space left"):
        publish_folder(staged, tmp_path / "destination")
    assert names_in(tmp_path / "destination") == ["old"]


def test_a_scratch_folder_is_removed_at_the_end_also_after_a_failure(tmp_path: Path) -> None:
    def fail_inside() -> None:
        with scratch_folder(tmp_path / "parent", "name") as folder:
            (folder / "below").mkdir()
            assert folder.parent == tmp_path / "parent"
            assert folder.stat().st_mode & 0o777 == 0o755
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert names_in(tmp_path / "parent") == []


def test_a_scratch_folder_that_was_moved_away_survives(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "name") as folder:
        (folder / "file").touch()
        folder.rename(tmp_path / "kept")
    assert names_in(tmp_path) == ["kept"]


KILLED = """
import os, signal, sys
from pathlib import Path
from gpuopt.storage import scratch_folder
with scratch_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "file").touch()
    print(folder.name, flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start_holder(parent: Path, name: str) -> tuple[subprocess.Popen[str], str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(parent), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    return holder, holder.stdout.readline().strip()


def test_folders_of_killed_processes_are_removed_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    # `[x]` would match as a pattern; another name that begins alike must not be touched.
    held = [start_holder(tmp_path, name) for name in ("a[x]", "a[x]", "a[x]b")]
    try:
        (dead, dead_folder), (_, live_folder), (other, other_folder) = held
        for process in (dead, other):
            process.communicate("\n")
        assert dead.returncode == -9
        assert (tmp_path / dead_folder / "file").exists()
        with scratch_folder(tmp_path, "a[x]") as ours:
            assert names_in(tmp_path) == sorted([live_folder, other_folder, ours.name])
            assert (tmp_path / live_folder / "file").exists()
    finally:
        for process, _ in held:
            if process.poll() is None:
                process.communicate("\n")


def test_folders_of_other_machines_stay(tmp_path: Path) -> None:
    foreign = tmp_path / ".name.some-other-host.999999.abc"
    foreign.mkdir()
    odd = tmp_path / ".name.notapid"
    odd.mkdir()
    with scratch_folder(tmp_path, "name"):
        assert foreign.exists()
        assert odd.exists()


def test_a_scratch_folder_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write in"), scratch_folder(tmp_path / "file", "name"):
        pass


def test_publishing_without_replacing_leaves_what_is_there(tmp_path: Path) -> None:
    for name in ("staged", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(StorageError, match="there"):
        publish_folder(tmp_path / "staged", tmp_path / "there", replace=False)
    assert (tmp_path / "there/file").read_text() == "there"
    publish_folder(tmp_path / "staged", tmp_path / "new", replace=False)
    assert names_in(tmp_path) == ["new", "there"]
