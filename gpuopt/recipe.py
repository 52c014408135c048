"""The recipe: everything that decides a run, typed, frozen and validated once.

A recipe is a YAML file with one section a stage. Flags and `--set` are laid over it before the
validation, so that there is one place where a value can be wrong and one kind of message for it.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from gpuopt.errors import GpuoptError, UsageError, one_line
from gpuopt.shapes import DTYPES, Profile, ShapeRange, format_shape, parse_shape
from gpuopt.storage import storage_errors

MAX_RECIPE_BYTES = 1 << 20
FACTORY_PATTERN = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")

AUTO = "auto"
Target = Literal["tensorrt-rtx", "tensorrt", "onnxruntime"]
Precision = Literal["int8", "fp16", "fp32"]
AskedPrecision = Literal["auto", "int8", "fp16", "fp32"]


def _as_shape(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return parse_shape(value)
        except UsageError as error:
            raise ValueError(error.message) from error
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return value


def _as_share(value: Any) -> Any:
    if isinstance(value, str) and value.rstrip().endswith("%"):
        try:
            return float(value.rstrip().removesuffix("%")) / 100
        except ValueError as error:
            raise ValueError("write a share as 0.5% or 0.005") from error
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _MEMORY.fullmatch(value.strip())
    if not match:
        raise ValueError("write a number with a unit, as in 2GiB or 500MiB")
    return int(float(match[1]) * _MEMORY_UNITS[match[2].lower()])


_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]i?B)")
_MEMORY_UNITS = {
    f"{prefix}{binary}b": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("kmgt", 1)
    for binary in ("", "i")
}
MemorySize = Annotated[int, BeforeValidator(_as_bytes), Field(ge=1)]


def _as_switch(value: Any) -> Any:
    # YAML reads a bare on or off as a boolean.
    return ("on" if value else "off") if isinstance(value, bool) else value


def _as_factor(value: Any) -> Any:
    if not isinstance(value, str) or "/" not in value:
        return value
    try:
        over, _, under = value.partition("/")
        return float(over) / float(under)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError("write a factor as 1/255 or 0.0039") from error


_Size = Annotated[int, Field(ge=1, strict=True)]
ShapeField = Annotated[tuple[_Size, ...], BeforeValidator(_as_shape), PlainSerializer(format_shape, when_used="json")]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(Section):
    """What is compiled: a file, a factory, or a file whose weights go into the factory's model."""

    path: str | None = Field(None, description="Model file; its kind is decided by its content.")
    factory: str | None = Field(
        None,
        description="package.module:factory, called without arguments, returns an nn.Module.",
    )
    trust_pickle: bool = Field(False, description="Let a pickled file run the code it carries.")

    @field_validator("factory")
    @classmethod
    def _module_and_function(cls, value: str | None) -> str | None:
        if value is not None and not FACTORY_PATTERN.match(value):
            raise ValueError("write package.module:function, as in myproject.networks:make")
        return value

    @model_validator(mode="after")
    def _something_to_compile(self) -> ModelSection:
        if not self.path and not self.factory:
            raise ValueError("give a path, a factory, or both")
        return self


