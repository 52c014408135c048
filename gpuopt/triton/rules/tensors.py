"""Inputs and outputs against the engine's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from gpuopt.shapes import ShapeRange, format_shape
from gpuopt.triton import schema
from gpuopt.triton.config import dims_of
from gpuopt.triton.rules.finding import Finding, Subject, error, warning
from gpuopt.triton.served import DATA_TYPES, ServedTensor

_IMAGE_DIMS = 3


def _pairs(subject: Subject) -> Iterator[tuple[str, Any, ServedTensor]]:
    """Fields of tensors that both sides have: the field's path, the configuration's entry, the engine's tensor."""
    if subject.served is None:
        return
    for path, field, tensors in (
        ("input", subject.config.input, subject.served.inputs),
        ("output", subject.config.output, subject.served.outputs),
    ):
        for entry, tensor in _matched(subject, path, field, tensors):
            if tensor is not None:
                yield f"{path} '{entry.name}'", entry, tensor


def _matched(
    subject: Subject, path: str, field: Sequence[Any], tensors: Sequence[ServedTensor]
) -> list[tuple[Any, ServedTensor | None]]:
    """Every entry with the engine's tensor that it is for; None: there is none.

    The pytorch backend counts where all names are `<name>__<index>`: outputs always, inputs if they are not forward's.
    """
    known = {tensor.name: tensor for tensor in tensors}
    indices = [_index(entry.name) for entry in field]
    counts = path == "output" or not all(entry.name in known for entry in field)
    if subject.backend == "pytorch" and counts and None not in indices:
        by_index = dict(enumerate(tensors))
        return [(entry, by_index.get(index)) for entry, index in zip(field, indices, strict=True) if index is not None]
    return [(entry, known.get(entry.name)) for entry in field]


def _index(name: str) -> int | None:
    """The index of `<name>__<index>`; None: it is not of that form."""
    _, separator, index = name.rpartition("__")
    return int(index) if separator and index.isdecimal() else None


def _fields(subject: Subject) -> Iterator[tuple[str, Any]]:
    for path, field in (("input", subject.config.input), ("output", subject.config.output)):
        for entry in field:
            yield f"{path} '{entry.name}'", entry


def names(subject: Subject) -> Iterator[Finding]:
    """Every input of the engine is there, and nothing else; outputs may be left out."""
    if subject.served is None:
        return
    for path, field, tensors in (
        ("input", subject.config.input, subject.served.inputs),
        ("output", subject.config.output, subject.served.outputs),
    ):
        known = [tensor.name for tensor in tensors]
        matched = _matched(subject, path, field, tensors)
        for name in sorted({entry.name for entry, tensor in matched if tensor is None}):
            yield error(
                "names", f"{path} '{name}'", f"the engine has no such {path}", f"Its {path}s: {', '.join(known)}."
            )
        written = [tensor.name for _, tensor in matched if tensor is not None]
        for name in known:
            if name not in written and path == "input":
                yield error(
                    "names", path, f"the engine's input '{name}' is missing", f'Add an input with name: "{name}".'
                )
            elif name not in written:
                yield warning(
                    "names", path, f"the engine's output '{name}' is missing", "Clients cannot ask for it; add it."
                )


def unique_names(subject: Subject) -> Iterator[Finding]:
    """A tensor is described once."""
    for path, field in (("input", subject.config.input), ("output", subject.config.output)):
        written = [entry.name for entry in field]
        for name in sorted({name for name in written if written.count(name) > 1}):
            yield error("unique_names", f"{path} '{name}'", "it is described twice", "Leave one of the two out.")
        if "" in written:
            yield error("unique_names", path, "an entry has no name", "Write the name of the engine's tensor.")


def there_are_tensors(subject: Subject) -> Iterator[Finding]:
    """A configuration has inputs and outputs; Triton could complete them, unless it is told not to."""
    for path, field in (("input", subject.config.input), ("output", subject.config.output)):
        if not field:
            yield warning(
                "there_are_tensors", path, "there is none",
                "Triton completes it only without --disable-auto-complete-config.",
            )  # fmt: skip


def data_types(subject: Subject) -> Iterator[Finding]:
    """Each has the engine's data type."""
    for path, entry, tensor in _pairs(subject):
        written = schema.value_name("", "DataType", entry.data_type)
        wanted = DATA_TYPES.get(tensor.spec.dtype, "")
        if written != wanted:
            yield error(
                "data_types", f"{path}.data_type", f"{written}, the engine has {tensor.spec.dtype}", f"Write {wanted}."
            )


