"""Files that are either whole or not there: hash, write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpuopt.errors import StorageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as lower-case hex, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form: sorted keys, no white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def list_files(folder: Path) -> list[Path]:
    """All regular files below `folder`, sorted by relative path; links are not followed."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and the folder itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into a `StorageError` that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            hint = "Free some space or choose another folder with --output / --cache-dir."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "Check the permissions or choose another folder with --output / --cache-dir."
        else:
            hint = "Check that the path exists and is of the expected kind."
        raise StorageError(f"cannot {action} {path}: {error.strerror or error}", hint) from error


def check_exists(path: Path) -> None:
    """Tell a path that is not there from one that is of the wrong kind.

    Raises:
        StorageError: it is not there, or cannot be looked at.
    """
    with storage_errors("read", path):
        path.stat()


def read_bytes(path: Path, most: int = 64 << 20) -> bytes:
    """A file that is read whole, since it is small.

    Raises:
        StorageError: it cannot be read, or has more than `most` bytes.
    """
    with storage_errors("read", path), path.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise StorageError(f"{path} has more than {most >> 20} MiB, too many for what it is", "Copy it again.")
    return content


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step: a reader sees the old or the new whole.

    What processes that were killed on this machine left of an earlier try is removed.

    Raises:
        StorageError: the folder cannot be written or the disk is full.
    """
    with storage_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = _without_abandoned(path.parent, path.name)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=prefix)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a JSON document, two-space indent, NaN refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder inside `parent`, removed at the end unless it was moved away.

    Folders of the same name whose process was killed on this machine are removed first.
    """
    with storage_errors("write in", parent):
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=_without_abandoned(parent, name)))
        folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _without_abandoned(parent: Path, name: str) -> str:
    """How this process's temporary names for `name` begin, once those of processes that are gone are removed."""
    remove_abandoned(parent, name)
    return f".{name}.{socket.gethostname()}.{os.getpid()}."


def remove_abandoned(parent: Path, name: str) -> None:
    """Remove the temporary files and folders for `name` of processes of this machine that are gone."""
    prefix = f".{name}.{socket.gethostname()}"
    for abandoned in parent.glob(f"{glob.escape(prefix)}.*"):
        owner = abandoned.name.removeprefix(prefix).split(".")[1]
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(abandoned, ignore_errors=True)
            with contextlib.suppress(OSError):
                abandoned.unlink(missing_ok=True)


def publish_folder(staged: Path, destination: Path, *, replace: bool = True) -> None:
    """Make `staged` appear as `destination` in one step, replacing what was there, or refusing to.

    Both must lie on one file system. Where the kernel can exchange two names (Linux's
    `renameat2`), a reader never sees the destination missing; elsewhere there is an instant
    between two renames. After return, `staged` does not exist.

    Raises:
        StorageError: the destination cannot be replaced, or is there and must not be.
    """
    with storage_errors("write", destination):
        sync_tree(staged)
        try:
            staged.rename(destination)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not replace:
                raise
            if not _exchange(staged, destination):
                retired = staged.with_name(staged.name + ".old")
                destination.rename(retired)
                staged.rename(destination)
                staged = retired
            shutil.rmtree(staged, ignore_errors=True)
        _sync_folder(destination.parent)


def _exchange(first: Path, second: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    result: int = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return result == 0


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
