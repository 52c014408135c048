"""Code of the user: where it is looked for, and which files it is made of."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Dependencies:
    """What a result of the user's code depends on.

    Attributes:
        files: of the user: source files, and what the code read.
        distributions: installed packages that were imported, gpuopt's own among them.
    """

    files: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()


_read_at_import: set[str] = set()
"""While `imported` imported modules in this process: a later stage finds them there, and does not see them read."""


def dependencies(read: Iterable[str]) -> Dependencies:
    """Those of all of the user's code in this process: an earlier stage may have imported what a later one calls.

    Args:
        read: files that the code read.
    """
    return Dependencies(tuple(sorted({*_user_files(), *_read_at_import, *read})), tuple(_imported_distributions()))


def imported(module: str) -> ModuleType:
    """The user's module, of the current folder, PYTHONPATH or what is installed; what it raises, it raises."""
    search_current_folder()
    with files_opened() as opened:
        try:
            return importlib.import_module(module)
        finally:
            _read_at_import.update(opened)


def _imported_distributions() -> list[str]:
    imported = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
    known = importlib.metadata.packages_distributions()
    return sorted({distribution for name in imported for distribution in known.get(name, ())})


def search_current_folder() -> None:
    """The user's code may lie there; behind everything installed, which it must not stand in for."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def _user_files() -> set[str]:
    """Source files of imported modules that belong to no installed package."""
    installed = _installed_folders()
    files = set()
    for module in list(sys.modules.values()):
        source = Path(str(getattr(module, "__file__", None)))
        if source.suffix != ".py" or not source.is_absolute() or "site-packages" in source.parts:
            continue
        path = source.resolve()
        if path.is_file() and not any(path.is_relative_to(folder) for folder in installed):
            files.add(str(path))
    return files


@contextlib.contextmanager
def files_opened() -> Iterator[set[str]]:
    """Files opened for reading meanwhile that belong to no installed package: weights, configurations."""
    found: set[str] = set()
    listening = True
    installed = _installed_folders()

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if not listening or event != "open" or not isinstance(arguments[0], str):
            return
        mode = arguments[1]
        if isinstance(mode, str) and not set(mode) & set("wax+"):
            path = Path(arguments[0]).resolve()
            if path.suffix != ".pyc" and path.is_file() and not any(map(path.is_relative_to, installed)):
                found.add(str(path))

    sys.addaudithook(listen)
    try:
        yield found
    finally:
        # An audit hook cannot be taken off again.
        listening = False


def _installed_folders() -> list[Path]:
    return [
        Path(p).resolve()
        for p in (*sysconfig.get_paths().values(), str(Path(__file__).parent), "/proc", "/sys", "/dev")
    ]
