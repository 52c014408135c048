"""PyTorch and ONNX Runtime on the same model and shapes, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpuopt.bench.report import Row
from gpuopt.errors import UsageError, one_line
from gpuopt.interpreter import module_command
from gpuopt.progress import Progress
from gpuopt.shapes import Shape, batch_size

KINDS = (
    "onnxruntime cpu",
    "onnxruntime cuda nchw",
    "onnxruntime cuda nhwc",
    "onnxruntime cuda fp16 nchw",
    "onnxruntime cuda fp16 nhwc",
    "torch eager",
    "torch eager, nchw",
    "torch eager, CUDA stream",
    "torch.compile",
    "torch.compile, nchw",
)
_TIMEOUT_SECONDS = 600


def kinds(names: Sequence[str]) -> tuple[str, ...]:
    """The baselines whose names begin so; all without a name.

    Raises:
        UsageError: no baseline begins so.
    """
    for name in names:
        if not any(kind.startswith(name) for kind in KINDS):
            raise UsageError(f"there is no baseline '{name}'", f"Baselines: {'; '.join(KINDS)}. A beginning will do.")
    return tuple(kind for kind in KINDS if not names or any(kind.startswith(name) for name in names))


def rows(
    folder: Path,
    shapes: Mapping[str, Shape],
    seconds: float,
    python: Path | None,
    progress: Progress,
    wanted: Sequence[str] = KINDS,
) -> Iterator[Row]:
    """A row for every baseline: figures, or why there are none.

    Args:
        folder: a bundle.
        shapes: of the inputs.
        seconds: for each.
        python: the interpreter that has torch or onnxruntime-gpu; None: this one.
        wanted: of `KINDS`.
    """
    batch = batch_size(shapes)
    asked = {
        "folder": str(folder.resolve()),
        "seconds": seconds,
        "batch": batch,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
    }
    for kind in wanted:
        with progress.stage(f"bench {kind}"):
            answer = _ask({**asked, "kind": kind}, python)
        if "failed" in answer:
            yield Row(group="baselines", name=kind, batch=batch, includes="", failed=answer["failed"])
        else:
            for entry in answer["rows"]:
                yield Row.model_validate({"group": "baselines", "batch": batch, **entry})


def _ask(request: Mapping[str, Any], python: Path | None) -> dict[str, Any]:
    environment = dict(os.environ)
    if python is not None:
        # Another interpreter has packages of its own, and only gpuopt itself from here.
        environment["PYTHONPATH"] = str(Path(__file__).parent.parent.parent)
        for name in ("PYTHONHOME", "LD_PRELOAD", "LD_LIBRARY_PATH"):
            environment.pop(name, None)
    command = module_command("gpuopt.bench.baseline", python=python)
    try:
        done = subprocess.run(  # noqa: S603 - our own module, no shell
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=_TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"failed": one_line(error)}
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with code {done.returncode}"]
        return {"failed": one_line(last[0])}
    return dict(answer)
