"""The texts of `gpuopt inspect` and `gpuopt check` against golden files: `pytest --update-golden` writes them anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuopt.engine_record import RangeRecord
from gpuopt.inspection import render
from gpuopt.inspection.model import (
    BundleFacts,
    CoverageFacts,
    EngineFacts,
    FileFacts,
    GraphFacts,
    Inspection,
    IntegrityReport,
    LoadingFacts,
    OriginFacts,
    SignatureFacts,
    TensorFacts,
    WeightFacts,
)

GOLDEN = Path(__file__).parents[2] / "golden"
SHA = "0123456789abcdef" * 4
ORIGIN = OriginFacts(
    model_path="/models/model.pt",
    model_factory="net:make",
    model_kind="state dict",
    model_sha256=SHA,
    exporter="dynamo",
    gpuopt_version="0.1.0",
    created="2026-01-02T03:04:05+00:00",
    command=("gpuopt", "compile", "my model.pt", "--model", "net:make"),
    python="3.11.7",
    platform="Linux x86_64",
    packages={f"package-{index}": f"{index}.0.0" for index in range(12)},
    gpus=("NVIDIA H100",),
)
PROFILE = {
    "image": RangeRecord(min="1x3x224x224", opt="8x3x224x224", max="16x3x224x224"),
    "length": RangeRecord(min="1", opt="8", max="16"),
}
INPUTS = (
    TensorFacts(name="image", dtype="float16", shape=("batch", 3, 224, 224), layout="hwc8"),
    TensorFacts(name="length", dtype="int32", shape=("batch",)),
)
OUTPUTS = (TensorFacts(name="logits", dtype="float32", shape=("batch", 1000), layout="chw"),)
ENGINE = EngineFacts(
    file=FileFacts(name="model.tensorrt.engine", size_bytes=5 << 20, sha256=SHA, matches_record=True),
    record_problem="",
    target="tensorrt",
    library_version="8.5.3.1",
    precision="int8",
    tf32=True,
    version_compatible=True,
    compute_capabilities=("9.0",),
    hardware_compatibility="none",
    gpu="NVIDIA H100",
    driver_version="13.0",
    plugins=("liba.so",),
    inputs=INPUTS,
    outputs=OUTPUTS,
    profiles=(PROFILE, PROFILE),
    status="verified",
    coverage=CoverageFacts(
        layers={"fp16": 4, "int8": 21},
        layer_share={"int8": 0.84, "fp16": 0.16},
        time_share={"int8": 0.92, "fp16": 0.08},
        reformats=2,
        quantizations=1,
        overhead_time_share=0.051,
        milliseconds=0.4321,
    ),
    proved_on="NVIDIA H100",
    loading=LoadingFacts(
        verdict="no",
        reasons=("there is no NVIDIA GPU here, or no driver", "a reason that is long " * 7),
        needs=("--plugin FOLDER/liba.so: it was built with it",),
    ),
)
GRAPH = GraphFacts(
    file=FileFacts(name="model.onnx", size_bytes=4321, sha256=SHA, matches_manifest=False),
    external=(FileFacts(name="model.onnx.data", size_bytes=3 << 30, sha256=SHA, matches_manifest=True),),
    producer="pytorch 2.15.0",
    ir_version=10,
    opsets={"ai.onnx": 20, "com.microsoft": 1},
    inputs=(TensorFacts(name="bad\x1b[31mname", dtype="float32", shape=None),),
    outputs=(TensorFacts(name="out", dtype="float32", shape=()),),
    profiles=(),
    weights={"int8": WeightFacts(tensors=20, size_bytes=2 << 20), "float32": WeightFacts(tensors=1, size_bytes=4)},
    operators={f"Operator{index}": 20 - index for index in range(14)},
    computing_nodes={"int8": 20, "fp32": 1},
    qdq_pairs=21,
    dequantized_weights=40,
    macs=123456789,
    int8_macs_share=0.987,
    macs_shapes={"image": "1x3x224x224"},
    loading=LoadingFacts(verdict="yes"),
    origin=ORIGIN,
)
BARE = EngineFacts(
    file=FileFacts(name="bare.plan", size_bytes=12, sha256=SHA),
    record_problem="no record",
    loading=LoadingFacts(verdict="unknown", reasons=("no record",)),
)
BUNDLE = BundleFacts(
    status="passed",
    precision="int8",
    files=12,
    size_bytes=9 << 20,
    problems=("recipe.yaml changed", "extra is not in the manifest"),
    signature=True,
    engines=(ENGINE,),
    graphs=(GRAPH.model_copy(update={"origin": None}),),
    origin=ORIGIN,
)
WHOLE = IntegrityReport(
    bundle="model.gpuopt",
    files=12,
    size_bytes=9 << 20,
    engines=("model.tensorrt.engine",),
    status="passed",
    precision="int8",
    signature=SignatureFacts(state="valid", key_id="0123456789ABCDEF", trusted_comment="release 7"),
)
QUANTIZED = WHOLE.model_copy(
    update={"engines": (), "status": None, "precision": None, "signature": SignatureFacts(state="unchecked")}
)

TEXTS = {
    "inspect-bundle": render.inspection(Inspection(kind="bundle", path="model.gpuopt", bundle=BUNDLE)),
    "inspect-engine": render.inspection(
        Inspection(
            kind="engine", path="model.tensorrt.engine", engine=ENGINE.model_copy(update={"origin": ORIGIN})
        )
    ),
    "inspect-engine-bare": render.inspection(Inspection(kind="engine", path="bare.plan", engine=BARE)),
    "inspect-onnx": render.inspection(Inspection(kind="onnx", path="model.onnx", graph=GRAPH)),
    "check": render.integrity(WHOLE),
    "check-quantized": render.integrity(QUANTIZED),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_is_the_golden_one(name: str, request: pytest.FixtureRequest) -> None:
    golden = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(TEXTS[name] + "\n")
    assert TEXTS[name] + "\n" == golden.read_text()
    assert all(line == line.rstrip() for line in TEXTS[name].splitlines())
