"""What the builder is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

HardwareCompatibility = Literal["none", "ampere+", "same-compute-capability"]
Feed = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class NativeCalibration:
    """INT8 ranges from TensorRT's own calibrator, of 8.5 to 10; the graph is FP32, without Q/DQ.

    Attributes:
        method: `entropy` (IInt8EntropyCalibrator2) or `minmax` (IInt8MinMaxCalibrator).
        feeds: gives the samples, once: by input name an array of shape (batch, ...), all of one shape an input.
        batch: samples in a feed.
        cache_file: calibration cache in TensorRT's text format; read instead of the feeds if it is there; None: none.
    """

    method: Literal["entropy", "minmax"]
    feeds: Callable[[], Iterable[Feed]]
    batch: int = 1
    cache_file: Path | None = None


@dataclass(frozen=True)
class BuildOptions:
    """Everything but the graph and its profiles that decides an engine.

    Attributes:
        precision: what the graph asks for; TensorRT 8 turns it into builder flags, newer ones read it in the graph.
        tf32: whether FP32 products may have TF32's ten bits of mantissa.
        fp16_remainder: whether what INT8 leaves may be FP16; TensorRT 8 and native calibration alone read it.
        fp32_nodes: nodes that stay in FP32; TensorRT 8 and native calibration alone read it.
        calibration: TensorRT's own calibrator instead of Q/DQ in the graph; None: Q/DQ.
        compute_capabilities: TensorRT-RTX only, as `8.6`; empty: 8.0 and newer.
        optimization_level: 0 (fast build) to 5 (fast engine); None: the builder's own. TensorRT 8.6 and newer.
        workspace_bytes: limit of scratch memory, clamped to what is free; None: the builder's own.
        timing_cache: file to read tactic timings from and to add to; None: none.
        require_timing_cache: refuse to build if `timing_cache` does not exist or does not fit.
        attempts: so many engines are built and raced by `stages/build.py`; one build does not look at it.
        tactic_sources: TensorRT's names, as `EDGE_MASK_CONVOLUTIONS`; empty: the builder's own choice.
        auxiliary_streams: at most so many inside one engine; None: the builder's own. TensorRT 8.6 and newer.
        timing_iterations: how often each tactic is timed; None: `configuration.TIMING_ITERATIONS`.
        version_compatible: the engine runs in later minor releases of the same major one.
        hardware_compatibility: the GPUs beside the one of the build.
        refit: weights can be replaced later.
        strip_weights: the plan holds no weights, and gpuopt does not run it. TensorRT 10 and newer.
        weight_streaming: weights may stay in host memory. TensorRT 10 and newer.
        plugins: shared libraries with plugins, loaded first.
        dla_core: the DLA core that takes what it can; None: none.
        sparsity: use 2:4 structured sparsity where the weights have it.
        io_formats: by tensor name, `DTYPE:FORMAT` as trtexec writes it (`fp16:hwc8`, `int8:chw32`); others: linear,
            in the graph's dtype.
        repairs: try again, a node in FP32 or with a smaller workspace, where the builder stops at it.
    """

    precision: Literal["int8", "fp16", "fp32"] = "int8"
    tf32: bool = True
    fp16_remainder: bool = True
    fp32_nodes: tuple[str, ...] = ()
    calibration: NativeCalibration | None = None
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    require_timing_cache: bool = False
    attempts: int = 1
    tactic_sources: tuple[str, ...] = ()
    auxiliary_streams: int | None = None
    timing_iterations: int | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    refit: bool = False
    strip_weights: bool = False
    weight_streaming: bool = False
    plugins: tuple[Path, ...] = ()
    dla_core: int | None = None
    sparsity: bool = False
    io_formats: tuple[tuple[str, str], ...] = ()
    repairs: bool = True
