"""Whether two failures are one and the same, and what counts as a failure inside a library."""

from __future__ import annotations

import gpuopt
from gpuopt.errors import AccuracyError, BuildError, ExportError, GpuoptError, QuantizationError, UsageError
from gpuopt.reduction.attempts import signature
from gpuopt.reduction.command import is_in_library


def refused(node: str, number: int) -> BuildError:
    return BuildError(
        f"tensorrt-rtx 1.7.1.{number} does not take the graph at node '{node}' (NonZero): "
        f"ModelImporter.cpp:{number}: In function importNonZero: [8] Assertion failed: creator"
    )


def test_names_numbers_and_shapes_are_no_part_of_a_signature() -> None:
    assert signature(refused("/a/nonzero", 151)) == signature(refused("node_NonZero_16", 9100))


def test_another_operator_or_kind_is_another_failure() -> None:
    other = BuildError(refused("x", 1).message.replace("importNonZero", "importUnique"))
    assert signature(other) != signature(refused("x", 1))
    assert signature(QuantizationError(refused("x", 1).message)) != signature(refused("x", 1))


def test_differences_are_one_failure_whatever_their_size() -> None:
    assert signature(AccuracyError("cosine 0.3")) == signature(AccuracyError("output 'y' has NaN"))


def test_a_refusal_of_our_own_is_no_failure_inside_a_library() -> None:
    ours = QuantizationError("no node can be quantized")
    ours.details = f'Traceback\n  File "{gpuopt.__path__[0]}/stages/quantize.py", line 46, in run\n    raise\n'
    theirs = QuantizationError("onnxruntime's quantizer fails: KeyError: 'x'")
    theirs.details = (
        f'Traceback\n  File "{gpuopt.__path__[0]}/quantization/qdq.py", line 9, in quantize\n    f()\n'
        '  File "/somewhere/site-packages/onnxruntime/quantization/quant.py", line 3, in f\n    raise KeyError\n'
        f"\nThe above exception was the direct cause of the following exception:\n\n{ours.details}"
    )
    assert not is_in_library(ours)
    assert is_in_library(theirs)
    assert is_in_library(BuildError("a library crashed"))
    assert is_in_library(ExportError("no exporter"))
    assert not is_in_library(UsageError("a flag"))
    assert not is_in_library(GpuoptError("nothing known"))
