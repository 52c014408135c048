"""Instances, GPUs, optimisation, warm-up, metrics."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

from gpuopt.triton import schema
from gpuopt.triton.config import LATENCY_FAMILY
from gpuopt.triton.repository import WARM_UP_FOLDER
from gpuopt.triton.rules.finding import Finding, Subject, error, warning
from gpuopt.triton.served import DATA_TYPES

_AUTO, _GPU, _CPU, _MODEL = range(4)
_CAPABILITY = re.compile(r"\d+\.\d")
_ACCELERATORS = {"onnxruntime": {"tensorrt", "cuda"}, "tensorrt": set(), "pytorch": set()}
_CPU_ACCELERATORS = {"onnxruntime": {"openvino"}, "tensorrt": set(), "pytorch": set()}


def instance_kinds(subject: Subject) -> Iterator[Finding]:
    """GPUs are named for instances on GPUs; TensorRT runs nowhere else."""
    for index, group in enumerate(subject.config.instance_group):
        path = f"instance_group {index}"
        kind = schema.value_name("ModelInstanceGroup", "Kind", group.kind)
        if group.gpus and group.kind in (_CPU, _MODEL):
            yield error("instance_kinds", f"{path}.gpus", f"{kind} has no GPUs", "Leave gpus out, or write KIND_GPU.")
        if subject.backend == "tensorrt" and group.kind in (_CPU, _MODEL):
            yield error(
                "instance_kinds", f"{path}.kind", f"{kind}, and an engine runs on GPUs alone", "Write KIND_GPU."
            )
        if group.kind == _CPU and subject.config.optimization.execution_accelerators.gpu_execution_accelerator:
            yield error(
                "instance_kinds", f"{path}.kind", "KIND_CPU, and gpu_execution_accelerator is for instances on GPUs",
                "Write KIND_GPU, or leave the accelerator out.",
            )  # fmt: skip


def instance_counts(subject: Subject) -> Iterator[Finding]:
    """Counts are positive, GPUs not negative and named once."""
    for index, group in enumerate(subject.config.instance_group):
        path = f"instance_group {index}"
        if group.count < 0:
            yield error("instance_counts", f"{path}.count", f"{group.count} is negative", "Write 1 or more.")
        if any(gpu < 0 for gpu in group.gpus):
            yield error("instance_counts", f"{path}.gpus", "a GPU's number is negative", "Count from 0.")
        if len(set(group.gpus)) != len(group.gpus):
            yield error("instance_counts", f"{path}.gpus", "a GPU is named twice", "Raise count instead.")
    named = [group.name for group in subject.config.instance_group if group.name]
    if len(set(named)) != len(named):
        yield error("instance_counts", "instance_group", "two groups have one name", "Name them differently.")
    passive = [group.passive for group in subject.config.instance_group]
    if passive and all(passive):
        yield error("instance_counts", "instance_group", "all groups are passive", "Leave passive out in one of them.")


def profiles(subject: Subject) -> Iterator[Finding]:
    """Named profiles exist; without names only the first is used."""
    served = subject.served
    for index, group in enumerate(subject.config.instance_group):
        path = f"instance_group {index}.profile"
        if group.profile and subject.backend != "tensorrt":
            yield error("profiles", path, f"{subject.backend} has no profiles", "Leave it out.")
            continue
        if served is None or served.backend != "tensorrt":
            continue
        last = len(served.profiles) - 1
        for written in group.profile:
            if not written.isdecimal() or int(written) > last:
                yield error("profiles", path, f"'{written}', the engine's are 0 to {last}", f"Write 0 to {last}.")
        if last > 0 and not group.profile:
            every = ", ".join(f'"{number}"' for number in range(last + 1))
            yield warning(
                "profiles", path, f"none of the engine's {last + 1} profiles is named: Triton takes the first alone",
                f"Write profile: [{every}].",
            )  # fmt: skip


def rate_limiter(subject: Subject) -> Iterator[Finding]:
    """A resource is either the GPU's or everybody's."""
    scopes: dict[str, set[bool]] = {}
    for group in subject.config.instance_group:
        for resource in group.rate_limiter.resources:
            scopes.setdefault(resource.name, set()).add(getattr(resource, "global"))
    for name, found in scopes.items():
        if len(found) > 1:
            yield error(
                "rate_limiter", "instance_group.rate_limiter", f"'{name}' is global in one place and not in another",
                "Write the same in both.",
            )  # fmt: skip


def compute_capabilities(subject: Subject) -> Iterator[Finding]:
    """Keys of cc_model_filenames are compute capabilities; the engine's own has its own file or the default one."""
    named = subject.config.cc_model_filenames
    for key in sorted(named):
        if not _CAPABILITY.fullmatch(key):
            yield error(
                "compute_capabilities", "cc_model_filenames", f"'{key}' is no compute capability", "Write it as 8.9."
            )  # fmt: skip
    record = subject.served.record if subject.served is not None else None
    if record is None or subject.folder is None or not named:
        return
    from gpuopt.triton.repository import versions

    for capability in record.compute_capabilities:
        for version in versions(subject.folder):
            path = subject.folder / str(version) / named[capability] if capability in named else None
            if path is not None and path.is_file() and path.stat().st_size != record.size_bytes:
                yield warning(
                    "compute_capabilities", f"cc_model_filenames {capability}",
                    f"version {version} has another file for the engine's own GPUs than the bundle",
                    "Let it name the bundle's engine.",
                )  # fmt: skip


