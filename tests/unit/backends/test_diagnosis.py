"""What builders say, as an error with the node, the cause and a next step. The lines are real ones."""

from __future__ import annotations

import pytest

from gpuopt.backends.tensorrt.diagnosis import explain, failing_node

LOG = [
    (
        "Error Code 10: Internal Error (Could not find any implementation for node /block/dw/Conv + /block/Relu.)",
        "build", "/block/dw/Conv", "no kernel for the node",
    ),
    (
        "10: [optimizer.cpp::computeCosts::3728] Error Code 10: Internal Error (Could not find any implementation for "
        "node {ForeignNode[/head/MatMul.../head/Add]}.)",
        "build", "/head/MatMul", "no kernel for the node",
    ),
    (
        "4: [network.cpp::validate::3063] Error Code 4: Internal Error (Network has dynamic or shape inputs, but no "
        "optimization profile has been defined.)",
        "build", "", "optimisation profiles do not fit",
    ),
    (
        "[network.cpp::addInput::1619] Error Code 3: API Usage Error (Parameter check failed at: "
        "optimizer/api/network.cpp::addInput::1619, condition: volume(dims) < kMAX_TENSOR_SIZE\n)",
        "build", "", "more than 2^31 - 1 values",
    ),
    (
        "2: [virtualMemoryBuffer.cpp::resizePhysical::144] Error Code 2: OutOfMemory (no further information)",
        "environment", "", "too little free memory",
    ),
    ("CUDA initialization failure with error: 35", "environment", "", "needs an NVIDIA GPU"),
    ("something that nobody has seen before", "build", "", "something that nobody has seen before"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "kind", "node", "words"), LOG)
def test_a_line_of_the_log(line: str, kind: str, node: str, words: str) -> None:
    last = "2: [builder.cpp::buildSerializedNetwork::751] Error Code 2: (Assertion engine != nullptr failed. )"
    error = explain("tensorrt 8.5.3.1", [line, last])
    assert error.kind == kind
    assert words in error.message
    assert failing_node([line]) == node
    assert (f"at node '{node}'" in error.message) == bool(node)
    assert error.hint


def test_silence_is_told_as_such() -> None:
    assert "no reason given" in explain("tensorrt 10.3", []).message
