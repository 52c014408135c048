"""Build options on a builder's configuration: each is applied, or refused with the release that has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuopt.backends.tensorrt import formats
from gpuopt.backends.tensorrt.library import is_strongly_typed, version
from gpuopt.backends.tensorrt.options import BuildOptions, NativeCalibration
from gpuopt.errors import BuildError, RequirementError, UsageError, one_line
from gpuopt.shapes import Profile, ShapeRange, format_shape
from gpuopt.storage import storage_errors, write_bytes


@dataclass
class Configuration:
    """A configuration with what was told of it.

    Attributes:
        config: the builder's.
        applied: options by name, as applied.
        warnings: one line each.
        timing_cache_bytes: read from the cache file; None: no cache in use.
    """

    config: Any
    applied: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    timing_cache_bytes: int | None = None


class Configurator:
    """Lays options on the configuration of one build.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.
        trt: its module.
    """

    def __init__(self, target: str, trt: Any, builder: Any, network: Any, log: Any) -> None:
        self._target = target
        self._trt = trt
        self._builder = builder
        self._network = network
        self._log = log
        self._version = version(trt)
        self._is_rtx = target == "tensorrt-rtx"

    def configure(self, options: BuildOptions, profiles: tuple[Profile, ...], free_bytes: int | None) -> Configuration:
        """A configuration for one build.

        Args:
            free_bytes: free memory of the GPU; None: not known.

        Raises:
            UsageError: an option that this release does not have, or that does not fit the graph.
            RequirementError: a timing cache is required and does not fit.
            BuildError: a profile does not fit the graph.
        """
        trt, config = self._trt, self._builder.create_builder_config()
        made = Configuration(config)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        self._set_precision(config, options)
        self._set_workspace(made, options, free_bytes)
        self._set_tactics(made, options)
        self._set_compatibility(made, options)
        self._set_weights(made, options)
        self._set_hardware(made, options)
        self._set_formats(made, options)
        self._fix_static_inputs(profiles)
        for profile in profiles:
            config.add_optimization_profile(self._profile(profile))
        self._set_timing_cache(made, options)
        return made

    def calibration_profile(self, calibration: NativeCalibration, profile: Profile) -> Any:
        """A profile of the one shape that calibration batches have, for `config.set_calibration_profile`."""
        batch = next(calibration.batches(), None)
        shapes = {name: value.shape for name, value in (batch or {}).items()}
        bounds = {
            n: ShapeRange(shapes.get(n, r.opt), shapes.get(n, r.opt), shapes.get(n, r.opt)) for n, r in profile.items()
        }
        return self._profile(bounds)

    def keep_timing_cache(self, made: Configuration, options: BuildOptions) -> None:
        """Write what the build has learned beside what others have in the meantime.

        Raises:
            StorageError: the file cannot be written.
        """
        if made.timing_cache_bytes is None or options.timing_cache is None:
            return
        cache = made.config.get_timing_cache()
        if cache is None:
            return
        path = options.timing_cache
        if path.is_file():
            errors = len(self._log.messages["ERROR"])
            other = made.config.create_timing_cache(path.read_bytes())
            if other is not None and len(self._log.messages["ERROR"]) == errors:
                cache.combine(other, True)
            del self._log.messages["ERROR"][errors:]
        with storage_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
        content = bytes(memoryview(cache.serialize()))
        write_bytes(path, content)
        made.applied["timing_cache"] = {"file": path.name, "read_bytes": made.timing_cache_bytes, "bytes": len(content)}

    def _set_precision(self, config: Any, options: BuildOptions) -> None:
        if is_strongly_typed(self._target, self._trt) and options.calibration is None:
            return
        flags = self._trt.BuilderFlag
        if options.fp16:
            config.set_flag(flags.FP16)
        if options.int8 or options.calibration is not None:
            config.set_flag(flags.INT8)

    def _set_workspace(self, made: Configuration, options: BuildOptions, free_bytes: int | None) -> None:
        wanted = options.workspace_bytes
        if wanted is None:
            return
        if free_bytes is not None and wanted > free_bytes:
            made.warnings.append(
                f"workspace {wanted / 2**30:.1f} GiB is more than the {free_bytes / 2**30:.1f} GiB free on the GPU: "
                "clamped to that"
            )
            wanted = free_bytes
        made.config.set_memory_pool_limit(self._trt.MemoryPoolType.WORKSPACE, wanted)
        made.applied["workspace_bytes"] = wanted

    def _set_tactics(self, made: Configuration, options: BuildOptions) -> None:
        config = made.config
        if options.optimization_level is not None:
            self._needs("build.optimization_level", (8, 6), config, "builder_optimization_level")
            config.builder_optimization_level = options.optimization_level
            made.applied["optimization_level"] = options.optimization_level
        if options.auxiliary_streams is not None:
            self._needs("build.auxiliary_streams", (8, 6), config, "max_aux_streams")
            config.max_aux_streams = options.auxiliary_streams
            made.applied["auxiliary_streams"] = options.auxiliary_streams
        if options.timing_iterations is not None:
            self._needs("build.timing_iterations", (8, 5), config, "avg_timing_iterations")
            config.avg_timing_iterations = options.timing_iterations
            made.applied["timing_iterations"] = options.timing_iterations
        if options.tactic_sources:
            if self._is_rtx:
                raise UsageError("TensorRT-RTX has no tactic sources", "Leave out build.tactic_sources.")
            config.set_tactic_sources(self._sources(options.tactic_sources))
            made.applied["tactic_sources"] = list(options.tactic_sources)
        if options.sparsity:
            config.set_flag(self._flag("build.sparsity", "SPARSE_WEIGHTS", (8, 5)))
            made.applied["sparsity"] = True

    def _sources(self, names: tuple[str, ...]) -> int:
        known = self._trt.TacticSource.__members__
        bits = 0
        for name in names:
            if name.upper() not in known:
                raise UsageError(
                    f"TensorRT {self._trt.__version__} has no tactic source '{name}'", f"It has {', '.join(known)}."
                )
            bits |= 1 << int(known[name.upper()])
        return bits

    def _set_compatibility(self, made: Configuration, options: BuildOptions) -> None:
        trt, config = self._trt, made.config
        if options.version_compatible:
            config.set_flag(self._flag("build.version_compatible", "VERSION_COMPATIBLE", (8, 6)))
            made.applied["version_compatible"] = True
        if options.hardware_compatibility != "none":
            if self._is_rtx:
                raise UsageError(
                    "build.hardware_compatibility is for target tensorrt",
                    "TensorRT-RTX engines run on several GPUs by themselves: --compute-capability.",
                )
            self._needs("build.hardware_compatibility", (8, 6), config, "hardware_compatibility_level")
            name = {"ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
            level = getattr(trt.HardwareCompatibilityLevel, name[options.hardware_compatibility], None)
            if level is None:
                raise self._too_old(f"hardware_compatibility {options.hardware_compatibility}", (10, 7))
            config.hardware_compatibility_level = level
            made.applied["hardware_compatibility"] = options.hardware_compatibility
        if self._is_rtx and options.compute_capabilities:
            chosen = [self._compute_capability(text) for text in options.compute_capabilities]
            config.num_compute_capabilities = len(chosen)
            for index, capability in enumerate(chosen):
                config.set_compute_capability(capability, index)

    def _set_weights(self, made: Configuration, options: BuildOptions) -> None:
        for key, wanted, flag, since in (
            ("refit", options.refit, "REFIT", (8, 5)),
            ("strip_weights", options.strip_weights, "STRIP_PLAN", (10, 0)),
            ("weight_streaming", options.weight_streaming, "WEIGHT_STREAMING", (10, 0)),
        ):
            if wanted:
                made.config.set_flag(self._flag(f"build.{key}", flag, since))
                made.applied[key] = True

    def _set_hardware(self, made: Configuration, options: BuildOptions) -> None:
        if options.dla_core is None:
            return
        trt, config, builder = self._trt, made.config, self._builder
        cores = int(getattr(builder, "num_DLA_cores", 0))
        if options.dla_core >= cores:
            raise UsageError(
                f"there is no DLA core {options.dla_core}: this GPU has {cores or 'none'}", "Leave out build.dla_core."
            )
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = options.dla_core
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
        made.applied["dla_core"] = options.dla_core

    def _set_formats(self, made: Configuration, options: BuildOptions) -> None:
        tensors = {tensor.name: tensor for tensor in self._io_tensors()}
        for name, text in options.io_formats:
            if name not in tensors:
                raise UsageError(
                    f"build.io_formats: the graph has no input or output '{name}'", f"It has {', '.join(tensors)}."
                )
            dtype, layout = formats.parse(text)
            tensor = tensors[name]
            wanted = self._trt.DataType.__members__[formats.DTYPES[dtype]]
            if wanted != tensor.dtype:
                if is_strongly_typed(self._target, self._trt):
                    raise UsageError(
                        f"build.io_formats: '{name}' is {tensor.dtype.name} in the graph, which decides the dtype",
                        "Give only the layout that you need, in the graph's dtype.",
                    )
                tensor.dtype = wanted
            tensor.allowed_formats = 1 << int(self._trt.TensorFormat.__members__[formats.NAMES[layout]])
        if options.io_formats:
            made.applied["io_formats"] = dict(options.io_formats)

    def _fix_static_inputs(self, profiles: tuple[Profile, ...]) -> None:
        """Give inputs that have one shape that shape: kernels are chosen for it, and contexts can share the profile."""
        for index in range(self._network.num_inputs):
            tensor = self._network.get_input(index)
            shapes = {bounds for profile in profiles for bounds in (profile[tensor.name].min, profile[tensor.name].max)}
            if len(shapes) == 1 and -1 in tuple(tensor.shape) and len(tensor.shape) == len(next(iter(shapes))):
                tensor.shape = next(iter(shapes))

    def _io_tensors(self) -> Iterator[Any]:
        for index in range(self._network.num_inputs):
            yield self._network.get_input(index)
        for index in range(self._network.num_outputs):
            yield self._network.get_output(index)

    def _set_timing_cache(self, made: Configuration, options: BuildOptions) -> None:
        path, config = options.timing_cache, made.config
        if path is None or self._is_rtx:
            if options.require_timing_cache:
                raise UsageError(
                    f"build.require_timing_cache: {self._target} has no timing cache in use", "Leave it out."
                )
            return
        content, problem = b"", ""
        if path.is_file():
            with storage_errors("read", path):
                content = path.read_bytes()
        elif options.require_timing_cache:
            problem = "it does not exist"
        cache, complaint = self._timing_cache(config, content)
        if complaint:
            problem = complaint
            cache, _ = self._timing_cache(config, b"")
            content = b""
        if problem and options.require_timing_cache:
            raise RequirementError(
                f"the timing cache {path} cannot be used: {problem}",
                "Make it with the same TensorRT on the same kind of GPU: build once without --require-timing-cache.",
            )
        if problem:
            made.warnings.append(f"the timing cache {path.name} was not used and is made anew: {problem}")
        if cache is not None and config.set_timing_cache(cache, False):
            made.timing_cache_bytes = len(content)

    def _timing_cache(self, config: Any, content: bytes) -> tuple[Any, str]:
        """A timing cache and, where TensorRT refuses the content, what it said."""
        errors = self._log.messages["ERROR"]
        before = len(errors)
        cache = config.create_timing_cache(content)
        said = errors[before:]
        del errors[before:]
        if cache is None or said:
            return cache, one_line(said[0]) if said else "TensorRT does not read it"
        return cache, ""

    def _compute_capability(self, text: str) -> Any:
        name = "CURRENT" if text == "current" else f"SM{text.replace('.', '').removeprefix('sm')}"
        capability = getattr(self._trt.ComputeCapability, name, None)
        if capability is None:
            from gpuopt.backends.tensorrt.builder import compute_capabilities

            raise UsageError(
                f"TensorRT-RTX {self._trt.__version__} does not build for compute capability '{text}'",
                f"It knows {', '.join(compute_capabilities(self._trt))} and current.",
            )
        return capability

    def _profile(self, profile: Profile) -> Any:
        result = self._builder.create_optimization_profile()
        for index in range(self._network.num_inputs):
            tensor = self._network.get_input(index)
            shapes = profile[tensor.name]
            if tensor.is_shape_tensor:
                raise BuildError(
                    f"input '{tensor.name}' is a shape tensor, whose values (not sizes) a profile would have to bound",
                    "Make the size a constant of the model, or derive it from another input's shape.",
                )
            if not all(size == -1 or size == wanted for size, wanted in zip(tensor.shape, shapes.opt, strict=True)):
                raise BuildError(
                    f"input '{tensor.name}' is {format_shape(tensor.shape)} in the network, "
                    f"not {format_shape(shapes.opt)}",
                    "This is a defect of the exported graph; try the other exporter: "
                    "--set export.exporters=torchscript.",
                )
            result.set_shape(tensor.name, shapes.min, shapes.opt, shapes.max)
        return result

    def _flag(self, key: str, name: str, since: tuple[int, int]) -> Any:
        flag = getattr(self._trt.BuilderFlag, name, None)
        if flag is None:
            raise self._too_old(key, since)
        return flag

    def _needs(self, key: str, since: tuple[int, int], thing: Any, attribute: str) -> None:
        if not hasattr(thing, attribute):
            raise self._too_old(key, since)

    def _too_old(self, key: str, since: tuple[int, int]) -> UsageError:
        library = "TensorRT-RTX" if self._is_rtx else "TensorRT"
        return UsageError(
            f"{library} {self._trt.__version__} does not have {key}",
            "Leave it out." if self._is_rtx else f"Leave it out, or install TensorRT {since[0]}.{since[1]} or newer.",
        )


def load_plugins(trt: Any, log: Any, files: tuple[Path, ...]) -> None:
    """Register TensorRT's own plugins and those of shared libraries, which run code.

    Raises:
        UsageError: a library is not there.
        BuildError: it cannot be loaded.
    """
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(log, "")
    for file in files:
        if not file.is_file():
            raise UsageError(f"the plugin library {file} is not there", "Give the path of a .so file.")
        try:
            if hasattr(trt, "get_plugin_registry") and hasattr(trt.get_plugin_registry(), "load_library"):
                trt.get_plugin_registry().load_library(str(file.resolve()))
            else:
                import ctypes

                ctypes.CDLL(str(file.resolve()), mode=ctypes.RTLD_GLOBAL)
        except Exception as error:
            raise BuildError(
                f"the plugin library {file} cannot be loaded: {one_line(error)}",
                "Check that it was built for this TensorRT and this CUDA (ldd shows what it lacks).",
            ) from error
