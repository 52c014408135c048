"""Models as Triton would serve them, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpuopt.reference import Reference
from gpuopt.shapes import Corner, ShapeRange, TensorSpec
from gpuopt.triton.served import Backend, Served, ServedTensor
from tests.unit.inspection.bundles import record


def served(folder: Path, backend: Backend = "tensorrt", **changes: Any) -> Served:
    """Images of batch 1 to 8 to ten scores; two profiles where `changes` says so."""
    profile = {"image": ShapeRange((1, 3, 16, 16), (4, 3, 16, 16), (8, 3, 16, 16))}
    fields: dict[str, Any] = {
        "inputs": (ServedTensor(TensorSpec("image", "float32", ("batch", 3, 16, 16))),),
        "outputs": (ServedTensor(TensorSpec("scores", "float32", ("batch", 10))),),
        "profiles": (profile,),
        "batched_outputs": ("scores",),
        **changes,
    }
    stored = Reference(
        folder, "PyTorch", tuple(t.spec for t in fields["inputs"]), tuple(t.spec for t in fields["outputs"]),
        fields["profiles"], (Corner("profile0-min", {n: r.min for n, r in fields["profiles"][0].items()}),),
        fields["batched_outputs"],
    )  # fmt: skip
    engine = folder / "model.engine"
    engine.write_bytes(b"ftrt")
    return Served(
        backend=backend, file=engine, more=(), inputs=fields["inputs"], outputs=fields["outputs"],
        profiles=fields["profiles"], record=record() if backend == "tensorrt" else None, stored=stored,
    )  # fmt: skip


CONFIG = """
name: "m"
platform: "tensorrt_plan"
backend: "tensorrt"
max_batch_size: 8
input { name: "image" data_type: TYPE_FP32 dims: [3, 16, 16] }
output { name: "scores" data_type: TYPE_FP32 dims: [10] }
dynamic_batching { }
instance_group { kind: KIND_GPU count: 1 }
default_model_filename: "model.plan"
"""
"""The configuration that fits `served`; changes are made to its text."""
