"""A pipeline of models as one: the models before and after, that are in the repository already, and ours between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

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
    outputs.

    Args:
        steps: configurations in order.
        renamed: `MODEL.OUTPUT` to `MODEL.INPUT`.

    Raises:
        UsageError: a name in `renamed` is none of theirs.
        ConfigurationError: two tensors that meet differ in data type.
    """
    ensemble = schema.new()
    ensemble.name = name
    ensemble.platform = "ensemble"
    ensemble.max_batch_size = min(step.max_batch_size for step in steps)
    _check_names(steps, renamed)
    made: dict[str, tuple[str, int]] = {}
    for index, step in enumerate(steps):
        entry = ensemble.ensemble_scheduling.step.add()
        entry.model_name = step.name
        entry.model_version = -1
        previous = {t.name for t in steps[index - 1].output} if index else set()
        unmatched = [t.name for t in step.input if t.name not in previous]
        for tensor in step.input:
            source = next(
                (out for out, target in renamed.items() if target == f"{step.name}.{tensor.name}"),
                f"{steps[index - 1].name}.{tensor.name}" if tensor.name in previous else "",
            )
            if not source and index and len(previous) == 1 and len(unmatched) == 1:
                source = f"{steps[index - 1].name}.{next(iter(previous))}"
            if not source:
                entry.input_map[tensor.name] = tensor.name
                _add(ensemble.input, tensor, tensor.name)
                continue
            inner, data_type = made[source]
            if data_type != tensor.data_type:
                raise ConfigurationError(
                    f"{source} is {schema.value_name('', 'DataType', data_type)}, "
                    f"{step.name}.{tensor.name} takes {schema.value_name('', 'DataType', tensor.data_type)}",
                    "Let the step before write the type that the next one reads.",
                )
            entry.input_map[tensor.name] = inner
        last = index == len(steps) - 1
        for tensor in step.output:
            inner = tensor.name if last else f"{step.name}.{tensor.name}"
            entry.output_map[tensor.name] = inner
            made[f"{step.name}.{tensor.name}"] = inner, tensor.data_type
            if last:
                _add(ensemble.output, tensor, tensor.name)
    return ensemble


def _check_names(steps: Sequence[ModelConfig], renamed: Mapping[str, str]) -> None:
    outputs = {f"{step.name}.{tensor.name}" for step in steps for tensor in step.output}
    inputs = {f"{step.name}.{tensor.name}" for step in steps for tensor in step.input}
    for source, target in renamed.items():
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
