"""From the lines that TensorRT's builders and parsers really print to a node, a cause and a next step."""

from __future__ import annotations

import re

import pytest

from gpuopt.backends.tensorrt import diagnosis
from gpuopt.backends.tensorrt.diagnosis import ParserProblem, builder_error, find, parser_error
from gpuopt.errors import BuildError, RequirementError

# Log lines of TensorRT 8.0 to 10.x as users report them, and of TensorRT-RTX 1.7; errors, then warnings.
BUILDER = [
    (
        "no implementation",
        "{ForeignNode[177...Reshape_81 + (Unnamed Layer* 146) [Shuffle]]}",
        [
            "10: [optimizer.cpp::computeCosts::3728] Error Code 10: Internal Error (Could not find any implementation "
            "for node {ForeignNode[177...Reshape_81 + (Unnamed Layer* 146) [Shuffle]]}.)",
            "2: [builder.cpp::buildSerializedNetwork::751] Error Code 2: Internal Error (Assertion engine != nullptr "
            "failed. )",
        ],
        [],
    ),
    (
        "no implementation",
        "/Concat_17slice",
        ["IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation for node "
         "/Concat_17slice.)"],
        [],
    ),
    (
        "no implementation",
        "/conv/Conv + /act/Relu",
        ["Error Code: 10: Could not find any implementation for node /conv/Conv + /act/Relu."],
        ["Some unrelated warning"],
    ),
    (
        "out of memory",
        "{ForeignNode[/1/Constant_36_output_0.../1/Slice_4]}",
        [
            "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
            "Error Code: 9: Skipping tactic 0x0000000000000000 due to exception [tunable_graph.cpp:create:117] "
            "autotuning: User allocator error allocating 15485030400-byte buffer",
            "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation for "
            "node {ForeignNode[/1/Constant_36_output_0.../1/Slice_4]}.)",
        ],
        ["Requested amount of GPU memory (15485030400 bytes) could not be allocated."],
    ),
    (
        "out of memory",
        "{ForeignNode[2337...Reshape_1696]}",
        ["10: [optimizer.cpp::computeCosts::2011] Error Code 10: Internal Error (Could not find any implementation for "
         "node {ForeignNode[2337...Reshape_1696]}.)"],
        ["Skipping tactic 0 due to insuficient memory on requested size of 1459519488 detected for tactic 0."],
    ),
    ("out of memory", "", ["2: [virtualMemoryBuffer.cpp::resizePhysical::160] Error Code 2: OutOfMemory (no further "
                           "information)"], []),
    (
        "workspace",
        "",
        ["IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([tactic.cpp:1676: enumerate_tactics] Tactic "
         "Selection: no tactics to implement the operation within workspace limit. Consider increase the allowed "
         "workspace size if applicable.; [tactic.cpp:264: run] Error during tactic selection. In compileGraph)"],
        [],
    ),
    (
        "no driver",
        "",
        ["[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/common/dispatch"
         "/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime version))"],
        [],
    ),
    (
        "profile",
        "",
        ["4: [network.cpp::validate::2882] Error Code 4: Internal Error (Network has dynamic or shape inputs, but no "
         "optimization profile has been defined.)"],
        [],
    ),
    (
        "shape tensor",
        "",
        ["4: [network.cpp::validate] Error Code 4: Internal Error (input shape tensor must have optimization profile)"],
        [],
    ),
    (
        "I/O format",
        "x",
        ["IBuilder::buildSerializedNetwork: Error Code 3: API Usage Error (x: has dataType Float unsupported by "
         "tensor's allowed TensorFormats. In operator() at /_src/optimizer/api/network.cpp:3537)"],
        [],
    ),
    (
        "library missing",
        "",
        ["IBuilder::buildSerializedNetwork: Error Code 6: API Usage Error (Unable to load library: "
         "libnvinfer_lean.so.1: libnvinfer_lean.so.1: cannot open shared object file: No such file or directory)"],
        [],
    ),
    ("unknown", "", ["2: Error Code 2: Internal Error (Assertion enginePtr != nullptr failed. )"], []),
    ("unknown", "", [], []),
]  # fmt: skip


