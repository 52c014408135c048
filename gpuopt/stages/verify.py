"""The deployed ONNX against the original model's outputs, at every corner, batch by batch."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpuopt import reference
from gpuopt.artifact import ENGINE_ONNX_FILE, ONNX_FILE, StageOutcome
from gpuopt.comparison import SAME, against_reference, batch_invariance
from gpuopt.recipe import Precision, VerifySection
from gpuopt.reference import Reference
from gpuopt.stages.context import StageContext
from gpuopt.storage import write_json
from gpuopt.tolerance import Limits, problem

VERIFICATION_FILE = "verification.json"
LIMITS: Mapping[Precision, Limits] = {
    "fp32": SAME,
    "fp16": Limits(min_cosine=0.999, min_sqnr_db=30.0, min_agreement=0.99),
    "int8": Limits(min_cosine=0.95, min_sqnr_db=10.0, min_agreement=0.9),
}
"""What every output has to reach, by the precision asked for."""

_HOW_TO_OPEN = "on the CPU open it with InferenceSession(..., disabled_optimizers=[NAME])"
BATCH_TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "int8": 5e-2}


def run(context: StageContext) -> StageOutcome:
    """Make `verification`: verdict and figures. A failed verdict is a result; what follows from it is the caller's."""
    stored = reference.load(context.folder("reference"))
    graphs = {ONNX_FILE: context.folder("onnx") / ONNX_FILE}
    if "engine_onnx" in context.artifacts:
        graphs[ENGINE_ONNX_FILE] = context.folder("engine_onnx") / ONNX_FILE
    result = check(graphs, stored, context.recipe.verify, context.recipe.graph_precision)
    write_json(context.made("verification") / VERIFICATION_FILE, result)
    return StageOutcome(result, tuple(result["warnings"]))


def limits_of(settings: VerifySection, precision: Precision) -> Limits:
    """What every output has to reach: the recipe's limits, and those of the precision where it has none."""
    standard = LIMITS[precision]
    return Limits(
        min_cosine=settings.min_cosine if settings.min_cosine is not None else standard.min_cosine,
        min_sqnr_db=settings.min_sqnr_db if settings.min_sqnr_db is not None else standard.min_sqnr_db,
        min_agreement=standard.min_agreement,
    )


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
        equal values) for others, `max_abs_error`; then `batch_invariance`, and `layout_kernels`: of `model.onnx`, how
        many nodes ONNX Runtime runs in a layout of its own on this CPU.

    Raises:
        BuildError, QuantizationError: ONNX Runtime refuses the model or fails on a corner's inputs.
    """
    # Engines are proved with the limits of this module, without ONNX Runtime.
    from gpuopt.backends.onnxruntime import Session, layout_kernels, optimizers_to_disable

    limits = limits_of(settings, precision)
    tolerance = BATCH_TOLERANCE[precision]
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    warnings: list[str] = []
    invariance: dict[str, dict[str, Any]] = {}
    kernels: dict[str, dict[str, int]] = {}
    for graph, path in graphs.items():
        disabled = optimizers_to_disable(path) if graph == ONNX_FILE else ()
        warnings.extend(f"{graph} makes ONNX Runtime crash in {name}: {_HOW_TO_OPEN}" for name in disabled)
        if graph == ONNX_FILE:
            with tempfile.TemporaryDirectory(prefix="gpuopt-verify-") as scratch:
                optimized = Path(scratch) / ONNX_FILE
                session = Session(path, disabled=disabled, optimized=optimized)
                kernels[graph] = asdict(layout_kernels(optimized))
        else:
            session = Session(path, optimization="none")
        for figures in against_reference(session, stored):
            rows.append({"graph": graph, **figures})
            if found := problem(figures, limits):
                failures.append(f"{graph}, output '{figures['output']}' at {figures['corner']}: {found}")
        if settings.batch_invariance:
            invariance[graph] = batch_invariance(
                session, stored, tolerance, limits.min_agreement, is_coarse=precision == "int8"
            )
            failures += [f"{graph}, {failure}" for failure in invariance[graph].get("failures", [])]
    return {
        "runtime": "onnxruntime",
        "reference": stored.origin,
        "passed": not failures,
        "failures": failures,
        "limits": {**asdict(limits), "batch_tolerance": tolerance},
        "outputs": rows,
        "batch_invariance": invariance,
        "layout_kernels": kernels,
        "warnings": warnings,
    }
