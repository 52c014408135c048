"""Which precision ships: engines of several are built, proved and timed in turn, and the fastest that holds is kept.

Nodes that INT8 makes slower go back to FP16 in a further candidate, `mixed`. Where two candidates are equally fast the
more precise one wins: INT8 has to pay for what it costs.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuopt import environment
from gpuopt.artifact import Artifact
from gpuopt.bench.measuring import Race
from gpuopt.bench.statistics import Ratio
from gpuopt.cache import Cache
from gpuopt.errors import (
    AccuracyError,
    BuildError,
    GpuoptError,
    PrecisionError,
    QuantizationError,
    RequirementError,
    SpeedError,
    UsageError,
)
from gpuopt.pipeline import Runner, builds_engine, own_version, why_not_run
from gpuopt.progress import Progress
from gpuopt.recipe import Recipe, resolve
from gpuopt.stages.context import StageContext
from gpuopt.worker import Worker

PRECISE_FIRST = ("fp32", "fp16", "mixed", "int8")
OUT_OF_THE_RACE = (AccuracyError, BuildError, PrecisionError, QuantizationError)
_SLOWER = 1.05
"""A node goes back to FP16 where its layers take longer by so much: below it timings of single layers are noise."""


@dataclass
class Candidate:
    """One precision.

    Attributes:
        error: why it is out of the race; None if it is in.
    """

    name: str
    recipe: Recipe
    runner: Runner
    error: GpuoptError | None = None
    excluded: tuple[str, ...] = ()


@dataclass
class Choice:
    """What came of the race.

    Attributes:
        winner: None if every candidate failed.
        table: for the report; JSON values.
        error: what the run ends in; None if it passed. Of several failed candidates that of the first.
        out: for the report, a line for every candidate where all failed; what the winner was not held to.
    """

    winner: Candidate | None
    table: dict[str, Any] = field(default_factory=dict)
    error: GpuoptError | None = None
    out: tuple[str, ...] = ()


Verdict = Callable[[Runner], GpuoptError | None]


@dataclass(frozen=True)
class Contest:
    """Everything that stays the same for all candidates.

    Attributes:
        run_name: what the cache remembers the last run by.
        verdict: what is wrong with a finished run.
        runners: of the candidates so far, also of one that a failure ended.
    """

    recipe: Recipe
    cache: Cache
    progress: Progress
    run_name: str
    verdict: Verdict
    explain: bool = False
    runners: list[Runner] = field(default_factory=list)

    def choose(self) -> Choice:
        """Build FP32, FP16, INT8 and, where INT8 costs time somewhere, the mixed engine; keep the fastest that holds.

        Raises:
            RequirementError: no target's engines can be run here.
            GpuoptError: what makes every candidate fail: the model, its data, its export.
        """
        target = measured_target(self.recipe)
        candidates = {name: self._made(name, with_precision(self.recipe, name)) for name in ("fp32", "fp16", "int8")}
        if self.recipe.speed.mixed and target != "onnxruntime":
            slow = self._slow_nodes(candidates, target)
            if slow:
                candidates["mixed"] = self._mixed(slow)
        choice = self._decide(candidates, target)
        if choice.winner is not None and (said := beyond_budget(self.recipe, choice.winner.name)):
            self.progress.warn(said)
            choice.out = (*choice.out, said)
        return choice

    def check(self, int8: Runner) -> Choice:
        """Whether a finished INT8 run is as fast as FP16.

        Raises:
            GpuoptError: FP16 cannot be made at all.
        """
        target = measured_target(self.recipe)
        candidates = {
            "int8": Candidate("int8", self.recipe, int8),
            "fp16": self._made("fp16", with_precision(self.recipe, "fp16")),
        }
        choice = self._decide(candidates, target)
        choice.winner = candidates["int8"]
        choice.table["chosen"] = "int8"
        found = choice.table.get("ratio_to_fp16", {}).get("int8")
        choice.error = None
        if found is not None and found["low"] > 1:
            choice.error = SpeedError(
                f"INT8 takes {found['value']:.2f} times as long as FP16 on {_gpu(target)} "
                f"({_times(choice.table, 'int8')} against {_times(choice.table, 'fp16')} ms)",
                "Use --precision auto, which keeps the fastest; --set speed.check=false ships INT8 as it is.",
            )
        return choice

    def made(self, name: str, recipe: Recipe) -> tuple[Runner, GpuoptError | None]:
        """Run a candidate, all but its benchmark; the run, and why it is out of the race."""
        found = self._made(name, recipe)
        return found.runner, found.error

    def _made(self, name: str, recipe: Recipe, excluded: tuple[str, ...] = ()) -> Candidate:
        # Only what ships is benchmarked, once it is known.
        unmeasured = recipe.model_copy(update={"benchmark": recipe.benchmark.model_copy(update={"enabled": "off"})})
        runner = Runner(unmeasured, self.cache, self.progress, f"{self.run_name} {name}", self.explain)
        self.runners.append(runner)
        self.progress.line(f"precision {name}" if name in PRECISE_FIRST else name)
        error: GpuoptError | None = None
        try:
            runner.run()
            error = self.verdict(runner)
        except OUT_OF_THE_RACE as failure:
            error = failure
        if error is not None:
            self.progress.warn(_out(name, error))
        return Candidate(name, recipe, runner, error, excluded)

    def _mixed(self, slow: Sequence[str]) -> Candidate:
        recipe = with_precision(self.recipe, "int8")
        patterns = (*recipe.quantize.nodes_to_exclude, *map(glob.escape, slow))
        quantize = recipe.quantize.model_copy(update={"nodes_to_exclude": patterns})
        return self._made("mixed", recipe.model_copy(update={"quantize": quantize}), tuple(slow))

    def _slow_nodes(self, candidates: Mapping[str, Candidate], target: str) -> list[str]:
        if any(candidates[name].error is not None for name in ("int8", "fp16")):
            return []
        proofs = {name: facts_of(candidates[name].runner, "prove", target) for name in ("int8", "fp16")}
        quantized = facts_of(candidates["int8"].runner, "quantize").get("quantized", [])
        if not all(proofs.values()):
            return []
        return slower_nodes(proofs["int8"]["layers"], proofs["fp16"]["layers"], quantized)

    def _decide(self, candidates: Mapping[str, Candidate], target: str) -> Choice:
        running = {name: c for name, c in candidates.items() if c.error is None}
        if not running:
            errors = {name: c.error for name, c in candidates.items() if c.error is not None}
            return Choice(None, {}, next(iter(errors.values())), tuple(_out(name, e) for name, e in errors.items()))
        facts = time_in_turn(
            {name: candidate.runner for name, candidate in running.items()},
            target, self.recipe, self.cache, self.progress,
        )  # fmt: skip
        found = Race.from_facts(facts)
        best = fastest(found)
        ratios = {n: _json(found.ratio(n, "fp16")) for n in running if n != "fp16"} if "fp16" in running else {}
        rows = [_row(candidates[name], found, target) for name in PRECISE_FIRST if name in candidates]
        table = {
            "target": target,
            "shapes": facts["shapes"],
            "includes": facts["includes"],
            "candidates": rows,
            "ratio_to_fp16": ratios,
            "chosen": best,
        }
        return Choice(candidates[best], table)


def time_in_turn(
    running: Mapping[str, Runner], target: str, recipe: Recipe, cache: Cache, progress: Progress
) -> Mapping[str, Any]:
    """The race of finished runs' engines, or of their ONNX files for `onnxruntime`: facts of `stages/race.py`.

    Args:
        recipe: whose `speed` and `build` say how.
    """
    artifacts: dict[str, Artifact] = {}
    for name, runner in running.items():
        kind, owner = ("onnx", "") if target == "onnxruntime" else ("engine", target)
        made, stored = runner.artifact(kind, owner), runner.artifact("reference")
        if made is None or stored is None:
            raise GpuoptError(f"candidate {name} has no {kind}")
        artifacts[f"subject {name}"] = made
        artifacts.setdefault("reference", stored)
    parts = race_key(target, recipe.speed.seconds, artifacts)
    if entry := cache.lookup(parts):
        return entry.facts
    with progress.stage(f"race {target}"), cache.scratch() as scratch, Worker() as worker:
        staged = scratch / "result"
        staged.mkdir()
        restricted = recipe.restricted_to(("speed", "build.plugins", "build.version_compatible"))
        context = StageContext(restricted, artifacts, staged, progress, target=target)
        outcome, seconds = worker.run("race", context)
        record = {"facts": dict(outcome.facts), "warnings": [], "seconds": round(seconds, 3)}
        facts: Mapping[str, Any] = cache.store(parts, staged, record).facts
    shown = ", ".join(f"{name} {ms:.3f} ms" for name, ms in sorted(facts["milliseconds"].items()))
    progress.line(f"{'race ' + target:<22}{seconds:>6.1f} s   {shown}")
    return facts


def race_key(target: str, seconds: float, artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """Everything that decides what a race measures: files, GPU, driver, library, and how engines are launched."""
    devices = environment.gpus() if target != "onnxruntime" else []
    return {
        "stage": "race",
        "gpuopt": own_version(),
        "target": target,
        "gpu": _gpu(target),
        "driver": devices[0].driver_version if devices else "",
        "library": environment.library_version(target),
        "CUDA graphs": str(target != "onnxruntime" and environment.has_module("cuda.bindings")),
        "seconds": str(seconds),
        **{f"input.{kind}": artifact.sha256 for kind, artifact in artifacts.items()},
    }


def _out(name: str, error: GpuoptError) -> str:
    return f"{name} is out: {error.message}"


def with_precision(recipe: Recipe, precision: str) -> Recipe:
    """The recipe of one candidate; an accuracy budget is INT8's alone."""
    tree = recipe.model_dump(mode="json")
    tree["precision"] = precision
    if precision != "int8":
        tree["accuracy"] = {}
    return resolve(tree)


