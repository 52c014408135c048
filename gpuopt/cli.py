"""The command line: parse, call, print, exit code. No logic."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpuopt import __version__
from gpuopt.errors import INTERRUPTED_EXIT_CODE, GpuoptError, UsageError, defect, one_line

if TYPE_CHECKING:
    from gpuopt.compile import Outcome
    from gpuopt.progress import Progress

app = typer.Typer(
    name="gpuopt",
    help="From a PyTorch model to a verified INT8 or FP16 inference engine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class PrecisionChoice(str, Enum):
    auto = "auto"
    int8 = "int8"
    fp16 = "fp16"
    fp32 = "fp32"


class TargetChoice(str, Enum):
    tensorrt_rtx = "tensorrt-rtx"
    tensorrt = "tensorrt"
    onnxruntime = "onnxruntime"


class MethodChoice(str, Enum):
    auto = "auto"
    entropy = "entropy"
    minmax = "minmax"
    percentile = "percentile"
    mse = "mse"


class FormatChoice(str, Enum):
    qdq = "qdq"
    qoperator = "qoperator"


class QuantizerChoice(str, Enum):
    gpuopt = "gpuopt"
    tensorrt = "tensorrt"


class GateMode(str, Enum):
    fail = "fail"
    warn = "warn"


class DocumentChoice(str, Enum):
    report = "report"
    bench = "bench"
    profile = "profile"
    sweep = "sweep"


class EqualizeChoice(str, Enum):
    auto = "auto"
    off = "off"
    cross_layer = "cross-layer"
    smooth = "smooth"


class BiasCorrectionChoice(str, Enum):
    auto = "auto"
    on = "on"
    off = "off"


class BackendChoice(str, Enum):
    tensorrt = "tensorrt"
    onnxruntime = "onnxruntime"
    pytorch = "pytorch"


class AcceleratorChoice(str, Enum):
    tensorrt = "tensorrt"
    cuda = "cuda"


class TimeoutActionChoice(str, Enum):
    reject = "reject"
    delay = "delay"


class DistributionChoice(str, Enum):
    poisson = "poisson"
    uniform = "uniform"
    bursty = "bursty"


class DifferenceChoice(str, Enum):
    gpu = "gpu"
    library = "library"
    driver = "driver"
    shapes = "shapes"
    definition = "definition"
    model = "model"
    all = "all"


_debug = False
_answered = False

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
HostCodeFlag = Annotated[
    bool, typer.Option("--allow-host-code", help="Run the CPU code that a version-compatible engine carries.")
]
PluginFlag = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE", help="Plugin library that the engine was built with; it runs code."),
]
PublicKeyOption = Annotated[
    str | None,
    typer.Option(
        "--public-key", metavar="FILE|KEY", help="Demand minisign's signature by this key before anything is run."
    ),
]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary; errors only.")]
VerboseFlag = Annotated[bool, typer.Option("--verbose", "-v", help="Also show the facts of every stage on stderr.")]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache-dir", help="Folder of the stage cache. [env: GPUOPT_CACHE_DIR; default: ~/.cache/gpuopt]"),
]

TimeoutOption = Annotated[
    str | None,
    typer.Option("--timeout", metavar="TIME", help="End after this long, as 90s, 15m or 2h, with the exit code 18."),
]

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Model file, its kind decided by content, or package.module:factory.", show_default=False),
]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", "-r", help="YAML recipe; flags are laid over it.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key: build.target=onnxruntime.")
]
FactoryOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODULE:FACTORY", help="Code of the model whose weights the file holds."),
]
TrustFlag = Annotated[bool, typer.Option("--trust-pickle", help="Let the model file run the code it carries.")]
InputOption = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", metavar="NAME:SHAPE[:DTYPE]", help="As in image:1x3x224x224 or ids:1x128:int64."),
]
MinShapesOption = Annotated[
    list[str] | None,
    typer.Option("--min-shapes", metavar="NAME:SHAPE,...", help="Smallest shapes of dynamic inputs."),
]
OptShapesOption = Annotated[
    list[str] | None,
    typer.Option("--opt-shapes", metavar="NAME:SHAPE,...", help="Shapes the kernels are chosen for."),
]
MaxShapesOption = Annotated[
    list[str] | None, typer.Option("--max-shapes", metavar="NAME:SHAPE,...", help="Largest shapes.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--calibration-data",
        "-c",
        help=".npz, folder of .npy / .npz / images, Polygraphy JSON, or package.module:callable. "
        "[default: calibration.npz or calibration/ beside the model]",
    ),
]
MethodOption = Annotated[MethodChoice | None, typer.Option("--calibration-method", help="[default: auto]")]
SamplesOption = Annotated[int | None, typer.Option("--calibration-samples", help="[default: 512]")]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-calibration-memory",
        metavar="SIZE",
        help="The most that calibration may add, as 2GiB; more passes where it does not fit.",
    ),
]
RangesOption = Annotated[
    str | None,
    typer.Option(
        "--calibration-ranges",
        metavar="FILE",
        help="Ranges of an earlier run, or a calibration cache of TensorRT, instead of data.",
    ),
]
StrictFlag = Annotated[
    bool, typer.Option("--strict-calibration", help="Findings about the calibration data are errors.")
]
RandomFlag = Annotated[bool, typer.Option("--random-calibration", help="Random data, for smoke tests.")]
EqualizeOption = Annotated[
    EqualizeChoice | None,
    typer.Option("--equalize", help="Even out channels before INT8. [default: auto: where it is measured to help]"),
]
BiasCorrectionOption = Annotated[
    BiasCorrectionChoice | None,
    typer.Option("--bias-correction", help="Of INT8 layers. [default: auto: where it is measured to help]"),
]
OpsetOption = Annotated[int | None, typer.Option("--opset", help="[default: 20; 17 for TensorRT 8.5]")]
EvaluationOption = Annotated[
    str | None,
    typer.Option(
        "--evaluation-data", help="Like --calibration-data; it may hold labels. [default: the calibration data]"
    ),
]
InputLayoutOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input-layout", metavar="[NAME=]LAYOUT", help="nhwc: channels last, of one input or all; repeatable."
    ),
]
OutputLayoutOption = Annotated[
    list[str] | None,
    typer.Option("--output-layout", metavar="[NAME=]LAYOUT", help="As --input-layout, of the outputs."),
]
InputDtypeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input-dtype",
        metavar="[NAME=]DTYPE",
        help="uint8: bytes, normalised in the graph as (bytes * scale - mean) / std; repeatable.",
    ),
]
MeanOption = Annotated[
    str | None, typer.Option("--mean", metavar="N,...", help="Of uint8 inputs, after the scale. [default: 0]")
]
StdOption = Annotated[str | None, typer.Option("--std", metavar="N,...", help="Of uint8 inputs. [default: 1]")]
ScaleOption = Annotated[str | None, typer.Option("--scale", help="Factor of uint8 inputs. [default: 1/255]")]
NoCacheFlag = Annotated[bool, typer.Option("--no-cache", help="Run every stage, keep nothing.")]
ExcludeNodesOption = Annotated[
    list[str] | None,
    typer.Option("--nodes-to-exclude", metavar="PATTERN", help="Nodes kept out of INT8, as '*/head/*'; repeatable."),
]
ExcludeTypesOption = Annotated[
    list[str] | None,
    typer.Option("--op-types-to-exclude", metavar="PATTERN", help="Operators kept out of INT8; repeatable."),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gpuopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    global _debug
    _debug = debug


@app.command()
def compile(  # noqa: A001 - the command's name
    model: ModelArgument = None,
    precision: Annotated[PrecisionChoice | None, typer.Option("--precision", "-p", help="[default: int8]")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Bundle folder. [default: MODEL.gpuopt beside the model]")
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    target: Annotated[
        list[TargetChoice] | None,
        typer.Option("--target", "-t", help="Repeatable. [default: TensorRT with a GPU, else TensorRT-RTX]"),
    ] = None,
    no_build: Annotated[
        bool, typer.Option("--no-build", help="Make the engines' graph; 'gpuopt build' builds it on the GPU's machine.")
    ] = False,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            "--compute-capability", metavar="X.Y", help="TensorRT-RTX GPUs, repeatable. [default: 8.0 and newer]"
        ),
    ] = None,
    factory: FactoryOption = None,
    trust_pickle: TrustFlag = False,
    inputs: InputOption = None,
    min_shapes: MinShapesOption = None,
    opt_shapes: OptShapesOption = None,
    max_shapes: MaxShapesOption = None,
    input_layout: InputLayoutOption = None,
    output_layout: OutputLayoutOption = None,
    input_dtype: InputDtypeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    scale: ScaleOption = None,
    calibration_data: DataOption = None,
    calibration_method: MethodOption = None,
    calibration_samples: SamplesOption = None,
    max_calibration_memory: MemoryOption = None,
    calibration_ranges: RangesOption = None,
    strict_calibration: StrictFlag = False,
    random_calibration: RandomFlag = False,
    quant_format: Annotated[FormatChoice | None, typer.Option("--quant-format", help="[default: qdq]")] = None,
    quantizer: Annotated[
        QuantizerChoice | None,
        typer.Option("--quantizer", help="tensorrt: its own calibrator, TensorRT 8.5 to 10. [default: gpuopt]"),
    ] = None,
    nodes_to_exclude: ExcludeNodesOption = None,
    op_types_to_exclude: ExcludeTypesOption = None,
    equalize: EqualizeOption = None,
    bias_correction: BiasCorrectionOption = None,
    max_accuracy_drop: Annotated[
        str | None,
        typer.Option(
            "--max-accuracy-drop",
            metavar="SHARE",
            help="0.5% or 0.005 (0.5 is 50%): nodes fall back to FP16 until the metric holds it.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            metavar="MODULE:FUNCTION",
            help="Of predictions and labels, larger is better. [default: top-1 or cosine]",
        ),
    ] = None,
    evaluation_data: EvaluationOption = None,
    labels: Annotated[
        str | None, typer.Option("--labels", help="An .npy file, or a key inside the .npz of --evaluation-data.")
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option("--min-cosine", help="Accuracy limit. [default: by precision]")
    ] = None,
    min_precision_coverage: Annotated[
        str | None,
        typer.Option(
            "--min-precision-coverage",
            metavar="SHARE",
            help="Of the computing layers' time in the asked-for precision, as 80%; the engine has to run here.",
        ),
    ] = None,
    opset: OpsetOption = None,
    workspace: Annotated[
        str | None,
        typer.Option("--workspace", metavar="SIZE", help="Limit of the engine's scratch memory, as 4GiB."),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            "--optimization-level", help="0 builds fast, 5 makes the fastest engine. [default: the builder's]"
        ),
    ] = None,
    timing_cache: Annotated[
        str | None,
        typer.Option(
            "--timing-cache",
            metavar="FILE",
            help="Timings of kernels, read and added to. [default: one per TensorRT and GPU in the cache]",
        ),
    ] = None,
    require_timing_cache: Annotated[
        bool, typer.Option("--require-timing-cache", help="Fail where no fitting timing cache is there, for CI.")
    ] = False,
    tactic_sources: Annotated[
        list[str] | None,
        typer.Option("--tactic-sources", metavar="NAME,...", help="Where kernels come from. [default: TensorRT's]"),
    ] = None,
    plugins: Annotated[
        list[str] | None,
        typer.Option(
            "--plugin", metavar="FILE", help="Shared library with TensorRT plugins, repeatable; it runs code."
        ),
    ] = None,
    io_formats: Annotated[
        list[str] | None,
        typer.Option(
            "--io-format",
            metavar="NAME=DTYPE:FORMAT",
            help="Of an input or output, as image=fp16:hwc8, repeatable; or auto: the fastest.",
        ),
    ] = None,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Measure latency and throughput. [default: where a gate needs it]")
    ] = False,
    max_latency: Annotated[
        list[str] | None,
        typer.Option("--max-latency", metavar="PERCENTILE=TIME", help="Gate, as p99=5ms; repeatable."),
    ] = None,
    max_latency_vs_fp16: Annotated[
        float | None, typer.Option("--max-latency-vs-fp16", metavar="RATIO", help="Gate: time over FP16's, as 0.9.")
    ] = None,
    min_throughput: Annotated[
        float | None, typer.Option("--min-throughput", metavar="RATE", help="Gate: samples a second.")
    ] = None,
    max_engine_size: Annotated[
        str | None, typer.Option("--max-engine-size", metavar="SIZE", help="Gate, as 50MiB.")
    ] = None,
    max_device_memory: Annotated[
        str | None,
        typer.Option("--max-device-memory", metavar="SIZE", help="Gate: of one execution, as 1GiB."),
    ] = None,
    max_build_seconds: Annotated[
        float | None, typer.Option("--max-build-seconds", metavar="SECONDS", help="Gate: of each engine's build.")
    ] = None,
    max_calibration_warnings: Annotated[
        int | None, typer.Option("--max-calibration-warnings", metavar="N", help="Gate: findings about the data.")
    ] = None,
    gate_mode: Annotated[
        GateMode | None, typer.Option("--gate-mode", help="warn: gates are told and fail nothing. [default: fail]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and the plan; do nothing.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say why each stage ran or did not, on stderr.")] = False,
    timeout: TimeoutOption = None,
    cache_dir: CacheOption = None,
    no_cache: NoCacheFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Compile a model: export, quantize, build engines, verify, report."""
    from gpuopt import request, time_limit

    flags = request.Flags(
        model=model,
        factory=factory,
        trust_pickle=trust_pickle,
        precision=_value(precision),
        output=output,
        target=tuple(t.value for t in target or ()),
        no_build=no_build,
        compute_capability=tuple(compute_capability or ()),
        inputs=tuple(inputs or ()),
        min_shapes=tuple(min_shapes or ()),
        opt_shapes=tuple(opt_shapes or ()),
        max_shapes=tuple(max_shapes or ()),
        input_layout=tuple(input_layout or ()),
        output_layout=tuple(output_layout or ()),
        input_dtype=tuple(input_dtype or ()),
        mean=mean,
        std=std,
        scale=scale,
        calibration_data=calibration_data,
        calibration_method=_value(calibration_method),
        calibration_samples=calibration_samples,
        max_calibration_memory=max_calibration_memory,
        calibration_ranges=calibration_ranges,
        strict_calibration=strict_calibration,
        random_calibration=random_calibration,
        quant_format=_value(quant_format),
        nodes_to_exclude=tuple(nodes_to_exclude or ()),
        op_types_to_exclude=tuple(op_types_to_exclude or ()),
        equalize=_value(equalize),
        bias_correction=_value(bias_correction),
        quantizer=_value(quantizer),
        min_cosine=min_cosine,
        min_precision_coverage=min_precision_coverage,
        opset=opset,
        max_accuracy_drop=max_accuracy_drop,
        metric=metric,
        evaluation_data=evaluation_data,
        labels=labels,
        workspace=workspace,
        optimization_level=optimization_level,
        timing_cache=timing_cache,
        require_timing_cache=require_timing_cache,
        tactic_sources=tuple(tactic_sources or ()),
        plugins=tuple(plugins or ()),
        io_formats=tuple(io_formats or ()),
        benchmark=benchmark,
        gate_mode=_value(gate_mode),
        max_latency=tuple(max_latency or ()),
        max_latency_vs_fp16=max_latency_vs_fp16,
        min_throughput=min_throughput,
        max_engine_size=max_engine_size,
        max_device_memory=max_device_memory,
        max_build_seconds=max_build_seconds,
        max_calibration_warnings=max_calibration_warnings,
    )
    chosen = request.recipe(recipe, flags, settings or [])
    if dry_run:
        typer.echo(request.describe(chosen, as_json), nl=False)
        return
    from gpuopt.compile import compile_model

    with time_limit.within(request.duration(timeout), not no_cache), request.open_cache(cache_dir, no_cache) as cache:
        outcome = compile_model(chosen, cache, _progress(quiet), sys.argv, explain)
    _finish(outcome, as_json, quiet, verbose)