@pytest.mark.parametrize(("cause", "node", "errors", "warnings"), BUILDER)
def test_the_cause_and_the_node_of_a_failed_build(
    cause: str, node: str, errors: list[str], warnings: list[str]
) -> None:
    finding = find({"ERROR": errors, "WARNING": warnings})
    assert (finding.cause.name, finding.node) == (cause, node)


PARSER = [
    (
        "zero point",
        "conv_DequantizeLinear",
        [],
        [
            'While parsing node number 3 [DequantizeLinear -> "a"]:',
            "--- Begin node ---",
            'input: "q"\ninput: "s"\noutput: "a"\nname: "conv_DequantizeLinear"\nop_type: "DequantizeLinear"\n',
            "ERROR: builtin_op_importers.cpp:1235 In function QuantDequantLinearHelper: [6] Assertion failed: "
            'shiftIsAllZeros(zeroPoint) && "TRT only supports symmetric quantization - zeroPt must be all zeros"',
        ],
    ),
    (
        "zero point",
        "deq",
        [ParserProblem("Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported. Please set "
                       "kENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLA", "deq", "DequantizeLinear")],
        [],
    ),
    (
        "scale",
        "quant",
        [ParserProblem('Assertion failed: scaleAllPositive && "Scale coefficients must all be positive"', "quant",
                       "QuantizeLinear")],
        [],
    ),
    (
        "plugin not found",
        "LeakyRelu_2",
        [ParserProblem('Assertion failed: creator && "Plugin not found, are the plugin name, version, and namespace '
                       'correct?"', "LeakyRelu_2", "Custom")],
        ["3: getPluginCreator could not find plugin: Custom version: 1"],
    ),
    (
        "external data missing",
        "",
        [ParserProblem("Failed to import initializer", "", "")],
        ["WeightsContext.cpp:178: Failed to open file: stdit3_simplified.onnx.data",
         "In node -1 with name:  and operator:  (parseGraph): INVALID_GRAPH: Failed to import initializer"],
    ),
    (
        "unsupported operator",
        "seq",
        [ParserProblem("In node 4 with name: seq and operator: SequenceAt (parseNode): UNSUPPORTED_NODE: no", "seq",
                       "SequenceAt")],
        [],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("cause", "node", "problems", "errors"), PARSER)
def test_a_refused_graph_names_node_and_cause(
    cause: str, node: str, problems: list[ParserProblem], errors: list[str]
) -> None:
    error = parser_error("tensorrt 8.5.3.1", problems, {"ERROR": errors, "WARNING": []})
    words = next(entry.words for entry in diagnosis.CAUSES if entry.name == cause)
    assert isinstance(error, BuildError)
    assert words in error.message
    assert error.hint
    assert (f"at node '{node}'" in error.message) == bool(node)


def test_a_missing_driver_is_an_error_of_the_environment() -> None:
    error = builder_error("tensorrt-rtx 1.7", {"ERROR": ["(cudaError 35: CUDA driver version is insufficient)"]})
    assert isinstance(error, RequirementError)


def test_the_hint_names_the_node_where_it_is_one_node() -> None:
    line = "Error Code 10: Internal Error (Could not find any implementation for node {}.)"
    one = builder_error("t", {"ERROR": [line.format("/conv/Conv")]})
    assert "cast.nodes_to_keep=[/conv/Conv]" in one.hint
    fused = builder_error("t", {"ERROR": [line.format("{ForeignNode[a...b]}")]})
    assert "cast.nodes_to_keep=[NAME]" in fused.hint


def test_a_long_line_is_cut_and_the_error_keeps_three_lines() -> None:
    error = builder_error("t", {"ERROR": ["Error Code 9: " + "word " * 1000]})
    assert len(error.message) < 600
    assert error.lines().count("\n") <= 2


def test_every_cause_has_words_a_hint_and_a_pattern_that_compiles() -> None:
    for cause in diagnosis.CAUSES:
        assert re.compile(cause.pattern)
        assert cause.words
        assert cause.hint
    assert len({cause.name for cause in diagnosis.CAUSES}) == len(diagnosis.CAUSES)
