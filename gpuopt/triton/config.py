"""A model and the user's choices to its `ModelConfig`: pure, no file is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpuopt.errors import UsageError
from gpuopt.shapes import Corner, format_shape
from gpuopt.storage import storage_errors
from gpuopt.triton import schema
from gpuopt.triton.options import DynamicBatching, InstanceGroup, Options, QueuePolicy
from gpuopt.triton.schema import ModelConfig
from gpuopt.triton.served import DATA_TYPES, DEFAULT_FILES, PLATFORMS, Served, ServedTensor

LATENCY_FAMILY = "nv_inference_first_response_histogram_ms"
"""The histogram whose buckets a configuration may set, by Triton's metrics guide."""


@dataclass(frozen=True)
class Made:
    """A configuration and what has to lie beside it.

    Attributes:
        warm_up: contents of files in the model's folder `warmup`, by name.
        warnings: one line each.
    """

    config: ModelConfig
    warm_up: Mapping[str, bytes]
    warnings: tuple[str, ...]


def make(served: Served, name: str, options: Options, engines: Mapping[str, str]) -> Made:
    """The configuration of a model.

    Args:
        name: of the model, which is its folder's.
        engines: file names in a version's folder by compute capability, `cc_model_filenames`.

    Raises:
        UsageError: what is asked for, the model does not admit.
        ConfigurationError: the file that is laid over it is none.
        StorageError: it cannot be read.
    """
    config = schema.new()
    config.name = name
    config.platform = PLATFORMS[served.backend]
    config.backend = served.backend
    config.max_batch_size = _max_batch_size(served, options)
    batched = config.max_batch_size > 0
    _tensors(config, served, batched)
    with schema.numbers_that_fit():
        _version_policy(config, options.version_policy)
        _dynamic_batching(config, served, options)
        _instances(config, served, options)
    _optimization(config, served, options)
    config.default_model_filename = DEFAULT_FILES[served.backend]
    for capability in sorted(engines):
        config.cc_model_filenames[capability] = engines[capability]
    for key in sorted(options.metric_tags):
        config.metric_tags[key] = options.metric_tags[key]
    warm_up = _warm_up(config, served, batched) if options.warm_up else {}
    if options.response_cache:
        config.response_cache.enable = True
    if options.latency_buckets:
        control = config.model_metrics.metric_control.add()
        control.metric_identifier.family = LATENCY_FAMILY
        control.histogram_options.buckets.extend(options.latency_buckets)
    if options.merged is not None:
        with storage_errors("read", options.merged):
            text = options.merged.read_text(encoding="utf-8", errors="replace")
        schema.lay_over(config, schema.parse(text, str(options.merged)))
    return Made(config, warm_up, tuple(_warnings(served, config, options)))


def _max_batch_size(served: Served, options: Options) -> int:
    largest, asked = served.largest_batch, options.max_batch_size
    if asked is None:
        return largest
    if asked > 0 and served.why_not_batched:
        raise UsageError(
            f"--max-batch-size {asked}: {served.why_not_batched}",
            "Leave it out: Triton gets the whole shape and max_batch_size 0.",
        )
    if asked > largest and asked > 0:
        raise UsageError(
            f"--max-batch-size {asked}: the model's profiles end at batch {largest}",
            f"Give {largest} or less, or compile it with a larger --max-shapes.",
        )
    return asked


def _tensors(config: ModelConfig, served: Served, batched: bool) -> None:
    for tensors, field in ((served.inputs, config.input), (served.outputs, config.output)):
        for tensor in tensors:
            entry = field.add()
            entry.name = tensor.name
            if tensor.spec.dtype not in DATA_TYPES:
                raise UsageError(
                    f"'{tensor.name}' is {tensor.spec.dtype}, which Triton has no data type for", "Change the model."
                )
            entry.data_type = schema.data_types().index(DATA_TYPES[tensor.spec.dtype])
            dims = dims_of(tensor, batched)
            if not dims and not batched:
                raise UsageError(
                    f"'{tensor.name}' is a scalar, which Triton serves only as one number a row of a batch",
                    "Give the model's tensor a dimension.",
                )
            # Triton's dims must not be empty: the guide asks for [1] and a reshape back.
            entry.dims.extend(dims or (1,))
            if not dims:
                entry.reshape.SetInParent()
            if not tensor.linear:
                entry.is_non_linear_format_io = True