@app.command()
def quantize(
    model: ModelArgument = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. [default: MODEL.quantized beside the model]")
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    factory: FactoryOption = None,
    trust_pickle: TrustFlag = False,
    inputs: InputOption = None,
    min_shapes: MinShapesOption = None,
    opt_shapes: OptShapesOption = None,
    max_shapes: MaxShapesOption = None,
    input_layout: InputLayoutOption = None,
    output_layout: OutputLayoutOption = None,
    input_dtype: InputDtypeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    scale: ScaleOption = None,
    calibration_data: DataOption = None,
    calibration_method: MethodOption = None,
    calibration_samples: SamplesOption = None,
    max_calibration_memory: MemoryOption = None,
    calibration_ranges: RangesOption = None,
    strict_calibration: StrictFlag = False,
    random_calibration: RandomFlag = False,
    nodes_to_exclude: ExcludeNodesOption = None,
    op_types_to_exclude: ExcludeTypesOption = None,
    equalize: EqualizeOption = None,
    bias_correction: BiasCorrectionOption = None,
    opset: OpsetOption = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print for every node: INT8 or floating point, and why.")
    ] = False,
    timeout: TimeoutOption = None,
    cache_dir: CacheOption = None,
    no_cache: NoCacheFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Quantize a model to ONNX with Q/DQ and say why; no engines are built."""
    from gpuopt import request, time_limit
    from gpuopt.quantize import quantize_model
    from gpuopt.report import placement

    flags = request.Flags(
        model=model,
        factory=factory,
        trust_pickle=trust_pickle,
        inputs=tuple(inputs or ()),
        min_shapes=tuple(min_shapes or ()),
        opt_shapes=tuple(opt_shapes or ()),
        max_shapes=tuple(max_shapes or ()),
        input_layout=tuple(input_layout or ()),
        output_layout=tuple(output_layout or ()),
        input_dtype=tuple(input_dtype or ()),
        mean=mean,
        std=std,
        scale=scale,
        calibration_data=calibration_data,
        calibration_method=_value(calibration_method),
        calibration_samples=calibration_samples,
        max_calibration_memory=max_calibration_memory,
        calibration_ranges=calibration_ranges,
        strict_calibration=strict_calibration,
        random_calibration=random_calibration,
        nodes_to_exclude=tuple(nodes_to_exclude or ()),
        op_types_to_exclude=tuple(op_types_to_exclude or ()),
        equalize=_value(equalize),
        bias_correction=_value(bias_correction),
        opset=opset,
    )
    chosen = request.recipe(recipe, flags, settings or [])
    with time_limit.within(request.duration(timeout), not no_cache), request.open_cache(cache_dir, no_cache) as cache:
        made = quantize_model(chosen, output, cache, _progress(quiet), sys.argv)
    if as_json:
        import json

        _answer(json.dumps(made.document, indent=2))
    elif explain:
        placement.show(made.document["nodes"])
    elif not quiet:
        typer.echo(placement.summary(made.document, _shown(made.folder)))


@app.command()
def analyze(
    model: ModelArgument = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for sensitivity.json and sensitivity.txt.")
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    factory: FactoryOption = None,
    trust_pickle: TrustFlag = False,
    inputs: InputOption = None,
    min_shapes: MinShapesOption = None,
    opt_shapes: OptShapesOption = None,
    max_shapes: MaxShapesOption = None,
    input_layout: InputLayoutOption = None,
    output_layout: OutputLayoutOption = None,
    input_dtype: InputDtypeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    scale: ScaleOption = None,
    calibration_data: DataOption = None,
    calibration_method: MethodOption = None,
    calibration_samples: SamplesOption = None,
    max_calibration_memory: MemoryOption = None,
    calibration_ranges: RangesOption = None,
    strict_calibration: StrictFlag = False,
    random_calibration: RandomFlag = False,
    nodes_to_exclude: ExcludeNodesOption = None,
    op_types_to_exclude: ExcludeTypesOption = None,
    equalize: EqualizeOption = None,
    evaluation_data: EvaluationOption = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Evaluation samples. [default: 32]")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it, too: .svg, .png or .html.")
    ] = None,
    timeout: TimeoutOption = None,
    cache_dir: CacheOption = None,
    no_cache: NoCacheFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show which layers cost accuracy in INT8, each quantized alone."""
    from gpuopt import drawing, request, time_limit
    from gpuopt.analysis import analyze_model, write
    from gpuopt.report import plot as plotting

    flags = request.Flags(
        model=model,
        factory=factory,
        trust_pickle=trust_pickle,
        inputs=tuple(inputs or ()),
        min_shapes=tuple(min_shapes or ()),
        opt_shapes=tuple(opt_shapes or ()),
        max_shapes=tuple(max_shapes or ()),
        input_layout=tuple(input_layout or ()),
        output_layout=tuple(output_layout or ()),
        input_dtype=tuple(input_dtype or ()),
        mean=mean,
        std=std,
        scale=scale,
        calibration_data=calibration_data,
        calibration_method=_value(calibration_method),
        calibration_samples=calibration_samples,
        max_calibration_memory=max_calibration_memory,
        calibration_ranges=calibration_ranges,
        strict_calibration=strict_calibration,
        random_calibration=random_calibration,
        nodes_to_exclude=tuple(nodes_to_exclude or ()),
        op_types_to_exclude=tuple(op_types_to_exclude or ()),
        equalize=_value(equalize),
        evaluation_data=evaluation_data,
        analyze_samples=samples,
    )
    if plot is not None:
        drawing.check(plot, plotting.SUFFIXES)
    with time_limit.within(request.duration(timeout), not no_cache), request.open_cache(cache_dir, no_cache) as store:
        analysis = analyze_model(request.recipe(recipe, flags, settings or []), store, _progress(quiet))
    write(analysis, output, plot)
    _show_analysis(analysis.document, as_json, quiet)


