"""ONNX Runtime: open a session, run a feed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from gpuopt.errors import BuildError, QuantizationError

ort.set_default_logger_severity(3)


class Session:
    """An ONNX model ready to run.

    Args:
        model: path of the ONNX file (external data beside it).
        providers: execution providers, first choice first.
        optimize: whether ONNX Runtime may fuse nodes; off where every tensor must stay visible.

    Raises:
        BuildError: ONNX Runtime refuses the model.
    """

    def __init__(
        self, model: Path, providers: Sequence[str] = ("CPUExecutionProvider",), optimize: bool = True
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            self._session = ort.InferenceSession(str(model), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's errors share no base class below Exception
            raise BuildError(
                f"ONNX Runtime {ort.__version__} refuses {model.name}: {first_line(error)}",
                "Run with --debug for its full message.",
            ) from error
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def run(self, feed: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Outputs by name for one feed of numpy arrays.

        Raises:
            QuantizationError: the model fails on this feed.
        """
        names = list(outputs) if outputs is not None else list(self.output_names)
        try:
            values = self._session.run(names, {n: np.asarray(feed[n]) for n in self.input_names})
        except Exception as error:
            shapes = ", ".join(f"{n} {tuple(np.shape(v))}" for n, v in feed.items())
            raise QuantizationError(
                f"ONNX Runtime fails on the inputs {shapes}: {first_line(error)}",
                "Check that the shapes and value ranges are ones that the model takes.",
            ) from error
        return dict(zip(names, values, strict=True))


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
