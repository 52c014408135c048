"""What the builder is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

HardwareCompatibility = Literal["none", "ampere+", "same-compute-capability"]


@dataclass(frozen=True)
class NativeCalibration:
    """TensorRT's own calibration.

    Attributes:
        method: `entropy` (IInt8EntropyCalibrator2) or `minmax` (IInt8MinMaxCalibrator).
        batches: gives the batches, all of one shape; each call starts anew.
        cache: a calibration cache to use instead of the batches; empty: none.
    """

    method: Literal["entropy", "minmax"]
    batches: Callable[[], Iterator[Mapping[str, npt.NDArray[Any]]]]
    cache: bytes = b""


@dataclass(frozen=True)
class BuildOptions:
    """Everything but the graph and its profiles that decides an engine.

    Attributes:
        fp16, int8: builder flags of TensorRT 8; newer ones read the precision in the graph.
        calibration: TensorRT's own calibrator instead of Q/DQ; TensorRT 8.5 to 9.
        compute_capabilities: TensorRT-RTX only, as `8.6`; empty: 8.0 and newer.
        optimization_level: 0 (fast build) to 5 (fast engine); None: the builder's own. TensorRT 8.6 and newer.
        workspace_bytes: limit of scratch memory, clamped to what is free; None: the builder's own.
        timing_cache: file to read tactic timings from and to add to; None: none.
        require_timing_cache: refuse to build if `timing_cache` does not exist or does not fit.
        tactic_sources: TensorRT's names, as `EDGE_MASK_CONVOLUTIONS`; empty: the builder's own choice.
        auxiliary_streams: at most so many inside one engine; None: the builder's own. TensorRT 8.6 and newer.
        timing_iterations: how often each tactic is timed; None: the builder's own.
        version_compatible: the engine runs in later minor releases of the same major one.
        hardware_compatibility: the GPUs beside the one of the build.
        refit: weights can be replaced later.
        strip_weights: the plan holds no weights; they are refitted from the ONNX file. TensorRT 10 and newer.
        weight_streaming: weights may stay in host memory. TensorRT 10 and newer.
        plugins: shared libraries with plugins, loaded first.
        dla_core: the DLA core that takes what it can; None: none.
        sparsity: use 2:4 structured sparsity where the weights have it.
        io_formats: by tensor name, `DTYPE:FORMAT` as trtexec writes it (`fp16:hwc8`, `int8:chw32`); others: linear,
            in the graph's dtype.
    """

    fp16: bool = False
    int8: bool = False
    calibration: NativeCalibration | None = None
    compute_capabilities: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    require_timing_cache: bool = False
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