@app.command()
def build(
    bundle: Annotated[Path, typer.Argument(help="Folder that 'gpuopt compile' wrote.")],
    target: Annotated[
        TargetChoice | None,
        typer.Option(
            "--target",
            "-t",
            metavar="<tensorrt-rtx|tensorrt>",
            help="[default: TensorRT with a GPU, else TensorRT-RTX]",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A key of build, verify, benchmark or gates: build.workspace=4GiB."
        ),
    ] = None,
    public_key: PublicKeyOption = None,
    timeout: TimeoutOption = None,
    cache_dir: CacheOption = None,
    no_cache: NoCacheFlag = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Build a bundle's engine for this machine and prove it; needs no PyTorch."""
    from gpuopt import request, time_limit
    from gpuopt.rebuild import build_bundle

    with time_limit.within(request.duration(timeout), not no_cache), request.open_cache(cache_dir, no_cache) as cache:
        outcome = build_bundle(bundle, _value(target), settings or [], cache, _progress(quiet), sys.argv, public_key)
    _finish(outcome, as_json, quiet, verbose)


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder that 'gpuopt compile' wrote.")],
    plugins: PluginFlag = None,
    allow_host_code: HostCodeFlag = False,
    public_key: PublicKeyOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Check a bundle's hashes and its outputs against the stored reference, here."""
    from gpuopt.compile import verify_bundle
    from gpuopt.engine_record import Trust

    trust = Trust(plugins or (), allow_host_code)
    _finish(verify_bundle(bundle, _progress(quiet), sys.argv, trust, public_key), as_json, quiet, verbose)


@app.command()
def bench(
    subject: Annotated[Path, typer.Argument(help="Bundle folder, or an engine with its record beside it.")],
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="GROUP",
            help="latency, loads, phases, overlap, streams, batches, memory or baselines; repeatable. [default: all]",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, help="For each row.")] = 1.0,
    batches: Annotated[
        str | None, typer.Option("--batches", metavar="N,N,...", help="[default: those of the profile]")
    ] = None,
    streams: Annotated[int, typer.Option("--streams", min=1, help="Largest number of executions side by side.")] = 4,
    beside: Annotated[
        Path | None, typer.Option("--beside", metavar="ENGINE", help="Another engine to run at the same time.")
    ] = None,
    plugins: PluginFlag = None,
    allow_host_code: HostCodeFlag = False,
    public_key: PublicKeyOption = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline", metavar="NAME", help="As torch.compile or 'onnxruntime cuda'; repeatable. [default: all]"
        ),
    ] = None,
    baseline_python: Annotated[
        Path | None,
        typer.Option("--baseline-python", metavar="FILE", help="Python with torch or onnxruntime-gpu. [default: this]"),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON, too.")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure latency, throughput and memory, beside PyTorch and ONNX Runtime."""
    from gpuopt import request
    from gpuopt.bench import command, report
    from gpuopt.engine_record import Trust

    asked = command.Request(
        subject=subject,
        groups=tuple(only or command.GROUPS),
        seconds=seconds,
        batches=request.sizes(batches),
        streams=streams,
        beside=beside,
        trust=Trust(tuple(plugins or ()), allow_host_code),
        baselines=tuple(baseline or ()),
        baseline_python=baseline_python,
        public_key=public_key,
    )
    found = command.bench(asked, sys.argv, _progress(quiet))
    if output is not None:
        command.write(found, output)
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        _answer(found.model_dump_json(indent=2))
    elif not quiet:
        typer.echo(report.render(found))


@app.command()
def profile(
    subject: Annotated[Path, typer.Argument(help="Bundle folder, or an engine with its record beside it.")],
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Timed runs of each layer.")] = 50,
    in_order: Annotated[bool, typer.Option("--in-order", help="As they run, instead of longest first.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Chrome trace of the PyTorch model: .json or .json.gz."),
    ] = None,
    plugins: PluginFlag = None,
    allow_host_code: HostCodeFlag = False,
    public_key: PublicKeyOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON, too.")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show where the time goes, layer by layer, and what bounds each layer."""
    from gpuopt import request
    from gpuopt.engine_record import Trust
    from gpuopt.profiling import command
    from gpuopt.storage import write_text

    if trace is not None:
        request.check_trace(subject, trace)
    trust = Trust(plugins or (), allow_host_code)
    found = command.profile(subject, iterations, sys.argv, _progress(quiet), trust, public_key)
    document = found.model_dump_json(indent=2)
    if output is not None:
        write_text(output, document + "\n")
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        _answer(document)
    elif not quiet:
        typer.echo(command.render(found, not in_order))
    if trace is not None:
        command.trace(subject, trace)


@app.command()
def reduce(
    subject: Annotated[Path, typer.Argument(help="ONNX file, or the folder MODEL.gpuopt.failed.")],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="FILE|optimized",
            help="Reduce a difference: to another ONNX graph of the model, or to ONNX Runtime's optimized one.",
        ),
    ] = None,
    target: Annotated[
        TargetChoice | None,
        typer.Option(
            "--target", "-t", help="[default: TensorRT with a GPU, else TensorRT-RTX; of a folder, as it failed]"
        ),
    ] = None,
    inputs: InputOption = None,
    min_shapes: MinShapesOption = None,
    opt_shapes: OptShapesOption = None,
    max_shapes: MaxShapesOption = None,
    settings: SetOption = None,
    min_cosine: Annotated[float, typer.Option("--min-cosine", help="With --against: outputs below differ.")] = 0.99,
    min_sqnr: Annotated[
        float, typer.Option("--min-sqnr", metavar="DB", help="With --against: outputs below differ.")
    ] = 20.0,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="For all tries.")] = 60.0,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Leave the model's weights in it; else they are random.")
    ] = False,
    replay: Annotated[
        bool, typer.Option("--replay", help="Try the graph of a failure again; ends as the failure did.")
    ] = False,
    plugins: PluginFlag = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. [default: MODEL.failure, or failure/ in the subject]")
    ] = None,
    cache_dir: CacheOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Find the smallest graph that still fails, or still differs, and the command that replays it."""
    from gpuopt import request
    from gpuopt.reduction import command

    flags = request.Flags(
        inputs=tuple(inputs or ()),
        min_shapes=tuple(min_shapes or ()),
        opt_shapes=tuple(opt_shapes or ()),
        max_shapes=tuple(max_shapes or ()),
        target=(target.value,) if target else (),
        plugins=tuple(map(str, plugins or ())),
    )
    if replay:
        command.replay(subject, plugins or (), seconds, _progress(quiet))
        return
    wish = command.wish(seconds, keep_weights, against, min_cosine, min_sqnr)
    asked = command.Request(subject, command.recipe_of(subject, flags, settings or []), against, output, wish)
    with request.open_cache(cache_dir, False) as store:
        answer = command.reduce(asked, store, _progress(quiet))
    if as_json:
        import json

        _answer(json.dumps(answer.document, indent=2))
    elif not quiet:
        typer.echo(command.render(answer, _shown(answer.folder)))


@app.command()
def schema(
    document: Annotated[DocumentChoice, typer.Argument(help="Which document.")] = DocumentChoice.report,
) -> None:
    """Print the JSON Schema of a document that gpuopt writes."""
    from gpuopt import request

    typer.echo(request.schema(document.value), nl=False)


@app.command()
def inspect(
    subject: Annotated[Path, typer.Argument(help="Bundle folder, engine or ONNX file.")],
    as_json: JsonFlag = False,
) -> None:
    """Show what a bundle, engine or ONNX file is, and whether it will load here; nothing is run."""
    from gpuopt.inspection import command, render

    found = command.inspect(subject)
    if as_json:
        _answer(found.model_dump_json(indent=2))
    else:
        typer.echo(render.inspection(found))


@app.command()
def check(
    bundle: Annotated[Path, typer.Argument(help="Folder that 'gpuopt compile' wrote.")],
    public_key: PublicKeyOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Check that a bundle is whole and, with --public-key, who signed it; nothing is run."""
    from gpuopt.inspection import integrity, render

    found = integrity.check(bundle, public_key)
    if as_json:
        _answer(found.model_dump_json(indent=2))
    elif not quiet:
        typer.echo(render.integrity(found))


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="Bundle folder, or a report.json of 'gpuopt compile'.")],
    new: Annotated[Path, typer.Argument(help="The same of the new release.")],
    max_p50_regress: Annotated[
        str | None, typer.Option("--max-p50-regress", metavar="SHARE", help="Of latency. [default: 5%]")
    ] = None,
    max_p90_regress: Annotated[
        str | None, typer.Option("--max-p90-regress", metavar="SHARE", help="Of latency. [default: 5%]")
    ] = None,
    max_p95_regress: Annotated[
        str | None, typer.Option("--max-p95-regress", metavar="SHARE", help="Of latency. [default: 5%]")
    ] = None,
    max_p99_regress: Annotated[
        str | None, typer.Option("--max-p99-regress", metavar="SHARE", help="Of latency. [default: 5%]")
    ] = None,
    max_throughput_regress: Annotated[
        str | None, typer.Option("--max-throughput-regress", metavar="SHARE", help="[default: 5%]")
    ] = None,
    max_size_regress: Annotated[
        str | None, typer.Option("--max-size-regress", metavar="SHARE", help="Of each file. [default: 10%]")
    ] = None,
    max_memory_regress: Annotated[
        str | None, typer.Option("--max-memory-regress", metavar="SHARE", help="Of the device. [default: 10%]")
    ] = None,
    max_sqnr_drop: Annotated[
        float | None, typer.Option("--max-sqnr-drop", metavar="DB", help="Of the worst corner. [default: 1]")
    ] = None,
    max_accuracy_drop: Annotated[
        str | None,
        typer.Option("--max-accuracy-drop", metavar="SHARE", help="Of the metric, and of equal values. [default: 0]"),
    ] = None,
    allow_different: Annotated[
        list[DifferenceChoice] | None,
        typer.Option("--allow-different", help="Compare although this differs; repeatable."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write it as Markdown, too.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as one HTML page, too.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON, too.")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Put two releases side by side; exit code 15 if the new one is worse."""
    from gpuopt.comparing import command, render

    given = {
        "--max-p50-regress": max_p50_regress,
        "--max-p90-regress": max_p90_regress,
        "--max-p95-regress": max_p95_regress,
        "--max-p99-regress": max_p99_regress,
        "--max-throughput-regress": max_throughput_regress,
        "--max-size-regress": max_size_regress,
        "--max-memory-regress": max_memory_regress,
        "--max-sqnr-drop": max_sqnr_drop,
        "--max-accuracy-drop": max_accuracy_drop,
    }
    answer = command.compare(old, new, given, [choice.value for choice in allow_different or ()], sys.argv)
    command.write(answer.comparison, output, markdown, html)
    if as_json:
        _answer(command.document(answer.comparison))
    elif not quiet:
        typer.echo(render.terminal(answer.comparison))
    if answer.error is not None:
        raise answer.error


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file: models, precisions, targets and batch sizes.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder or URL for bundles, table and plot. [default: the file's]"),
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="At a time, here. [default: half of the cores]")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="The most that one combination may take, as 8GiB.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="On a Ray cluster: its address, auto, or local for a new one."),
    ] = None,
    retries: Annotated[
        int | None, typer.Option("--retries", min=0, help="For a task whose worker on Ray was lost. [default: 2]")
    ] = None,
    wait_for_nodes: Annotated[
        str | None,
        typer.Option("--wait-for-nodes", metavar="TIME", help="Where no node on Ray fits, as 10m: it may grow."),
    ] = None,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="TIME", help="For each combination, as 90s, 15m or 2h.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the combinations; do nothing.")] = False,
    cache_dir: CacheOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Compile many models, precisions, targets and batch sizes; one table and plot."""
    from gpuopt import request
    from gpuopt.sweep import command, render

    request.duration(timeout)
    asked = command.Request(
        file, output, processes, request.memory(memory), retries, ray, timeout, cache_dir,
        request.duration(wait_for_nodes),
    )  # fmt: skip
    if dry_run:
        typer.echo(command.describe(command.planned(asked), as_json), nl=False)
        return
    outcome = command.sweep(asked, sys.argv, _progress(quiet))
    if as_json:
        _answer(outcome.report.model_dump_json(indent=2))
    elif not quiet:
        typer.echo(render.terminal(outcome.report))
    if outcome.error is not None:
        raise outcome.error


@app.command()
def triton(
    bundle: Annotated[Path, typer.Argument(help="Folder that 'gpuopt compile' wrote.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Model repository, new or not.")] = None,
    check: Annotated[
        Path | None,
        typer.Option("--check", metavar="PATH", help="Compare this config.pbtxt or model folder; write nothing."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the model. [default: the bundle's]")] = None,
    version: Annotated[int | None, typer.Option("--version", min=1, help="[default: the next one]")] = None,
    backend: Annotated[
        BackendChoice | None, typer.Option("--backend", help="[default: tensorrt with an engine, else onnxruntime]")
    ] = None,
    torchscript: Annotated[
        Path | None, typer.Option("--torchscript", metavar="FILE", help="The original model, for --backend pytorch.")
    ] = None,
    keep_config: Annotated[
        bool, typer.Option("--keep-config", help="Of a model that is there: add the version, check it, leave it.")
    ] = False,
    replace_config: Annotated[
        bool, typer.Option("--replace-config", help="Of a model that is there: write it anew.")
    ] = False,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Batcher and instances of 'gpuopt plan-batching'.")
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option("--max-batch-size", min=0, help="[default: the profiles' largest]")
    ] = None,
    preferred_batch_size: Annotated[
        str | None, typer.Option("--preferred-batch-size", metavar="N,N,...", help="[default: none]")
    ] = None,
    max_queue_delay: Annotated[
        str | None, typer.Option("--max-queue-delay", metavar="TIME", help="As 100ms or 500us. [default: 0]")
    ] = None,
    preserve_ordering: Annotated[
        bool, typer.Option("--preserve-ordering", help="Responses in the order of requests.")
    ] = False,
    priority_levels: Annotated[int, typer.Option("--priority-levels", min=0, help="1 is served first.")] = 0,
    default_priority_level: Annotated[int, typer.Option("--default-priority-level", min=0)] = 0,
    max_queue_size: Annotated[
        int | None, typer.Option("--max-queue-size", min=1, max=2**32 - 1, help="Requests beyond it are refused.")
    ] = None,
    queue_timeout: Annotated[
        str | None, typer.Option("--queue-timeout", metavar="TIME", help="Of a request that waits.")
    ] = None,
    timeout_action: Annotated[TimeoutActionChoice | None, typer.Option("--timeout-action")] = None,
    allow_timeout_override: Annotated[
        bool, typer.Option("--allow-timeout-override", help="Requests may shorten it.")
    ] = False,
    priority_queue: Annotated[
        list[str] | None,
        typer.Option(
            "--priority-queue",
            metavar="LEVEL:POLICY",
            help="As 2:size=100,timeout=50ms,action=delay,override; repeatable.",
        ),
    ] = None,
    no_dynamic_batching: Annotated[
        bool, typer.Option("--no-dynamic-batching", help="Requests are served singly.")
    ] = False,
    instances: Annotated[
        list[str] | None,
        typer.Option("--instances", metavar="KIND:COUNT[:GPU,...]", help="As gpu:2:0,1 or cpu:4; repeatable."),
    ] = None,
    engine_for: Annotated[
        list[str] | None,
        typer.Option("--engine-for", metavar="[X.Y=]BUNDLE", help="Engine for another kind of GPU; repeatable."),
    ] = None,
    accelerator: Annotated[
        list[AcceleratorChoice] | None, typer.Option("--accelerator", help="Of ONNX Runtime; repeatable.")
    ] = None,
    accelerator_parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--accelerator-parameter", metavar="NAME:KEY=VALUE", help="As tensorrt:precision_mode=FP16; repeatable."
        ),
    ] = None,
    cuda_graphs: Annotated[bool, typer.Option("--cuda-graphs", help="Of an engine.")] = False,
    pinned_memory: Annotated[
        bool | None, typer.Option("--pinned-memory/--no-pinned-memory", help="[default: Triton's, which is on]")
    ] = None,
    warm_up: Annotated[
        bool, typer.Option("--warm-up", help="Requests from the reference's inputs before it is ready.")
    ] = False,
    version_policy: Annotated[
        str | None, typer.Option("--version-policy", metavar="POLICY", help="all, latest:N or specific:N,N.")
    ] = None,
    response_cache: Annotated[bool, typer.Option("--response-cache")] = False,
    metric_tag: Annotated[
        list[str] | None, typer.Option("--metric-tag", metavar="KEY=VALUE", help="On its metrics; repeatable.")
    ] = None,
    latency_buckets: Annotated[
        str | None, typer.Option("--latency-buckets", metavar="MS,MS,...", help="Of the histogram of first responses.")
    ] = None,
    merge: Annotated[
        Path | None, typer.Option("--merge", metavar="FILE", help="Fields of a config.pbtxt, laid over the rest.")
    ] = None,
    ensemble: Annotated[
        str | None, typer.Option("--ensemble", metavar="NAME", help="Write this pipeline around the model, too.")
    ] = None,
    before: Annotated[
        list[str] | None, typer.Option("--before", metavar="MODEL", help="Step of the repository; repeatable.")
    ] = None,
    after: Annotated[
        list[str] | None, typer.Option("--after", metavar="MODEL", help="Step of the repository; repeatable.")
    ] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="MODEL.OUTPUT=MODEL.INPUT", help="Where names differ; repeatable."),
    ] = None,
    public_key: PublicKeyOption = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write a bundle into a Triton model repository, or check a configuration against it."""
    from gpuopt.triton import command, flags, render

    chosen_backend = flags.backend(_value(backend))
    if check is not None:
        flags.check_alone(output)
        answer = command.check_config(bundle, check, chosen_backend, torchscript, sys.argv, public_key)
        if as_json:
            _answer(answer.model_dump_json(indent=2))
        elif not quiet:
            typer.echo(render.checked(answer))
        if (problem := command.failure(answer)) is not None:
            raise problem
        return
    batching = flags.Batching(
        max_batch_size=max_batch_size,
        preferred_batch_size=preferred_batch_size,
        max_queue_delay=max_queue_delay,
        preserve_ordering=preserve_ordering,
        priority_levels=priority_levels,
        default_priority_level=default_priority_level,
        max_queue_size=max_queue_size,
        queue_timeout=queue_timeout,
        timeout_action=_value(timeout_action),
        allow_timeout_override=allow_timeout_override,
        priority_queue=tuple(priority_queue or ()),
        disabled=no_dynamic_batching,
    )
    running = flags.Running(
        instances=tuple(instances or ()),
        engine_for=tuple(engine_for or ()),
        accelerator=tuple(choice.value for choice in accelerator or ()),
        accelerator_parameter=tuple(accelerator_parameter or ()),
        cuda_graphs=cuda_graphs,
        pinned_memory=pinned_memory,
        warm_up=warm_up,
        version_policy=version_policy or "",
        response_cache=response_cache,
        metric_tag=tuple(metric_tag or ()),
        latency_buckets=latency_buckets,
        merge=merge,
    )
    asked = command.Request(
        bundle=bundle,
        repository=flags.repository(output),
        name=name or "",
        version=version,
        backend=chosen_backend,
        torchscript=torchscript,
        options=flags.options(batching, running, plan),
        existing=flags.existing(keep_config, replace_config),
        ensemble=flags.ensemble(ensemble, before or [], after or [], mapping or []),
        public_key=public_key,
    )
    written = command.write(asked, sys.argv)
    for warning in written.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        _answer(written.model_dump_json(indent=2))
    elif not quiet:
        typer.echo(render.written(written))


