"""Which inputs a model is compiled for: names, dtypes and shape profiles.

Flags and recipe come first, then what the model states of itself, then the calibration data.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpuopt import reference
from gpuopt.deployed_form import BYTES, form_of_input
from gpuopt.errors import DataError, UsageError
from gpuopt.recipe import InputSection, Recipe
from gpuopt.shapes import Profile, ShapeRange, TensorSpec, corners, format_shape


@dataclass(frozen=True)
class StatedInput:
    """What a model says of one of its inputs.

    Attributes:
        spec: dtype and shape as the model writes it, dynamic sizes as strings.
        range: shapes that the model takes; None if it leaves a dimension open.
        unbounded: dynamic axes of `range` whose largest size is a default, not the model's word.
    """

    spec: TensorSpec
    range: ShapeRange | None
    unbounded: tuple[int, ...] = ()

    def admits(self, wanted: ShapeRange) -> bool:
        """Whether the model takes the wanted shapes."""
        if len(self.spec.shape) != len(wanted.min):
            return False
        for axis, size in enumerate(self.spec.shape):
            low, high = wanted.min[axis], wanted.max[axis]
            if isinstance(size, int):
                if not low == high == size:
                    return False
            elif self.range is not None:
                bounded = axis not in self.unbounded
                if low < self.range.min[axis] or (bounded and high > self.range.max[axis]):
                    return False
        return True


@dataclass(frozen=True)
class ResolvedInputs:
    """Inputs with every dynamic axis named, and the profiles.

    Attributes:
        inputs: dynamic axes are strings: `batch` for axis 0, `<input>_dim<axis>` for others.
        profiles: the first from flags, model or data, then the recipe's further ones.
        warnings: one line each.
    """

    inputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    warnings: tuple[str, ...]


def resolve(
    recipe: Recipe,
    parameters: Sequence[str],
    stated: Sequence[StatedInput],
    samples: Sequence[reference.Feed],
) -> ResolvedInputs:
    """Decide names, dtypes and shapes.

    Args:
        recipe: its `inputs` (an empty name stands for the only input) and `profiles`.
        parameters: names that forward takes; empty if unknown.
        stated: what the model says; empty if it says nothing.
        samples: calibration samples, batch axis kept; may be empty.

    Raises:
        UsageError: a shape is known from nowhere, or contradicts the model.
        DataError: a sample contradicts the shapes.
    """
    by_name = {s.spec.name: s for s in stated}
    sample = samples[0] if samples else {}
    given = _with_names(recipe.inputs, list(by_name) or list(sample) or list(parameters)[:1])
    names = list(by_name) or (list(sample) if set(given) <= set(sample) else list(given))
    _check_names(given, names, parameters, list(by_name))
    if set(names) <= set(parameters):
        # Exporters write the graph's inputs in forward's order.
        names = [name for name in parameters if name in names]
    specs: list[TensorSpec] = []
    profile: dict[str, ShapeRange] = {}
    warnings = []
    for name in names:
        section = given.get(name, InputSection())
        model = by_name.get(name)
        shapes = _completed(section, model, sample.get(name))
        if shapes is not None and shapes != _completed(section, model, None):
            warnings.append(
                f"'{name}' is built for {format_shape(shapes.min)} to {format_shape(shapes.max)}: the end that was not "
                f"given comes from one calibration sample, {format_shape(sample[name].shape)}; --min-shapes and "
                "--max-shapes choose"
            )
        if shapes and model and not model.admits(shapes):
            takes = f"{format_shape(model.range.min)} to {format_shape(model.range.max)}" if model.range else ""
            raise UsageError(
                f"input '{name}' takes {takes or format_shape(model.spec.shape)}, "
                f"not {format_shape(shapes.min)} to {format_shape(shapes.max)}",
                "Ask for shapes that the model takes, or export it with wider ones.",
            )
        if shapes is None and model and model.range:
            shapes = model.range
            if model.unbounded:
                warnings.append(
                    f"the model sets no upper bound for axes {list(model.unbounded)} of '{name}': "
                    f"built for up to {format_shape(shapes.max)}; --max-shapes chooses"
                )
        if shapes is None and name in sample:
            size = tuple(int(n) for n in sample[name].shape)
            shapes = ShapeRange(size, size, size)
            warnings.append(
                f"the shape of '{name}' is that of one calibration sample, {format_shape(size)}, and no other: "
                "--min-shapes and --max-shapes open it, for larger batches above all"
            )
        if shapes is None:
            written = f" ({format_shape(model.spec.shape)})" if model else ""
            sizes = [size if isinstance(size, int) else 1 for size in model.spec.shape] if model else (1, 3, 224, 224)
            raise UsageError(
                f"the shape of input '{name}'{written} is open",
                f"Give it: --input {name}:{format_shape(sizes)}, or --min-shapes / --opt-shapes / --max-shapes.",
            )
        _check_sample(name, sample.get(name), shapes)
        specs.append(TensorSpec(name, _dtype(section, model, sample.get(name)), shapes.opt))
        profile[name] = shapes
    profiles = (profile, *recipe.extra_profiles())
    for index, further in enumerate(profiles[1:]):
        if set(further) != set(names):
            raise UsageError(
                f"profiles.{index} names {', '.join(sorted(further))}; the inputs are {', '.join(names)}",
                "Give every profile a range for every input.",
            )
        for name, wanted in further.items():
            model = by_name.get(name)
            if len(wanted.min) != len(profile[name].min) or (model and not model.admits(wanted)):
                raise UsageError(
                    f"profiles.{index}: input '{name}' does not take "
                    f"{format_shape(wanted.min)} to {format_shape(wanted.max)}",
                    "Ask for shapes that the model takes, with the same number of dimensions in every profile.",
                )
    return ResolvedInputs(tuple(_name_axes(spec, profiles) for spec in specs), profiles, tuple(warnings))


def _check_sample(name: str, sample: reference.Array | None, shapes: ShapeRange) -> None:
    """Tell of data that cannot fit before an export that may take minutes; the batch axis is free."""
    if sample is None or sample.ndim != len(shapes.min):
        return
    for axis in range(1, sample.ndim):
        if axis not in shapes.dynamic_axes and sample.shape[axis] != shapes.min[axis]:
            seen, wanted = format_shape(sample.shape), format_shape(shapes.opt)
            hint = "Prepare the data as the model takes it, or give the shapes that the data has."
            if _is_channels_last(sample.shape, shapes):
                hint = "It looks channels-last: transpose it to channels first, or give --input-layout nhwc."
            raise DataError(f"a calibration sample of '{name}' is {seen}, the input {wanted}", hint)


def _is_channels_last(shape: tuple[int, ...], shapes: ShapeRange) -> bool:
    """Whether a sample has the input's shape, any number of samples, with the channels last."""
    if len(shape) < 3:
        return False
    moved = (shapes.opt[0], shape[-1], *shape[1:-1])
    return shapes.admits(moved)


