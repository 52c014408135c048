"""Triton's `ModelConfig` as protobuf knows it: `config.pbtxt` is read and written by protobuf's own text format.

The table holds what Triton's `model_config.proto` (package `inference`) says of its messages: number, type and name of
each field. A test compares it, field by field, with the descriptors that come with `tritonclient`, which itself cannot
be installed beside onnx.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.descriptor import Descriptor

from gpuopt.errors import ConfigurationError, UsageError, one_line

PACKAGE = "inference"
_FILE = "gpuopt/model_config.proto"

ModelConfig = Any
"""A message `inference.ModelConfig`; its class is made at run time."""

# A line a message: `number type name`, `*` behind the number of a repeated field, `name/oneof` inside a oneof.
_MESSAGES: Mapping[str, str] = {
    "ModelRateLimiter": "1* Resource resources; 2 uint32 priority",
    "ModelRateLimiter.Resource": "1 string name; 2 bool global; 3 uint32 count",
    "ModelInstanceGroup": (
        "1 string name; 4 Kind kind; 2 int32 count; 6 .ModelRateLimiter rate_limiter; 3* int32 gpus; "
        "8* SecondaryDevice secondary_devices; 5* string profile; 7 bool passive; 9 string host_policy"
    ),
    "ModelInstanceGroup.SecondaryDevice": "1 SecondaryDeviceKind kind; 2 int64 device_id",
    "ModelTensorReshape": "1* int64 shape",
    "ModelInput": (
        "1 string name; 2 .DataType data_type; 3 Format format; 4* int64 dims; 5 .ModelTensorReshape reshape; "
        "6 bool is_shape_tensor; 7 bool allow_ragged_batch; 8 bool optional; 9 bool is_non_linear_format_io"
    ),
    "ModelOutput": (
        "1 string name; 2 .DataType data_type; 3* int64 dims; 5 .ModelTensorReshape reshape; "
        "4 string label_filename; 6 bool is_shape_tensor; 7 bool is_non_linear_format_io"
    ),
    "BatchInput": "1 Kind kind; 2* string target_name; 3 .DataType data_type; 4* string source_input",
    "BatchOutput": "1* string target_name; 2 Kind kind; 3* string source_input",
    "ModelVersionPolicy": "1 Latest latest/policy_choice; 2 All all/policy_choice; 3 Specific specific/policy_choice",
    "ModelVersionPolicy.Latest": "1 uint32 num_versions",
    "ModelVersionPolicy.All": "",
    "ModelVersionPolicy.Specific": "1* int64 versions",
    "ModelOptimizationPolicy": (
        "1 Graph graph; 2 ModelPriority priority; 3 Cuda cuda; 4 ExecutionAccelerators execution_accelerators; "
        "5 PinnedMemoryBuffer input_pinned_memory; 6 PinnedMemoryBuffer output_pinned_memory; "
        "7 uint32 gather_kernel_buffer_threshold; 8 bool eager_batching"
    ),
    "ModelOptimizationPolicy.Graph": "1 int32 level",
    "ModelOptimizationPolicy.Cuda": (
        "1 bool graphs; 2 bool busy_wait_events; 3* GraphSpec graph_spec; 4 bool output_copy_stream"
    ),
    "ModelOptimizationPolicy.Cuda.GraphSpec": (
        "1 int32 batch_size; 2 map<string,.ModelOptimizationPolicy.Cuda.GraphSpec.Shape> input; "
        "3 LowerBound graph_lower_bound"
    ),
    "ModelOptimizationPolicy.Cuda.GraphSpec.Shape": "1* int64 dim",
    "ModelOptimizationPolicy.Cuda.GraphSpec.LowerBound": (
        "1 int32 batch_size; 2 map<string,.ModelOptimizationPolicy.Cuda.GraphSpec.Shape> input"
    ),
    "ModelOptimizationPolicy.ExecutionAccelerators": (
        "1* Accelerator gpu_execution_accelerator; 2* Accelerator cpu_execution_accelerator"
    ),
    "ModelOptimizationPolicy.ExecutionAccelerators.Accelerator": "1 string name; 2 map<string,string> parameters",
    "ModelOptimizationPolicy.PinnedMemoryBuffer": "1 bool enable",
    "ModelQueuePolicy": (
        "1 TimeoutAction timeout_action; 2 uint64 default_timeout_microseconds; 3 bool allow_timeout_override; "
        "4 uint32 max_queue_size"
    ),
    "ModelDynamicBatching": (
        "1* int32 preferred_batch_size; 2 uint64 max_queue_delay_microseconds; 3 bool preserve_ordering; "
        "4 uint64 priority_levels; 5 uint64 default_priority_level; 6 .ModelQueuePolicy default_queue_policy; "
        "7 map<uint64,.ModelQueuePolicy> priority_queue_policy"
    ),
    "ModelSequenceBatching": (
        "3 StrategyDirect direct/strategy_choice; 4 StrategyOldest oldest/strategy_choice; "
        "1 uint64 max_sequence_idle_microseconds; 2* ControlInput control_input; 5* State state; "
        "6 bool iterative_sequence"
    ),
    "ModelSequenceBatching.Control": (
        "1 Kind kind; 2* int32 int32_false_true; 3* float fp32_false_true; 5* bool bool_false_true; "
        "4 .DataType data_type"
    ),
    "ModelSequenceBatching.ControlInput": "1 string name; 2* Control control",
    "ModelSequenceBatching.InitialState": (
        "1 .DataType data_type; 2* int64 dims; 3 bool zero_data/state_data; 4 string data_file/state_data; "
        "5 string name"
    ),
    "ModelSequenceBatching.State": (
        "1 string input_name; 2 string output_name; 3 .DataType data_type; 4* int64 dims; "
        "5* InitialState initial_state; 6 bool use_same_buffer_for_input_output; 7 bool use_growable_memory"
    ),
    "ModelSequenceBatching.StrategyDirect": "1 uint64 max_queue_delay_microseconds; 2 float minimum_slot_utilization",
    "ModelSequenceBatching.StrategyOldest": (
        "1 int32 max_candidate_sequences; 2* int32 preferred_batch_size; 3 uint64 max_queue_delay_microseconds; "
        "4 bool preserve_ordering"
    ),
    "ModelEnsembling": "1* Step step; 2 uint32 max_inflight_requests",
    "ModelEnsembling.Step": (
        "1 string model_name; 2 int64 model_version; 3 map<string,string> input_map; 4 map<string,string> output_map; "
        "5 string model_namespace"
    ),
    "ModelParameter": "1 string string_value",
    "ModelWarmup": "1 string name; 2 uint32 batch_size; 3 map<string,.ModelWarmup.Input> inputs; 4 uint32 count",
    "ModelWarmup.Input": (
        "1 .DataType data_type; 2* int64 dims; 3 bool zero_data/input_data_type; 4 bool random_data/input_data_type; "
        "5 string input_data_file/input_data_type"
    ),
    "ModelOperations": "1* string op_library_filename",
    "ModelTransactionPolicy": "1 bool decoupled",
    "ModelRepositoryAgents": "1* Agent agents",
    "ModelRepositoryAgents.Agent": "1 string name; 2 map<string,string> parameters",
    "ModelResponseCache": "1 bool enable",
    "ModelMetrics": "1* MetricControl metric_control",
    "ModelMetrics.MetricControl": (
        "1 MetricIdentifier metric_identifier; 2 HistogramOptions histogram_options/metric_options"
    ),
    "ModelMetrics.MetricControl.MetricIdentifier": "1 string family",
    "ModelMetrics.MetricControl.HistogramOptions": "1* double buckets",
    "ModelConfig": (
        "1 string name; 2 string platform; 17 string backend; 25 string runtime; "
        "3 .ModelVersionPolicy version_policy; 4 int32 max_batch_size; 5* .ModelInput input; 6* .ModelOutput output; "
        "20* .BatchInput batch_input; 21* .BatchOutput batch_output; 12 .ModelOptimizationPolicy optimization; "
        "11 .ModelDynamicBatching dynamic_batching/scheduling_choice; "
        "13 .ModelSequenceBatching sequence_batching/scheduling_choice; "
        "15 .ModelEnsembling ensemble_scheduling/scheduling_choice; 7* .ModelInstanceGroup instance_group; "
        "8 string default_model_filename; 9 map<string,string> cc_model_filenames; 10 map<string,string> metric_tags; "
        "14 map<string,.ModelParameter> parameters; 16* .ModelWarmup model_warmup; "
        "18 .ModelOperations model_operations; 19 .ModelTransactionPolicy model_transaction_policy; "
        "23 .ModelRepositoryAgents model_repository_agents; 24 .ModelResponseCache response_cache; "
        "26 .ModelMetrics model_metrics"
    ),
}

# Values are numbered from 0.
_ENUMS: Mapping[str, str] = {
    "DataType": (
        "TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 TYPE_INT32 "
        "TYPE_INT64 TYPE_FP16 TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16"
    ),
    "ModelInstanceGroup.Kind": "KIND_AUTO KIND_GPU KIND_CPU KIND_MODEL",
    "ModelInstanceGroup.SecondaryDevice.SecondaryDeviceKind": "KIND_NVDLA",
    "ModelInput.Format": "FORMAT_NONE FORMAT_NHWC FORMAT_NCHW",
    "BatchInput.Kind": (
        "BATCH_ELEMENT_COUNT BATCH_ACCUMULATED_ELEMENT_COUNT BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO "
        "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE BATCH_ITEM_SHAPE BATCH_ITEM_SHAPE_FLATTEN"
    ),
    "BatchOutput.Kind": "BATCH_SCATTER_WITH_INPUT_SHAPE",
    "ModelOptimizationPolicy.ModelPriority": "PRIORITY_DEFAULT PRIORITY_MAX PRIORITY_MIN",
    "ModelQueuePolicy.TimeoutAction": "REJECT DELAY",
    "ModelSequenceBatching.Control.Kind": (
        "CONTROL_SEQUENCE_START CONTROL_SEQUENCE_READY CONTROL_SEQUENCE_END CONTROL_SEQUENCE_CORRID"
    ),
}

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
    "float": _Field.TYPE_FLOAT,
    "double": _Field.TYPE_DOUBLE,
    "string": _Field.TYPE_STRING,
}


def descriptor() -> Descriptor:
    """The descriptor of `ModelConfig`."""
    return _pool().FindMessageTypeByName(f"{PACKAGE}.ModelConfig")


def new() -> ModelConfig:
    """An empty `ModelConfig`."""
    return message_factory.GetMessageClass(descriptor())()


def value_name(message: str, enumeration: str, number: int) -> str:
    """The name of an enum's value: `value_name("", "DataType", 11)` is `TYPE_FP32`; its number if it has none."""
    path = f"{message}.{enumeration}" if message else enumeration
    names = _ENUMS[path].split()
    return names[number] if number < len(names) else str(number)