@app.command("plan-batching")
def plan_batching(
    latencies: Annotated[
        Path, typer.Argument(help="Report of 'gpuopt bench --output', or a CSV or JSON table of batch latencies.")
    ],
    target: Annotated[
        str, typer.Option("--target", metavar="PERCENTILE=TIME", help="From arrival to response, as p99=20ms.")
    ],
    rate: Annotated[float | None, typer.Option("--rate", min=0.001, help="Requests a second.")] = None,
    distribution: Annotated[
        DistributionChoice | None, typer.Option("--distribution", help="Of their gaps. [default: poisson]")
    ] = None,
    burstiness: Annotated[
        float | None,
        typer.Option("--burstiness", min=0.1, max=20, help="Deviation over mean of the gaps, if bursty. [default: 3]"),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="CSV of arrivals in seconds, instead of --rate.")
    ] = None,
    instances: Annotated[
        int | None, typer.Option("--instances", min=1, help="[default: as many as pay by the report's streams]")
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option("--max-batch-size", min=1, help="[default: what carries most]")
    ] = None,
    preferred_batch_size: Annotated[
        str | None, typer.Option("--preferred-batch-size", metavar="N,N,...", help="[default: what carries most]")
    ] = None,
    max_queue_delay: Annotated[
        str | None, typer.Option("--max-queue-delay", metavar="TIME", help="[default: what carries most]")
    ] = None,
    preserve_ordering: Annotated[
        bool, typer.Option("--preserve-ordering", help="Responses in the order of requests.")
    ] = False,
    max_queue_size: Annotated[
        int | None, typer.Option("--max-queue-size", min=1, max=2**32 - 1, help="Requests beyond it are refused.")
    ] = None,
    queue_timeout: Annotated[
        str | None, typer.Option("--queue-timeout", metavar="TIME", help="A request that waits longer is refused.")
    ] = None,
    max_drop: Annotated[
        str, typer.Option("--max-drop", metavar="SHARE", help="Requests that may be refused, as 0.1%.")
    ] = "0",
    overhead: Annotated[
        str | None, typer.Option("--overhead", metavar="TIME", help="Of every request besides, as the network's.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="FILE", help="Predict this config.pbtxt beside the plan.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw it, too: .svg or .png.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON, too.")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Choose Triton's batching settings for a load and a latency target, by simulation."""
    from gpuopt import drawing
    from gpuopt.batching import command, flags, report
    from gpuopt.batching import plot as plotting

    if plot is not None:
        drawing.check(plot, plotting.SUFFIXES)
    asked = flags.request(
        latencies,
        flags.Load(rate, _value(distribution), burstiness, trace),
        flags.Goal(target, max_drop, overhead, against),
        flags.Settings(
            instances, max_batch_size, preferred_batch_size, max_queue_delay, preserve_ordering, max_queue_size,
            queue_timeout,
        ),
    )  # fmt: skip
    answer = command.make(asked, sys.argv, _progress(quiet))
    if output is not None:
        command.write(answer.report, output)
    if plot is not None:
        plotting.save(answer.report, plot)
    for warning in answer.report.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        _answer(answer.report.model_dump_json(indent=2))
    elif not quiet:
        typer.echo(report.render(answer.report))
    if answer.error is not None:
        raise answer.error


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Show what is installed and what each target still needs, with the command."""
    from gpuopt import request

    typer.echo(request.doctor(as_json), nl=False)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete everything in the cache.")] = False,
    cache_dir: CacheOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show where the stage cache lies and how large it is, or clear it."""
    from gpuopt import request

    typer.echo(request.cache_state(cache_dir, clear, as_json), nl=False)


def _value(choice: Enum | None) -> str | None:
    return str(choice.value) if choice else None


def _progress(quiet: bool) -> Progress:
    from gpuopt.progress import choose

    return choose(quiet)


def _show_analysis(document: dict[str, Any], as_json: bool, quiet: bool) -> None:
    from gpuopt.report import sensitivity

    if as_json:
        import json

        _answer(json.dumps(document, indent=2))
    elif sys.stdout.isatty() and not quiet:
        sensitivity.show(document["sensitivity"])
    elif not quiet:
        typer.echo(sensitivity.render(document["sensitivity"]))


def _shown(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def _finish(outcome: Outcome, as_json: bool, quiet: bool, verbose: bool) -> None:
    from gpuopt.report import terminal

    folder = Path(outcome.report.bundle) if outcome.report.bundle is not None else None
    shown = _shown(folder) if folder is not None else ""
    if verbose:
        typer.echo(terminal.render_facts(outcome.report), err=True)
    if as_json:
        _answer(outcome.report.model_dump_json(indent=2))
    elif outcome.error is None and not quiet:
        typer.echo(terminal.render(outcome.report, shown, outcome.unbuilt))
    if outcome.error is not None:
        if not quiet and folder and (folder / "report.md").is_file() and folder.name.endswith(".failed"):
            typer.echo(f"report: {shown}/report.md", err=True)
        raise outcome.error


def main() -> None:
    """Entry point: runs a command and ends the process with its documented exit code."""
    try:
        sys.exit(_run())
    except BrokenPipeError:
        # The reader of stdout has gone; Python would complain once more while it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run() -> int:
    import signal

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = app(standalone_mode=False)
        # The parser turns Ctrl-C into this result.
        return _interrupted() if result == INTERRUPTED_EXIT_CODE else int(result or 0)
    except GpuoptError as error:
        return _report_error(error)
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as exit_request:
        code: Any = exit_request.code
        return int(code or 0)
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        from gpuopt.environment import missing_module

        return _report_error(missing_module(error, "gpuopt"))
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error))
            return UsageError.exit_code
        if hasattr(error, "format_message"):
            return _report_error(_usage_error(error))
        problem = defect(error)
        problem.__cause__ = error
        return _report_error(problem)


def _interrupted() -> int:
    _answer_json("interrupted", INTERRUPTED_EXIT_CODE, "interrupted", "")
    typer.echo("gpuopt: interrupted; nothing half-written is left", err=True)
    return INTERRUPTED_EXIT_CODE


def _answer(document: str) -> None:
    """Print what `--json` asks for; a failure from here on prints no second one."""
    global _answered
    _answered = True
    typer.echo(document)


def _answer_json(kind: str, exit_code: int, message: str, hint: str) -> None:
    """With `--json` there is one document on stdout however a run ends."""
    if "--json" in sys.argv and not _answered:
        import json

        error = {"kind": kind, "exit_code": exit_code, "message": message, "hint": hint, "stage": None}
        typer.echo(json.dumps({"schema_version": 1, "status": "failed", "error": error}, indent=2))


def _usage_error(error: Any) -> UsageError:
    """The parser's complaint in our own form."""
    command = getattr(getattr(error, "ctx", None), "command_path", "gpuopt")
    return UsageError(
        one_line(error.format_message().replace("Value error, ", "")), f"'{command} --help' lists the options."
    )


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _report_error(error: GpuoptError) -> int:
    _answer_json(error.kind, error.exit_code, error.message, error.hint)
    typer.echo(error.lines(), err=True)
    if _debug:
        import traceback

        typer.echo(error.details or "".join(traceback.format_exception(error)), err=True)
    return error.exit_code
