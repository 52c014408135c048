"""What the library says: kept instead of printed, in one logger a process.

TensorRT keeps the first logger that it is given and uses it for whatever comes later, so that one has to outlive
everything.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

_MOST_MESSAGES = 200

_logs: dict[str, Any] = {}


def library_log(trt: ModuleType) -> Any:
    """The process's logger for a library: `messages` by level (ERROR, WARNING, NOTED); `clear()` forgets them."""
    if trt.__name__ not in _logs:
        _logs[trt.__name__] = _make(trt)
    return _logs[trt.__name__]


def last_words(log: Any) -> str:
    """The last error as one line."""
    lines = log.messages["ERROR"]
    return " ".join(lines[-1].split())[:300] if lines else "no reason given"


def _make(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: dict[str, list[str]] = {}
            self.clear()

        def clear(self) -> None:
            self.messages = {"ERROR": [], "WARNING": [], "NOTED": []}

        def log(self, severity: Any, message: str) -> None:
            try:
                level = {"INTERNAL_ERROR": "ERROR"}.get(severity.name, severity.name)
                kept = self.messages.get(level)
                if kept is None and "timing cache" in message:
                    kept = self.messages["NOTED"]
                if kept is not None and len(kept) < _MOST_MESSAGES:
                    kept.append(str(message).strip())
            except Exception:  # noqa: S110 - an exception here would pass through C++ and abort
                pass

    return Log()