class InputSection(Section):
    """One input: dtype, and one static shape or a min / opt / max range."""

    dtype: Literal[DTYPES] | None = None  # type: ignore[valid-type]
    shape: ShapeField | None = Field(
        None, description="Those of min, opt and max that are not given; alone: a static shape."
    )
    min: ShapeField | None = None
    opt: ShapeField | None = None
    max: ShapeField | None = None
    low: float | None = Field(
        None, description="Smallest value of generated reference inputs; bytes, where it takes them."
    )
    high: float | None = Field(None, description="Largest (integers: one past the largest) value.")

    def range(self) -> ShapeRange | None:
        """The min / opt / max shapes; a missing one is `shape`, else its nearest neighbour."""
        known = {
            "min": (self.min, self.shape, self.opt, self.max),
            "opt": (self.opt, self.shape, self.max, self.min),
            "max": (self.max, self.shape, self.opt, self.min),
        }
        # Not `or`: the shape of a scalar is the empty tuple.
        found = {name: next((s for s in shapes if s is not None), None) for name, shapes in known.items()}
        low, mid, high = found["min"], found["opt"], found["max"]
        if low is None or mid is None or high is None:
            return None
        return ShapeRange(low, mid, high)

    def bounds(self) -> tuple[float, float] | None:
        """Value range of generated inputs; None: the default of their dtype."""
        if self.low is None and self.high is None:
            return None
        return (self.low if self.low is not None else 0.0, self.high if self.high is not None else 1.0)

    @model_validator(mode="after")
    def _consistent(self) -> InputSection:
        try:
            self.range()
        except UsageError as error:
            raise ValueError(error.message) from error
        bounds = self.bounds()
        if bounds and bounds[0] > bounds[1]:
            raise ValueError(f"low {bounds[0]:g} is above high {bounds[1]:g} (by default 0 and 1)")
        return self


class ExportSection(Section):
    """PyTorch to ONNX."""

    opset: int = Field(20, ge=17, le=23, description="ONNX opset; 17 is for TensorRT 8.5.")
    exporters: Annotated[
        tuple[Literal["dynamo", "torchscript"], ...], BeforeValidator(_as_list), Field(min_length=1)
    ] = ("dynamo", "torchscript")
    seed: int = Field(0, ge=0, description="Seed of a factory's random weights and of generated inputs.")


class SimplifySection(Section):
    """Constant folding, shape inference and fusion, before quantization."""

    enabled: bool = True


Layout = Literal["nchw", "nhwc"]
InputDtype = Literal["float", "uint8"]


class LayoutSection(Section):
    """What the deployed model takes and gives, where that is other than the original model's inputs and outputs.

    `nhwc` stands for the channels last, whatever the number of spatial axes; `nchw` and `float` for what the original
    model has. One value is for all inputs (outputs), a mapping for those that it names.
    """

    input: Layout | dict[str, Layout] = "nchw"
    output: Layout | dict[str, Layout] = "nchw"
    input_dtype: InputDtype | dict[str, InputDtype] = Field(
        "float", description="uint8: bytes, which the graph turns into (bytes * scale - mean) / std."
    )
    mean: Annotated[tuple[float, ...], Field(min_length=1)] = (0.0,)
    std: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0,)
    scale: Annotated[float, BeforeValidator(_as_factor), Field(gt=0)] = Field(
        1 / 255, description="Factor of the bytes, before mean and std; 1/255 may be written so."
    )

    @field_validator("std")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(number > 0 for number in value):
            raise ValueError("std has to be above zero")
        return value

    @model_validator(mode="after")
    def _normalization_is_of_bytes(self) -> LayoutSection:
        lengths = {len(numbers) for numbers in (self.mean, self.std)} - {1}
        if len(lengths) > 1:
            raise ValueError("mean and std have different numbers of channels: give one number, or one for each")
        standard = (self.mean, self.std, self.scale) == ((0.0,), (1.0,), 1 / 255)
        if not standard and not self._takes_bytes():
            raise ValueError(
                "mean, std and scale are for bytes: give --input-dtype uint8 (layout.input_dtype) or leave them out"
            )
        return self

    def _takes_bytes(self) -> bool:
        asked = self.input_dtype
        return "uint8" in (asked.values() if isinstance(asked, dict) else (asked,))

    @property
    def changes(self) -> bool:
        """Whether anything is asked for that the original model does not have."""
        settings = (self.input, self.output, self.input_dtype)
        found = {v for setting in settings for v in (setting.values() if isinstance(setting, dict) else (setting,))}
        return bool(found - {"nchw", "float"})

    def input_is_channels_last(self, name: str) -> bool:
        """Whether an input of this name has its channels last."""
        return (self.input.get(name) if isinstance(self.input, dict) else self.input) == "nhwc"

    def output_is_channels_last(self, name: str) -> bool:
        """Whether an output of this name has its channels last."""
        return (self.output.get(name) if isinstance(self.output, dict) else self.output) == "nhwc"

    def input_is_bytes(self, name: str) -> bool:
        """Whether an input of this name is bytes."""
        asked = self.input_dtype
        return (asked.get(name) if isinstance(asked, dict) else asked) == "uint8"


