"""From a model and options to a configuration; the syntax of flags; ensembles."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuopt.errors import ConfigurationError, UsageError
from gpuopt.shapes import ShapeRange, TensorSpec
from gpuopt.triton import config, ensemble, flags, options, schema
from gpuopt.triton.options import DynamicBatching, InstanceGroup, Options, QueuePolicy
from gpuopt.triton.served import ServedTensor
from tests.unit.triton.models import CONFIG, served


def test_the_smallest_configuration(tmp_path: Path) -> None:
    made = config.make(served(tmp_path), "m", Options(), {})
    wanted = schema.parse(CONFIG, "it")
    assert made.config == wanted
    assert schema.parse(schema.render(made.config), "it") == wanted


def test_rows_that_depend_on_each_other_are_not_batched(tmp_path: Path) -> None:
    made = config.make(served(tmp_path, batched_outputs=()), "m", Options(), {})
    assert made.config.max_batch_size == 0
    assert list(made.config.input[0].dims) == [-1, 3, 16, 16]
    assert not made.config.HasField("dynamic_batching")
    assert any("depend on each other" in warning for warning in made.warnings)
    with pytest.raises(UsageError, match="depend on each other"):
        config.make(served(tmp_path, batched_outputs=()), "m", Options(max_batch_size=4), {})
    asked = Options(dynamic_batching=DynamicBatching(max_queue_delay_microseconds=5))
    with pytest.raises(UsageError, match="cannot be batched"):
        config.make(served(tmp_path, batched_outputs=()), "m", asked, {})


def test_one_number_a_row_is_reshaped(tmp_path: Path) -> None:
    model = served(tmp_path, outputs=(ServedTensor(TensorSpec("scores", "float32", ("batch",))),))
    output = config.make(model, "m", Options(), {}).config.output[0]
    assert list(output.dims) == [1]
    assert output.HasField("reshape")
    assert list(output.reshape.shape) == []
    scalar = served(tmp_path, outputs=(ServedTensor(TensorSpec("scores", "float32", ())),))
    with pytest.raises(UsageError, match="scalar"):
        config.make(scalar, "m", Options(), {})


def test_several_profiles_are_all_named(tmp_path: Path) -> None:
    one = {"image": ShapeRange((1, 3, 16, 16), (1, 3, 16, 16), (1, 3, 16, 16))}
    model = served(tmp_path, profiles=(one, *served(tmp_path).profiles))
    assert list(config.make(model, "m", Options(), {}).config.instance_group[0].profile) == ["0", "1"]


def test_a_fragment_is_laid_over_the_rest(tmp_path: Path) -> None:
    fragment = tmp_path / "more.pbtxt"
    fragment.write_text('parameters { key: "a" value { string_value: "b" } } optimization { eager_batching: true }')
    made = config.make(served(tmp_path), "m", Options(merged=fragment), {})
    assert made.config.parameters["a"].string_value == "b"
    assert made.config.optimization.eager_batching
    fragment.write_text(
        "instance_group { kind: KIND_GPU count: 4 } version_policy { specific { versions: 3 } } dynamic_batching "
        "{ preferred_batch_size: 4 priority_levels: 1 default_priority_level: 1 } metric_tags { key: 'a' value: '2' }"
    )
    asked = Options(
        merged=fragment, version_policy="specific:1,2", metric_tags={"a": "1", "b": "1"},
        dynamic_batching=DynamicBatching(preferred_batch_size=(2, 8), max_queue_delay_microseconds=5),
    )  # fmt: skip
    made = config.make(served(tmp_path), "m", asked, {})
    assert [group.count for group in made.config.instance_group] == [4]
    assert list(made.config.version_policy.specific.versions) == [3]
    batching = made.config.dynamic_batching
    assert (list(batching.preferred_batch_size), batching.max_queue_delay_microseconds) == ([4], 5)
    assert dict(made.config.metric_tags) == {"a": "2", "b": "1"}
    fragment.write_text("eager: true")
    with pytest.raises(ConfigurationError, match=r"more\.pbtxt is not a model configuration"):
        config.make(served(tmp_path), "m", Options(merged=fragment), {})


def test_numbers_that_triton_s_configuration_does_not_hold(tmp_path: Path) -> None:
    for asked in (
        Options(dynamic_batching=DynamicBatching(default_queue_policy=QueuePolicy(max_queue_size=5_000_000_000))),
        Options(dynamic_batching=DynamicBatching(priority_levels=2**64)),
        Options(instances=(InstanceGroup("KIND_GPU", 2**31),)),
        Options(version_policy=f"latest:{2**32}"),
    ):
        with pytest.raises(UsageError, match="larger than Triton's configuration can hold"):
            config.make(served(tmp_path), "m", asked, {})


def test_a_capability_stands_before_a_bundle_whatever_its_path() -> None:
    assert flags._engines(("8.6=/data/run=3/a.gpuopt", "/data/run=3/a.gpuopt", "9.0=b.gpuopt")) == (
        ("8.6", Path("/data/run=3/a.gpuopt")), ("", Path("/data/run=3/a.gpuopt")), ("9.0", Path("b.gpuopt")),
    )  # fmt: skip


def test_instance_groups() -> None:
    assert options.instance_group("gpu:2:0,1") == InstanceGroup("KIND_GPU", 2, (0, 1))
    assert options.instance_group("cpu") == InstanceGroup("KIND_CPU", 1)
    for text in ("", "gpu:0", "gpu:x", "gpu:1:a", "cpu:1:0", "gpu:1:0:1"):
        with pytest.raises(UsageError):
            options.instance_group(text)


def test_priority_queues() -> None:
    assert options.priority_queues(["2:size=10,timeout=5ms,action=delay,override"]) == {
        2: QueuePolicy(10, 5000, "DELAY", True)
    }
    assert options.priority_queues(["1:"]) == {1: QueuePolicy()}
    for text in ("size=1", "1:size", "1:sizes=2", "1:action=drop", "1:timeout=5"):
        with pytest.raises(UsageError):
            options.priority_queues([text])


def test_accelerators_and_their_parameters() -> None:
    assert options.accelerators(["tensorrt", "cuda"], ["tensorrt:precision_mode=FP16"]) == {
        "tensorrt": {"precision_mode": "FP16"}, "cuda": {},
    }  # fmt: skip
    for text in ("cuda:a=b", "tensorrt:a", "a=b"):
        with pytest.raises(UsageError):
            options.accelerators(["tensorrt"], [text])


def test_flags_that_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        flags.existing(True, True)
    with pytest.raises(UsageError):
        flags.ensemble(None, ["a"], [], [])
    with pytest.raises(UsageError):
        flags.ensemble("e", [], [], [])
    with pytest.raises(UsageError):
        flags.options(flags.Batching(disabled=True, preserve_ordering=True), flags.Running(), None)
    with pytest.raises(UsageError):
        flags.options(flags.Batching(max_queue_delay="5ms"), flags.Running(), tmp_path / "plan.json")
    with pytest.raises(UsageError):
        flags.check_alone(tmp_path)
    assert flags.options(flags.Batching(disabled=True), flags.Running(), None).dynamic_batching is None


STEP = """
name: "{name}" max_batch_size: 4
input {{ name: "{given}" data_type: TYPE_{kind} dims: [3] }} output {{ name: "{made}" data_type: TYPE_FP32 dims: [3] }}
"""


def test_an_ensemble_by_names_and_by_the_only_tensor_left() -> None:
    steps = [
        schema.parse(STEP.format(name=name, given=given, made=made, kind="FP32"), "it")
        for name, given, made in (("a", "x", "image"), ("b", "image", "y"), ("c", "z", "out"))
    ]
    made = ensemble.make("e", steps, {})
    by_name, alone = made.ensemble_scheduling.step[1], made.ensemble_scheduling.step[2]
    assert dict(by_name.input_map) == {"image": "a.image"}
    assert dict(alone.input_map) == {"z": "b.y"}
    assert [t.name for t in made.input] == ["x"]
    assert [t.name for t in made.output] == ["out"]
    with pytest.raises(UsageError, match=r"'b\.no' is none of the steps' tensors"):
        ensemble.make("e", steps, {"c.z": "b.no"})
    with pytest.raises(UsageError, match=r"no step before 'a' makes 'c\.out'"):
        ensemble.make("e", steps, {"a.x": "c.out"})


def test_what_is_matched_already_is_not_left(tmp_path: Path) -> None:
    decode = schema.parse(STEP.format(name="decode", given="raw", made="image", kind="UINT8"), "it")
    model = schema.parse(
        STEP.format(name="m", given="image", made="y", kind="FP32")
        + 'input { name: "mask" data_type: TYPE_FP32 dims: [3] }',
        "it",
    )
    made = ensemble.make("e", [decode, model], {})
    assert dict(made.ensemble_scheduling.step[1].input_map) == {"image": "decode.image", "mask": "mask"}
    assert [t.name for t in made.input] == ["raw", "mask"]
    mapped = ensemble.make("e", [decode, model], {"m.mask": "decode.image", "m.image": "decode.image"})
    assert dict(mapped.ensemble_scheduling.step[1].input_map) == {"image": "decode.image", "mask": "decode.image"}


def test_a_mapped_input_has_one_source() -> None:
    asked = flags.ensemble("e", ["a"], ["c"], ["a.x=b.y", "a.x=c.y"])
    assert asked is not None
    assert asked.renamed == {"b.y": "a.x", "c.y": "a.x"}
    with pytest.raises(UsageError, match=r"'b\.y' has two sources, a\.x and a\.z"):
        flags.ensemble("e", ["a"], [], ["a.x=b.y", "a.z=b.y"])


@pytest.mark.parametrize(
    ("given", "taken", "fits"),
    [
        (("4", "[3]"), ("4", "[3]"), True),
        (("4", "[-1]"), ("4", "[3]"), True),
        (("4", "[3]"), ("0", "[-1, 3]"), True),
        (("4", "[3]"), ("4", "[4]"), False),
        (("4", "[3]"), ("4", "[3, 1]"), False),
        (("0", "[4, 3]"), ("4", "[5]"), False),
    ],
)
def test_shapes_that_meet_and_that_do_not(given: tuple[str, str], taken: tuple[str, str], fits: bool) -> None:
    first, second = (
        schema.parse(
            f'name: "{name}" max_batch_size: {batch} input {{ name: "{takes}" data_type: TYPE_FP32 dims: {dims} }} '
            f'output {{ name: "{makes}" data_type: TYPE_FP32 dims: {dims} }}',
            "it",
        )
        for name, (batch, dims), takes, makes in (("a", given, "x", "t"), ("b", taken, "t", "y"))
    )
    if fits:
        ensemble.make("e", [first, second], {})
    else:
        with pytest.raises(ConfigurationError, match=r"a\.t is .*, b\.t takes "):
            ensemble.make("e", [first, second], {})


def test_types_that_do_not_meet() -> None:
    steps = [
        schema.parse(STEP.format(name=name, given="x", made="x", kind=kind), "it")
        for name, kind in (("a", "FP32"), ("b", "INT8"))
    ]
    with pytest.raises(ConfigurationError, match=r"a\.x is TYPE_FP32, b\.x takes TYPE_INT8"):
        ensemble.make("e", steps, {})
