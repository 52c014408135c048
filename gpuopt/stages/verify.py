"""The deployed ONNX against the original model's outputs, at every corner, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpuopt import reference
from gpuopt.artifact import ENGINE_ONNX_FILE, ONNX_FILE, StageOutcome
from gpuopt.backends.onnxruntime import Session, optimizers_to_disable
from gpuopt.recipe import Precision, VerifySection
from gpuopt.reference import Array, Reference
from gpuopt.stages.context import StageContext
from gpuopt.storage import write_json

VERIFICATION_FILE = "verification.json"
MIN_COSINE: Mapping[Precision, float] = {"fp32": 0.99999, "fp16": 0.999, "int8": 0.95}
"""Smallest cosine similarity a floating-point output may have, by the precision asked for."""

_HOW_TO_OPEN = "on the CPU open it with InferenceSession(..., disabled_optimizers=[NAME])"
_MIN_AGREEMENT: Mapping[Precision, float] = {"fp32": 0.999, "fp16": 0.99, "int8": 0.9}
_BATCH_TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "int8": 5e-2}


def run(context: StageContext) -> StageOutcome:
    """Make `verification`: verdict and figures. A failed verdict is a result; what follows from it is the caller's."""
    stored = reference.load(context.folder("reference"))
    graphs = {ONNX_FILE: context.folder("onnx") / ONNX_FILE}
    if "engine_onnx" in context.artifacts:
        graphs[ENGINE_ONNX_FILE] = context.folder("engine_onnx") / ONNX_FILE
    result = check(graphs, stored, context.recipe.verify, context.recipe.precision)
    write_json(context.made("verification") / VERIFICATION_FILE, result)
    return StageOutcome(result, tuple(result["warnings"]))


def check(
    graphs: Mapping[str, Path], stored: Reference, settings: VerifySection, precision: Precision
) -> dict[str, Any]:
    """Run ONNX graphs in ONNX Runtime at every corner.

    `model.onnx` runs as its users run it, optimized. `engine.onnx` runs node by node, so that its
    figures are those of the graph as written, which TensorRT gets.

    Args:
        graphs: path of each graph by its name in the bundle.

    Returns:
        `passed`, `failures` and `warnings` (one line each), `limits`, and for every graph, corner and
        output: `cosine` and `sqnr_db` (signal over error power, dB) for floating-point outputs, `agreement` (share of
        equal values) for others, `max_abs_error`; then `batch_invariance`.

    Raises:
        BuildError, QuantizationError: ONNX Runtime refuses the model or fails on a corner's inputs.
    """
    minimum = settings.min_cosine if settings.min_cosine is not None else MIN_COSINE[precision]
    limits = {
        "min_cosine": minimum,
        "min_agreement": _MIN_AGREEMENT[precision],
        "min_sqnr_db": settings.min_sqnr_db,
        "batch_tolerance": _BATCH_TOLERANCE[precision],
    }
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    warnings: list[str] = []
    invariance: dict[str, dict[str, Any]] = {}
    for graph, path in graphs.items():
        disabled = optimizers_to_disable(path) if graph == ONNX_FILE else ()
        warnings.extend(f"{graph} makes ONNX Runtime crash in {name}: {_HOW_TO_OPEN}" for name in disabled)
        session = Session(path, disabled=disabled, optimization="all" if graph == ONNX_FILE else "none")
        for corner in stored.corners:
            actual = session.run(stored.feed(corner))
            for name, expected in stored.expected(corner).items():
                row = {"graph": graph, "corner": corner.name, "output": name, **compare(actual[name], expected)}
                rows.append(row)
                if problem := _problem(row, limits):
                    failures.append(f"{graph}, output '{name}' at {corner.name}: {problem}")
        if settings.batch_invariance:
            invariance[graph] = _batch_invariance(session, stored, limits)
            failures += [f"{graph}, {failure}" for failure in invariance[graph].get("failures", [])]
    return {
        "runtime": "onnxruntime",
        "reference": stored.origin,
        "passed": not failures,
        "failures": failures,
        "limits": limits,
        "outputs": rows,
        "batch_invariance": invariance,
        "warnings": warnings,
    }


