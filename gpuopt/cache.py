"""The stage cache: content-addressed, safe for several runs at once, never believed unchecked.

    <cache>/entries/<key>/entry.json     what made it, what it says, the hashes of its files; a hash of all that
    <cache>/entries/<key>/<kind>/...     the artifacts
    <cache>/last/<run>.json              the key parts of the last run, for --explain
    <cache>/sources/<source>.json        the files of user code behind a factory or a metric
    <cache>/timing/<name>.timing         what TensorRT's builder has timed, by release and GPU
    <cache>/journals/<key>.jsonl         what a stage that was interrupted had finished

An entry appears by one rename and is never changed afterwards. A reader hashes its files; an entry
that does not match is put aside and made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuopt.artifact import Artifact, folder_hashes
from gpuopt.errors import UsageError
from gpuopt.storage import remove_abandoned, scratch_folder, sha256_json, storage_errors, sync_tree, write_json

KeyParts = Mapping[str, str]

_SCRATCH = "stage"


@dataclass(frozen=True)
class Entry:
    """A stage's result as it lies in the cache.

    Attributes:
        artifacts: by kind.
        facts, warnings: what the stage said.
        seconds: how long the stage took when it ran.
    """

    artifacts: Mapping[str, Artifact]
    facts: Mapping[str, Any]
    warnings: tuple[str, ...]
    seconds: float


def default_folder() -> Path:
    """`GPUOPT_CACHE_DIR`, else `users_folder`."""
    folder = os.environ.get("GPUOPT_CACHE_DIR")
    return Path(folder) if folder else users_folder()


def users_folder() -> Path:
    """`gpuopt` in the user's cache folder (XDG Base Directory rules).

    Raises:
        UsageError: the user has no home, as in containers that run as any number.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpuopt"
    except RuntimeError as error:
        raise UsageError(
            "there is no home folder for the cache", "Set GPUOPT_CACHE_DIR or --cache-dir; --no-cache keeps nothing."
        ) from error


class Cache:
    """Results of stages under the hash of everything that decided them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lookup(self, parts: KeyParts) -> Entry | None:
        """The entry for these key parts, its files hashed anew; None if absent or damaged."""
        folder = self._entry(parts)
        try:
            record = _unsealed((folder / "entry.json").read_text())
            if record["parts"] != dict(parts):
                raise ValueError("an entry of another key")
            artifacts = {}
            for kind, expected in record["artifacts"].items():
                hashes = folder_hashes(folder / kind)
                if hashes != expected:
                    raise ValueError(kind)
                artifacts[kind] = Artifact(kind, folder / kind, sha256_json(hashes))
            return Entry(artifacts, record["facts"], tuple(record["warnings"]), record["seconds"])
        except FileNotFoundError:
            # A folder without its record would be in the way of `store` for ever.
            if folder.exists():
                self._discard(folder)
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._discard(folder)
            return None

    def store(self, parts: KeyParts, staged: Path, record: Mapping[str, Any]) -> Entry:
        """Keep the folders of artifacts in `staged` (one a kind) as the entry for `parts`.

        Args:
            staged: a folder inside `scratch()`; it is moved, not copied.
            record: `facts`, `warnings` and `seconds` of the stage.

        Raises:
            StorageError: the cache cannot be written.
        """
        kinds = sorted(p.name for p in staged.iterdir() if p.is_dir())
        hashes = {kind: folder_hashes(staged / kind) for kind in kinds}
        folder = self._entry(parts)
        with storage_errors("write", folder):
            write_json(staged / "entry.json", _sealed({"parts": dict(parts), "artifacts": hashes, **record}))
            sync_tree(staged)
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                staged.rename(folder)
            except OSError:
                # Another run was first, and its files are what lies there now; or it is a damaged entry, which the
                # lookup puts aside, and then another run may be first again.
                existing = self.lookup(parts)
                if existing is None:
                    try:
                        staged.rename(folder)
                    except OSError:
                        existing = self.lookup(parts)
                        if existing is None:
                            raise
                if existing is not None:
                    # A stage without a key is filed by what it made: the same files, but facts of its own.
                    return Entry(existing.artifacts, record["facts"], tuple(record["warnings"]), record["seconds"])
        self.journal(parts).unlink(missing_ok=True)
        artifacts = {kind: Artifact(kind, folder / kind, sha256_json(hashes[kind])) for kind in kinds}
        return Entry(artifacts, record["facts"], tuple(record["warnings"]), record["seconds"])

    def journal(self, parts: KeyParts) -> Path:
        """Where a long stage notes what it has finished, to go on there; gone once its result is stored."""
        return self.folder / "journals" / f"{sha256_json(dict(parts))}.jsonl"

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A context with a new folder on the cache's file system."""
        return scratch_folder(self.folder / "scratch", _SCRATCH)

    def tidy(self) -> None:
        """Remove what runs that were killed left; those at work are left alone."""
        remove_abandoned(self.folder / "scratch", _SCRATCH)

    def recall(self, shelf: str, name: str) -> Any:
        """A small JSON document kept under `shelf`; None if absent or damaged."""
        try:
            return _unsealed(self._document(shelf, name).read_text())
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def remember(self, shelf: str, name: str, value: Any) -> None:
        """Keep a small JSON document for `recall`."""
        write_json(self._document(shelf, name), _sealed(value))

    def clear(self) -> int:
        """Delete every entry and document; gives the number of entries deleted."""
        count = len(list((self.folder / "entries").glob("*")))
        for name in ("entries", "last", "sources", "journals", "scratch", "timing"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        return count

    def _entry(self, parts: KeyParts) -> Path:
        return self.folder / "entries" / sha256_json(dict(parts))

    def _document(self, shelf: str, name: str) -> Path:
        return self.folder / shelf / f"{sha256_json(name)[:32]}.json"

    def _discard(self, folder: Path) -> None:
        scratch = self.folder / "scratch"
        with storage_errors("write", scratch):
            scratch.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=scratch, prefix="damaged-"))
            with contextlib.suppress(FileNotFoundError):
                folder.rename(aside / "entry")
        shutil.rmtree(aside, ignore_errors=True)


def _sealed(value: Any) -> dict[str, Any]:
    """A document with a hash of what it says: a flipped bit is noticed in what is no artifact, too."""
    return {"sha256": sha256_json(value), "content": value}


def _unsealed(text: str) -> Any:
    """What `_sealed` holds.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: it is something else, or was damaged.
    """
    document = json.loads(text)
    if document["sha256"] != sha256_json(document["content"]):
        raise ValueError("the hash does not fit")
    return document["content"]


def explain(before: KeyParts | None, now: KeyParts) -> str:
    """Why a stage runs: what differs between the key parts of the last run and of this one."""
    if before is None:
        return "first run"
    changes = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name.startswith("input."):
            changes.append(f"its input {name.removeprefix('input.')} changed")
        else:
            changes.append(f"{name} changed from {old or 'nothing'} to {new or 'nothing'}")
    return "; ".join(changes) or "its cache entry is gone"
