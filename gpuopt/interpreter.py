"""Processes of our own: the Python of this one, searching where this one does.

Python would put the current folder first for them, and a file there, beside a downloaded model perhaps, would stand in
for a library of the same name. (`-P`, which leaves it out, came with Python 3.11.)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def search_path(folder: Path | None = None) -> list[str]:
    """Our own search path with the current folder left out, unless gpuopt itself lies there.

    Args:
        folder: the current folder of the process to be started, where that is another one than ours.
    """
    here, ours = {Path.cwd(), folder or Path.cwd()}, Path(__file__).parent.parent
    asked = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [entry for entry in sys.path if entry and (Path(entry) not in here or Path(entry) == ours or entry in asked)]


def module_command(module: str, *arguments: str, folder: Path | None = None, python: Path | None = None) -> list[str]:
    """What `python -m MODULE ARGUMENTS` does, without the current folder on the search path.

    Args:
        folder: as in `search_path`.
        python: another interpreter, which searches where it does by itself; None: ours.
    """
    path = repr(search_path(folder)) if python is None else "[entry for entry in sys.path if entry]"
    script = (
        f"import sys; sys.path[:] = {path}; "
        f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [str(python or sys.executable), "-c", script, *arguments]
