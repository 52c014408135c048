"""What Triton is to serve, as the bundle has it: the file, its tensors, its profiles and what they allow."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from gpuopt import bundle, engine_record, reference
from gpuopt.artifact import ONNX_FILE
from gpuopt.engine_record import EngineRecord
from gpuopt.errors import EngineError, StorageError, UsageError
from gpuopt.inspection import home
from gpuopt.reference import Reference
from gpuopt.shapes import Profile, TensorSpec
from gpuopt.storage import sha256_file

Backend = Literal["tensorrt", "onnxruntime", "pytorch"]

PLATFORMS: Mapping[Backend, str] = {
    "tensorrt": "tensorrt_plan",
    "onnxruntime": "onnxruntime_onnx",
    "pytorch": "pytorch_libtorch",
}
DEFAULT_FILES: Mapping[Backend, str] = {
    "tensorrt": "model.plan",
    "onnxruntime": "model.onnx",
    "pytorch": "model.pt",
}
DATA_TYPES: Mapping[str, str] = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
}
"""Triton's name of a numpy dtype, from the table of data types in its model configuration guide."""


@dataclass(frozen=True)
class ServedTensor:
    """An input or output as the model has it.

    Attributes:
        spec: the dtype is the engine's; a dynamic dimension is a string.
        linear: whether it lies in memory as its shape says; else in one of TensorRT's vectorised or channels-last
            formats.
    """

    spec: TensorSpec
    linear: bool = True

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> tuple[int | str, ...]:
        return self.spec.shape


@dataclass(frozen=True)
class Served:
    """A model for Triton.

    Attributes:
        backend: which of Triton's.
        file: what is deployed, in the bundle; for `pytorch` the file that the user named.
        more: files that have to lie beside it: external data of an ONNX file.
        inputs, outputs: its tensors.
        profiles: shapes that it takes; batch and all.
        record: of an engine; None for another file.
        stored: the bundle's reference: inputs for warm-up samples, and which outputs are independent of the batch.
    """

    backend: Backend
    file: Path
    more: tuple[Path, ...]
    inputs: tuple[ServedTensor, ...]
    outputs: tuple[ServedTensor, ...]
    profiles: tuple[Profile, ...]
    record: EngineRecord | None
    stored: Reference = field(repr=False)

    @property
    def why_not_batched(self) -> str:
        """Why Triton cannot put requests together; empty if it can.

        Its guide demands a batch dimension that is the first one of every input and output. Rows that depend on each
        other would mix the requests of different users.
        """
        for tensor in self.inputs:
            if not tensor.shape or not isinstance(tensor.shape[0], str):
                return f"input '{tensor.name}' has no dynamic first dimension"
        for profile in self.profiles:
            if len({(r.min[0], r.max[0]) for r in profile.values()}) != 1:
                return "the inputs of a profile differ in their first dimension"
        for tensor in self.outputs:
            if not tensor.shape or not isinstance(tensor.shape[0], str):
                return f"output '{tensor.name}' has no dynamic first dimension"
        independent = set(self.stored.batched_outputs)
        # A profile that does not begin at 1 has not been asked: no single sample could be run.
        if all(r.min[0] == 1 for profile in self.profiles for r in profile.values()):
            for tensor in self.outputs:
                if tensor.name not in independent:
                    return (
                        f"rows of output '{tensor.name}' depend on each other in the original model, or were not shown "
                        "to be independent"
                    )
        return ""

    @property
    def largest_batch(self) -> int:
        """The largest first dimension of any profile; 0 if it is no batch."""
        if self.why_not_batched:
            return 0
        return max(r.max[0] for profile in self.profiles for r in profile.values())

    @property
    def smallest_batch(self) -> int:
        """The smallest first dimension of any profile; 0 if it is no batch."""
        if self.why_not_batched:
            return 0
        return min(r.min[0] for profile in self.profiles for r in profile.values())