def _completed(section: InputSection, model: StatedInput | None, sample: reference.Array | None) -> ShapeRange | None:
    """The section's shapes; a smallest or largest one that it leaves out is the model's own, or takes in the sample."""
    given = section.range()
    if given is None or section.shape is not None:
        return given
    low, high = section.min, section.max
    if model is not None and model.range is not None:
        low, high = low or model.range.min, high or model.range.max
    elif sample is not None and sample.ndim == len(given.opt):
        low = tuple(map(min, sample.shape, given.min)) if low is None else low
        high = tuple(map(max, sample.shape, given.max)) if high is None else high
    if low is None or high is None or len({len(low), len(given.opt), len(high)}) != 1:
        return given
    return ShapeRange(low, section.opt or high, high)


def with_model_names(samples: Sequence[reference.Feed], stated: Sequence[StatedInput]) -> list[reference.Feed]:
    """Samples of one array under the name of the model's only input, whatever the data calls it."""
    if len(stated) != 1 or any(len(sample) != 1 for sample in samples):
        return list(samples)
    return [{stated[0].spec.name: value} for sample in samples for value in sample.values()]


def corner_feeds(
    recipe: Recipe, resolved: ResolvedInputs, samples: Sequence[reference.Feed]
) -> dict[str, dict[str, reference.Array]]:
    """Reference inputs for every corner of the profiles, by corner name, in the original model's form.

    What the deployed model takes as bytes is made of bytes.

    Args:
        samples: in the original model's form.
    """
    bounds = value_bounds(recipe.inputs, resolved.inputs[0].name)
    norms = {
        spec.name: norm
        for spec in resolved.inputs
        if (norm := form_of_input(recipe.layout, spec.name).normalization) is not None
    }
    known = {**dict.fromkeys(norms, BYTES), **bounds}
    generated = {name for name in norms if not any(name in sample for sample in samples)}
    specs = [replace(spec, dtype="uint8") if spec.name in generated else spec for spec in resolved.inputs]
    feeds = {}
    for index, corner in enumerate(corners(resolved.profiles)):
        feed = reference.make_feed(corner, specs, samples, known, recipe.export.seed + index)
        for spec in resolved.inputs:
            if spec.name in generated:
                feed[spec.name] = norms[spec.name].apply(feed[spec.name]).astype(spec.dtype)
        feeds[corner.name] = feed
    return feeds


