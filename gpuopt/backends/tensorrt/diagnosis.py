"""What the parser and the builder say, as an error with the node, its cause in words and a next step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpuopt.errors import BuildError, RequirementError, one_line

_PRECISION = "Keep the node out of INT8 (--nodes-to-exclude NAME) or FP16 (--set cast.nodes_to_keep=[NAME])."


@dataclass(frozen=True)
class Cause:
    """One known way to fail.

    Attributes:
        pattern: in the log, in any line.
        meaning: in words.
        hint: what to do.
        is_environment: whether the machine lacks something, rather than the graph.
    """

    pattern: str
    meaning: str
    hint: str
    is_environment: bool = False


CAUSES = (
    Cause(
        r"cudaError 35|insufficient for CUDA runtime|CUDA initialization failure|no CUDA-capable device",
        "it needs an NVIDIA GPU and a current driver for this build",
        "Leave out the compute capability 'current', or build on the machine with the GPU.",
        True,
    ),
    Cause(
        r"volume\(dims\) < kMAX_TENSOR_SIZE|exceeds the maximum (tensor )?(volume|size)",
        "a tensor has more than 2^31 - 1 values, which TensorRT does not take",
        "Use smaller --max-shapes.",
    ),
    Cause(
        r"out of memory|OutOfMemory|cudaErrorMemoryAllocation|Requested amount of GPU memory",
        "the GPU has too little free memory",
        "Stop what else runs on the GPU (nvidia-smi lists it), use smaller --max-shapes or a smaller --workspace.",
        True,
    ),
    Cause(
        r"insufficient (memory|workspace)|[Ww]orkspace (is )?too small|requires? more workspace",
        "no kernel fits into the workspace",
        "Give more: --workspace 8GiB.",
    ),
    Cause(
        r"[Pp]lugin not found|creator && |getPluginCreator could not find",
        "an operator is neither TensorRT's own nor a plugin that is loaded",
        "Load its library with --plugin FILE.so, or change the operator in the model.",
    ),
    Cause(
        r"zero_point|zero point|shiftIsAllZeros",
        "a Q or DQ has a zero point that is not zero",
        "TensorRT takes symmetric INT8 only: quantize with 'gpuopt quantize', or calibrate symmetrically.",
    ),
    Cause(
        r"[Mm]issing scale and zero-point|no scale and zero-point|calibration (failure|data)",
        "a tensor in INT8 has no scale",
        "Leave its layer out of INT8 (--nodes-to-exclude NAME).",
    ),
    Cause(
        r"no optimization profile|Profile kOPT values|dimensions? .* not (within|satisfy)|setDimensions.*profile",
        "the optimisation profiles do not fit the graph's inputs",
        "Give --min-shapes, --opt-shapes and --max-shapes for every dynamic input.",
    ),
    Cause(
        r"external data|Failed to open file|weights? file",
        "the ONNX file's external data cannot be read",
        "Keep the data file beside the ONNX file.",
    ),
    Cause(
        r"[Uu]nsupported ONNX opset|opset version|ir_version",
        "this TensorRT does not know the graph's opset",
        "Export with another: --opset 17 for TensorRT 8.5, 20 for TensorRT 10.",
    ),
    Cause(
        r"[Cc]ould not find any implementation|no implementation",
        "TensorRT has no kernel for the node in its precision and formats",
        _PRECISION,
    ),
    Cause(r"[Tt]iming cache (not found|is required|mismatch)", "the timing cache does not fit", "Build without it."),
)

_NODE = (
    r"for node ([^\n]+?)(?:\.\)?$|\.?\s|$)",
    r"[Nn]ode(?: name)?[: ]+'?([\w./:+ -]+?)'?(?:[,.)\]]|$)",
    r"\[Node:? '?([\w./:-]+)'?\]",
)
_LAST_WORDS = ("engine != nullptr failed", "Engine deserialization failed")


def explain(who: str, lines: Sequence[str]) -> BuildError | RequirementError:
    """The builder's log as an error.

    Args:
        who: library and version.
        lines: what it said with severity error, oldest first; may be empty.
    """
    telling = [line for line in lines if not any(words in line for words in _LAST_WORDS)] or list(lines)
    text = "\n".join(telling)
    cause = next((cause for cause in CAUSES if re.search(cause.pattern, text)), None)
    node = failing_node(telling)
    where = f" at node '{node}'" if node else ""
    said = one_line(telling[-1]) if telling else "no reason given"
    if cause is None:
        return BuildError(f"{who} cannot build the engine{where}: {said}", _PRECISION)
    kind = RequirementError if cause.is_environment else BuildError
    return kind(f"{who} cannot build the engine{where}: {cause.meaning} ({said})", cause.hint)


def failing_node(lines: Sequence[str]) -> str:
    """The node that the builder names, as ONNX names it; empty if it names none."""
    for line in reversed(lines):
        for pattern in _NODE:
            found = re.search(pattern, line)
            if found and found[1].strip():
                return _first_onnx_name(found[1].strip())
    return ""


def _first_onnx_name(name: str) -> str:
    """Of fused nodes (`a + b`) and blocks (`{ForeignNode[a...b]}`) the first."""
    block = re.search(r"ForeignNode\[([^\]]+?)\.\.\.", name)
    return block[1] if block else name.split(" + ")[0].strip("{}[]' ")


def refused_graph(who: str, parser: Any) -> BuildError:
    """The parser's first problem as an error."""
    problems = [parser.get_error(index) for index in range(parser.num_errors)]
    first = problems[0] if problems else None
    where = ""
    if first is not None:
        # TensorRT 8 gives neither.
        name, operator = getattr(first, "node_name", str)(), getattr(first, "node_operator", str)()
        where = f" at node '{name}' ({operator})" if name or operator else ""
        if not where and first.node() >= 0:
            where = f" at node number {first.node()}"
    detail = one_line(first.desc()) if first is not None else "no reason given"
    cause = next((cause for cause in CAUSES if re.search(cause.pattern, detail)), None)
    if cause is not None:
        return BuildError(f"{who} does not take the graph{where}: {cause.meaning} ({detail})", cause.hint)
    return BuildError(
        f"{who} does not take the graph{where}: {detail}",
        "Keep the node out of INT8 (--set quantize.nodes_to_exclude=[NAME]) or FP16 (cast.nodes_to_keep), "
        "or change the operator in the model.",
    )


def without_repeats(messages: Mapping[str, list[str]]) -> list[str]:
    """Errors, then warnings, each once."""
    return list(dict.fromkeys([*messages["ERROR"], *messages["WARNING"]]))