def beyond_budget(recipe: Recipe, winner: str) -> str:
    """What is to be told where the precision that ships was not held to the accuracy budget; empty if it was."""
    if recipe.accuracy.max_drop is None or winner != "fp16":
        return ""
    return (
        f"FP16 ships, and the accuracy budget of {recipe.accuracy.max_drop:g} is INT8's alone: FP16's outputs were "
        "compared with the original model's, its metric was not taken"
    )


def measured_target(recipe: Recipe) -> str:
    """The target whose engines are timed: the first that can run here; ONNX Runtime where no engine is asked for.

    Raises:
        RequirementError: engines are asked for and none can run here.
    """
    if not builds_engine(recipe):
        return "onnxruntime"
    if not recipe.build.enabled:
        raise UsageError("--precision auto times engines, and --no-build makes none", "Leave out one of the two.")
    reasons = {}
    for target in recipe.build.target:
        if target != "onnxruntime":
            reasons[target] = why_not_run(recipe, target)
            if not reasons[target]:
                return target
    target, reason = next(iter(reasons.items()))
    raise RequirementError(
        f"--precision auto times engines, and those of {target} cannot be run here: {reason}",
        "Run it on the machine that the engines are for, or with --target onnxruntime.",
    )


def can_check_speed(recipe: Recipe) -> bool:
    """Whether INT8's speed can be compared with FP16's: an engine is asked for that runs here."""
    engines = (target for target in recipe.build.target if target != "onnxruntime")
    return (
        recipe.build.enabled
        and recipe.speed.check
        and recipe.verify.enabled
        and any(not why_not_run(recipe, t) for t in engines)
    )


