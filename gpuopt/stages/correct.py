"""The mean error of INT8 layers taken out of their biases, where held-out samples show that it helps."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpuopt import onnx_model
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration.held_out import open_split
from gpuopt.errors import described
from gpuopt.quantization import bias_correction, measurement
from gpuopt.quantization.measurement import Reals
from gpuopt.stages.context import StageContext

LEAST_GAIN_DB = 0.1
"""SQNR that the correction has to gain on held-out samples before `auto` takes it: it costs the engine nothing."""


def run(context: StageContext) -> StageOutcome:
    """Make `onnx` and, where there is one, `engine_onnx`: both with the same corrections, or both as they came."""
    asked = context.recipe.quantize.bias_correction
    facts: dict[str, Any] = {"asked": asked, "corrected_nodes": 0}
    shifts: Mapping[str, Reals] = {}
    try:
        shifts, more = _shifts(context)
        facts.update(more)
    except Exception as error:
        if asked == "on":
            raise
        facts["reason"] = f"it could not be measured: {described(error)}"
    for kind in ("onnx", "engine_onnx"):
        if kind not in context.artifacts:
            continue
        folder = context.made(kind)
        if shifts:
            onnx_model.save(bias_correction.correct(onnx_model.load(context.folder(kind)), shifts), folder)
        else:
            shutil.copytree(context.folder(kind), folder, dirs_exist_ok=True)
    facts["corrected_nodes"] = len(shifts)
    return StageOutcome(facts)


def _shifts(context: StageContext) -> tuple[Mapping[str, Reals], dict[str, Any]]:
    """The corrections by node name, empty if there is reason to leave the graph alone; and what was found."""
    asked = context.recipe.quantize.bias_correction
    exact = onnx_model.load(context.folder("float_onnx"))
    if any(node.op_type == "DequantizeLinear" for node in exact.graph.node):
        return {}, {"reason": "the model held Q/DQ before"}
    quantized = onnx_model.load(context.folder("onnx"))
    both = bias_correction.side_by_side(exact, quantized)
    if not both.pairs:
        return {}, {"reason": "no quantized node has weights"}
    split = open_split(context, onnx_model.input_specs(exact), 2)
    facts: dict[str, Any] = {"samples": split.count, "held_out": split.held_out_count}
    if asked == "auto" and not split.enough:
        return {}, {**facts, "reason": split.too_few}
    with tempfile.TemporaryDirectory(dir=context.output) as scratch:
        samples = split.chosen_by() if split.enough else split.samples
        means = measurement.mean_differences(both.model, both.pairs, samples, Path(scratch) / "both")
        shifts = bias_correction.corrections(means)
        shifts = {name: shift for name, shift in shifts.items() if np.any(shift)}
        if not shifts:
            return {}, {**facts, "reason": "no layer has a mean error beyond chance"}
        if not split.enough:
            return shifts, facts
        corrected = bias_correction.correct(quantized, shifts)
        outputs = measurement.ExactOutputs(Session(context.folder("float_onnx") / ONNX_FILE))
        session = Session(context.folder("onnx") / ONNX_FILE)
        before = measurement.sqnr(outputs, session, split.held_out())
        session = Session(onnx_model.save(corrected, Path(scratch) / "corrected"))
        after = measurement.sqnr(outputs, session, split.held_out())
    facts["sqnr_db_before"] = None if before is None else round(before.db, 2)
    facts["sqnr_db_corrected"] = None if after is None else round(after.db, 2)
    pays = before is not None and after is not None and after.pays_over(before, LEAST_GAIN_DB)
    if asked == "auto" and not pays:
        reason = f"it gains less than {LEAST_GAIN_DB} dB on {split.held_out_count} held-out samples, or by chance"
        return {}, {**facts, "reason": reason}
    return shifts, facts
