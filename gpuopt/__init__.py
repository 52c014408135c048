"""gpuopt: from a PyTorch model to an inference engine that a release pipeline can trust."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpuopt.engine import Engine, load

__version__ = "0.1.0"
__all__ = ["Engine", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # numpy and the backends are loaded when an engine is, not by every command.
    if name in ("Engine", "load"):
        from gpuopt import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'gpuopt' has no attribute '{name}'")