def accelerators(subject: Subject) -> Iterator[Finding]:
    """Accelerators are ONNX Runtime's: tensorrt and cuda on GPUs, openvino on CPUs."""
    written = subject.config.optimization.execution_accelerators
    for path, field, known in (
        ("gpu_execution_accelerator", written.gpu_execution_accelerator, _ACCELERATORS),
        ("cpu_execution_accelerator", written.cpu_execution_accelerator, _CPU_ACCELERATORS),
    ):
        allowed = known.get(subject.backend)
        for entry in field:
            if allowed is not None and entry.name not in allowed:
                yield error(
                    "accelerators", path, f"the {subject.backend} backend has no '{entry.name}'",
                    f"Write {' or '.join(sorted(allowed))}." if allowed else "Leave it out.",
                )  # fmt: skip


def cuda_graphs(subject: Subject) -> Iterator[Finding]:
    """CUDA graphs are the tensorrt backend's; a graph's batch and shapes are ones that the engine takes."""
    cuda = subject.config.optimization.cuda
    if (cuda.graphs or cuda.graph_spec) and subject.backend != "tensorrt":
        yield error(
            "cuda_graphs", "optimization.cuda", f"the {subject.backend} backend records no graphs", "Leave it out."
        )  # fmt: skip
        return
    if cuda.graph_spec and not cuda.graphs:
        yield warning("cuda_graphs", "optimization.cuda.graphs", "it is off: graph_spec does nothing", "Write true.")
    for index, spec in enumerate(cuda.graph_spec):
        path = f"optimization.cuda.graph_spec {index}"
        if spec.batch_size > subject.config.max_batch_size or spec.batch_size < 0:
            yield error(
                "cuda_graphs", f"{path}.batch_size",
                f"{spec.batch_size}, max_batch_size is {subject.config.max_batch_size}",
                f"Write 1 to {subject.config.max_batch_size}." if subject.batched else "Write 0.",
            )  # fmt: skip
        if subject.served is None or not spec.input:
            continue
        shapes = {
            name: (*((spec.batch_size,) if subject.batched else ()), *shape.dim) for name, shape in spec.input.items()
        }
        fits = any(
            all(name in profile and profile[name].admits(shape) for name, shape in shapes.items())
            for profile in subject.served.profiles
        )
        if not fits:
            yield error("cuda_graphs", path, "no profile of the engine admits it", "Write shapes inside a profile.")