def dims_of(tensor: ServedTensor, batched: bool) -> tuple[int, ...]:
    """A tensor's dims as Triton has them: without the batch where there is one, -1 for a dynamic size."""
    shape = tensor.shape[1:] if batched else tensor.shape
    return tuple(size if isinstance(size, int) else -1 for size in shape)


def _version_policy(config: ModelConfig, written: str) -> None:
    policy, _, rest = written.partition(":")
    parts = rest.split(",") if rest else []
    if not written:
        return
    if policy == "all" and not parts:
        config.version_policy.all.SetInParent()
    elif policy == "latest" and len(parts) == 1 and parts[0].isdecimal() and int(parts[0]) > 0:
        config.version_policy.latest.num_versions = int(parts[0])
    elif policy == "specific" and parts and all(part.isdecimal() for part in parts):
        config.version_policy.specific.versions.extend(int(part) for part in parts)
    else:
        raise UsageError(
            f"--version-policy '{written}' is none", "Write all, latest:N, or specific:N,N with the versions' numbers."
        )


def _dynamic_batching(config: ModelConfig, served: Served, options: Options) -> None:
    asked = options.dynamic_batching
    if asked is None:
        return
    if config.max_batch_size == 0:
        if asked != DynamicBatching():
            reason = served.why_not_batched or "--max-batch-size is 0"
            raise UsageError(
                f"requests cannot be batched: {reason}", "Leave the flags of the dynamic batcher out, or --help."
            )
        return
    batching = config.dynamic_batching
    batching.SetInParent()
    for size in asked.preferred_batch_size:
        if size > config.max_batch_size:
            raise UsageError(
                f"--preferred-batch-size {size} is larger than the largest batch, {config.max_batch_size}",
                "Leave it out, or compile the model with a larger --max-shapes.",
            )
    batching.preferred_batch_size.extend(asked.preferred_batch_size)
    batching.max_queue_delay_microseconds = asked.max_queue_delay_microseconds
    batching.preserve_ordering = asked.preserve_ordering
    batching.priority_levels = asked.priority_levels
    batching.default_priority_level = asked.default_priority_level
    if not asked.default_queue_policy.is_default:
        _policy(batching.default_queue_policy, asked.default_queue_policy)
    for level in sorted(asked.priority_queue_policy):
        _policy(batching.priority_queue_policy[level], asked.priority_queue_policy[level])


def _policy(message: Any, policy: QueuePolicy) -> None:
    message.SetInParent()
    message.timeout_action = ("REJECT", "DELAY").index(policy.action)
    message.default_timeout_microseconds = policy.timeout_microseconds
    message.allow_timeout_override = policy.allow_timeout_override
    message.max_queue_size = policy.max_queue_size


def _instances(config: ModelConfig, served: Served, options: Options) -> None:
    on_gpu = served.backend == "tensorrt" or bool(options.optimization.accelerators)
    groups = options.instances or (InstanceGroup("KIND_GPU" if on_gpu else "KIND_AUTO", 1),)
    for group in groups:
        entry = config.instance_group.add()
        entry.count = group.count
        entry.kind = ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL").index(group.kind)
        entry.gpus.extend(group.gpus)
        # Without a list Triton's instances take the first profile alone.
        if served.backend == "tensorrt" and len(served.profiles) > 1:
            entry.profile.extend(str(index) for index in range(len(served.profiles)))


