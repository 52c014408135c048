"""A pipeline of models as one: the models before and after, that are in the repository already, and ours between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpuopt.errors import ConfigurationError, UsageError
from gpuopt.storage import storage_errors
from gpuopt.triton import schema
from gpuopt.triton.repository import CONFIG_FILE
from gpuopt.triton.schema import ModelConfig


def read(repository: Path, model: str) -> ModelConfig:
    """The configuration of a model in the repository.

    Raises:
        UsageError: there is none.
        ConfigurationError: it cannot be read as one.
    """
    path = repository / model / CONFIG_FILE
    if not path.is_file():
        raise UsageError(
            f"{repository} has no model '{model}' with a {CONFIG_FILE}", "Put it there first: a step names its tensors."
        )
    with storage_errors("read", path):
        config = schema.parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if not config.name:
        config.name = model
    return config


def make(name: str, steps: Sequence[ModelConfig], renamed: Mapping[str, str]) -> ModelConfig:
    """An ensemble that hands each step's outputs on to the next.

    A tensor goes to the input of the same name, or to the one that `renamed` says, or, where one output is left and one
    input is open, to that. What no earlier step makes, is an input of the ensemble; the last step's outputs are its
    outputs. Tensors meet if Triton takes them for consistent.

    Args:
        steps: configurations in order.
        renamed: `MODEL.INPUT` to the `MODEL.OUTPUT` that it takes.

    Raises:
        UsageError: a name in `renamed` is none of theirs, or an output is not made before the step that takes it.
        ConfigurationError: two tensors that meet differ in data type or shape.
    """
    ensemble = schema.new()
    ensemble.name = name
    ensemble.platform = "ensemble"
    ensemble.max_batch_size = min(step.max_batch_size for step in steps)
    _check_names(steps, renamed)
    made: dict[str, tuple[str, Any, int]] = {}
    for index, step in enumerate(steps):
        entry = ensemble.ensemble_scheduling.step.add()
        entry.model_name = step.name
        entry.model_version = -1
        sources = _sources(step, steps[index - 1] if index else None, renamed)
        for tensor in step.input:
            source = sources.get(tensor.name)
            if source is None:
                entry.input_map[tensor.name] = tensor.name
                _add(ensemble.input, tensor, tensor.name)
                continue
            if source not in made:
                raise UsageError(
                    f"--map {source}={step.name}.{tensor.name}: no step before '{step.name}' makes '{source}'",
                    "Steps run in the order of --before, the model, --after.",
                )
            inner, origin, largest = made[source]
            _check_meeting(source, origin, largest, f"{step.name}.{tensor.name}", tensor, step.max_batch_size)
            entry.input_map[tensor.name] = inner
        last = index == len(steps) - 1
        for tensor in step.output:
            inner = tensor.name if last else f"{step.name}.{tensor.name}"
            entry.output_map[tensor.name] = inner
            made[f"{step.name}.{tensor.name}"] = inner, tensor, step.max_batch_size
            if last:
                _add(ensemble.output, tensor, tensor.name)
    return ensemble


def _sources(step: ModelConfig, before: ModelConfig | None, renamed: Mapping[str, str]) -> dict[str, str]:
    """By each of a step's inputs that some step makes, what it takes: `MODEL.OUTPUT`."""
    names = [tensor.name for tensor in step.input]
    found = {name: renamed[f"{step.name}.{name}"] for name in names if f"{step.name}.{name}" in renamed}
    if before is None:
        return found
    outputs = {tensor.name: f"{before.name}.{tensor.name}" for tensor in before.output}
    found |= {name: outputs[name] for name in names if name in outputs and name not in found}
    taken = {*renamed.values(), *found.values()}
    left = [source for source in outputs.values() if source not in taken]
    still_open = [name for name in names if name not in found]
    if len(left) == 1 and len(still_open) == 1:
        found[still_open[0]] = left[0]
    return found


def _check_meeting(source: str, given: Any, given_batch: int, target: str, taken: Any, taken_batch: int) -> None:
    if given.data_type != taken.data_type:
        raise ConfigurationError(
            f"{source} is {schema.value_name('', 'DataType', given.data_type)}, "
            f"{target} takes {schema.value_name('', 'DataType', taken.data_type)}",
            "Let the step before write the type that the next one reads.",
        )
    # As Triton compares them: alone, or with the batch that max_batch_size puts in front.
    pairs = [
        (tuple(given.dims), tuple(taken.dims)),
        (_whole(given, given_batch), _whole(taken, taken_batch)),
    ]
    if not any(_is_one_shape(*pair) for pair in pairs):
        raise ConfigurationError(
            f"{source} is {list(pairs[1][0])}, {target} takes {list(pairs[1][1])}",
            "Let the step before write the shape that the next one reads, or map another tensor: --map.",
        )


def _whole(tensor: Any, largest_batch: int) -> tuple[int, ...]:
    return (*((-1,) if largest_batch > 0 else ()), *tensor.dims)


def _is_one_shape(one: Sequence[int], other: Sequence[int]) -> bool:
    return len(one) == len(other) and all(-1 in pair or pair[0] == pair[1] for pair in zip(one, other, strict=True))


def _check_names(steps: Sequence[ModelConfig], renamed: Mapping[str, str]) -> None:
    outputs = {f"{step.name}.{tensor.name}" for step in steps for tensor in step.output}
    inputs = {f"{step.name}.{tensor.name}" for step in steps for tensor in step.input}
    for target, source in renamed.items():
        for name, known in ((source, outputs), (target, inputs)):
            if name not in known:
                raise UsageError(
                    f"--map {source}={target}: '{name}' is none of the steps' tensors",
                    f"There are: {', '.join(sorted(known))}.",
                )


def _add(field: object, tensor: object, name: str) -> None:
    entry = field.add()  # type: ignore[attr-defined]
    entry.name = name
    entry.data_type = tensor.data_type  # type: ignore[attr-defined]
    entry.dims.extend(tensor.dims)  # type: ignore[attr-defined]
