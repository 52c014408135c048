"""Why a graph was refused or an engine was not built: from the library's log to a node, a cause and a next step.

What is known stands in `CAUSES`; the first row that fits the log decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpuopt.errors import BuildError, GpuoptError, RequirementError

_MOST_QUOTED = 240


@dataclass(frozen=True)
class Cause:
    """A known reason of a failure.

    Attributes:
        name: short, for the facts and for repairs.
        pattern: what a line of the log shows.
        words: the cause, for people.
        hint: what to do next.
        error: the kind of error that it is.
    """

    name: str
    pattern: str
    words: str
    hint: str
    error: type[GpuoptError] = BuildError


NO_IMPLEMENTATION = "no implementation"
OUT_OF_MEMORY = "out of memory"

CAUSES = (
    Cause(
        "no driver",
        r"cudaError 35|insufficient for CUDA runtime|CUDA initialization failure|no CUDA-capable device",
        "it needs an NVIDIA GPU and a current driver for this build",
        "Build on the machine with the GPU. TensorRT-RTX needs one for the compute capability 'current' alone.",
        RequirementError,
    ),
    Cause(
        "external data missing",
        r"[Ff]ailed to open file|Failed to (?:import|load) (?:initializer|weights)|external data",
        "a file with the graph's weights (external data) cannot be read",
        "Keep the .data file in the folder of the ONNX file, under its own name.",
    ),
    Cause(
        "opset",
        r"[Oo]pset.{0,60}(?:not supported|unsupported|newer than)|No Op registered for \w+ with domain_version|"
        r"[Uu]nsupported (?:ONNX )?(?:IR|opset) version",
        "the graph's opset is not one that this release takes",
        "Export with another one: --opset 17 for TensorRT 8.5, up to 20 for TensorRT 10 and newer.",
    ),
    Cause(
        "data-dependent shape",
        r"importNonZero|NonZero plugin creator|importUnique\b|data[- ]dependent shape",
        "the size of its output depends on the data (NonZero: nonzero(), a mask as an index; Unique), a data-dependent "
        "shape that it does not take",
        "Keep the size fixed: torch.where or a product with the mask instead of a selection, topk with a constant k. "
        "Or select outside of the engine.",
    ),
    Cause(
        "plugin not found",
        r"Plugin not found|could not find plugin|[Nn]o matching plugin|Attempting to import as plugin",
        "the operator is no ONNX operator that it knows, and no plugin of that name is loaded",
        "Change the operator in the model, or load the library that has the plugin (--plugin FOLDER/libNAME.so; "
        "TensorRT-RTX takes none).",
    ),
    Cause(
        "unsupported operator",
        r"[Nn]o importer registered for op|UNSUPPORTED_NODE(?!_)|[Uu]nsupported (?:ONNX )?operator|No conversion",
        "the operator is not supported",
        "Change the operator in the model, or load a plugin for it: --plugin FOLDER/libNAME.so.",
    ),
    Cause(
        "zero point",
        r"shiftIsAllZeros|[Nn]on-zero zero point|only supports symmetric quantization|zero[ _-]?point.{0,40}zero",
        "it quantizes symmetrically alone, and a Q or DQ of the graph has a zero point that is not zero",
        "Quantize the floating-point model with gpuopt, or the original tool with symmetric INT8 (zero points 0).",
    ),
    Cause(
        "scale",
        r"scaleAllPositive|[Ss]cale coefficients must all be positive|[Ss]cale.{0,60}must be "
        r"(?:an initializer|constant|a build-?time constant)|[Mm]issing scale for tensor|has no scale|"
        r"[Mm]issing dynamic range",
        "a tensor has no scale for INT8, or one that is not positive or not constant",
        "Look at the ranges: a tensor of zeros or NaN gives such a scale; --nodes-to-exclude keeps a node out of INT8.",
    ),
    Cause(
        "INT32 dequantized",
        r"DequantizeLinear.{0,80}(?:INT32|kINT32)|[Ii]nput type to dequantize must be INT8",
        "a bias is stored as INT32 behind DQ, which it does not take",
        "Leave biases in floating point: gpuopt does; onnxruntime's quantizer with QuantizeBias=False.",
    ),
    Cause(
        "shape tensor",
        r"input shape tensor|is a shape tensor|shape values provided by optimization profile|missing values for shape",
        "an input's values are sizes (a shape tensor), which a profile would have to bound",
        "Make the size a constant of the model, or derive it from another input's shape.",
    ),
    Cause(
        "profile",
        r"optimization profile has been defined|must have optimization profile|MIN ?<= ?OPT ?<= ?MAX|"
        r"[Ii]mpossible for the given optimization profile|does not satisfy any optimization profile|"
        r"profile.{0,60}(?:not satisf|inconsisten|invalid)|kMIN dimensions|kMAX dimensions|kOPT dimensions",
        "the shapes of the profile do not fit the graph",
        "Look at --min-shapes, --opt-shapes and --max-shapes: each has to be a shape that the model takes.",
    ),
    Cause(
        "I/O format",
        r"unsupported by tensor's allowed TensorFormats|allowed[ _]?[Ff]ormats",
        "an input or output cannot have the asked-for format in its dtype",
        "hwc8 and hwc16 are for fp16, hwc for fp32 and uint8, chw4 for int8 and fp16, chw32 for all but uint8;\n"
        "chw is always possible: --io-format NAME=fp16:chw.",
    ),
    Cause(
        OUT_OF_MEMORY,
        r"out of memory|OutOfMemory|MEM_ALLOC_FAILED|could not be allocated|[Tt]ry decreasing the workspace size|"
        r"User allocator error allocating|insuff?icient memory",
        "the GPU's memory does not suffice",
        "Free the GPU ('nvidia-smi' shows who uses it), or bound the build: --workspace 1GiB, or smaller --max-shapes.",
    ),
    Cause(
        "workspace",
        r"[Ii]ncreas\w* (?:the )?(?:allowed )?workspace|within workspace limit|sufficient workspace",
        "no kernel can work with so little scratch memory",
        "Raise or leave out --workspace.",
    ),
    Cause(
        NO_IMPLEMENTATION,
        r"[Cc]ould not find any implementation for node|no tactics to implement|NO_IMPLEMENTATION",
        "there is no kernel for it in this precision and shape on this GPU",
        "Keep the node out of FP16 (cast.nodes_to_keep=[NAME]) and INT8 (--nodes-to-exclude NAME), or try "
        "--optimization-level 5.",
    ),
    Cause(
        "timing cache",
        r"[Tt]iming cache.{0,40}(?:miss|mismatch)",
        "the timing cache does not fit this build",
        "Delete it or name another one: --timing-cache FILE.",
    ),
    Cause(
        "CUDA",
        r"CHECK\(status == CUDA_SUCCESS\)",
        "a call of the GPU's driver failed",
        "TensorRT-RTX needs a GPU for refit and strip_weights; 'nvidia-smi' shows whether there is one.",
        RequirementError,
    ),
    Cause(
        "library missing",
        r"Unable to load library|cannot open shared object file",
        "a library of TensorRT, or one that it uses, is not there",
        "Install the whole package of TensorRT; 'gpuopt doctor' shows what is there.",
        RequirementError,
    ),
)

_UNKNOWN = Cause(
    "unknown",
    "",
    "",
    "Keep the node out of INT8 (--nodes-to-exclude NAME) or FP16 (cast.nodes_to_keep=[NAME]), or change the operator "
    "in the model.",
)

_NODES = (
    re.compile(r"implementation for node (?P<node>.+?)(?:\.\)|\.?\s*$|\.? (?:due|with|In) )", re.MULTILINE),
    re.compile(r"fastest tactic for (?P<node>\S.*?)(?:\.\)|\.?\s*$)", re.MULTILINE),
    re.compile(r"with name: (?P<node>.*?) and operator:"),
    re.compile(r"^name: \"(?P<node>.+)\"$", re.MULTILINE),
    re.compile(r"Error Code \d+: [\w ]+\((?:node |layer )?'?(?P<node>[^\s:'\[\](){}]+)'?: "),
)


@dataclass(frozen=True)
class ParserProblem:
    """One error of the ONNX parser; name and operator may be empty."""

    text: str
    node: str
    operator: str


@dataclass(frozen=True)
class Finding:
    """What a log says.

    Attributes:
        cause: of `CAUSES`, or one named `unknown`.
        node: the library's words for the failing node, which may be several fused ones; empty: not known.
        line: the line that shows it.
    """

    cause: Cause
    node: str
    line: str


def find(messages: Mapping[str, Sequence[str]]) -> Finding:
    """The cause that a log shows.

    Args:
        messages: lines by level, `ERROR` and `WARNING`; a warning decides only where no error is known.
    """
    errors, warnings = list(messages.get("ERROR", ())), list(messages.get("WARNING", ()))
    node = _node([*errors, *warnings])
    for cause in CAUSES:
        # Memory runs out in warnings, while the error is that nothing was found.
        lines = [*errors, *warnings] if cause.name in (OUT_OF_MEMORY, "workspace") else errors
        for line in lines:
            if re.search(cause.pattern, line):
                return Finding(cause, node, line)
    last = errors or warnings
    return Finding(_UNKNOWN, node, last[-1] if last else "no reason given")


def _node(lines: Sequence[str]) -> str:
    for pattern in _NODES:
        for line in lines:
            if match := pattern.search(line):
                return match["node"].strip()
    return ""


def builder_error(who: str, messages: Mapping[str, Sequence[str]]) -> GpuoptError:
    """The error for an engine that was not built.

    Args:
        who: library and version.
        messages: the log's lines by level.
    """
    return _with_log(_error(f"{who} cannot build the engine", find(messages), ""), [], messages)


def parser_error(who: str, problems: Sequence[ParserProblem], messages: Mapping[str, Sequence[str]]) -> GpuoptError:
    """The error for a graph that the ONNX parser refuses.

    Args:
        who: library and version.
        problems: the parser's own list, in its order.
        messages: the log's lines by level.
    """
    # The log holds more than the list: what an assertion was about, and of TensorRT 8 the node's name.
    told = [problem.text for problem in problems]
    finding = find({"ERROR": [*told, *messages.get("ERROR", ())], "WARNING": messages.get("WARNING", ())})
    first = next((problem for problem in problems if problem.node or problem.operator), None)
    if first is not None:
        finding = Finding(finding.cause, first.node or finding.node, finding.line)
    elif finding.cause.name == "unknown" and told:
        finding = Finding(finding.cause, finding.node, told[0])
    error = _error(f"{who} does not take the graph", finding, first.operator if first is not None else "")
    return _with_log(error, told, messages)


def _with_log(error: GpuoptError, told: Sequence[str], messages: Mapping[str, Sequence[str]]) -> GpuoptError:
    """The error with everything that the library said, for `--debug` and the log of a kept failure."""
    lines = [*told, *(f"{level}: {line}" for level, said in messages.items() for line in said)]
    error.details = "\n".join(["", *dict.fromkeys(lines), ""])
    return error


def _error(said: str, finding: Finding, operator: str) -> GpuoptError:
    kind = f" ({operator})" if operator else ""
    where = f" at node '{finding.node[:120]}'{kind}" if finding.node or operator else ""
    words = f"{finding.cause.words}: " if finding.cause.words else ""
    line = " ".join(finding.line.split())
    quoted = line if len(line) <= _MOST_QUOTED else line[: _MOST_QUOTED - 3] + "..."
    hint = finding.cause.hint.replace("NAME]", f"{finding.node}]") if _is_name(finding.node) else finding.cause.hint
    return finding.cause.error(f"{said}{where}: {words}{quoted}", hint)


def _is_name(node: str) -> bool:
    return bool(re.fullmatch(r"[\w./:-]+", node))