class ImageSection(Section):
    """How the images of a folder become the model's input."""

    resize: int | None = Field(None, ge=1, description="Length of the shorter side after resizing, pixels.")
    crop: int | None = Field(None, ge=1, description="Side of the centre crop, pixels.")
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    scale: float = Field(1 / 255, gt=0, description="Factor before mean and std.")
    layout: Layout = "nchw"
    color: Literal["rgb", "bgr", "gray"] = "rgb"


class CalibrateSection(Section):
    """Which data decides the INT8 ranges, and how."""

    data: str | None = Field(None, description=".npz, folder, Polygraphy JSON or package.module:callable.")
    ranges: str | None = Field(None, description="Ranges file, or calibration cache of TensorRT, instead of data.")
    method: Literal["auto", "entropy", "minmax", "percentile", "mse"] = Field(
        "auto", description="auto: minmax, entropy or mse, whichever loses least at the model's outputs."
    )
    percentile: float = Field(99.99, gt=50, le=100)
    samples: int = Field(512, ge=1, description="At most this many samples, spread over the data.")
    random: bool = Field(False, description="Random data, for smoke tests; marks the report.")
    values: int = Field(
        1 << 13,
        ge=0,
        description="entropy, mse: values of an activation that each sample adds to its histogram; 0: every one.",
    )
    max_memory: MemorySize | None = Field(None, description="The most that calibration may add, as 2GiB or 500MiB.")
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    strict: bool = Field(False, description="A finding of the data checks is an error.")
    images: ImageSection | None = None

    @model_validator(mode="after")
    def _one_source(self) -> CalibrateSection:
        if self.random and self.ranges is not None:
            raise ValueError("ranges come from a file or from random data, not from both: leave out one")
        return self


class QuantizeSection(Section):
    """Static INT8: which nodes, and in which format."""

    format: Literal["qdq", "qoperator"] = "qdq"
    quantizer: Literal["gpuopt", "tensorrt"] = Field(
        "gpuopt", description="tensorrt: the native calibrator of TensorRT 8.5 to 10, for target tensorrt alone."
    )
    per_channel: bool = True
    op_types: Names = (
        "Conv", "ConvTranspose", "MatMul", "Gemm", "Add",
        "Concat", "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Split", "Slice", "Identity",
        "AveragePool", "GlobalAveragePool",
    )  # fmt: skip
    op_types_to_exclude: Names = ()
    nodes_to_exclude: Names = Field((), description="Node names; shell patterns such as '*/head/*'.")
    min_channels: int = Field(
        16,
        ge=1,
        description="A layer with fewer channels on a side stays out of INT8, but for the first Conv over an image and "
        "the outputs of a classifier behind an average of INT8 values.",
    )
    equalize: Annotated[Literal["auto", "off", "cross-layer", "smooth"], BeforeValidator(_as_switch)] = Field(
        "auto", description="Move per-channel factors between layers; auto: where held-out samples gain."
    )
    smooth_alpha: float | None = Field(None, ge=0, le=1, description="Empty: 0.5; auto tries 0.25, 0.5 and 0.75.")
    bias_correction: Annotated[Literal["auto", "on", "off"], BeforeValidator(_as_switch)] = Field(
        "auto", description="Take the mean error of INT8 layers out of their biases; auto: where held-out samples gain."
    )


class AnalyzeSection(Section):
    """Which layers cost accuracy in INT8, each quantized alone."""

    enabled: bool = Field(False, description="'gpuopt analyze' sets it; an accuracy budget analyzes where it has to.")
    samples: int = Field(32, ge=1, description="At most this many samples of accuracy.data or calibrate.data.")


