"""What `gpuopt inspect` and `gpuopt check` answer: plain, frozen data; units are in the names."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from gpuopt.engine_record import RangeRecord

ProfileFacts = dict[str, RangeRecord]
"""Shapes of every input by its name."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileFacts(_Part):
    """A file and whether it is the one that was made.

    Attributes:
        matches_record: whether size and SHA-256 are those of an engine's record; None: there is no record.
        matches_manifest: whether the SHA-256 is that of the bundle's manifest; None: it lies in no bundle.
    """

    name: str
    size_bytes: int
    sha256: str
    matches_record: bool | None = None
    matches_manifest: bool | None = None


class TensorFacts(_Part):
    """An input or output.

    Attributes:
        shape: dynamic dimensions by name; None where the graph states no shape.
        layout: memory layout, as `chw` or `hwc8`; None where it is not known.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None
    layout: str | None = None


class LoadingFacts(_Part):
    """Whether it will load on this machine.

    Attributes:
        reasons: everything that speaks against it or leaves it open, one line each.
        needs: what has to be named where it is run.
    """

    verdict: Literal["yes", "no", "unknown"]
    reasons: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


class CoverageFacts(_Part):
    """Which precision an engine works in, as `backends.tensorrt.inspector.Coverage` when it was proved."""

    layers: dict[str, int]
    layer_share: dict[str, float]
    time_share: dict[str, float] | None
    reformats: int
    quantizations: int
    overhead_time_share: float | None
    milliseconds: float | None


class OriginFacts(_Part):
    """Where it comes from, as a bundle's manifest and report have it.

    Attributes:
        exporter: of the graph, as `dynamo`; None where the report does not say.
        packages: versions by distribution.
        gpus: of the machine.
    """

    model_path: str | None
    model_factory: str | None
    model_kind: str | None
    model_sha256: str | None
    exporter: str | None
    gpuopt_version: str
    created: str
    command: tuple[str, ...]
    python: str
    platform: str
    packages: dict[str, str]
    gpus: tuple[str, ...]


class EngineFacts(_Part):
    """A serialized engine, as its record has it; what needs the record is None or empty without one.

    Attributes:
        record_problem: why there is no record; empty: there is one.
        compute_capabilities: empty: 8.0 and newer, or not known.
        gpu, driver_version: of the machine that it was built on; empty: it had none.
        status: `verified`, `built` or `failed`, from the bundle's report.
        coverage: from the proof in the bundle's report; None: it was not run.
        proved_on: name of that GPU.
        origin: of the bundle that it lies in; None in the description of that bundle, which has its own.
    """

    file: FileFacts
    record_problem: str
    target: str | None = None
    library_version: str | None = None
    precision: str | None = None
    tf32: bool | None = None
    version_compatible: bool | None = None
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatibility: str | None = None
    gpu: str | None = None
    driver_version: str | None = None
    plugins: tuple[str, ...] = ()
    inputs: tuple[TensorFacts, ...] = ()
    outputs: tuple[TensorFacts, ...] = ()
    profiles: tuple[ProfileFacts, ...] = ()
    status: str | None = None
    coverage: CoverageFacts | None = None
    proved_on: str | None = None
    loading: LoadingFacts
    origin: OriginFacts | None = None


class WeightFacts(_Part):
    """Initializers of one dtype."""

    tensors: int
    size_bytes: int


class GraphFacts(_Part):
    """An ONNX graph.

    Attributes:
        external: files with its weights.
        producer: what wrote the file, and its version.
        opsets: version by domain.
        weights: by dtype, those of subgraphs included.
        operators: nodes by operator, those of subgraphs included.
        computing_nodes: convolutions and matrix products of the main graph by precision.
        qdq_pairs: activations and weights that are quantized and dequantized.
        dequantized_weights: weights stored as integers and dequantized.
        macs: multiply-accumulates of the computing nodes; None where a shape is not known.
        int8_macs_share: 0 to 1.
        macs_shapes: shapes of the inputs that these are for; open dimensions that nobody names count as 1.
        origin: of the bundle that it lies in; None in the description of that bundle, which has its own.
    """

    file: FileFacts
    external: tuple[FileFacts, ...]
    producer: str
    ir_version: int
    opsets: dict[str, int]
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    profiles: tuple[ProfileFacts, ...]
    weights: dict[str, WeightFacts]
    operators: dict[str, int]
    computing_nodes: dict[str, int]
    qdq_pairs: int
    dequantized_weights: int
    macs: int | None
    int8_macs_share: float | None
    macs_shapes: dict[str, str]
    loading: LoadingFacts
    origin: OriginFacts | None = None


class BundleFacts(_Part):
    """A bundle.

    Attributes:
        status: of the run that made it; None for a folder of `gpuopt quantize`, which has none.
        files: in the manifest.
        size_bytes: of the files that are there.
        problems: what is otherwise than the manifest says, or cannot be read.
        signature: whether a file with one is there; `gpuopt check` verifies it.
    """

    status: str | None
    precision: str | None
    files: int
    size_bytes: int
    problems: tuple[str, ...]
    signature: bool
    engines: tuple[EngineFacts, ...]
    graphs: tuple[GraphFacts, ...]
    origin: OriginFacts


class Inspection(_Part):
    """The whole answer; one of `engine`, `graph` and `bundle` is there."""

    schema_version: Literal[1] = 1
    kind: Literal["engine", "onnx", "bundle"]
    path: str
    engine: EngineFacts | None = None
    graph: GraphFacts | None = None
    bundle: BundleFacts | None = None


class SignatureFacts(_Part):
    """A bundle's signature.

    Attributes:
        state: `unchecked`: there is one, and no key to check it with.
        key_id: as minisign prints it; empty unless it is valid.
        trusted_comment: what the signer wrote.
    """

    state: Literal["valid", "unchecked", "none"]
    key_id: str = ""
    trusted_comment: str = ""


class IntegrityReport(_Part):
    """What `gpuopt check` looked at and found in order.

    Attributes:
        files: in the manifest, each hashed.
        size_bytes: of all of them.
        engines: names of those whose records fit.
        status, precision: of the run that made it; None for a folder of `gpuopt quantize`, which has no report.
    """

    schema_version: Literal[1] = 1
    bundle: str
    files: int
    size_bytes: int
    engines: tuple[str, ...]
    status: str | None
    precision: str | None
    signature: SignatureFacts
