"""A sweep's file, typed and validated, and the combinations that it stands for.

    version: 1
    output: sweep                      a folder; or a URL of fsspec, as s3://bucket/sweep, with every task on Ray
    models:
      resnet:                          parts of a recipe: what this model needs
        model: {path: resnet.pt2}
        inputs: {image: {shape: 1x3x224x224}}
        calibrate: {data: calibration.npz}
    precisions: [int8, fp16]
    targets:
    - onnxruntime
    - {name: ada, target: tensorrt-rtx, build: {compute_capability: ["8.9"]}}
    - {name: h100, target: tensorrt, gpu: H100}
    batches: [1, 8]                    the first axis of every input; left out: as the model says
    recipe: {verify: {batch_invariance: false}}
    exclude:
    - {model: resnet, precision: int8, batch: 8}

What is said of a target goes over what is said of a model, and that over `recipe`.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from gpuopt.errors import UsageError, first_problem
from gpuopt.recipe import AskedPrecision, MemorySize, Recipe, Target, load, resolve
from gpuopt.shapes import format_shape, parse_shape

MOST_COMBINATIONS = 10_000
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_DECIDED = ("precision", "output", "version")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TargetSection(_Part):
    """What engines are built for, and where.

    Attributes:
        name: in the names of bundles; by default the target's.
        gpu: the accelerator type, as Ray calls it (`H100`), of the node that the task needs; empty: any node.
        build: keys of the recipe's section.
    """

    target: Target
    name: str = ""
    gpu: str = ""
    build: dict[str, Any] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.name or self.target


class Exclusion(_Part):
    """Combinations to leave out: those that have all of this."""

    model: str | None = None
    precision: AskedPrecision | None = None
    target: str | None = None
    batch: int | None = None


def _as_target(value: Any) -> Any:
    return {"target": value} if isinstance(value, str) else value


class SweepFile(_Part):
    """A whole sweep.

    Attributes:
        models: by name, parts of a recipe.
        recipe: parts of a recipe for all.
        memory: the most that one task may take, resident, with its processes; more ends it.
        retries: how often a task is tried again whose worker was lost.
    """

    version: Literal[1] = 1
    output: str = "sweep"
    models: dict[str, dict[str, Any]] = Field(min_length=1)
    precisions: tuple[AskedPrecision, ...] = Field(("int8",), min_length=1)
    targets: tuple[Annotated[TargetSection, BeforeValidator(_as_target)], ...] = Field(min_length=1)
    batches: tuple[Annotated[int, Field(ge=1, le=1 << 20, strict=True)], ...] = ()
    recipe: dict[str, Any] = Field(default_factory=dict)
    exclude: tuple[Exclusion, ...] = ()
    memory: MemorySize | None = None
    retries: int = Field(2, ge=0, le=100)

    @field_validator("models")
    @classmethod
    def _names_are_files(cls, models: dict[str, Any]) -> dict[str, Any]:
        for name in models:
            if not _NAME.fullmatch(name):
                raise ValueError(f"'{name[:40]}' names a folder later: write letters, digits, '.', '_' and '-'")
        return models

    @field_validator("targets")
    @classmethod
    def _targets_differ(cls, targets: tuple[TargetSection, ...]) -> tuple[TargetSection, ...]:
        labels = [target.label for target in targets]
        if len(set(labels)) != len(labels):
            raise ValueError("two targets have one name: give each a 'name' of its own")
        for label in labels:
            if not _NAME.fullmatch(label):
                raise ValueError(f"'{label[:40]}' names a folder later: write letters, digits, '.', '_' and '-'")
        return targets


@dataclass(frozen=True)
class Combination:
    """One bundle to make.

    Attributes:
        name: unique; also the bundle's folder below the sweep's output.
        gpu: the accelerator type it needs; empty: none.
        batch: None: as the model says.
        recipe: whole and valid, but for the folder of the result.
    """

    name: str
    model: str
    precision: str
    target: str
    target_label: str
    gpu: str
    batch: int | None
    recipe: Recipe


def read(path: Path) -> SweepFile:
    """Read a sweep's file.

    Raises:
        StorageError: it cannot be read.
        UsageError: it is not YAML, or a key or value is wrong; the message names it.
    """
    tree = load(path)
    try:
        return SweepFile.model_validate(tree)
    except ValidationError as error:
        raise UsageError(
            f"{path}: {first_problem(error)}", "docs/commands.md has an example, at 'gpuopt sweep'."
        ) from error


def combinations(sweep: SweepFile) -> list[Combination]:
    """Every combination that is not excluded, in the file's order: models, precisions, targets, batches.

    Raises:
        UsageError: a recipe is not valid, an input's shape is not said that a batch has to go into, an exclusion
            excludes nothing, or nothing is left.
    """
    batches: tuple[int | None, ...] = sweep.batches or (None,)
    count = len(sweep.models) * len(sweep.precisions) * len(sweep.targets) * len(batches)
    if count > MOST_COMBINATIONS:
        raise UsageError(f"the sweep has {count} combinations, above {MOST_COMBINATIONS}", "Make several of it.")
    found = []
    used: set[Exclusion] = set()
    for model, precision, target, batch in itertools.product(sweep.models, sweep.precisions, sweep.targets, batches):
        applied = [one for one in sweep.exclude if _excludes(one, model, precision, target.label, batch)]
        used.update(applied)
        if not applied:
            found.append(_combination(sweep, model, precision, target, batch))
    idle = [one for one in sweep.exclude if one not in used]
    if idle:
        told = {key: value for key, value in idle[0].model_dump().items() if value is not None}
        raise UsageError(f"exclude: no combination has {told}", "Check its names, or leave it out.")
    if not found:
        raise UsageError("every combination of the sweep is excluded", "Leave out an exclusion.")
    return found


def _excludes(one: Exclusion, model: str, precision: str, target: str, batch: int | None) -> bool:
    asked = ((one.model, model), (one.precision, precision), (one.target, target), (one.batch, batch))
    return all(wanted is None or wanted == value for wanted, value in asked)


def _combination(
    sweep: SweepFile, model: str, precision: AskedPrecision, target: TargetSection, batch: int | None
) -> Combination:
    name = "-".join([model, precision, target.label, *([f"b{batch}"] if batch is not None else [])])
    tree = merged(merged(sweep.recipe, sweep.models[model]), {"build": target.build})
    if decided := [key for key in _DECIDED if key in tree]:
        raise UsageError(f"{name}: '{decided[0]}' is the sweep's to decide", f"Leave it out of the recipe of {model}.")
    tree = merged(tree, {"precision": precision, "build": {"target": [target.target]}})
    if batch is not None:
        tree["inputs"] = _with_batch(name, tree.get("inputs"), batch)
    try:
        recipe = resolve(tree)
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}", error.hint) from error
    return Combination(name, model, precision, target.target, target.label, target.gpu, batch, recipe)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees laid over each other; where both have a mapping these are merged, else the second one holds."""
    tree = copy.deepcopy(dict(base))
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), Mapping):
            tree[key] = merged(tree[key], value)
        else:
            tree[key] = copy.deepcopy(value)
    return tree


