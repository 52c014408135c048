"""The record beside a serialized engine: what it is, and where it may run; read before it is deserialised.

An engine file is executable code. `model.tensorrt.engine` is believed only if `model.tensorrt.engine.json`
lies beside it and holds its hash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gpuopt.errors import EngineError, first_problem
from gpuopt.shapes import Profile, ShapeRange, TensorSpec, format_shape, parse_shape
from gpuopt.storage import read_bytes, write_text

BuiltTarget = Literal["tensorrt", "tensorrt-rtx"]
ENGINE_FILES: Mapping[BuiltTarget, str] = {
    "tensorrt": "model.tensorrt.engine",
    "tensorrt-rtx": "model.tensorrt-rtx.engine",
}
"""What the engine for a target is called in a bundle; where a bundle has both, the first is meant."""


def find_engine(folder: Path) -> Path | None:
    """The engine in a bundle, if it has one."""
    return next((folder / name for name in ENGINE_FILES.values() if (folder / name).is_file()), None)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorRecord(_Part):
    """An input or output; a dynamic dimension is a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)


class RangeRecord(_Part):
    """Shapes as `1x3x224x224`."""

    min: str
    opt: str
    max: str


class EngineRecord(_Part):
    """What an engine is and was built with.

    Attributes:
        file: its name, without a folder.
        library_version: of TensorRT or TensorRT-RTX, as `8.5.3.1`.
        version_compatible: it runs in later minor releases of its major one, too.
        compute_capabilities: of the GPUs that it runs on, as `9.0`; empty: not known, or `8.0 and newer`.
        hardware_compatibility: `none`: only on a GPU as the one it was built on.
        gpu: name of the GPU it was built on; empty if there was none.
        driver_version: the CUDA version that the driver supported, as `12.4`; empty without a GPU.
        precision: what was asked for.
        tf32: whether FP32 products may have TF32's ten bits of mantissa.
        inputs, outputs: dtypes are the engine's; shapes are those of the reference, dynamic dimensions by name.
        plugins: file names of the libraries that have to be loaded before it.
        weights_stripped: it holds no weights, and cannot run before it was refitted.
    """

    record_version: Literal[1] = 1
    file: str
    sha256: str
    size_bytes: int
    target: BuiltTarget
    library_version: str
    version_compatible: bool
    compute_capabilities: tuple[str, ...]
    hardware_compatibility: str
    gpu: str
    driver_version: str
    precision: str
    tf32: bool = True
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    profiles: tuple[dict[str, RangeRecord], ...]
    plugins: tuple[str, ...] = ()
    weights_stripped: bool = False

    def shape_profiles(self) -> tuple[Profile, ...]:
        """The optimisation profiles."""
        return tuple(
            {n: ShapeRange(parse_shape(r.min), parse_shape(r.opt), parse_shape(r.max)) for n, r in profile.items()}
            for profile in self.profiles
        )


def profile_records(profiles: tuple[Profile, ...]) -> tuple[dict[str, RangeRecord], ...]:
    """Profiles as a record holds them."""
    return tuple(
        {
            name: RangeRecord(min=format_shape(r.min), opt=format_shape(r.opt), max=format_shape(r.max))
            for name, r in profile.items()
        }
        for profile in profiles
    )


@dataclass(frozen=True)
class Trust:
    """What the user lets an engine run on the CPU, beside its kernels on the GPU; no record is taken at its word.

    Attributes:
        plugins: libraries that are loaded before it.
        host_code: whether a version-compatible engine may run the runtime that it carries.
    """

    plugins: Sequence[Path] = ()
    host_code: bool = False


def record_path(engine: Path) -> Path:
    """Where the record of an engine lies."""
    return engine.with_name(engine.name + ".json")


def write(engine: Path, record: EngineRecord) -> None:
    """Write the record beside its engine.

    Raises:
        StorageError: it cannot be written.
    """
    write_text(record_path(engine), record.model_dump_json(indent=2) + "\n")


def read(engine: Path) -> EngineRecord:
    """The record of an engine.

    Raises:
        StorageError: it cannot be read.
        EngineError: there is none, or it is no record.
    """
    path = record_path(engine)
    if not path.is_file():
        raise EngineError(
            f"{engine.name} has no record {path.name} beside it, so that its origin and hash are not known",
            "Copy both files, or build the engine with gpuopt.",
        )
    try:
        return EngineRecord.model_validate_json(read_bytes(path))
    except ValidationError as error:
        raise EngineError(
            f"{path.name} is not the record of an engine: {first_problem(error)}",
            "Copy the engine and its record again.",
        ) from error