def data_types() -> tuple[str, ...]:
    """Names of Triton's data types by number."""
    return tuple(_ENUMS["DataType"].split())


def parse(text: str, origin: str) -> ModelConfig:
    """Read a `config.pbtxt`.

    Args:
        origin: what the text is, for the error: a file's name.

    Raises:
        ConfigurationError: it is no text format, names an unknown field, or a value is of another type.
    """
    message = new()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise ConfigurationError(
            f"{origin} is not a model configuration: {error}",
            "The line and column say where; fields are those of Triton's model_config.proto.",
        ) from error
    return message


def lay_over(config: ModelConfig, fragment: ModelConfig) -> None:
    """Set what a fragment sets: a list takes the place of the one that is there, keys of a map are added to it.

    A zero and a `false` in the fragment are as if they were not there: the format does not tell them apart.
    """
    _clear(config, fragment)
    config.MergeFrom(fragment)


def _clear(config: Any, fragment: Any) -> None:
    """What a fragment sets, messages and maps apart: merging would add to a list."""
    for field, value in fragment.ListFields():
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if hasattr(value, "ListFields"):
            if config.HasField(field.name):
                _clear(getattr(config, field.name), value)
        elif not is_map:
            config.ClearField(field.name)


@contextlib.contextmanager
def numbers_that_fit() -> Iterator[None]:
    """For assignments to a message: a number that its field does not hold is the user's mistake.

    Raises:
        UsageError: there was one.
    """
    try:
        yield
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"a number is larger than Triton's configuration can hold: {one_line(error)}", "Give a smaller one."
        ) from error