def compare(actual: Array, expected: Array) -> dict[str, Any]:
    """Figures of one output: finite, shape_equal, cosine, sqnr_db, agreement, max_abs_error; None where undefined.

    SQNR is 10 log10(sum expected^2 / sum (actual - expected)^2); an exact result has none (None).
    """
    figures: dict[str, Any] = {
        "shape": list(actual.shape),
        "shape_equal": actual.shape == expected.shape,
        "finite": True,
        "cosine": None,
        "sqnr_db": None,
        "agreement": None,
        "max_abs_error": None,
    }
    if actual.shape != expected.shape:
        return figures
    if expected.dtype.kind != "f":
        figures["agreement"] = float(np.mean(actual == expected)) if expected.size else 1.0
        return figures
    got, want = actual.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    usable = np.isfinite(got) & np.isfinite(want)
    figures["finite"] = bool(np.array_equal(got[~usable], want[~usable], equal_nan=True))
    got, want = got[usable], want[usable]
    figures["max_abs_error"] = float(np.max(np.abs(got - want), initial=0.0))
    # The other figures do not depend on the unit, and squares of very large or small numbers would leave float64.
    unit = float(max(np.max(np.abs(got), initial=0.0), np.max(np.abs(want), initial=0.0))) or 1.0
    got, want = got / unit, want / unit
    error = float(np.sum((got - want) ** 2))
    power = float(np.sum(want**2))
    norm = math.sqrt(power) * float(np.linalg.norm(got))
    if norm > 0:
        figures["cosine"] = min(1.0, float(got @ want) / norm)
    elif error == 0:
        figures["cosine"] = 1.0
    else:
        figures["cosine"] = 0.0
    if error > 0 and power > 0:
        figures["sqnr_db"] = 10 * math.log10(power / error)
    return figures


def _problem(row: Mapping[str, Any], limits: Mapping[str, Any]) -> str:
    if not row["shape_equal"]:
        return f"has the shape {row['shape']}, the reference another"
    if not row["finite"]:
        return "has NaN or infinity in other places than the reference"
    if row["cosine"] is not None and row["cosine"] < limits["min_cosine"]:
        return f"cosine {row['cosine']:.5f} is below {limits['min_cosine']}"
    if limits["min_sqnr_db"] is not None and row["sqnr_db"] is not None and row["sqnr_db"] < limits["min_sqnr_db"]:
        return f"SQNR {row['sqnr_db']:.1f} dB is below {limits['min_sqnr_db']} dB"
    if row["agreement"] is not None and row["agreement"] < limits["min_agreement"]:
        return f"only {row['agreement']:.1%} of the values agree"
    return ""


def _batch_invariance(session: Session, stored: Reference, limits: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a sample's outputs depend on the samples beside it, where the original's do not."""
    name = reference.largest_batch(stored.corners, stored.profiles)
    if name is None:
        return {"checked": False, "reason": "the batch is fixed"}
    if not stored.batched_outputs:
        return {"checked": False, "reason": f"in {stored.origin} too, outputs depend on the whole batch"}
    corner = next(c for c in stored.corners if c.name == name)
    feed = stored.feed(corner)
    together = session.run(feed)
    worst, failures = 0.0, list[str]()
    batch = next(iter(feed.values())).shape[0]
    for row in reference.rows_to_check(batch):
        alone = session.run(reference.row_of(feed, row))
        for output in stored.batched_outputs:
            in_batch = together[output][row : row + 1].astype(np.float64)
            scale = max(float(np.max(np.abs(in_batch), initial=0.0)), 1e-12)
            error = float(np.max(np.abs(alone[output].astype(np.float64) - in_batch), initial=0.0)) / scale
            worst = max(worst, error)
            if not error <= limits["batch_tolerance"]:
                failures.append(
                    f"output '{output}': row {row} of a batch of {batch} differs from the row alone by {error:.1e}"
                )
    return {"checked": True, "batch": batch, "worst_relative_error": worst, "failures": failures}