def _optimization(config: ModelConfig, served: Served, options: Options) -> None:
    asked = options.optimization
    if asked.cuda_graphs:
        if served.backend != "tensorrt":
            raise UsageError(
                f"--cuda-graphs: Triton's {served.backend} backend records none", "Leave it out, or serve an engine."
            )
        config.optimization.cuda.graphs = True
        if config.max_batch_size > 0:
            _graph_specs(config, served)
    if asked.accelerators and served.backend != "onnxruntime":
        raise UsageError(
            f"--accelerator belongs to ONNX Runtime, not to the {served.backend} backend",
            "Leave it out, or choose --backend onnxruntime.",
        )
    for name, parameters in asked.accelerators.items():
        entry = config.optimization.execution_accelerators.gpu_execution_accelerator.add()
        entry.name = name
        for key in sorted(parameters):
            entry.parameters[key] = parameters[key]
    if asked.pinned_memory is not None:
        config.optimization.input_pinned_memory.enable = asked.pinned_memory
        config.optimization.output_pinned_memory.enable = asked.pinned_memory


def _graph_specs(config: ModelConfig, served: Served) -> None:
    """A graph for the smallest, tuned-for and largest batch of every profile, at its tuned-for and largest shapes."""
    seen = set()
    for profile in served.profiles:
        for shapes in ({n: r.min for n, r in profile.items()}, {n: r.opt for n, r in profile.items()},
                       {n: r.max for n, r in profile.items()}):  # fmt: skip
            batch = next(iter(shapes.values()))[0]
            key = (batch, tuple(sorted((name, shape[1:]) for name, shape in shapes.items())))
            if batch > config.max_batch_size or key in seen:
                continue
            seen.add(key)
            spec = config.optimization.cuda.graph_spec.add()
            spec.batch_size = batch
            for name in sorted(shapes):
                spec.input[name].dim.extend(shapes[name][1:])


def _warm_up(config: ModelConfig, served: Served, batched: bool) -> dict[str, bytes]:
    """Warm-up requests at every stored corner that the configuration admits; contents of their files by name.

    Triton simulates a batch by that many requests of one sample each, which all have the same values.
    """
    files: dict[str, bytes] = {}
    for corner in served.stored.corners:
        batch = _batch(corner) if batched else 1
        if batch > max(config.max_batch_size, 1):
            continue
        feed = served.stored.feed(corner)
        entry = config.model_warmup.add()
        entry.name = corner.name
        entry.batch_size = batch
        for tensor in served.inputs:
            sample = feed[tensor.name][0] if batched else feed[tensor.name]
            sample = np.ascontiguousarray(sample.astype(tensor.spec.dtype))
            file = f"{corner.name}.{len(files)}"
            files[file] = sample.tobytes()
            wanted = entry.inputs[tensor.name]
            wanted.data_type = schema.data_types().index(DATA_TYPES[tensor.spec.dtype])
            wanted.dims.extend(sample.shape or (1,))
            wanted.input_data_file = file
    return files


def _batch(corner: Corner) -> int:
    return next(iter(corner.shapes.values()))[0]


def _warnings(served: Served, config: ModelConfig, options: Options) -> list[str]:
    found = []
    record = served.record
    if record is not None and record.target == "tensorrt-rtx":
        found.append(
            "the engine is TensorRT-RTX's: the tensorrt backend of NVIDIA's containers does not load it, "
            "one that is built against TensorRT-RTX does"
        )
    elif record is not None and not record.version_compatible:
        found.append(f"the engine runs in a Triton whose TensorRT is {record.library_version}, and in no other")
    if record is not None and record.plugins:
        found.append(
            f"the engine needs {', '.join(record.plugins)}: load it with LD_PRELOAD, or "
            "--backend-config=tensorrt,plugins=FILE"
        )
    if served.why_not_batched:
        found.append(f"requests are not batched: {served.why_not_batched}")
    elif served.smallest_batch > 1:
        found.append(
            f"the profiles begin at batch {served.smallest_batch}: Triton hands single requests on as batch 1, "
            "which the engine refuses"
        )
    if options.dynamic_batching is None and config.max_batch_size > 1:
        found.append(
            "Triton turns the dynamic batcher on by itself for a max_batch_size above 1: start it with "
            "--disable-auto-complete-config to serve requests singly"
        )
    for tensor in (*served.inputs, *served.outputs):
        if not tensor.linear:
            shape = format_shape(tensor.shape)
            found.append(f"'{tensor.name}' ({shape}) is in a packed format: clients send and get it as it lies there")
    return found
