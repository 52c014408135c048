"""Code of the user: where it is looked for, and which files it is made of."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
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
"""By modules of the user while they were imported: a later stage finds them there, and does not see them read."""


def dependencies(read: Iterable[str]) -> Dependencies:
    """Those of all of the user's code in this process: an earlier stage may have imported what a later one calls.

    Args:
        read: files that the code read. Of those that are gone nobody can tell whether they change: they do not count.
    """
    files = {*_user_files(), *(name for name in (*_read_at_import, *read) if Path(name).is_file())}
    return Dependencies(tuple(sorted(files)), tuple(_imported_distributions()))


def watch_imports() -> None:
    """From now on, for good, note which files modules read while they are imported, wherever the import stands."""
    installed = _installed_folders()

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and _is_read(arguments) and _is_importing():
            _note(arguments[0], installed, _read_at_import)

    sys.addaudithook(listen)


def _is_importing() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "exec_module" and frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def imported(module: str) -> ModuleType:
    """The user's module, of the current folder, PYTHONPATH or what is installed; what it raises, it raises."""
    search_current_folder()
    stem = module.removesuffix(".py")
    if stem != module and not _is_package(stem):
        # Importing it would run the file first.
        raise ModuleNotFoundError(f"{module} is a file's name; the module is called {stem}", name=module)
    return importlib.import_module(module)


def _is_package(name: str) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.submodule_search_locations is not None


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
        if listening and event == "open" and _is_read(arguments):
            _note(arguments[0], installed, found)

    sys.addaudithook(listen)
    try:
        yield found
    finally:
        # An audit hook cannot be taken off again.
        listening = False


def _is_read(arguments: tuple[Any, ...]) -> bool:
    """Whether the arguments of an `open` event are those of reading what can be the user's."""
    name, mode = arguments[:2]
    return isinstance(name, str) and not name.endswith(".pyc") and isinstance(mode, str) and not set(mode) & set("wax+")


def _note(name: str, installed: Sequence[Path], found: set[str]) -> None:
    path = Path(name).resolve()
    if path.is_file() and not any(map(path.is_relative_to, installed)):
        found.add(str(path))


def _installed_folders() -> list[Path]:
    return [
        Path(p).resolve()
        for p in (*sysconfig.get_paths().values(), str(Path(__file__).parent), "/proc", "/sys", "/dev")
    ]