def data_type_is_set(subject: Subject) -> Iterator[Finding]:
    """Triton knows no tensor of type INVALID."""
    for path, entry in _fields(subject):
        if entry.data_type == 0 and subject.served is None:
            yield error("data_type_is_set", f"{path}.data_type", "it is not set", "Write one, as TYPE_FP32.")


def dims(subject: Subject) -> Iterator[Finding]:
    """The whole shape, a batch in front where max_batch_size says so, is one that the engine takes."""
    for path, entry, tensor in _pairs(subject):
        written = tuple(entry.reshape.shape) if entry.HasField("reshape") else tuple(entry.dims)
        wanted = dims_of(tensor, subject.batched)
        shown = format_shape(tensor.shape)
        if len(written) != len(wanted):
            whole = dims_of(tensor, batched=False)
            if subject.batched and len(written) == len(whole):
                message = (
                    f"{_list(written)} counts the batch, which max_batch_size {subject.config.max_batch_size} adds"
                )
            elif not subject.batched and len(written) + 1 == len(whole):
                message = f"{_list(written)} leaves the first dimension out, and max_batch_size 0 adds none"
            else:
                message = f"{_list(written)} has {len(written)} dimensions"
            yield error("dims", f"{path}.dims", f"{message}; the engine has {shown}", f"Write {_list(wanted)}.")
        elif any(0 <= size != ours for size, ours in zip(written, wanted, strict=True) if ours != -1) or any(
            size == -1 and ours != -1 for size, ours in zip(written, wanted, strict=True)
        ):
            yield error("dims", f"{path}.dims", f"{_list(written)}, the engine has {shown}", f"Write {_list(wanted)}.")


def dims_inside_profiles(subject: Subject) -> Iterator[Finding]:
    """A size that the configuration fixes and the engine leaves open lies inside one of the profiles."""
    if subject.served is None:
        return
    for path, entry, tensor in _pairs(subject):
        ranges = [profile[tensor.name] for profile in subject.served.profiles if tensor.name in profile]
        written = tuple(entry.reshape.shape) if entry.HasField("reshape") else tuple(entry.dims)
        skipped = 1 if subject.batched else 0
        if not ranges or len(written) + skipped != len(ranges[0].min):
            continue
        if not any(_inside(written, bounds, skipped) for bounds in ranges):
            told = " or ".join(
                f"{format_shape(b.min[skipped:])} to {format_shape(b.max[skipped:])}" for b in ranges
            )  # fmt: skip
            yield error(
                "dims_inside_profiles", f"{path}.dims", f"{_list(written)} lies outside the profiles, {told}",
                "Write -1 for what varies, or build the engine with such shapes.",
            )  # fmt: skip


def _inside(written: Sequence[int], bounds: ShapeRange, skipped: int) -> bool:
    return all(
        size == -1 or low <= size <= high
        for size, low, high in zip(written, bounds.min[skipped:], bounds.max[skipped:], strict=True)
    )


def dims_are_not_empty(subject: Subject) -> Iterator[Finding]:
    """Triton's shapes have at least one dimension, each positive or -1."""
    for path, entry in _fields(subject):
        if not entry.dims:
            yield error(
                "dims_are_not_empty", f"{path}.dims", "it is empty",
                "Write [1], and reshape { } where the model has none.",
            )  # fmt: skip
        for size in entry.dims:
            if size < 1 and size != -1:
                yield error(
                    "dims_are_not_empty", f"{path}.dims", f"{size} is no size", "Write a positive number, or -1."
                )  # fmt: skip


def reshape(subject: Subject) -> Iterator[Finding]:
    """A reshape keeps the number of elements, and without a batch it is not empty."""
    for path, entry in _fields(subject):
        if not entry.HasField("reshape"):
            continue
        target = tuple(entry.reshape.shape)
        if not target and not subject.batched:
            yield error(
                "reshape", f"{path}.reshape", "it is empty, and there is no batch",
                "Write its shape, or batch the model.",
            )  # fmt: skip
        for sizes in (tuple(entry.dims), target):
            if any(size < 1 and size != -1 for size in sizes):
                return
        fixed = [math.prod(size for size in sizes if size != -1) for sizes in (tuple(entry.dims), target)]
        open_sizes = [sizes.count(-1) for sizes in (tuple(entry.dims), target)]
        if fixed[0] != fixed[1] or open_sizes[0] != open_sizes[1]:
            yield error(
                "reshape", f"{path}.reshape", f"{_list(target)} holds other elements than dims {_list(entry.dims)}",
                "Give both the same number of elements.",
            )  # fmt: skip