class AccuracySection(Section):
    """How much accuracy INT8 may cost; above that, nodes fall back to FP16 until it holds."""

    max_drop: Annotated[float, BeforeValidator(_as_share), Field(ge=0)] | None = Field(
        None, description="Largest absolute drop of the metric against FP32: 0.5% or 0.005; 0.5 is 50%. Empty: none."
    )
    metric: str | None = Field(
        None, description="package.module:function, called with predictions and labels; larger is better."
    )
    data: str | None = Field(None, description="Evaluation data, as calibrate.data; empty: the calibration data.")
    labels: str | None = Field(None, description="A .npy file, or a key inside the evaluation data's .npz.")
    samples: int | None = Field(None, ge=1, description="Empty: all; of calibration data calibrate.samples.")

    @field_validator("metric")
    @classmethod
    def _module_and_function(cls, value: str | None) -> str | None:
        if value is not None and not FACTORY_PATTERN.match(value):
            raise ValueError("write package.module:function, as in myproject.metrics:accuracy")
        return value

    @model_validator(mode="after")
    def _needs_a_budget(self) -> AccuracySection:
        if self.max_drop is None and (self.metric or self.labels):
            raise ValueError("metric and labels need max_drop (--max-accuracy-drop), as in 0.5%")
        if self.max_drop is not None and self.max_drop > 1 and not self.metric:
            raise ValueError(f"max_drop {self.max_drop:g} is {self.max_drop:.0%}, above all there is: write 0.5%")
        return self


class CastSection(Section):
    """FP16: of the whole graph, or of what INT8 leaves."""

    remainder: Literal["fp16", "fp32"] = "fp16"
    op_types_to_keep: Names = Field((), description="Operator types that stay in FP32.")
    nodes_to_keep: Names = Field((), description="Nodes that stay in FP32; shell patterns.")


class BuildSection(Section):
    """The engines."""

    target: Annotated[tuple[Target, ...], BeforeValidator(_as_list)] = Field(
        (),
        description="Empty: TensorRT where it and a GPU are present, else TensorRT-RTX; ONNX Runtime always.",
    )
    enabled: bool = Field(True, description="false: make the graph for engines; 'gpuopt build' builds them elsewhere.")
    compute_capability: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        (), description="TensorRT-RTX: 8.6, 8.9, ...; empty: 8.0 and newer."
    )
    optimization_level: int | None = Field(None, ge=0, le=5, description="0 builds fast, 5 makes the fastest engine.")
    workspace: MemorySize | None = Field(None, description="Limit of scratch memory, as 4GiB; clamped to what is free.")
    timing_cache: str | None = Field(
        None, description="File of tactic timings; empty: one per TensorRT version and GPU in gpuopt's cache."
    )
    require_timing_cache: bool = Field(False, description="Fail where no fitting timing cache is there, for CI.")
    timing_iterations: int | None = Field(
        None, ge=1, description="How often a tactic that the cache lacks is timed; empty: 8 times."
    )
    attempts: int = Field(
        1,
        ge=1,
        le=16,
        description="Build each engine so often, each time with timings of its own, race them, and keep the fastest.",
    )
    tactic_sources: Names = Field((), description="TensorRT's names; empty: its own choice.")
    auxiliary_streams: int | None = Field(None, ge=0, description="At most so many inside one engine.")
    version_compatible: bool = Field(False, description="Runs in later minor releases of TensorRT, too.")
    hardware_compatibility: Literal["none", "ampere+", "same-compute-capability"] = "none"
    refit: bool = Field(False, description="Weights can be replaced later.")
    strip_weights: bool = Field(
        False, description="The plan holds no weights, so that it is not run here; TensorRT 10 and newer."
    )
    weight_streaming: bool = Field(False, description="Weights may stay in host memory; TensorRT 10 and newer.")
    plugins: Names = Field((), description="Shared libraries with plugins; they run code.")
    dla_core: int | None = Field(None, ge=0, description="The DLA core that takes what it can.")
    tf32: bool = Field(True, description="FP32 may multiply with TF32's ten bits of mantissa, as TensorRT does.")
    sparsity: bool = Field(False, description="2:4 sparsity where the weights have it.")
    io_formats: dict[str, str] | Literal["auto"] = Field(
        default_factory=dict,
        description="By tensor: DTYPE:FORMAT, as fp16:hwc8 or int8:chw32; auto: the fastest, by measurement.",
    )
    legacy: bool | None = Field(
        None, description="For TensorRT 8.5 and 8.6: opset 17, FP16 by builder flags; empty: as the TensorRT here is."
    )
    repairs: bool = Field(True, description="Try again where a node or the workspace stops the builder.")