def fastest(found: Race, preferred: Sequence[str] = PRECISE_FIRST) -> str:
    """The fastest; where the difference is within the noise, the first of those in the order of preference."""
    names = [name for name in preferred if name in found.milliseconds]
    best = names[0]
    for name in names[1:]:
        ratio = found.ratio(name, best)
        if ratio.value < 1 and ratio.is_beyond_noise:
            best = name
    return best


def slower_nodes(
    int8: Sequence[Mapping[str, Any]], fp16: Sequence[Mapping[str, Any]], quantized: Sequence[str]
) -> list[str]:
    """Quantized nodes whose layers take longer in the INT8 engine than in the FP16 one.

    The two engines fuse nodes differently, so nodes that share a layer in either are compared together. A change of
    layout or an unfused Q or DQ counts for the layer that it is in front of.

    Args:
        int8, fp16: layer rows of the two engines' proofs.
        quantized: names of the quantized nodes.
    """
    wanted = set(quantized)
    group: dict[str, str] = {}

    def root(name: str) -> str:
        while group.setdefault(name, name) != name:
            name = group[name]
        return name

    spent = {"int8": dict[str, float](), "fp16": dict[str, float]()}
    for rows in (int8, fp16):
        for row in rows:
            names: Sequence[str] = row["onnx_nodes"] if row["computes"] else []
            for name in names[1:]:
                group[root(name)] = root(names[0])
    for precision, rows in (("int8", int8), ("fp16", fp16)):
        owner = {row["name"]: root(row["onnx_nodes"][0]) for row in rows if row["computes"] and row["onnx_nodes"]}
        for row in rows:
            at = owner.get(row["name"]) or _beside(row["name"], owner, group, root)
            if at is not None:
                spent[precision][at] = spent[precision].get(at, 0.0) + (row["milliseconds"] or 0.0)
    slow = {at for at, time in spent["int8"].items() if at in spent["fp16"] and time > _SLOWER * spent["fp16"][at]}
    return [name for name in quantized if name in wanted and name in group and root(name) in slow]