def image_format(subject: Subject) -> Iterator[Finding]:
    """FORMAT_NHWC and FORMAT_NCHW are for three dims."""
    for entry in subject.config.input:
        if entry.format != 0 and len(entry.dims) != _IMAGE_DIMS:
            yield error(
                "image_format", f"input '{entry.name}'.format", f"an image format for {len(entry.dims)} dims",
                "Leave it out, or give dims as [channels, height, width].",
            )  # fmt: skip


def io_formats(subject: Subject) -> Iterator[Finding]:
    """`is_non_linear_format_io` stands exactly where the engine's tensor is not linear."""
    if subject.backend != "tensorrt":
        return
    for path, entry, tensor in _pairs(subject):
        if entry.is_non_linear_format_io == tensor.linear:
            engine = "linear" if tensor.linear else "packed (channels last or vectorised)"
            yield error(
                "io_formats", f"{path}.is_non_linear_format_io",
                f"{str(entry.is_non_linear_format_io).lower()}, the engine's tensor is {engine}",
                f"Write {str(not tensor.linear).lower()}.",
            )  # fmt: skip


def tensorrt_only_flags(subject: Subject) -> Iterator[Finding]:
    """Shape tensors and packed formats exist for TensorRT alone, and gpuopt's engines have no shape tensors."""
    for path, entry in _fields(subject):
        if entry.is_non_linear_format_io and subject.backend != "tensorrt":
            yield error(
                "tensorrt_only_flags", f"{path}.is_non_linear_format_io", f"{subject.backend} has no such formats",
                "Leave it out.",
            )  # fmt: skip
        if entry.is_shape_tensor:
            yield error(
                "tensorrt_only_flags", f"{path}.is_shape_tensor",
                "the engine's tensor is none" if subject.backend == "tensorrt" else f"{subject.backend} has none",
                "Leave it out.",
            )  # fmt: skip


def ragged_inputs(subject: Subject) -> Iterator[Finding]:
    """Ragged inputs are the dynamic batcher's, and need a batch."""
    for entry in subject.config.input:
        if entry.allow_ragged_batch and not subject.batched:
            yield error(
                "ragged_inputs", f"input '{entry.name}'.allow_ragged_batch", "max_batch_size is 0", "Leave it out."
            )  # fmt: skip
        if entry.allow_ragged_batch and entry.HasField("reshape"):
            yield error(
                "ragged_inputs", f"input '{entry.name}'.allow_ragged_batch", "a ragged input cannot be reshaped",
                "Leave one of the two out.",
            )  # fmt: skip


def optional_inputs(subject: Subject) -> Iterator[Finding]:
    """An engine needs all its inputs."""
    for entry in subject.config.input:
        if entry.optional and subject.backend in ("tensorrt", "onnxruntime", "pytorch"):
            yield error(
                "optional_inputs", f"input '{entry.name}'.optional", "the model computes nothing without it",
                "Leave it out.",
            )  # fmt: skip


def pytorch_names(subject: Subject) -> Iterator[Finding]:
    """TorchScript names no outputs: the guide demands `<name>__<index>`, each index once."""
    if subject.backend != "pytorch":
        return
    indices = []
    for entry in subject.config.output:
        index = _index(entry.name)
        if index is None:
            yield error(
                "pytorch_names", f"output '{entry.name}'", "the pytorch backend cannot tell which output it is",
                f"Name it {entry.name}__0, with the output's index behind two underscores.",
            )  # fmt: skip
        else:
            indices.append(index)
    if len(set(indices)) != len(indices):
        yield error("pytorch_names", "output", "two outputs have one index", "Number them from 0.")


def batch_inputs(subject: Subject) -> Iterator[Finding]:
    """A batch input or output has one source, which is an input, and a type that Triton fills in."""
    inputs = {entry.name for entry in subject.config.input}
    outputs = {entry.name for entry in subject.config.output}
    for path, field in (("batch_input", subject.config.batch_input), ("batch_output", subject.config.batch_output)):
        for entry in field:
            if len(entry.source_input) != 1 or not set(entry.source_input) <= inputs:
                yield error(
                    "batch_inputs", f"{path}.source_input", f"{', '.join(entry.source_input) or 'there is none'}",
                    "Name exactly one input of the model.",
                )  # fmt: skip
    for entry in subject.config.batch_input:
        if schema.value_name("", "DataType", entry.data_type) not in ("TYPE_INT32", "TYPE_FP32"):
            yield error(
                "batch_inputs", "batch_input.data_type", schema.value_name("", "DataType", entry.data_type),
                "Write TYPE_INT32 or TYPE_FP32.",
            )  # fmt: skip
    for entry in subject.config.batch_output:
        if not set(entry.target_name) <= outputs:
            yield error("batch_inputs", "batch_output.target_name", "it is no output", "Name one of the outputs.")


def _list(sizes: Sequence[int]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"
