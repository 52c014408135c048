"""Every failure a user can meet: what happened, where, and what to do next.

Each kind has one exit code, the same in every command. The table in README.md lists them and a
test keeps the two equal.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pydantic import ValidationError

_MOST_CHARACTERS = 300
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def one_line(error: BaseException | str) -> str:
    """An error's text on one line of at most 300 characters, without terminal codes."""
    text = " ".join(_TERMINAL_CODES.sub("", str(error)).split())
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."


def described(error: BaseException) -> str:
    """An error's type and text on one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def first_problem(error: ValidationError) -> str:
    """Where the first thing that pydantic found stands, and the rule that it breaks, on one line."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the document"
    return f"{one_line(where)}: {one_line(first['msg'].removeprefix('Value error, '))}"


class GpuoptError(Exception):
    """A failure with a message for the user.

    Args:
        message: what happened and where, one line, no trailing full stop.
        hint: what to do next, at most two lines.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "internal"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = ""
        """Traceback of the process that failed, for `--debug`."""

    def lines(self) -> str:
        """The error as stderr shows it: three lines at most."""
        message = " ".join(self.message.split())
        return "\n".join([f"gpuopt: {self.kind} error: {message}", *self.hint.splitlines()][:3])


class UsageError(GpuoptError):
    """A flag, a recipe key or a combination of them is wrong."""

    exit_code = 2
    kind = "usage"


class ModelError(GpuoptError):
    """The model cannot be read: truncated, of an unknown kind, or not trusted to run code."""

    exit_code = 3
    kind = "model"


class DataError(GpuoptError):
    """Calibration or input data is missing, of the wrong shape or dtype, or holds NaN."""

    exit_code = 4
    kind = "data"


class ExportError(GpuoptError):
    """No exporter turned the model into an ONNX graph that computes the same."""

    exit_code = 5
    kind = "export"


class QuantizationError(GpuoptError):
    """The graph could not be calibrated, quantized or cast."""

    exit_code = 6
    kind = "quantization"


class BuildError(GpuoptError):
    """A backend refused to build the engine."""

    exit_code = 7
    kind = "build"


class AccuracyError(GpuoptError):
    """The deployed model is too far from PyTorch's outputs."""

    exit_code = 8
    kind = "accuracy"


class RequirementError(GpuoptError):
    """A package, a driver or a GPU that the request needs is not there."""

    exit_code = 9
    kind = "environment"


class StorageError(GpuoptError):
    """A file or folder cannot be read or written: permissions, a full disk, a damaged bundle."""

    exit_code = 10
    kind = "storage"


class EngineError(GpuoptError):
    """A serialized engine is not what its record says, or was built for another TensorRT, GPU or driver."""

    exit_code = 11
    kind = "engine"


class PrecisionError(GpuoptError):
    """The engine runs less of its work in the asked-for precision than was demanded, or cannot be run to show it."""

    exit_code = 12
    kind = "precision"


class SpeedError(GpuoptError):
    """INT8 was demanded and is slower than FP16, an engine misses a limit of latency or throughput, or no batching
    settings hold a load within its target."""

    exit_code = 13
    kind = "speed"


class ResourceError(GpuoptError):
    """The engine is larger, takes more device memory or took longer to build than the gates allow."""

    exit_code = 14
    kind = "resources"


class RegressionError(GpuoptError):
    """`gpuopt compare`: the new release is worse than the old one."""

    exit_code = 15
    kind = "regression"


class ComparisonError(GpuoptError):
    """`gpuopt compare`: the two cannot be compared: another GPU, TensorRT or way of measuring."""

    exit_code = 16
    kind = "comparison"


class SignatureError(GpuoptError):
    """A bundle's signature is missing, damaged, or of another key."""

    exit_code = 17
    kind = "signature"


class TimeLimitError(GpuoptError):
    """The command took longer than `--timeout` lets it."""

    exit_code = 18
    kind = "timeout"


class ConfigurationError(GpuoptError):
    """A Triton model configuration is not one, breaks a rule of Triton's, or disagrees with its engine."""

    exit_code = 19
    kind = "configuration"


class ReductionError(GpuoptError):
    """`gpuopt reduce`: nothing fails here, or differs, or the time was too short to tell."""

    exit_code = 20
    kind = "reduction"


INTERRUPTED_EXIT_CODE = 130

KINDS: tuple[type[GpuoptError], ...] = (
    GpuoptError,
    UsageError,
    ModelError,
    DataError,
    ExportError,
    QuantizationError,
    BuildError,
    AccuracyError,
    RequirementError,
    StorageError,
    EngineError,
    PrecisionError,
    SpeedError,
    ResourceError,
    RegressionError,
    ComparisonError,
    SignatureError,
    TimeLimitError,
    ConfigurationError,
    ReductionError,
)


def defect(error: BaseException, where: str = "") -> GpuoptError:
    """An error that nobody foresaw, in words for the user."""
    return GpuoptError(
        f"{where}{described(error)}",
        "This is a defect of gpuopt. Run 'gpuopt --debug ...' for the traceback and report it.",
    )
