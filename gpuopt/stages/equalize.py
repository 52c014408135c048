"""Channels of neighbouring layers made even before INT8, where held-out samples show that it helps."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from gpuopt import onnx_model, reference
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration.collectors import RangeCollector
from gpuopt.calibration.held_out import Split, open_split
from gpuopt.calibration.run import RunOptions, calibrate
from gpuopt.comparison import SAME, first_difference
from gpuopt.errors import described
from gpuopt.quantization import equalization, measurement, placement, qdq
from gpuopt.quantization.equalization import Equalized, Site
from gpuopt.quantization.measurement import Sqnr
from gpuopt.recipe import Recipe
from gpuopt.stages.context import StageContext

LEAST_GAIN_DB = 0.2
"""SQNR that a method has to gain on held-out samples before `auto` takes it."""

_ALPHAS = (0.5, 0.25, 0.75)


@dataclass(frozen=True)
class _Choice:
    """What came of it; without `equalized` the graph stays as it is, and the facts hold the `reason`."""

    facts: dict[str, Any]
    equalized: Equalized | None = None


def run(context: StageContext) -> StageOutcome:
    """Make `onnx`, equalised or as it came, and `float_onnx`: the same graph, for comparing with after INT8.

    `auto` takes the method that gains most on held-out samples, and only if it gains `LEAST_GAIN_DB`; a method that
    was asked for is applied in any case. Either way the FP32 graph has to compute what the original model does.

    Raises:
        DataError: there are no samples, or they do not fit the model; `auto` leaves that to the calibration.
    """
    asked = context.recipe.quantize.equalize
    model = onnx_model.load(context.folder("onnx"))
    choice = _choose(model, context)
    folder = context.made("onnx")
    warnings = []
    if choice.equalized is not None:
        difference = _misses(choice.equalized.model, folder, context)
        if difference:
            warnings.append(f"the graph was not equalised: {difference}")
            choice = _Choice({**choice.facts, "reason": f"the FP32 graph would change: {difference}"})
    if choice.equalized is None:
        shutil.copytree(context.folder("onnx"), folder, dirs_exist_ok=True)
    kept = context.made("float_onnx")
    for file in folder.iterdir():
        _link(file, kept / file.name)
    applied = choice.equalized is not None
    before, after = choice.facts.get("sqnr_db_before"), choice.facts.get("sqnr_db_after")
    if applied and before is not None and after is not None and after < before:
        warnings.append(
            f"quantize.equalize {asked} lowers the SQNR on held-out samples from {before} to {after} dB; "
            "auto would not do it"
        )
    facts = {"asked": asked, **choice.facts, "applied": applied}
    facts["changed_nodes"] = list(choice.equalized.producers) if choice.equalized else []
    return StageOutcome(facts, tuple(warnings))


def _choose(model: onnx.ModelProto, context: StageContext) -> _Choice:
    asked = context.recipe.quantize.equalize
    if asked == "off":
        return _Choice({"reason": "quantize.equalize is off"})
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return _Choice({"reason": "the graph holds Q/DQ already"})
    if asked == "auto" and context.recipe.calibrate.ranges is not None:
        return _Choice({"reason": "the ranges come from a file, and are those of the graph as it is"})
    sites = equalization.find_sites(model)
    if asked == "cross-layer":
        sites = [site for site in sites if site.linear]
    if not sites:
        return _Choice({"sites": 0, "reason": "no two layers between which a factor for each channel could move"})
    try:
        return _measured(model, sites, context)
    except Exception as error:
        if asked != "auto":
            raise
        # Calibration and quantization meet the same data and the same graph, and are the ones to fail.
        return _Choice({"sites": len(sites), "reason": f"it could not be measured: {described(error)}"})


def _measured(model: onnx.ModelProto, sites: list[Site], context: StageContext) -> _Choice:
    settings = context.recipe.quantize
    methods = _methods(sites, context.recipe)
    split = open_split(context, onnx_model.input_specs(model), len(methods) + 2)
    facts: dict[str, Any] = {"sites": len(sites), "samples": split.count, "held_out": split.held_out_count}
    if settings.equalize == "auto" and not split.enough:
        return _Choice({**facts, "reason": split.too_few})
    trial = _Trial(context, split)
    before = trial.sqnr(model)
    if settings.equalize == "auto" and before is None:
        return _Choice({**facts, "reason": "nothing can be quantized, or no output shows the error"})
    maxima = trial.maxima(model, sites) if any(method == "smooth" for method, _ in methods) else {}
    best: tuple[tuple[bool, float], dict[str, Any], Equalized] | None = None
    tried = []
    for method, alpha in methods:
        if method == "cross-layer":
            equalized = equalization.cross_layer(model, sites)
        else:
            equalized = equalization.smooth(model, sites, maxima, alpha, settings.per_channel)
        after = trial.sqnr(equalized.model)
        row: dict[str, Any] = {
            "method": method,
            "alpha": alpha if method == "smooth" else None,
            "sqnr_db_after": _rounded(after),
        }
        tried.append(row)
        gain = 0.0 if after is None or before is None else after.gain_over(before)
        pays = after is not None and before is not None and after.pays_over(before, LEAST_GAIN_DB)
        if best is None or (pays, gain) > best[0]:
            best = ((pays, gain), row, equalized)
        if method == "smooth" and alpha == _ALPHAS[0] and gain < LEAST_GAIN_DB / 2:
            # A better alpha may lie beside the usual one, but hardly where that one is of no use.
            break
    assert best is not None, "there is a method to try where there are sites"
    (pays, _), row, equalized = best
    facts.update(sqnr_db_before=_rounded(before), tried=tried)
    if settings.equalize == "auto" and not pays:
        reason = f"nothing gains {LEAST_GAIN_DB} dB on {split.held_out_count} held-out samples beyond chance"
        return _Choice({**facts, "reason": reason})
    if not equalized.producers:
        return _Choice({**facts, "reason": "the channels are even already"})
    equalization.set_mark(equalized.model, row["method"], row["alpha"])
    return _Choice({**facts, **row}, equalized)


def _methods(sites: list[Site], recipe: Recipe) -> list[tuple[str, float]]:
    """The methods to try, each with its alpha."""
    settings = recipe.quantize
    cross_layer = [("cross-layer", 0.0)] if any(site.linear for site in sites) else []
    if settings.equalize == "cross-layer":
        return cross_layer
    alphas = _ALPHAS if settings.equalize == "auto" else _ALPHAS[:1]
    if settings.smooth_alpha is not None:
        alphas = (settings.smooth_alpha,)
    smooth = [("smooth", alpha) for alpha in alphas]
    return cross_layer + smooth if settings.equalize == "auto" else smooth


@dataclass(frozen=True)
class _Trial:
    """Quantizes a graph as the stages to come will, by one half of the samples, and compares on the other."""

    context: StageContext
    split: Split

    @functools.cached_property
    def exact(self) -> measurement.ExactOutputs:
        """What the graph gives as it came."""
        return measurement.ExactOutputs(Session(self.context.folder("onnx") / ONNX_FILE))

    def sqnr(self, model: onnx.ModelProto) -> Sqnr | None:
        """SQNR of a graph's INT8 form against the original; None if nothing is quantized, or samples are too few."""
        settings, how = self.context.recipe.quantize, self.context.recipe.calibrate
        if not self.split.enough:
            return None
        fp16 = self.context.recipe.has_fp16_scales
        known = onnx_model.float_tensors(model)
        wanted = placement.candidate_tensors(model, settings.format == "qoperator", settings.min_channels)
        tensors = [name for name in wanted if name in known]
        with tempfile.TemporaryDirectory(dir=self.context.output) as scratch:
            method = "minmax" if how.method == "auto" else how.method
            collector = RangeCollector(method, how.percentile, values_per_slice=how.values)
            options = RunOptions(max_memory=how.max_memory)
            watched = Path(scratch) / "watched"
            found = calibrate(model, tensors, self.split.chosen_by(), collector, watched, options).ranges
            decisions = placement.place(model, settings, found, fp16)
            if not any(decision.quantized for decision in decisions):
                return None
            runtime = qdq.quantize(model, settings, decisions, found, fp16).runtime
            quantized = Session(onnx_model.save(runtime, Path(scratch) / "quantized"))
        return measurement.sqnr(self.exact, quantized, self.split.held_out())

    def maxima(self, model: onnx.ModelProto, sites: list[Site]) -> dict[str, measurement.Reals]:
        """The largest |x| of every channel that enters a site's readers."""
        axes = {reader.tensor: reader.axis for site in sites for reader in site.readers}
        samples = self.split.chosen_by() if self.split.enough else self.split.samples
        with tempfile.TemporaryDirectory(dir=self.context.output) as scratch:
            return measurement.channel_maxima(model, axes, samples, Path(scratch) / "watched")


def _misses(model: onnx.ModelProto, folder: Path, context: StageContext) -> str:
    """Write the equalised graph; if it does not compute what the original does, remove it and say where."""
    onnx_model.save(model, folder)
    difference = first_difference(Session(folder / ONNX_FILE), reference.load(context.folder("reference")), SAME)
    if difference:
        for written in folder.iterdir():
            written.unlink()
    return difference


def _link(file: Path, copy: Path) -> None:
    """The same bytes under a second name, without a second copy where the file system can."""
    try:
        os.link(file, copy)
    except OSError:
        shutil.copyfile(file, copy)


def _rounded(value: Sqnr | None) -> float | None:
    return None if value is None else round(value.db, 2)
