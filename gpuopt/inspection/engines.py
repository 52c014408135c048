"""A serialized engine, described by its record and by the report of its bundle; it is not deserialised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from gpuopt import engine_record
from gpuopt.engine_record import EngineRecord, TensorRecord
from gpuopt.errors import EngineError
from gpuopt.inspection import loading
from gpuopt.inspection.home import Home
from gpuopt.inspection.model import CoverageFacts, EngineFacts, FileFacts, TensorFacts
from gpuopt.report.model import EngineReport
from gpuopt.storage import sha256_file, storage_errors

MAGIC = (b"ftrt", b"ptrt", b"vtrt")
"""What plans of TensorRT and, the last one, of TensorRT-RTX begin with."""

SUFFIXES = (".engine", ".plan", ".trt")


def is_plan(path: Path) -> bool:
    """Whether a file begins as a serialized engine does."""
    with storage_errors("read", path), path.open("rb") as stream:
        return stream.read(4) in MAGIC


def describe(path: Path, home: Home | None, with_origin: bool) -> EngineFacts:
    """What is known of an engine.

    Args:
        home: the bundle that it lies in.
        with_origin: whether the bundle's origin is told, too.

    Raises:
        StorageError: the engine or its record cannot be read.
    """
    with storage_errors("read", path):
        size, sha256 = path.stat().st_size, sha256_file(path)
    record, problem = _record(path)
    file = FileFacts(
        name=path.name,
        size_bytes=size,
        sha256=sha256,
        matches_record=(size, sha256) == (record.size_bytes, record.sha256) if record is not None else None,
        matches_manifest=home.hash_fits(path.name, sha256) if home is not None else None,
    )
    line = home.engine(path.name) if home is not None else None
    proof = line.proof if line is not None and line.proof is not None and line.sha256 == sha256 else None
    facts = EngineFacts(
        file=file,
        record_problem=problem,
        status=_status(line, sha256),
        coverage=_coverage(proof),
        proved_on=str(proof["gpu"]) if proof is not None and "gpu" in proof else None,
        loading=loading.of_engine(file, record, problem),
        origin=home.origin() if home is not None and with_origin else None,
    )
    if record is None:
        return facts
    told = proof.get("io_formats") if proof is not None else None
    formats = told if isinstance(told, dict) else home.io_formats if home is not None else {}
    return facts.model_copy(
        update={
            "target": record.target,
            "library_version": record.library_version,
            "precision": record.precision,
            "tf32": record.tf32,
            "version_compatible": record.version_compatible,
            "compute_capabilities": record.compute_capabilities,
            "hardware_compatibility": record.hardware_compatibility,
            "gpu": record.gpu,
            "driver_version": record.driver_version,
            "plugins": record.plugins,
            "inputs": tuple(_tensor(tensor, formats) for tensor in record.inputs),
            "outputs": tuple(_tensor(tensor, formats) for tensor in record.outputs),
            "profiles": record.profiles,
        }
    )


def _record(path: Path) -> tuple[EngineRecord | None, str]:
    if not engine_record.record_path(path).is_file():
        return None, "no record"
    try:
        return engine_record.read(path), ""
    except EngineError as error:
        return None, error.message


def _status(line: EngineReport | None, sha256: str) -> str | None:
    """The report's word of a file that is still the one it is about."""
    return line.status if line is not None and line.sha256 == sha256 else None


def _coverage(proof: Mapping[str, object] | None) -> CoverageFacts | None:
    if proof is None:
        return None
    try:
        return CoverageFacts.model_validate(proof.get("coverage"))
    except ValidationError:
        return None


def _tensor(record: TensorRecord, formats: Mapping[str, object]) -> TensorFacts:
    """Formats are `fp16:hwc8`; the dtype in them is the record's."""
    layout = str(formats[record.name]).partition(":")[2] if record.name in formats else ""
    return TensorFacts(name=record.name, dtype=record.dtype, shape=record.shape, layout=layout or None)
