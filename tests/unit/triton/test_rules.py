"""Every rule, with what breaks it and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gpuopt.shapes import ShapeRange, TensorSpec
from gpuopt.triton import check, schema
from gpuopt.triton.rules import RULES
from gpuopt.triton.rules.finding import Finding
from gpuopt.triton.served import Served, ServedTensor
from tests.unit.triton.models import CONFIG, served


def ask(text: str, model: Served | None, folder: Path | None = None) -> list[Finding]:
    return check.findings(schema.parse(text, "it"), model, folder)


def swap(old: str, new: str) -> str:
    assert old in CONFIG, old
    return CONFIG.replace(old, new)


def add(text: str) -> str:
    return CONFIG + text


def test_what_fits_has_no_finding(tmp_path: Path) -> None:
    assert ask(CONFIG, served(tmp_path)) == []


BATCHER = "dynamic_batching { }"
BROKEN = [
    ("max_batch_size", "error", swap("max_batch_size: 8", "max_batch_size: 16"), "profiles end at batch 8"),
    ("max_batch_size", "error", swap("max_batch_size: 8", "max_batch_size: -1"), "negative"),
    ("unused_batch", "warning", swap("max_batch_size: 8", "max_batch_size: 4"), "go to batch 8"),
    ("scheduler_needs_batch", "error", swap("max_batch_size: 8", "max_batch_size: 0"), "max_batch_size is 0"),
    ("scheduler_needs_batch", "warning", swap("max_batch_size: 8", "max_batch_size: 1"), "nothing to put together"),
    ("preferred_sizes", "error", swap(BATCHER, "dynamic_batching { preferred_batch_size: 16 }"), "max_batch_size is 8"),
    ("preferred_sizes", "error", swap(BATCHER, "dynamic_batching { preferred_batch_size: 0 }"), "0"),
    ("priorities", "error", swap(BATCHER, "dynamic_batching { priority_levels: 2 }"), "there are 2 levels"),
    (
        "priorities", "error",
        swap(BATCHER, "dynamic_batching { priority_levels: 2 default_priority_level: 1 "
             "priority_queue_policy { key: 3 value { } } }"),
        "there are 2 levels",
    ),
    (
        "priorities", "warning",
        swap(BATCHER, "dynamic_batching { priority_queue_policy { key: 3 value { } } }"), "does nothing",
    ),
    ("priorities", "warning", swap(BATCHER, "dynamic_batching { default_priority_level: 1 }"), "no priority_levels"),
    (
        "ordering", "error",
        swap(BATCHER, "dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }"),
        "excludes priority_levels",
    ),
    (
        "ordering", "error",
        swap(BATCHER, "dynamic_batching { preserve_ordering: true default_queue_policy "
             "{ timeout_action: DELAY default_timeout_microseconds: 5 } }"),
        "excludes timeout_action DELAY",
    ),
    (
        "timeouts", "error",
        swap(BATCHER, "dynamic_batching { max_queue_delay_microseconds: 100000 default_queue_policy "
             "{ default_timeout_microseconds: 5000 } }"),
        "may hold a request for 100 ms",
    ),
    (
        "timeouts", "warning",
        swap(BATCHER, "dynamic_batching { default_queue_policy { timeout_action: DELAY } }"), "without a timeout",
    ),
    (
        "timeouts", "warning",
        swap(BATCHER, "dynamic_batching { default_queue_policy { allow_timeout_override: true } }"), "only shorten",
    ),
    (
        "queue_size", "warning",
        swap(BATCHER, "dynamic_batching { default_queue_policy { max_queue_size: 4 } }"), "a batch has up to 8",
    ),
    ("queue_delay", "warning", swap(BATCHER, "dynamic_batching { preferred_batch_size: [2, 4] }"), "closed at 2"),
    (
        "response_cache", "error",
        add("response_cache { enable: true } model_transaction_policy { decoupled: true }"), "excludes decoupled",
    ),
    (
        "response_cache", "error",
        swap(BATCHER, "sequence_batching { }") + "response_cache { enable: true }", "excludes sequence_batching",
    ),
    ("decoupled", "error", add("model_transaction_policy { decoupled: true }"), "answers each request once"),
    ("stateful", "warning", swap(BATCHER, "sequence_batching { }"), "keeps no state"),
    (
        "stateful", "error", swap(BATCHER, "sequence_batching { direct { minimum_slot_utilization: 2 } }"), "no share",
    ),
    ("there_are_tensors", "warning", swap('output { name: "scores" data_type: TYPE_FP32 dims: [10] }', ""), "none"),
    ("names", "error", swap('name: "image"', 'name: "img"'), "no such input"),
    ("names", "error", swap('input { name: "image" data_type: TYPE_FP32 dims: [3, 16, 16] }', ""), "is missing"),
    ("names", "warning", swap('name: "scores"', 'name: "score"'), "'scores' is missing"),
    ("unique_names", "error", add('input { name: "image" data_type: TYPE_FP32 dims: [3, 16, 16] }'), "twice"),
    ("unique_names", "error", add("input { data_type: TYPE_FP32 dims: [3, 16, 16] }"), "no name"),
    ("data_types", "error", swap("TYPE_FP32 dims: [3", "TYPE_FP16 dims: [3"), "the engine has float32"),
    ("dims", "error", swap("[3, 16, 16]", "[8, 3, 16, 16]"), "counts the batch"),
    ("dims", "error", swap("[3, 16, 16]", "[16, 16]"), "has 2 dimensions"),
    ("dims", "error", swap("[3, 16, 16]", "[3, 16, 32]"), "batchx3x16x16"),
    ("dims", "error", swap("[3, 16, 16]", "[3, 16, -1]"), "batchx3x16x16"),
    ("dims_are_not_empty", "error", swap("dims: [10]", ""), "empty"),
    ("dims_are_not_empty", "error", swap("dims: [10]", "dims: [0]"), "0 is no size"),
    ("reshape", "error", swap("dims: [10]", "dims: [3] reshape { shape: [10] }"), "other elements"),
    ("image_format", "error", swap("dims: [3, 16, 16]", "format: FORMAT_NCHW dims: [16, 16]"), "for 2 dims"),
    ("io_formats", "error", swap("dims: [10]", "dims: [10] is_non_linear_format_io: true"), "tensor is linear"),
    ("tensorrt_only_flags", "error", swap("dims: [10]", "dims: [10] is_shape_tensor: true"), "is none"),
    (
        "ragged_inputs", "error",
        swap("dims: [3, 16, 16]", "dims: [768] reshape { shape: [3, 16, 16] } allow_ragged_batch: true"), "reshaped",
    ),
    ("optional_inputs", "error", swap("dims: [3, 16, 16]", "dims: [3, 16, 16] optional: true"), "computes nothing"),
    ("batch_inputs", "error", add('batch_input { source_input: "no" data_type: TYPE_INT32 }'), "no"),
    ("batch_inputs", "error", add('batch_input { source_input: "image" data_type: TYPE_INT8 }'), "TYPE_INT8"),
    (
        "batch_inputs", "error", add('batch_output { source_input: "image" target_name: "image" }'), "no output",
    ),
    ("instance_kinds", "error", swap("kind: KIND_GPU", "kind: KIND_CPU"), "GPUs alone"),
    ("instance_kinds", "error", swap("kind: KIND_GPU", "kind: KIND_MODEL gpus: [0]"), "has no GPUs"),
    ("instance_counts", "error", swap("count: 1", "count: -1"), "negative"),
    ("instance_counts", "error", swap("count: 1", "count: 1 gpus: [-1]"), "negative"),
    ("instance_counts", "error", swap("count: 1", "count: 1 gpus: [0, 0]"), "twice"),
    ("instance_counts", "error", swap("count: 1", "count: 1 passive: true"), "passive"),
    (
        "instance_counts", "error",
        swap("count: 1", 'name: "a"') + 'instance_group { kind: KIND_GPU name: "a" }', "one name",
    ),
    ("profiles", "error", swap("count: 1", 'count: 1 profile: ["1"]'), "are 0 to 0"),
    (
        "rate_limiter", "error",
        swap("count: 1", 'rate_limiter { resources { name: "R" } resources { name: "R" global: true } }'), "global",
    ),
    ("compute_capabilities", "error", add('cc_model_filenames { key: "sm80" value: "a" }'), "no compute capability"),
    (
        "accelerators", "error",
        add('optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } }'),
        "no 'tensorrt'",
    ),
    (
        "cuda_graphs", "error",
        add("optimization { cuda { graphs: true graph_spec { batch_size: 16 } } }"), "max_batch_size is 8",
    ),
    ("cuda_graphs", "warning", add("optimization { cuda { graph_spec { batch_size: 1 } } }"), "it is off"),
    (
        "cuda_graphs", "error",
        add('optimization { cuda { graphs: true graph_spec { batch_size: 2 input { key: "image" value '
            "{ dim: [3, 8, 8] } } } } }"),
        "no profile",
    ),
    ("warm_up", "error", add('model_warmup { name: "w" batch_size: 1 }'), "'image' is missing"),
    (
        "warm_up", "error",
        add('model_warmup { name: "w" batch_size: 9 inputs { key: "image" value { data_type: TYPE_FP32 '
            "dims: [3, 16, 16] zero_data: true } } }"),
        "largest batch is 8",
    ),
    (
        "warm_up", "error",
        add('model_warmup { name: "w" batch_size: 1 inputs { key: "image" value { data_type: TYPE_FP16 '
            "dims: [3, 16, 16] zero_data: true } } }"),
        "not the input's",
    ),
    (
        "warm_up", "error",
        add('model_warmup { name: "w" batch_size: 1 inputs { key: "image" value { data_type: TYPE_FP32 '
            "dims: [3, 16] zero_data: true } } }"),
        "the input has",
    ),
    (
        "warm_up", "error",
        add('model_warmup { name: "w" batch_size: 1 inputs { key: "image" value { data_type: TYPE_FP32 '
            "dims: [3, 16, 16] } } }"),
        "not which values",
    ),
    (
        "warm_up", "error",
        add('model_warmup { name: "w" batch_size: 1 inputs { key: "image" value { data_type: TYPE_FP32 '
            'dims: [3, 16, 16] zero_data: true } } inputs { key: "mask" value { zero_data: true } } }'),
        "no input 'mask'",
    ),
    ("metrics", "error", add("model_metrics { metric_control { } }"), "cannot be set"),
    (
        "metrics", "error",
        add('model_metrics { metric_control { metric_identifier { family: "nv_inference_first_response_histogram_ms" } '
            "histogram_options { buckets: [5, 1] } } }"),
        "does not rise",
    ),
    ("platform", "error", swap("tensorrt_plan", "onnxruntime_onnx"), "does not go with"),
    (
        "platform", "error",
        swap('platform: "tensorrt_plan"\nbackend: "tensorrt"', 'backend: "onnxruntime"'), "does not run",
    ),
    (
        "platform", "warning",
        swap('platform: "tensorrt_plan"\nbackend: "tensorrt"', ""), "guesses",
    ),
    ("platform", "error", swap('platform: "tensorrt_plan"\nbackend: "tensorrt"', 'platform: "ensemble"'), "'ensemble'"),
    ("platform", "error", swap('platform: "tensorrt_plan"\nbackend: "tensorrt"', 'platform: "caffe"'), "unknown"),
    ("one_source", "error", swap('"model.plan"', '"../model.plan"'), "leaves"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "severity", "text", "told"), BROKEN)
def test_a_rule_finds_what_breaks_it(tmp_path: Path, rule: str, severity: str, text: str, told: str) -> None:
    found = [f for f in ask(text, served(tmp_path)) if f.rule == rule]
    assert found, f"{rule} finds nothing"
    assert any(f.severity == severity and told in f"{f.field}: {f.message}" for f in found), found
    for finding in found:
        assert len(finding.lines()) <= 3
        assert finding.fix
        assert "\n" not in finding.message + finding.fix


def test_a_smallest_batch_above_one(tmp_path: Path) -> None:
    profile = {"image": ShapeRange((2, 3, 16, 16), (4, 3, 16, 16), (8, 3, 16, 16))}
    found = ask(CONFIG, served(tmp_path, profiles=(profile,)))
    assert [f.rule for f in found] == ["smallest_batch"]


def test_a_model_that_cannot_be_batched(tmp_path: Path) -> None:
    model = served(tmp_path, batched_outputs=())
    assert "depend on each other" in next(f for f in ask(CONFIG, model) if f.rule == "max_batch_size").message
    fixed = served(tmp_path, inputs=(ServedTensor(TensorSpec("image", "float32", (1, 3, 16, 16))),))
    assert "no dynamic first dimension" in next(f for f in ask(CONFIG, fixed) if f.rule == "max_batch_size").message
    whole = CONFIG.replace("max_batch_size: 8", "").replace("dynamic_batching { }", "")
    whole = whole.replace("[3, 16, 16]", "[-1, 3, 16, 16]").replace("[10]", "[-1, 10]")
    assert ask(whole, model) == []
    left_out = ask(whole.replace("[-1, 10]", "[10]"), model)
    assert [(f.rule, "leaves the first dimension out" in f.message) for f in left_out] == [("dims", True)]


def test_a_packed_input_has_to_be_told(tmp_path: Path) -> None:
    packed = ServedTensor(TensorSpec("image", "float16", ("batch", 3, 16, 16)), linear=False)
    model = served(tmp_path, inputs=(packed,))
    text = CONFIG.replace("TYPE_FP32 dims: [3", "TYPE_FP16 dims: [3")
    assert [f.rule for f in ask(text, model)] == ["io_formats"]
    assert ask(text.replace("dims: [3, 16, 16]", "dims: [3, 16, 16] is_non_linear_format_io: true"), model) == []


def test_profiles_of_an_engine_that_has_several(tmp_path: Path) -> None:
    small = {"image": ShapeRange((1, 3, 16, 16), (1, 3, 16, 16), (1, 3, 16, 16))}
    model = served(tmp_path, profiles=(small, *served(tmp_path).profiles))
    assert [(f.rule, f.severity) for f in ask(CONFIG, model)] == [("profiles", "warning")]
    assert ask(CONFIG.replace("count: 1", 'count: 1 profile: ["0", "1"]'), model) == []


def test_a_size_outside_the_profiles(tmp_path: Path) -> None:
    profile = {"image": ShapeRange((1, 3, 16, 16), (4, 3, 32, 32), (8, 3, 64, 64))}
    tensor = ServedTensor(TensorSpec("image", "float32", ("batch", 3, "height", "width")))
    model = served(tmp_path, profiles=(profile,), inputs=(tensor,))
    assert ask(CONFIG, model) == []
    assert ask(CONFIG.replace("[3, 16, 16]", "[3, -1, -1]"), model) == []
    found = ask(CONFIG.replace("[3, 16, 16]", "[3, 128, 16]"), model)
    assert [f.rule for f in found] == ["dims_inside_profiles"]


def test_outputs_of_torchscript_are_numbered(tmp_path: Path) -> None:
    text = CONFIG.replace("tensorrt_plan", "pytorch_libtorch").replace('"tensorrt"', '"pytorch"')
    named = served(tmp_path, "pytorch", outputs=(ServedTensor(TensorSpec("scores__0", "float32", ("batch", 10))),),
                   batched_outputs=("scores__0",))  # fmt: skip
    assert ask(text.replace("scores", "scores__0"), named) == []
    assert "pytorch_names" in [f.rule for f in ask(text, named)]
    twice = text.replace("scores", "scores__0") + 'output { name: "more__0" data_type: TYPE_FP32 dims: [10] }'
    assert any(f.rule == "pytorch_names" and "one index" in f.message for f in ask(twice, named))
    # Numbers count, whatever stands before them; inputs are forward's, or are numbered as well.
    numbered = text.replace('"scores"', '"OUTPUT__0"').replace('"image"', '"INPUT__0"')
    assert ask(numbered, named) == []
    assert [f.rule for f in ask(numbered.replace("dims: [10]", "dims: [11]"), named)] == ["dims"]
    for old, new in (("OUTPUT__0", "OUTPUT__1"), ("INPUT__0", "INPUT__1")):
        assert "names" in [f.rule for f in ask(numbered.replace(old, new), named)]


def test_what_triton_does_not_refuse_is_no_error(tmp_path: Path) -> None:
    def batcher(text: str) -> list[Finding]:
        return ask(swap(BATCHER, f"dynamic_batching {{ max_queue_delay_microseconds: 9000 {text} }}"), served(tmp_path))

    policy = "timeout_action: {} default_timeout_microseconds: 5000"
    assert batcher(f"default_queue_policy {{ {policy.format('DELAY')} }}") == []
    ignored = f"priority_queue_policy {{ key: 1 value {{ {policy.format('REJECT')} }} }}"
    assert [(f.rule, f.severity) for f in batcher(ignored)] == [("priorities", "warning")]


def test_files_and_versions(tmp_path: Path) -> None:
    model = served(tmp_path)
    folder = tmp_path / "m"
    folder.mkdir()

    def rules(text: str = CONFIG) -> list[str]:
        return [f.rule for f in ask(text, model, folder)]

    assert rules() == ["versions"]
    (folder / "1").mkdir()
    assert rules() == ["files", "is_this_engine"]
    (folder / "1/model.plan").write_bytes(b"other")
    assert rules() == ["is_this_engine"]
    (folder / "1/model.plan").write_bytes(model.file.read_bytes())
    assert model.record is not None
    model = dataclasses.replace(model, record=None)
    assert rules() == []
    assert rules(CONFIG.replace('name: "m"', 'name: "n"')) == ["name"]
    assert rules(CONFIG + "version_policy { specific { versions: [2, 3] } }") == ["versions", "versions"]
    some = ask(CONFIG + "version_policy { specific { versions: [1, 2] } }", model, folder)
    assert [(f.rule, f.severity) for f in some] == [("versions", "warning")]
    assert rules(CONFIG + "version_policy { specific { } }") == ["versions"]
    assert rules(CONFIG + "version_policy { latest { } }") == ["versions"]
    assert rules(CONFIG + 'cc_model_filenames { key: "8.0" value: "a100.plan" }') == ["files"]
    (folder / "1/model.plan").rename(folder / "1/a100.plan")
    alone = swap('default_model_filename: "model.plan"', 'cc_model_filenames { key: "8.0" value: "a100.plan" }')
    assert [(f.rule, f.severity) for f in ask(alone, model, folder)] == [("files", "warning")]
    (folder / "1/a100.plan").rename(folder / "1/model.plan")
    warm_up = (
        'model_warmup { name: "w" batch_size: 1 inputs { key: "image" value { data_type: TYPE_FP32 dims: [3, 16, 16] '
        'input_data_file: "f" } } }'
    )
    assert rules(CONFIG + warm_up) == ["warm_up_files"]
    (folder / "warmup").mkdir()
    (folder / "warmup/f").write_bytes(bytes(100))
    assert rules(CONFIG + warm_up) == ["warm_up_files"]
    (folder / "warmup/f").write_bytes(bytes(3 * 16 * 16 * 4))
    assert rules(CONFIG + warm_up) == []


ENSEMBLE = """
platform: "ensemble"
max_batch_size: 4
input { name: "raw" data_type: TYPE_UINT8 dims: [-1] }
output { name: "class" data_type: TYPE_INT64 dims: [1] }
ensemble_scheduling {
  step { model_name: "a" model_version: -1 input_map { key: "x" value: "raw" } output_map { key: "y" value: "t" } }
  step { model_name: "b" model_version: -1 input_map { key: "x" value: "t" } output_map { key: "y" value: "class" } }
}
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("", "", ""),
        ('value: "class"', 'value: "t"', "made twice"),
        ('key: "x" value: "t"', 'key: "x" value: "u"', "no step makes it, and"),
        ('key: "x" value: "raw"', 'key: "x" value: "t"', "no step reads it"),
        ('name: "class"', 'name: "klass"', "no step makes it"),
        ('model_name: "a" ', "", "not set"),
        ('input_map { key: "x" value: "raw" }', "", "it is empty"),
        ("max_batch_size: 4", "instance_group { count: 1 }", "no instances"),
        ("max_batch_size: 4", "optimization { }", "computes nothing"),
        ('platform: "ensemble"', 'backend: "tensorrt"', "ensemble"),
    ],
)
def test_ensembles(old: str, new: str, told: str) -> None:
    found = ask(ENSEMBLE.replace(old, new, 1) if old else ENSEMBLE, None)
    assert bool(found) == bool(told)
    assert any(told in f"{f.message} {f.fix}" for f in found) or not told


def test_an_ensemble_s_steps_are_in_the_repository(tmp_path: Path) -> None:
    for name in ("e/1", "a"):
        (tmp_path / name).mkdir(parents=True)
    found = ask(ENSEMBLE, None, tmp_path / "e")
    assert [f.field for f in found] == ["step 'b'"]


def test_every_rule_is_tested() -> None:
    here = Path(__file__).read_text()
    for rule in RULES:
        assert f'"{rule.__name__}"' in here or rule.__name__ in ("ensemble", "data_type_is_set"), rule.__name__
    assert len({rule.__name__ for rule in RULES}) == len(RULES)