class VerifySection(Section):
    """How far the deployed model may be from PyTorch."""

    enabled: bool = True
    min_cosine: float | None = Field(None, ge=-1, le=1, description="Empty: by precision.")
    min_sqnr_db: float | None = Field(None, description="Empty: not checked.")
    batch_invariance: bool = True
    min_precision_coverage: Annotated[float, BeforeValidator(_as_share), Field(ge=0, le=1)] | None = Field(
        None,
        description="Share of the computing layers' time in the asked-for precision, as 80%; less, or unseen, fails.",
    )


class SpeedSection(Section):
    """Engines of several precisions, timed in turn."""

    check: bool = Field(True, description="INT8 that is slower than FP16 is an error, where engines run here.")
    mixed: bool = Field(True, description="auto: also try INT8 with those nodes in FP16 that INT8 makes slower.")
    seconds: float = Field(3.0, gt=0, description="For all candidates together.")


class BenchmarkSection(Section):
    """Latency and throughput of what was built, measured after it was verified."""

    enabled: Annotated[Literal["auto", "on", "off"], BeforeValidator(_as_switch)] = Field(
        "auto", description="auto: where a gate needs it."
    )
    seconds: float = Field(2.0, gt=0, description="Measured for, of each file.")
    cuda_graph: bool = Field(True, description="Engines run as a CUDA graph.")


Percentile = Literal["p50", "p90", "p95", "p99"]


class GatesSection(Section):
    """What a release has to hold; `verify` and `accuracy` have the limits of accuracy, which are gates, too."""

    mode: Literal["fail", "warn"] = Field("fail", description="warn: report gates that do not pass, and pass.")
    max_latency_ms: dict[Percentile, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="By percentile, of single inferences: {p99: 5}."
    )
    max_latency_vs_fp16: float | None = Field(None, gt=0, description="Time of an inference over FP16's, as 0.9.")
    min_throughput: float | None = Field(None, gt=0, description="Samples a second.")
    max_engine_size: MemorySize | None = Field(None, description="Of each engine, as 50MiB.")
    max_device_memory: MemorySize | None = Field(None, description="Inputs, outputs and scratch memory, as 1GiB.")
    max_build_seconds: float | None = Field(None, gt=0, description="Of each engine's build.")
    max_calibration_warnings: int | None = Field(None, ge=0, description="Findings about the calibration data.")


class FailureSection(Section):
    """What is kept of a stage that fails inside a library, in `MODEL.gpuopt.failed/failure/`."""

    seconds: float = Field(60, ge=0, description="For finding the smallest graph that still fails; 0: none.")
    keep_weights: bool = Field(False, description="Leave the model's weights in it; else they are random.")


class OutputSection(Section):
    directory: str | None = Field(None, description="Bundle folder; empty: <model>.gpuopt beside the model.")


