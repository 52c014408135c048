"""From an ONNX file to a network: the log, plugins, the parser, the formats of inputs and outputs, the profiles."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gpuopt.backends.tensorrt import diagnosis, formats
from gpuopt.backends.tensorrt.library import MODULES, version
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.environment import install_hint
from gpuopt.errors import BuildError, RequirementError, UsageError
from gpuopt.shapes import Profile, format_shape

DTYPES = {"fp32": "FLOAT", "fp16": "HALF", "int8": "INT8", "int32": "INT32", "int64": "INT64", "bool": "BOOL",
          "uint8": "UINT8"}  # fmt: skip
"""Names of dtypes as trtexec writes them, and TensorRT's."""
FORMATS = {
    "chw": "LINEAR",
    "chw2": "CHW2",
    "chw4": "CHW4",
    "hwc8": "HWC8",
    "chw16": "CHW16",
    "chw32": "CHW32",
    "dhwc8": "DHWC8",
    "cdhw32": "CDHW32",
    "hwc": "HWC",
    "hwc16": "HWC16",
    "dhwc": "DHWC",
    "dla_linear": "DLA_LINEAR",
    "dla_hwc4": "DLA_HWC4",
}
"""Names of memory layouts as trtexec writes them, and TensorRT's."""


@dataclass(frozen=True)
class Parsed:
    """A network and what has to live as long as it does."""

    builder: Any
    network: Any
    parser: Any


def load_plugins(trt: ModuleType, libraries: Sequence[Path]) -> None:
    """Make the ready plugins and those of `libraries` known to the parser; libraries run code.

    Raises:
        BuildError: a library is missing or cannot be loaded.
    """
    for path in libraries:
        if not path.is_file():
            raise BuildError(
                f"plugin library {path} does not exist", "Give the path of its .so file: --plugin FOLDER/libNAME.so."
            )
        try:
            library = ctypes.CDLL(str(path.absolute()), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise BuildError(
                f"plugin library {path} cannot be loaded: {error}",
                "Build it for this machine and this TensorRT; 'ldd' shows what it lacks.",
            ) from error
        # Libraries of plugins either register themselves when they are loaded, or give their creators on demand.
        if any(hasattr(library, name) for name in ("getCreators", "getPluginCreators")) and version(trt) >= (8, 6):
            trt.get_plugin_registry().load_library(str(path.absolute()))


def make_builder(target: str, trt: ModuleType, log: Any) -> Any:
    """A builder.

    Raises:
        RequirementError: there is no usable driver.
        BuildError: the GPU's memory does not suffice for the builder itself.
    """
    try:
        builder = trt.Builder(log)
    except (TypeError, RuntimeError):  # how pybind11 reports a constructor that gave nothing
        builder = None
    if builder is None:
        if diagnosis.find(log.messages).cause.name == diagnosis.OUT_OF_MEMORY:
            raise diagnosis.builder_error(f"{target} {trt.__version__}", log.messages)
        lines = log.messages["ERROR"] or log.messages["WARNING"]
        said = f": {lines[-1][:200]}" if lines else ""
        raise RequirementError(
            f"{target} finds no usable GPU driver{said}",
            f"'nvidia-smi' shows the driver; it has to fit the package: {install_hint(MODULES[target])}.",
        )
    return builder


def parse(target: str, trt: ModuleType, log: Any, onnx_path: Path, weakly_typed: bool) -> Parsed:
    """Builder, network and parser of an ONNX file; the plugins are loaded before.

    Raises:
        RequirementError: there is no usable driver.
        BuildError: the parser refuses; the message names the node where there is one.
    """
    builder = make_builder(target, trt, log)
    network = builder.create_network(_network_flags(trt, weakly_typed))
    parser = trt.OnnxParser(network, log)
    if target == "tensorrt":
        trt.init_libnvinfer_plugins(log, "")
    if not parser.parse_from_file(str(onnx_path)):
        raise diagnosis.parser_error(f"{target} {trt.__version__}", _problems(parser, onnx_path), log.messages)
    return Parsed(builder, network, parser)


def _network_flags(trt: ModuleType, weakly_typed: bool) -> int:
    if not weakly_typed:
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    # From TensorRT 10 on every network has an explicit batch.
    return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH) if version(trt) < (10, 0) else 0


def _problems(parser: Any, onnx_path: Path) -> list[diagnosis.ParserProblem]:
    problems = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        # TensorRT 8 has the node's index alone.
        name, operator = getattr(error, "node_name", str)(), getattr(error, "node_operator", str)()
        if not name and not operator:
            name, operator = _node_at(onnx_path, int(error.node()))
        problems.append(diagnosis.ParserProblem(str(error.desc()), str(name), str(operator)))
    return problems


def _node_at(onnx_path: Path, index: int) -> tuple[str, str]:
    import onnx

    try:
        node = onnx.load(str(onnx_path), load_external_data=False).graph.node[index] if index >= 0 else None
    except Exception:  # the file that the parser refuses may be none at all
        node = None
    return (node.name, node.op_type) if node is not None else ("", "")


