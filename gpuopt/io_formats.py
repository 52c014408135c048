"""Memory formats of an engine's inputs and outputs, chosen by measurement: `build.io_formats: auto`.

A candidate gives one format to all inputs and outputs that can have it; dtypes stay what they are. What every candidate
shares is in the cache, so that each costs a build, a proof and its turn in the race. Linear stays unless another format
is faster beyond the noise: it costs the caller nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gpuopt.bench.measuring import Race
from gpuopt.cache import Cache
from gpuopt.errors import GpuoptError
from gpuopt.pipeline import Runner, builds_engine, why_not_run
from gpuopt.precision import facts_of, fastest, time_in_turn
from gpuopt.progress import Progress
from gpuopt.recipe import AUTO, Recipe
from gpuopt.shapes import TensorSpec

LINEAR = "linear"
_SHORT = {"float32": "fp32", "float16": "fp16", "int8": "int8", "uint8": "uint8"}
BY_FORMAT: Mapping[str, tuple[str, ...]] = {
    "hwc": ("float32", "uint8"),
    "hwc8": ("float16",),
    "chw4": ("int8",),
    "chw32": ("float32", "float16", "int8"),
}
"""The dtypes that TensorRT's builder takes in each format (asked of TensorRT-RTX 1.7's), and that images come in."""

Formats = Mapping[str, str]
Run = Callable[[str, Recipe], tuple[Runner, GpuoptError | None]]


@dataclass(frozen=True)
class FormatChoice:
    """What came of it.

    Attributes:
        recipe: with the formats that are kept.
        runner: of the engine that has them.
        table: for the report; JSON values.
    """

    recipe: Recipe
    runner: Runner
    table: dict[str, Any]


def asks_for_the_fastest(recipe: Recipe) -> bool:
    """Whether formats are to be measured."""
    return recipe.build.io_formats == AUTO


def with_formats(recipe: Recipe, formats: Formats) -> Recipe:
    """The recipe with these formats."""
    build = recipe.build.model_copy(update={"io_formats": dict(formats)})
    return recipe.model_copy(update={"build": build})


def as_shipped(recipe: Recipe, table: Mapping[str, Any] | None) -> Recipe:
    """The bundle's recipe: what was measured is decided, the rest is for 'gpuopt build' where the engine runs."""
    if table is None or table["candidates"]:
        return recipe
    build = recipe.build.model_copy(update={"io_formats": AUTO})
    return recipe.model_copy(update={"build": build})


def candidates(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], recipe: Recipe) -> dict[str, Formats]:
    """Formats by tensor, by the candidate's name; linear first.

    Args:
        inputs, outputs: of the deployed model. Those whose channels are last in the graph have no format: TensorRT's
            formats take the second dimension for the channels.
    """
    layout = recipe.layout
    fitting = [spec for spec in inputs if not layout.input_is_channels_last(spec.name)]
    fitting += [spec for spec in outputs if not layout.output_is_channels_last(spec.name)]
    found: dict[str, Formats] = {LINEAR: {}}
    for name, dtypes in BY_FORMAT.items():
        formats = {
            spec.name: f"{_SHORT[spec.dtype]}:{name}"
            for spec in fitting
            if len(spec.shape) == 4 and spec.dtype in dtypes
        }
        if formats:
            found[name] = formats
    return found


def why_not_measured(recipe: Recipe) -> str:
    """Why no format can be timed here; empty if it can."""
    if not builds_engine(recipe):
        return "no engine is asked for"
    if not recipe.build.enabled:
        return "no engine is built here"
    if not recipe.verify.enabled:
        return "no engine is run (verify.enabled is false)"
    return "" if _target(recipe) else next(why_not_run(recipe, t) for t in recipe.build.target if t != "onnxruntime")


def _target(recipe: Recipe) -> str:
    engines = (target for target in recipe.build.target if target != "onnxruntime")
    return next((target for target in engines if not why_not_run(recipe, target)), "")


def unmeasured(recipe: Recipe) -> dict[str, Any]:
    """The report's table where nothing could be measured."""
    return {
        "target": next((target for target in recipe.build.target if target != "onnxruntime"), ""),
        "shapes": {},
        "includes": "",
        "candidates": [],
        "chosen": LINEAR,
        "verdict": f"nothing could be measured here: {why_not_measured(recipe)}; inputs and outputs stay linear",
    }


def choose(linear: Runner, run: Run, cache: Cache, progress: Progress) -> FormatChoice:
    """Build, prove and time every candidate; keep the fastest.

    Args:
        linear: a finished run with linear inputs and outputs.
        run: makes a candidate of a name and a recipe: its run, and why it is out of the race.

    Raises:
        GpuoptError: of the race itself.
    """
    from gpuopt import reference

    recipe = linear.recipe
    target, stored = _target(recipe), linear.artifact("reference")
    if stored is None:
        raise GpuoptError("a finished run has no reference")
    deployed = reference.load(stored.path)
    asked = candidates(deployed.inputs, deployed.outputs, recipe)
    runners, errors = {LINEAR: linear}, dict[str, GpuoptError]()
    for name, formats in asked.items():
        if name != LINEAR:
            runner, error = run(f"io formats {name}", with_formats(recipe, formats))
            if error is None:
                runners[name] = runner
            else:
                errors[name] = error
    found, about = None, dict[str, Any]()
    best = LINEAR
    if len(runners) > 1:
        facts = time_in_turn(runners, target, recipe, cache, progress)
        found = Race.from_facts(facts)
        best = fastest(found, tuple(asked))
        about = {"shapes": dict(facts["shapes"]), "includes": facts["includes"]}
    table = {
        "target": target,
        "shapes": about.get("shapes", {}),
        "includes": about.get("includes", ""),
        "candidates": [_row(name, asked[name], found, errors.get(name), runners.get(name), target) for name in asked],
        "chosen": best,
        "verdict": _verdict(best, found, asked),
    }
    return FormatChoice(with_formats(recipe, asked[best]), runners[best], table)


def _verdict(best: str, found: Race | None, asked: Mapping[str, Formats]) -> str:
    if found is None:
        why = "no input or output has a format to choose" if len(asked) == 1 else "no other format can be built"
        return f"{why}: linear is kept"
    if best == LINEAR:
        return "no other format is faster beyond the noise: linear is kept"
    ratio = found.ratio(best, LINEAR)
    return f"{best} takes {ratio.value:.3f} times linear's time ({ratio.low:.3f} to {ratio.high:.3f}): it is kept"


def _row(
    name: str,
    formats: Formats,
    found: Race | None,
    error: GpuoptError | None,
    runner: Runner | None,
    target: str,
) -> dict[str, Any]:
    times = sorted(found.rounds.get(name, ())) if found is not None else []
    proved = facts_of(runner, "prove", target).get("io_formats", {}) if runner is not None else {}
    return {
        "name": name,
        "state": "out" if error is not None else "measured" if times else "built",
        "reason": error.message if error is not None else "",
        "formats": dict(formats),
        "as_built": dict(proved),
        "milliseconds": found.milliseconds.get(name) if found is not None else None,
        "lowest": times[0] if times else None,
        "highest": times[-1] if times else None,
    }