def warm_up(subject: Subject) -> Iterator[Finding]:
    """A warm-up request has every input, with type, shape and batch that the configuration admits."""
    for sample in subject.config.model_warmup:
        path = f"model_warmup '{sample.name}'"
        if not sample.batch_size:
            yield warning("warm_up", f"{path}.batch_size", "0: Triton skips it", "Write 1 or more.")
        largest = max(subject.config.max_batch_size, 1)
        if sample.batch_size > largest:
            yield error(
                "warm_up", f"{path}.batch_size", f"{sample.batch_size}, the largest batch is {largest}",
                f"Write at most {largest}.",
            )  # fmt: skip
        inputs = {entry.name: entry for entry in subject.config.input}
        for name in sorted(set(inputs) - set(sample.inputs)):
            yield error("warm_up", path, f"input '{name}' is missing", "Give every input of the model.")
        for name in sorted(sample.inputs):
            wanted, given = inputs.get(name), sample.inputs[name]
            if wanted is None:
                yield error("warm_up", path, f"the model has no input '{name}'", "Leave it out.")
                continue
            if given.data_type != wanted.data_type:
                yield error(
                    "warm_up", f"{path}.inputs '{name}'.data_type", "it is not the input's",
                    f"Write {schema.value_name('', 'DataType', wanted.data_type)}.",
                )  # fmt: skip
            fits = len(given.dims) == len(wanted.dims) and all(
                size > 0 and allowed in (-1, size) for size, allowed in zip(given.dims, wanted.dims, strict=False)
            )
            if not fits:
                yield error(
                    "warm_up", f"{path}.inputs '{name}'.dims", f"{list(given.dims)}, the input has {list(wanted.dims)}",
                    "Write the input's dims, with a number for every -1.",
                )  # fmt: skip
            if given.WhichOneof("input_data_type") is None:
                yield error(
                    "warm_up", f"{path}.inputs '{name}'", "it says not which values",
                    "Write zero_data, random_data or input_data_file.",
                )  # fmt: skip


def warm_up_files(subject: Subject) -> Iterator[Finding]:
    """The file of a warm-up input lies in the model's folder `warmup` and has the bytes of one sample."""
    if subject.folder is None:
        return
    sizes = {triton: np.dtype(name).itemsize for name, triton in DATA_TYPES.items() if name != "bfloat16"}
    for sample in subject.config.model_warmup:
        for name in sorted(sample.inputs):
            given = sample.inputs[name]
            if given.WhichOneof("input_data_type") != "input_data_file":
                continue
            path = subject.folder / WARM_UP_FOLDER / given.input_data_file
            field = f"model_warmup '{sample.name}'.inputs '{name}'.input_data_file"
            if not path.is_file():
                yield error("warm_up_files", field, f"{WARM_UP_FOLDER}/{path.name} is missing", "Put it there.")
                continue
            one = sizes.get(schema.value_name("", "DataType", given.data_type), 0)
            wanted = math.prod(given.dims) * one
            if one and path.stat().st_size < wanted:
                yield error(
                    "warm_up_files", field, f"{path.stat().st_size} bytes, one sample has {wanted}", "Write it anew."
                )  # fmt: skip


def metrics(subject: Subject) -> Iterator[Finding]:
    """A metric's buckets rise, and its family is one that Triton lets a model set."""
    for control in subject.config.model_metrics.metric_control:
        buckets = list(control.histogram_options.buckets)
        if control.metric_identifier.family != LATENCY_FAMILY:
            yield error(
                "metrics", "model_metrics.metric_identifier.family",
                f"'{control.metric_identifier.family}' cannot be set by a model", f"Write {LATENCY_FAMILY}.",
            )  # fmt: skip
        if not buckets or any(low >= high for low, high in itertools.pairwise(buckets)):
            yield error(
                "metrics", "model_metrics.histogram_options.buckets", f"{buckets} does not rise",
                "Write the buckets' upper ends in order, milliseconds.",
            )  # fmt: skip