def holds_fp16(trt: ModuleType, network: Any) -> bool:
    """Whether a layer of the network gives FP16, which TensorRT 8 takes only with the flag for it."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return any(layer.get_output(i).dtype == trt.DataType.HALF for layer in layers for i in range(layer.num_outputs))


def keep_in_fp32(trt: ModuleType, network: Any, nodes: Sequence[str]) -> int:
    """Ask for FP32 in the layers of these ONNX nodes; for networks that are not strongly typed.

    Returns:
        How many layers that were.
    """
    wanted, parts, count = set(nodes), tuple(f"{name}/" for name in nodes), 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        # What was spelled out (`legacy`) has the name of its node in front.
        if not (layer.name in wanted or layer.name.startswith(parts)) or any(
            tensor.dtype != trt.DataType.FLOAT for tensor in outputs
        ):
            continue
        layer.precision = trt.DataType.FLOAT
        for number in range(layer.num_outputs):
            layer.set_output_type(number, trt.DataType.FLOAT)
        count += 1
    return count


def parse_io_formats(written: Sequence[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Dtype and layout by tensor name from `fp16:hwc8`.

    Raises:
        UsageError: a dtype or a layout is not known.
    """
    parsed = {}
    for name, text in written:
        dtype, _, layout = text.lower().partition(":")
        if dtype not in DTYPES or layout not in FORMATS:
            raise UsageError(
                f"build.io_formats: '{text}' for '{name}' is no DTYPE:FORMAT, as in fp16:hwc8",
                f"Dtypes: {', '.join(DTYPES)}; formats: {', '.join(FORMATS)}.",
            )
        parsed[name] = (dtype, layout)
    return parsed


def set_io_formats(trt: ModuleType, network: Any, options: BuildOptions, weakly_typed: bool) -> None:
    """Set dtypes and layouts of inputs and outputs as asked for.

    Raises:
        UsageError: there is no such input or output, or this TensorRT does not know the layout.
        BuildError: a strongly typed network has another dtype.
    """
    tensors = io_tensors(network)
    for name, (dtype, layout) in parse_io_formats(options.io_formats).items():
        tensor = tensors.get(name)
        if tensor is None:
            raise UsageError(
                f"build.io_formats: '{name}' is no input or output of the network", f"It has {', '.join(tensors)}."
            )
        if layout in formats.NAMES:
            formats.check_rank(len(tensor.shape), layout)
        wanted = getattr(trt.DataType, DTYPES[dtype], None)
        chosen = getattr(trt.TensorFormat, FORMATS[layout], None)
        if wanted is None or chosen is None:
            missing = dtype if wanted is None else layout
            raise UsageError(f"build.io_formats: TensorRT {trt.__version__} has no '{missing}'", "Choose another one.")
        if weakly_typed:
            tensor.dtype = wanted
        elif tensor.dtype != wanted:
            raise BuildError(
                f"'{name}' is {tensor.dtype.name} in the graph, not {dtype}: the network is strongly typed",
                "Only the floating-point dtypes fp16 and fp32 can be exchanged for each other.",
            )
        tensor.allowed_formats = 1 << int(chosen)


def io_tensors(network: Any) -> dict[str, Any]:
    """Inputs, then outputs, by name."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return {tensor.name: tensor for tensor in [*inputs, *outputs]}


def fix_static_inputs(network: Any, profiles: tuple[Profile, ...]) -> None:
    """Give inputs that have one shape in all profiles that shape: execution contexts can then share a profile."""
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = {
            shape
            for profile in profiles
            if tensor.name in profile
            for shape in (profile[tensor.name].min, profile[tensor.name].max)
        }
        if len(shapes) != 1 or -1 not in tuple(tensor.shape):
            continue
        (shape,) = shapes
        fits = len(tensor.shape) == len(shape)
        if fits and all(size in (-1, wanted) for size, wanted in zip(tensor.shape, shape, strict=True)):
            tensor.shape = shape


def optimization_profile(builder: Any, network: Any, profile: Profile) -> Any:
    """TensorRT's form of a shape profile.

    Raises:
        BuildError: it does not fit the network's inputs.
    """
    result = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name not in profile:
            raise BuildError(
                f"input '{tensor.name}' of the network has no shape in the profile, which has {', '.join(profile)}",
                "Give it a shape: --input NAME:SHAPE.",
            )
        shapes = profile[tensor.name]
        if tensor.is_shape_tensor:
            raise BuildError(
                f"input '{tensor.name}' is a shape tensor, whose values (not sizes) a profile would have to bound",
                "Make the size a constant of the model, or derive it from another input's shape.",
            )
        fits = len(tensor.shape) == len(shapes.opt) and all(
            size in (-1, low) and size in (-1, high)
            for size, low, high in zip(tensor.shape, shapes.min, shapes.max, strict=True)
        )
        if not fits:
            raise BuildError(
                f"input '{tensor.name}' is {format_shape(tensor.shape)} in the network, not {format_shape(shapes.min)} "
                f"to {format_shape(shapes.max)}",
                "This is a defect of the exported graph; try the other exporter: --set export.exporters=torchscript.",
            )
        result.set_shape(tensor.name, shapes.min, shapes.opt, shapes.max)
    return result


def without_repeats(messages: Mapping[str, list[str]]) -> list[str]:
    """Errors, then warnings, each once."""
    return list(dict.fromkeys([*messages["ERROR"], *messages["WARNING"]]))
