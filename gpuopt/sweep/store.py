"""Where a sweep's results lie: a folder, or what fsspec reaches by a URL, which every worker can.

<output>/<combination>/...            the bundle
<output>/rows/<combination>.json      its row, written when the bundle is whole
<output>/sweep.json, .md, .svg        the document, the table and the plot
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from gpuopt import bundle, environment
from gpuopt.errors import GpuoptError, RequirementError, StorageError, one_line
from gpuopt.storage import read_bytes, write_bytes

_URL = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z0-9+.-]+)*://", re.ASCII)


class Store(Protocol):
    """Results by name."""

    def read(self, name: str) -> bytes | None:
        """A small document; None if it is not there.

        Raises:
            StorageError: it cannot be told whether it is.
        """

    def write(self, name: str, content: bytes) -> None:
        """Replace a small document as a whole.

        Raises:
            StorageError: it cannot be written.
        """

    def bundle_folder(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A local path at which a bundle is written; in the store once the context has ended without an error."""

    def has_bundle(self, name: str, manifest_sha256: str) -> bool:
        """Whether the bundle with this manifest is there, as far as can be told without fetching it."""

    def place(self, name: str) -> str:
        """Where something lies, for people."""


def open_store(output: str) -> Store:
    """The store of an output.

    Raises:
        RequirementError: it is a URL, and fsspec or what it needs for it is not installed.
        StorageError: fsspec cannot use the URL.
    """
    return _Remote(output) if is_url(output) else _Folder(Path(output).absolute())


def is_url(output: str) -> bool:
    """Whether an output is a URL of fsspec rather than a path."""
    return _URL.match(output) is not None


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> bytes | None:
        path = self._folder / name
        return read_bytes(path) if path.is_file() else None

    def write(self, name: str, content: bytes) -> None:
        write_bytes(self._folder / name, content)

    @contextlib.contextmanager
    def bundle_folder(self, name: str) -> Iterator[Path]:
        # `gpuopt compile` puts a bundle into its place in one step.
        yield self._folder / name

    def has_bundle(self, name: str, manifest_sha256: str) -> bool:
        import hashlib

        try:
            bundle.open_bundle(self._folder / name)
            content = read_bytes(self._folder / name / bundle.MANIFEST_FILE)
        except GpuoptError:
            return False
        return hashlib.sha256(content).hexdigest() == manifest_sha256

    def place(self, name: str) -> str:
        return str(self._folder / name) if name else str(self._folder)


class _Remote:
    def __init__(self, url: str) -> None:
        environment.require("fsspec", f"keeping results at {url}")
        import fsspec

        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise RequirementError(
                f"fsspec needs another package for {url}: {one_line(error)}", "pip install the package that it names."
            ) from error
        except Exception as error:  # each file system has errors of its own
            raise StorageError(f"cannot use {url}: {one_line(error)}", "fsspec has to know the URL.") from error
        self._url = url.rstrip("/")
        self._root = self._root.rstrip("/")

    def read(self, name: str) -> bytes | None:
        with self._errors("read", name):
            try:
                content: bytes = self._files.cat_file(self._at(name))
            except FileNotFoundError:
                return None
            return content

    def write(self, name: str, content: bytes) -> None:
        with self._errors("write", name):
            self._files.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(self._at(name), content)

    @contextlib.contextmanager
    def bundle_folder(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="gpuopt-sweep-") as scratch:
            folder = Path(scratch) / "bundle"
            yield folder
            if folder.is_dir():
                with self._errors("write", name):
                    self._upload(folder, name)

    def _upload(self, folder: Path, name: str) -> None:
        """What was there goes first, its manifest before the rest; the new manifest comes last: without it there is
        no bundle."""
        manifest = f"{name}/{bundle.MANIFEST_FILE}"
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._at(manifest))
        with contextlib.suppress(FileNotFoundError):
            self._files.rm(self._at(name), recursive=True)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != bundle.MANIFEST_FILE]
        for path in [*files, folder / bundle.MANIFEST_FILE]:
            place = self._at(f"{name}/{path.relative_to(folder).as_posix()}")
            self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), place)

    def has_bundle(self, name: str, manifest_sha256: str) -> bool:
        import hashlib

        content = self.read(f"{name}/{bundle.MANIFEST_FILE}")
        return content is not None and hashlib.sha256(content).hexdigest() == manifest_sha256

    def place(self, name: str) -> str:
        return f"{self._url}/{name}".rstrip("/")

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _errors(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except GpuoptError:
            raise
        except Exception as error:  # each file system has errors of its own
            raise StorageError(
                f"cannot {action} {self.place(name)}: {one_line(error)}", "Check the URL, the network and the rights."
            ) from error


def sha256_of_manifest(folder: Path) -> str:
    """SHA-256 of a bundle's manifest."""
    import hashlib

    return hashlib.sha256(read_bytes(folder / bundle.MANIFEST_FILE)).hexdigest()
