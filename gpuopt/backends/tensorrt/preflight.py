"""Whether an engine may be deserialised here: hash, library, GPU and driver, each with a message of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpuopt.backends.tensorrt.library import name_of
from gpuopt.engine_record import EngineRecord
from gpuopt.errors import EngineError
from gpuopt.storage import sha256_file, storage_errors

_AGAIN = "Build it here: gpuopt build BUNDLE."


@dataclass(frozen=True)
class Here:
    """This machine, as far as it decides whether an engine runs.

    Attributes:
        library_version: of the target's library, as `8.5.3.1`.
        compute_capability: of the GPU, as `9.0`.
        gpu: its name.
        driver_version: the newest CUDA version that the driver supports, as `13.0`.
    """

    library_version: str
    compute_capability: str
    gpu: str
    driver_version: str


def check_file(path: Path, record: EngineRecord) -> None:
    """Whether the file is the one that the record describes.

    Raises:
        StorageError: it cannot be read.
        EngineError: it was cut off or changed.
    """
    with storage_errors("read", path):
        size = path.stat().st_size
        problem = file_problem(path.name, record, size, sha256_file(path) if size == record.size_bytes else "")
    if problem is not None:
        raise problem


def file_problem(name: str, record: EngineRecord, size_bytes: int, sha256: str) -> EngineError | None:
    """In what a file of this size and hash is not the one that the record describes; None if it is that."""
    if size_bytes != record.size_bytes:
        return EngineError(
            f"{name} has {size_bytes} bytes, its record says {record.size_bytes}: the file was cut off or replaced",
            "Copy the engine and its record again.",
        )
    if sha256 != record.sha256:
        return EngineError(
            f"{name} was changed: SHA-256 {sha256[:12]}..., its record says {record.sha256[:12]}...",
            "An engine is executable code: copy it again from where it was built.",
        )
    return None


def check_machine(record: EngineRecord, here: Here) -> None:
    """Whether library, GPU and driver are ones that the engine was built for.

    Raises:
        EngineError: the first that is not.
    """
    problems = (
        library_problem(record, here.library_version),
        gpu_problem(record, here.gpu, here.compute_capability),
        driver_problem(record, here.driver_version),
    )
    for problem in problems:
        if problem is not None:
            raise problem


def library_problem(record: EngineRecord, version: str) -> EngineError | None:
    """What is wrong with the library here; None if nothing is."""
    built, present = _number(record.library_version), _number(version)
    if built[:3] == present[:3]:
        return None
    if record.version_compatible and built[:1] == present[:1] and present >= built:
        return None
    return EngineError(
        f"{record.file} was built with {name_of(record.target)} {record.library_version}, {version} is installed",
        f"{_AGAIN} build.version_compatible makes engines for later minor releases, too.",
    )


def gpu_problem(record: EngineRecord, gpu: str, compute_capability: str) -> EngineError | None:
    """What is wrong with the GPU here; None if nothing is."""
    capability, built = _number(compute_capability), record.compute_capabilities
    if record.target == "tensorrt-rtx":
        # https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html
        supported = capability in ((8, 0), (8, 6), (8, 9)) or capability >= (10, 0)
        if not supported:
            return EngineError(
                f"TensorRT-RTX does not run on {gpu} (compute capability {compute_capability})",
                "Build for target tensorrt there.",
            )
    if record.hardware_compatibility == "ampere+":
        fits, told = capability >= (8, 0), "8.0 and newer"
    else:
        fits, told = not built or compute_capability in built, ", ".join(built)
    if fits:
        return None
    return EngineError(
        f"{record.file} was built for compute capability {told}, {gpu} has {compute_capability}",
        _AGAIN,
    )


def driver_problem(record: EngineRecord, version: str) -> EngineError | None:
    """What is wrong with the driver here, by the CUDA version that it supports; None if nothing is."""
    if record.driver_version and _number(version) < _number(record.driver_version):
        return EngineError(
            f"{record.file} was built with a driver for CUDA {record.driver_version}, "
            f"the one here is for CUDA {version}",
            f"Update the NVIDIA driver. {_AGAIN}",
        )
    return None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
