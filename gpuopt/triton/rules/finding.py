"""What a rule is asked about, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpuopt.triton.schema import ModelConfig
from gpuopt.triton.served import Served


@dataclass(frozen=True)
class Subject:
    """A configuration and what it is compared with.

    Attributes:
        served: the model as the bundle has it; None for an ensemble.
        folder: the model's folder in its repository; None: the configuration lies alone, and no file is looked for.
    """

    config: ModelConfig
    served: Served | None
    folder: Path | None

    @property
    def backend(self) -> str:
        """The backend that Triton chooses: by `backend`, `platform` or the file's name."""
        by_platform = {
            "tensorrt_plan": "tensorrt",
            "onnxruntime_onnx": "onnxruntime",
            "pytorch_libtorch": "pytorch",
            "pytorch": "pytorch",
        }
        by_file = {"model.plan": "tensorrt", "model.onnx": "onnxruntime", "model.pt": "pytorch"}
        return str(
            self.config.backend
            or by_platform.get(self.config.platform)
            or by_file.get(self.config.default_model_filename)
            or ("" if self.config.platform or self.served is None else self.served.backend)
        )

    @property
    def batched(self) -> bool:
        """Whether Triton adds a batch dimension to every `dims`."""
        return bool(self.config.max_batch_size > 0)


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Attributes:
        severity: `error`: Triton refuses to load it, or requests fail; `warning`: it loads and does less than it seems.
        field: of the configuration.
        message: what stands there and what the engine or the rule has.
        fix: what to write.
    """

    rule: str
    severity: Literal["error", "warning"]
    field: str
    message: str
    fix: str

    def lines(self) -> list[str]:
        """Three lines at most."""
        return [f"{self.severity} {self.field}: {self.message}", f"  {self.fix}"]


Rule = Callable[[Subject], Iterator[Finding]]


def error(rule: str, field: str, message: str, fix: str) -> Finding:
    return Finding(rule, "error", field, message, fix)


def warning(rule: str, field: str, message: str, fix: str) -> Finding:
    return Finding(rule, "warning", field, message, fix)
