"""Code of the user: where it is looked for, and which files it is made of."""

from __future__ import annotations

import contextlib
import sys
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any


def search_current_folder() -> None:
    """The user's code may lie there; behind everything installed, which it must not stand in for."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def user_files(before: Collection[str]) -> list[str]:
    """Source files of modules imported since `before` that belong to no installed package."""
    installed = _installed_folders()
    files = set()
    for name in set(sys.modules).difference(before):
        source = Path(str(getattr(sys.modules[name], "__file__", None)))
        if source.suffix != ".py" or not source.is_absolute() or "site-packages" in source.parts:
            continue
        path = source.resolve()
        if path.is_file() and not any(path.is_relative_to(folder) for folder in installed):
            files.add(str(path))
    return sorted(files)


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
