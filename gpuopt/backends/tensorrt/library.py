"""The Python module of a target and what its version can do."""

from __future__ import annotations

import importlib
from types import ModuleType

from gpuopt.environment import install_hint
from gpuopt.errors import RequirementError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_OLDEST = (8, 5)


def import_module(target: str) -> ModuleType:
    """The Python module of a target.

    Raises:
        RequirementError: it is not installed, or too old.
    """
    try:
        module = importlib.import_module(MODULES[target])
    except ImportError as error:
        raise RequirementError(
            f"target {target} needs the Python module '{MODULES[target]}': {error}",
            f"Install it: {install_hint(MODULES[target])}.",
        ) from error
    if target == "tensorrt" and version(module) < _OLDEST:
        raise RequirementError(
            f"TensorRT {module.__version__} is older than {_OLDEST[0]}.{_OLDEST[1]}",
            "Install TensorRT 10 or newer; 8.5 and 8.6 work, too.",
        )
    return module


def name_of(target: str) -> str:
    """The library as NVIDIA calls it."""
    return "TensorRT-RTX" if target == "tensorrt-rtx" else "TensorRT"


def version(module: ModuleType) -> tuple[int, int]:
    """Major and minor version of TensorRT or TensorRT-RTX."""
    return release(str(module.__version__))


def release(stated: str) -> tuple[int, int]:
    """Major and minor version of a stated one, as `8.5.3.1`."""
    major, minor = stated.split(".")[:2]
    return int(major), int(minor)


def is_strongly_typed(target: str, module: ModuleType) -> bool:
    """Whether precision is what the graph says, rather than builder flags."""
    return target == "tensorrt-rtx" or version(module)[0] >= 10