def _with_batch(name: str, inputs: Any, batch: int) -> dict[str, Any]:
    """The inputs with this size as the first axis: of `shape`, or of `opt`, and what bounds it widened to hold it."""
    if not isinstance(inputs, dict) or not inputs:
        raise UsageError(
            f"{name}: 'batches' needs the shapes of the model's inputs",
            "Give them: inputs: {NAME: {shape: 1x3x224x224}}.",
        )
    found: dict[str, Any] = {}
    for key, told in inputs.items():
        entry = dict(told) if isinstance(told, dict) else {}
        shapes = {part: _shape(name, key, entry[part]) for part in ("shape", "min", "opt", "max") if part in entry}
        if not any(shapes.values()):
            raise UsageError(f"{name}: input '{key}' has no shape with a batch in it", "Give inputs.NAME.shape.")
        for part, shape in shapes.items():
            wanted = {"min": min(*shape[:1], batch), "max": max(*shape[:1], batch)}.get(part, batch) if shape else batch
            entry[part] = format_shape((wanted, *shape[1:]))
        found[key] = entry
    return found


def _shape(name: str, key: str, told: Any) -> tuple[int, ...]:
    if isinstance(told, (list, tuple)) and all(isinstance(size, int) for size in told):
        return tuple(told)
    try:
        return parse_shape(str(told))
    except UsageError as error:
        raise UsageError(f"{name}: input '{key}': {error.message}", error.hint) from error


def gpus_needed(found: Iterable[Combination]) -> set[str]:
    """The accelerator types that combinations need."""
    return {one.gpu for one in found if one.gpu}
