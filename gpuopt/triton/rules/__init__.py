"""What Triton's model configuration guide demands, as far as it can be told without a server: a function a rule.

A rule is handed a configuration, the model that it is for and the folder it lies in, and yields what it finds. The
rules are those of the guide (user guide: model configuration, batchers, model repository, ensemble models, metrics) and
of the backends it refers to.
"""

from __future__ import annotations

from gpuopt.triton.rules import batching, repository, running, tensors
from gpuopt.triton.rules.finding import Rule

RULES: tuple[Rule, ...] = (
    repository.name,
    repository.platform,
    repository.one_source,
    repository.versions,
    repository.files,
    repository.is_this_engine,
    repository.ensemble,
    batching.max_batch_size,
    batching.unused_batch,
    batching.smallest_batch,
    batching.scheduler_needs_batch,
    batching.preferred_sizes,
    batching.priorities,
    batching.ordering,
    batching.timeouts,
    batching.queue_size,
    batching.queue_delay,
    batching.response_cache,
    batching.decoupled,
    batching.stateful,
    tensors.there_are_tensors,
    tensors.names,
    tensors.unique_names,
    tensors.data_types,
    tensors.data_type_is_set,
    tensors.dims,
    tensors.dims_inside_profiles,
    tensors.dims_are_not_empty,
    tensors.reshape,
    tensors.image_format,
    tensors.io_formats,
    tensors.tensorrt_only_flags,
    tensors.ragged_inputs,
    tensors.optional_inputs,
    tensors.pytorch_names,
    tensors.batch_inputs,
    running.instance_kinds,
    running.instance_counts,
    running.profiles,
    running.rate_limiter,
    running.compute_capabilities,
    running.accelerators,
    running.cuda_graphs,
    running.warm_up,
    running.warm_up_files,
    running.metrics,
)