def _beside(name: str, owner: Mapping[str, str], group: Mapping[str, str], root: Callable[[str], str]) -> str | None:
    """The group that a layer between others belongs to."""
    if name.startswith("Reformatting CopyNode"):
        _, _, layer = name.partition(" to ")
        return owner.get(layer)
    if "QuantizeLinear" in name:
        # Named after the tensor, and that after the node that makes it.
        makers = [node for node in group if name.startswith(node)]
        return root(max(makers, key=len)) if makers else None
    return None


def facts_of(runner: Runner, stage: str, target: str = "") -> Mapping[str, Any]:
    """What a stage of a run said; empty if it did not run."""
    for result in runner.results:
        if result.step.stage.name == stage and result.step.target == target:
            return result.entry.facts
    return {}


def _row(candidate: Candidate, found: Race, target: str) -> dict[str, Any]:
    times = sorted(found.rounds.get(candidate.name, ()))
    checked = facts_of(candidate.runner, "prove", target) or facts_of(candidate.runner, "verify")
    sqnr = [row["sqnr_db"] for row in checked.get("outputs", []) if row["sqnr_db"] is not None]
    return {
        "name": candidate.name,
        "state": "out" if candidate.error is not None else "measured",
        "reason": candidate.error.message if candidate.error is not None else "",
        "milliseconds": found.milliseconds.get(candidate.name),
        "lowest": times[0] if times else None,
        "highest": times[-1] if times else None,
        "lowest_sqnr_db": min(sqnr) if sqnr else None,
        "back_in_fp16": list(candidate.excluded),
    }


def _json(ratio: Ratio) -> dict[str, float]:
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high}


def _gpu(target: str) -> str:
    devices = environment.gpus()
    return devices[0].name if devices and target != "onnxruntime" else "this machine's CPU"


def _times(table: Mapping[str, Any], name: str) -> str:
    return next(f"{row['milliseconds']:.3f}" for row in table["candidates"] if row["name"] == name)
