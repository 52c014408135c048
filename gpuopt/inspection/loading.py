"""Whether an engine or a graph will load on this machine: every reason against it, and nothing loaded to find out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gpuopt import environment
from gpuopt.backends.tensorrt import preflight
from gpuopt.engine_record import EngineRecord
from gpuopt.inspection.model import FileFacts, LoadingFacts
from gpuopt.inspection.runtime_limits import Operator, objections


def of_engine(file: FileFacts, record: EngineRecord | None, record_problem: str) -> LoadingFacts:
    """Of an engine, on the first GPU.

    Args:
        record_problem: why there is no record.
    """
    if record is None:
        return LoadingFacts(verdict="unknown", reasons=(record_problem,))
    reasons: list[str] = []
    open_questions: list[str] = []
    if problem := preflight.file_problem(file.name, record, file.size_bytes, file.sha256):
        reasons.append(problem.message)
    version = environment.stated_library_version(record.target)
    if not environment.has_library(record.target):
        name, hint = record.target, environment.library_install_hint(record.target)
        reasons.append(f"the library of {name}, {record.library_version}, is not installed: {hint}")
    elif not version:
        open_questions.append(f"which version of {record.target} is installed is not known unless it is loaded")
    elif problem := preflight.library_problem(record, version):
        reasons.append(problem.message)
    if devices := environment.gpus():
        gpu = devices[0]
        found = (
            preflight.gpu_problem(record, gpu.name, gpu.compute_capability),
            preflight.driver_problem(record, gpu.driver_version),
        )
        reasons += [problem.message for problem in found if problem is not None]
    else:
        reasons.append("there is no NVIDIA GPU here, or no driver")
    if not environment.has_module("pycuda"):
        reasons.append(f"pycuda is not installed: {environment.install_hint('pycuda')}")
    verdict = "no" if reasons else "unknown" if open_questions else "yes"
    return LoadingFacts.model_validate(
        {"verdict": verdict, "reasons": (*reasons, *open_questions), "needs": _needs(record)}
    )


def of_graph(ir_version: int, opsets: Mapping[str, int], operators: Collection[Operator]) -> LoadingFacts:
    """Of an ONNX graph, in ONNX Runtime, as far as versions and names of operators tell.

    Args:
        opsets: by domain; ai.onnx is the empty one.
        operators: all that the file does not define itself.
    """
    if not environment.has_library("onnxruntime"):
        hint = environment.library_install_hint("onnxruntime")
        return LoadingFacts(verdict="no", reasons=(f"ONNX Runtime is not installed: {hint}",))
    found = objections(environment.stated_library_version("onnxruntime"), ir_version, opsets, operators)
    verdict = "no" if found.reasons else "unknown" if found.open_questions else "yes"
    return LoadingFacts.model_validate({"verdict": verdict, "reasons": (*found.reasons, *found.open_questions)})


def _needs(record: EngineRecord) -> tuple[str, ...]:
    needs = [f"--plugin FOLDER/{name}: it was built with this library, whose code runs" for name in record.plugins]
    if record.version_compatible:
        needs.append("--allow-host-code: as every version-compatible engine it carries code for the CPU")
    return tuple(needs)