class Recipe(Section):
    """A whole run."""

    version: Literal[1] = 1
    model: ModelSection
    precision: AskedPrecision = "int8"
    inputs: dict[str, InputSection] = Field(default_factory=dict)
    profiles: tuple[dict[str, InputSection], ...] = Field(
        (), description="Further shape profiles, each with min / opt / max of every input."
    )
    export: ExportSection = ExportSection()
    simplify: SimplifySection = SimplifySection()
    layout: LayoutSection = LayoutSection()
    calibrate: CalibrateSection = CalibrateSection()
    quantize: QuantizeSection = QuantizeSection()
    analyze: AnalyzeSection = AnalyzeSection()
    accuracy: AccuracySection = AccuracySection()
    cast: CastSection = CastSection()
    build: BuildSection = BuildSection()
    verify: VerifySection = VerifySection()
    speed: SpeedSection = SpeedSection()
    benchmark: BenchmarkSection = BenchmarkSection()
    gates: GatesSection = GatesSection()
    output: OutputSection = OutputSection()
    failure: FailureSection = FailureSection()

    @model_validator(mode="after")
    def _format_fits_target(self) -> Recipe:
        if self.quantize.format == "qoperator" and any(t != "onnxruntime" for t in self.build.target):
            raise ValueError(
                "quantize.format qoperator is for ONNX Runtime on the CPU only: TensorRT reads Q/DQ pairs and has no "
                "QLinearConv. Use qdq, or build.target onnxruntime alone"
            )
        return self

    @model_validator(mode="after")
    def _native_calibration_is_tensorrts(self) -> Recipe:
        if self.quantize.quantizer == "gpuopt":
            return self
        if any(target == "tensorrt-rtx" for target in self.build.target):
            raise ValueError("quantize.quantizer tensorrt needs build.target tensorrt: TensorRT-RTX has no calibrators")
        if self.build.target and "tensorrt" not in self.build.target:
            raise ValueError(
                "quantize.quantizer tensorrt quantizes engines of build.target tensorrt alone, and build.target is "
                f"{', '.join(self.build.target)}: nothing would be INT8. Give --target tensorrt, or leave it out"
            )
        if self.calibrate.method not in ("auto", "entropy", "minmax"):
            raise ValueError("TensorRT's own calibrators are entropy and minmax: choose one as calibrate.method")
        if self.accuracy.max_drop is not None or self.calibrate.ranges is not None:
            raise ValueError(
                "an accuracy budget and ranges need gpuopt's own quantizer: leave out quantize.quantizer tensorrt"
            )
        return self

    @model_validator(mode="after")
    def _a_budget_is_for_int8(self) -> Recipe:
        if self.accuracy.max_drop is not None and self.precision not in ("int8", "auto"):
            raise ValueError(f"accuracy.max_drop is for precision int8, not {self.precision}: only INT8 falls back")
        return self

    @property
    def built_precision(self) -> Precision:
        """The precision of a run; `auto` is several runs."""
        if self.precision == "auto":
            raise GpuoptError("precision auto was not resolved")
        return self.precision

    @property
    def graph_precision(self) -> Precision:
        """The precision of the ONNX graphs: TensorRT's own calibrator quantizes the engine and leaves them in FP32."""
        if self.built_precision == "int8" and self.quantize.quantizer == "tensorrt":
            return "fp32"
        return self.built_precision

    @property
    def has_fp16_scales(self) -> bool:
        """Whether the remainder of an INT8 engine is FP16, and with it every scale."""
        return self.quantize.format == "qdq" and self.cast.remainder == "fp16" and not self.build.legacy

    def restricted_to(self, sections: Iterable[str]) -> Recipe:
        """This recipe with everything but the named sections (or `section.field`) at its default.

        A stage sees only such a recipe, so that what it declares is what its cache key holds.
        """
        kept: dict[str, Any] = {"model": _NO_MODEL}
        for name in sections:
            section, _, field = name.partition(".")
            if field:
                so_far = kept.get(section, Recipe.model_fields[section].default)
                kept[section] = so_far.model_copy(update={field: getattr(getattr(self, section), field)})
            else:
                kept[section] = getattr(self, section)
        return Recipe.model_construct(**kept)

    def extra_profiles(self) -> list[Profile]:
        """The further profiles, each with a range for every input.

        Raises:
            UsageError: a profile leaves an input's shape open.
        """
        profiles: list[Profile] = []
        for index, entry in enumerate(self.profiles):
            ranges = {name: section.range() for name, section in entry.items()}
            missing = [name for name, value in ranges.items() if value is None]
            if missing:
                raise UsageError(f"profiles.{index} gives no shape for {', '.join(missing)}", "Give min, opt and max.")
            profiles.append({name: value for name, value in ranges.items() if value is not None})
        return profiles

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `load` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