def facts_of(stored: reference.Reference) -> dict[str, Any]:
    """Names, dtypes and shapes, for the report."""
    return {
        "inputs": [
            {
                "name": spec.name,
                "dtype": spec.dtype,
                "profiles": [
                    {part: format_shape(getattr(profile[spec.name], part)) for part in ("min", "opt", "max")}
                    for profile in stored.profiles
                ],
            }
            for spec in stored.inputs
        ],
        "outputs": [{"name": s.name, "dtype": s.dtype, "shape": format_shape(s.shape)} for s in stored.outputs],
    }


def value_bounds(inputs: Mapping[str, InputSection], only: str) -> dict[str, tuple[float, float]]:
    """Value ranges of generated inputs by name; a section without a name is that of the input `only`."""
    bounds = {name or only: section.bounds() for name, section in inputs.items()}
    return {name: pair for name, pair in bounds.items() if pair}


def dynamic_axes(inputs: Sequence[TensorSpec]) -> dict[str, tuple[int, ...]]:
    """The dynamic axes of every input."""
    return {s.name: tuple(axis for axis, size in enumerate(s.shape) if isinstance(size, str)) for s in inputs}


def _with_names(given: Mapping[str, InputSection], candidates: Sequence[str]) -> dict[str, InputSection]:
    if "" not in given:
        return dict(given)
    if len(candidates) > 1:
        raise UsageError(
            f"--input needs a name: the model has the inputs {', '.join(candidates)}",
            f"Write --input {candidates[0]}:1x3x224x224.",
        )
    return {(name or (candidates[0] if candidates else "input")): section for name, section in given.items()}


def _check_names(
    given: Mapping[str, InputSection], names: Sequence[str], parameters: Sequence[str], stated: Sequence[str]
) -> None:
    takes = ", ".join(parameters) or "unnamed inputs"
    if not names:
        raise UsageError(
            "the input shapes are not known: neither the model nor the calibration data states them",
            f"Give one an input: --input {next(iter(parameters), 'input')}:1x3x224x224 (forward takes: {takes}).",
        )
    for name in given:
        if stated and name not in stated:
            near = difflib.get_close_matches(name, stated, 1)
            raise UsageError(
                f"the model has no input '{name}'; it has {', '.join(stated)}",
                f"Did you mean '{near[0]}'?" if near else "Use one of these names.",
            )
    unknown = [name for name in names if parameters and name not in parameters]
    # The only input may have a name of the user's own; with several, position would be a guess.
    if unknown and (len(names) > 1 or not parameters):
        near = difflib.get_close_matches(unknown[0], parameters, 1)
        raise UsageError(
            f"forward has no parameter '{unknown[0]}'; it takes {takes}",
            f"Did you mean '{near[0]}'?" if near else "Name the inputs, and the keys of the data, as forward does.",
        )


def _dtype(section: InputSection, model: StatedInput | None, sample: reference.Array | None) -> str:
    if section.dtype:
        return str(section.dtype)
    if model:
        return model.spec.dtype
    if sample is None or sample.dtype == "float64":
        return "float32"
    return str(sample.dtype)


def _name_axes(spec: TensorSpec, profiles: Sequence[Profile]) -> TensorSpec:
    shape: list[int | str] = list(spec.shape)
    for axis in range(len(shape)):
        sizes = {size for p in profiles for size in (p[spec.name].min[axis], p[spec.name].max[axis])}
        if len(sizes) > 1:
            shape[axis] = "batch" if axis == 0 else f"{spec.name}_dim{axis}"
    return TensorSpec(spec.name, spec.dtype, tuple(shape))