def of_bundle(folder: Path, backend: Backend | None = None, torchscript: Path | None = None) -> Served:
    """What a bundle has for a backend.

    Args:
        backend: None: `tensorrt` if the bundle has an engine, else `onnxruntime`.
        torchscript: the file for `pytorch`, which bundles do not hold.

    Raises:
        StorageError: the bundle is damaged.
        EngineError: the engine has no record, or is not the one that its record is about.
        UsageError: the bundle has no engine, or no TorchScript file was named.
    """
    manifest = bundle.open_bundle(folder)
    stored = reference.load(folder / "reference")
    engine = engine_record.find_engine(folder)
    chosen: Backend = backend or ("tensorrt" if engine is not None else "onnxruntime")
    if (chosen == "pytorch") != (torchscript is not None):
        raise UsageError(
            "--backend pytorch and --torchscript FILE belong together",
            "Save the original model with torch.jit.trace(...).save(FILE): bundles do not hold it.",
        )
    if chosen == "tensorrt":
        if engine is None:
            raise UsageError(
                f"{folder} holds no engine", "Build one with 'gpuopt build', or choose --backend onnxruntime."
            )
        return _engine(folder, engine, stored)
    if torchscript is not None:
        return _torchscript(torchscript, stored)
    path = folder / ONNX_FILE
    if not path.is_file():
        raise StorageError(f"{folder} holds no {ONNX_FILE}", "Compile it again.")
    return Served(
        backend="onnxruntime",
        file=path,
        more=_external_files(path, manifest["files"]),
        inputs=tuple(ServedTensor(spec) for spec in stored.inputs),
        outputs=tuple(ServedTensor(spec) for spec in stored.outputs),
        profiles=stored.profiles,
        record=None,
        stored=stored,
    )


def engine_of(folder: Path) -> Served:
    """The engine of a bundle; `of_bundle` for the `tensorrt` backend."""
    return of_bundle(folder, "tensorrt")


def _engine(folder: Path, path: Path, stored: Reference) -> Served:
    record = engine_record.read(path)
    if sha256_file(path) != record.sha256:
        raise EngineError(
            f"{path.name} is not the engine that its record describes", "Copy both again, or build the engine anew."
        )
    about = home.of_bundle(folder)
    line = about.engine(path.name)
    proof = line.proof if line is not None and line.proof is not None and line.sha256 == record.sha256 else {}
    told = proof.get("io_formats")
    formats = told if isinstance(told, dict) else about.io_formats

    def served(spec: TensorSpec) -> ServedTensor:
        layout = str(formats.get(spec.name, "")).partition(":")[2]
        return ServedTensor(spec, layout in ("", "chw"))

    return Served(
        backend="tensorrt",
        file=path,
        more=(),
        inputs=tuple(served(tensor.spec()) for tensor in record.inputs),
        outputs=tuple(served(tensor.spec()) for tensor in record.outputs),
        profiles=record.shape_profiles(),
        record=record,
        stored=stored,
    )


def _torchscript(path: Path, stored: Reference) -> Served:
    from gpuopt.model_file import ModelKind, detect

    if not path.is_file() or detect(path) is not ModelKind.TORCHSCRIPT:
        raise UsageError(
            f"{path} is no TorchScript archive", "Triton's pytorch backend takes what torch.jit.trace(...).save writes."
        )
    # TorchScript names no outputs: Triton's guide demands <name>__<index>. Inputs have forward's names.
    outputs = tuple(
        ServedTensor(TensorSpec(f"{spec.name}__{index}", spec.dtype, spec.shape))
        for index, spec in enumerate(stored.outputs)
    )
    renamed = {f"{spec.name}__{index}": spec.name for index, spec in enumerate(stored.outputs)}
    independent = tuple(name for name, original in renamed.items() if original in stored.batched_outputs)
    return Served(
        backend="pytorch",
        file=path,
        more=(),
        inputs=tuple(ServedTensor(spec) for spec in stored.inputs),
        outputs=outputs,
        profiles=stored.profiles,
        record=None,
        stored=replace(stored, batched_outputs=independent),
    )


def _external_files(path: Path, bundled: Container[str]) -> tuple[Path, ...]:
    from gpuopt import onnx_model

    return tuple(onnx_model.bundled_external_files(path, bundled))