_NO_MODEL = ModelSection.model_construct()


# Of a value that only looks like a date or a number, PyYAML raises what the conversion raises.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Safe loading without aliases (they can expand without bound) or repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_mark()
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is repeated", node.start_mark)
        return mapping


def load(path: Path) -> dict[str, Any]:
    """Read a recipe file as a plain mapping, not yet validated.

    Raises:
        StorageError: the file cannot be read.
        UsageError: it is not YAML, too large, or not a mapping.
    """
    with storage_errors("read", path), path.open("rb") as stream:
        data = stream.read(MAX_RECIPE_BYTES + 1)
    if len(data) > MAX_RECIPE_BYTES:
        raise UsageError(f"{path} is larger than {MAX_RECIPE_BYTES} bytes", "A recipe is a short YAML file.")
    try:
        value = yaml.load(data, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except _YAML_ERRORS as error:
        raise UsageError(
            f"{path} is not a recipe: {one_line(error)}", "Write it as YAML, one section a stage."
        ) from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a recipe: it holds no sections", "See the examples in recipes/.")
    return value


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `build.target` and the like inside a nested mapping, making the levels that lack.

    Raises:
        UsageError: a level on the way is no section.
    """
    *path, last = key.split(".")
    for level in path:
        tree = tree.setdefault(level, {})
        if not isinstance(tree, dict):
            raise UsageError(f"'{key}' cannot be set: '{level}' holds a value, not a section")
    tree[last] = value


def parse_setting(text: str) -> tuple[str, Any]:
    """Parse `KEY=VALUE` of `--set`; the value is read as YAML.

    Raises:
        UsageError: there is no `=` or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(
            f"--set {text}: no value", "Write --set section.key=value, as in --set build.target=onnxruntime."
        )
    try:
        return key.strip(), yaml.load(value, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except _YAML_ERRORS as error:
        raise UsageError(f"--set {text}: {one_line(error)}", "Quote the value as YAML would.") from error


def resolve(tree: Mapping[str, Any]) -> Recipe:
    """Validate a recipe.

    Raises:
        UsageError: names the key, its value, the rule it breaks and, for an unknown key, the nearest right one.
    """
    try:
        return Recipe.model_validate(dict(tree))
    except ValidationError as error:
        first = error.errors()[0]
        raise _explain(first, len(error.errors())) from error


def _explain(problem: Any, count: int) -> GpuoptError:
    path = [str(part) for part in problem["loc"]]
    where = ".".join(path)
    more = f" (and {count - 1} more)" if count > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _fields_at(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"Did you mean '{'.'.join([*path[:-1], near[0]])}'?" if near else f"Known here: {', '.join(known)}."
        return UsageError(f"recipe: unknown key '{where}'{more}", hint)
    if problem["type"] == "missing":
        return UsageError(f"recipe: '{where}' is missing{more}", "Every recipe needs a model: path or factory.")
    rule = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    shown = "" if isinstance(value, (dict, BaseModel)) else f" = {value!r}"
    subject = f"{where}{shown}: " if where else ""
    return UsageError(f"recipe: {subject}{rule}{more}", "gpuopt compile --dry-run prints the resolved recipe.")


def _fields_at(path: list[str]) -> list[str]:
    if path and path[0] in ("inputs", "profiles"):
        return list(InputSection.model_fields)
    model: Any = Recipe
    for part in path:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = _section_of(field.annotation) if field else None
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _section_of(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((a for a in typing.get_args(annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return annotation