def render(config: ModelConfig) -> str:
    """A configuration as text, fields in the order of Triton's own file, lists on one line."""
    return text_format.MessageToString(config, use_short_repeated_primitives=True, use_index_order=True)


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name=_FILE, package=PACKAGE, syntax="proto3")
    made: dict[str, descriptor_pb2.DescriptorProto] = {}
    for path, fields in _MESSAGES.items():
        parent, _, name = path.rpartition(".")
        message = made[parent].nested_type.add(name=name) if parent else file.message_type.add(name=name)
        made[path] = message
        for line in filter(None, fields.split("; ")):
            _add_field(message, path, line)
    for path, names in _ENUMS.items():
        parent, _, name = path.rpartition(".")
        enumeration = made[parent].enum_type.add(name=name) if parent else file.enum_type.add(name=name)
        for number, value in enumerate(names.split()):
            enumeration.value.add(name=value, number=number)
    # A pool of its own: another package may have Triton's real file in protobuf's default one.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _add_field(message: descriptor_pb2.DescriptorProto, path: str, line: str) -> None:
    number, kind, name = line.split()
    name, _, choice = name.partition("/")
    field = message.field.add(name=name, number=int(number.rstrip("*")), json_name=name)
    field.label = _Field.LABEL_REPEATED if number.endswith("*") else _Field.LABEL_OPTIONAL
    if choice:
        choices = [declared.name for declared in message.oneof_decl]
        if choice not in choices:
            message.oneof_decl.add(name=choice)
            choices.append(choice)
        field.oneof_index = choices.index(choice)
    if kind.startswith("map<"):
        key, _, value = kind[4:-1].partition(",")
        entry = message.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        _set_type(entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL), path, key)
        _set_type(entry.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL), path, value)
        field.label = _Field.LABEL_REPEATED
        field.type = _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{path}.{entry.name}"
    else:
        _set_type(field, path, kind)


def _set_type(field: descriptor_pb2.FieldDescriptorProto, path: str, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
        return
    full = kind[1:] if kind.startswith(".") else _resolve(path, kind)
    field.type = _Field.TYPE_ENUM if full in _ENUMS else _Field.TYPE_MESSAGE
    field.type_name = f".{PACKAGE}.{full}"


def _resolve(path: str, kind: str) -> str:
    """The full name of a message or enum that is declared in `path` or in one around it."""
    scope = path
    while scope and f"{scope}.{kind}" not in {*_MESSAGES, *_ENUMS}:
        scope = scope.rpartition(".")[0]
    return f"{scope}.{kind}" if scope else kind
