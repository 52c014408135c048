"""Every name that gpuopt uses of TensorRT's Python module exists in TensorRT 11, or is listed as legacy.

`tests/api/tensorrt_names.txt` holds the names of every supported release (tools/tensorrt_names.py writes it).
"""

from __future__ import annotations

import ast
import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent.parent.parent
FOLDER = ROOT / "gpuopt/backends/tensorrt"
sys.path.insert(0, str(ROOT / "tools"))
tensorrt_names = importlib.import_module("tensorrt_names")
sys.path.remove(str(ROOT / "tools"))
NAMES: dict[str, set[str]] = tensorrt_names.read()
RELEASES = {"8.5", "8.6", "10", "11", "rtx"}

VARIABLES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "tensor": "ITensor",
    "layer": "ILayer",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "registry": "IPluginRegistry",
    "cache": "ITimingCache",
}
"""What a variable of this name holds in gpuopt/backends/tensorrt, also with a `_` before it."""

NOT_THE_LIBRARY = {"repairs.py": set(VARIABLES), "legacy.py": set(VARIABLES), "calibrator.py": {"context"}}
"""Variables of such a name that hold ONNX or pycuda objects."""

WITH_NAMES_IN_TEXT = ("configuration.py", "network.py", "calibrator.py")

LEGACY = {
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": "needed before TensorRT 10",
    "ILayer.precision": "of networks that are not strongly typed",
    "ILayer.set_output_type": "of networks that are not strongly typed",
    "IBuilderConfig.int8_calibrator": "TensorRT's calibrator, until 10",
    "IBuilderConfig.set_calibration_profile": "TensorRT's calibrator, until 10",
    "IInt8EntropyCalibrator2": "TensorRT's calibrator, until 10",
    "IInt8MinMaxCalibrator": "TensorRT's calibrator, until 10",
    "ICudaEngine.create_execution_context_without_device_memory": "until 10; later ones take a strategy",
    "ICudaEngine.device_memory_size": "until 10; later ones have device_memory_size_v2",
    "BuilderFlag.FP16": "precision in flags, until 10",
    "BuilderFlag.INT8": "precision in flags, until 10",
    "BuilderFlag.PREFER_PRECISION_CONSTRAINTS": "precision in flags, until 10",
}
"""Not in TensorRT 11: used for older releases alone."""

RTX_ONLY = {"ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"}


def used_names() -> dict[str, set[str]]:
    """Names of the library that the code reaches for, and the files that do."""
    found: dict[str, set[str]] = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text())
        names = list(_attributes(tree, NOT_THE_LIBRARY.get(path.name, set())))
        for name in [*names, *(_by_text(tree) if path.name in WITH_NAMES_IN_TEXT else ())]:
            found.setdefault(name, set()).add(path.name)
    return found


def _attributes(tree: ast.AST, excluded: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id == "trt":
            if not node.attr.startswith("__"):
                yield node.attr
        elif isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "trt":
            if not node.attr.startswith("__"):
                yield f"{owner.attr}.{node.attr}"
        else:
            last = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            kind = VARIABLES.get(last.removeprefix("_"))
            if kind and last.removeprefix("_") not in excluded:
                yield f"{kind}.{node.attr}"


def _by_text(tree: ast.AST) -> Iterator[str]:
    """Names in text: builder flags, calibrators and the like, which are looked up with getattr."""
    enumerations = ("BuilderFlag", "HardwareCompatibilityLevel", "TensorFormat")
    known = {name.partition(".")[2]: name for name in NAMES if name.partition(".")[0] in enumerations}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.isupper() and node.value in known:
                yield known[node.value]
            elif node.value in NAMES and node.value.startswith("IInt8"):
                yield node.value


USED = used_names()


def test_the_scan_sees_what_is_used() -> None:
    expected = {
        "Builder.create_network",
        "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.avg_timing_iterations",
        "BuilderFlag.STRIP_PLAN",
        "BuilderFlag.INT8",
        "IInt8MinMaxCalibrator",
        "TensorFormat.HWC8",
        "MemoryPoolType.WORKSPACE",
        "OnnxParser.parse_from_file",
        "ITensor.allowed_formats",
    }
    assert expected <= USED.keys()


@pytest.mark.parametrize("name", sorted(USED))
def test_a_used_name_exists_in_tensorrt_11_or_is_listed_as_legacy(name: str) -> None:
    releases = NAMES.get(name, set())
    assert releases, f"{name} ({', '.join(USED[name])}) is in no release"
    if name in RTX_ONLY or name.partition(".")[0] in RTX_ONLY:
        assert "rtx" in releases
    elif name in LEGACY:
        assert "11" not in releases
        assert "8.5" in releases
    else:
        assert "11" in releases, f"{name} ({', '.join(USED[name])}) is gone from TensorRT 11"


SINCE = {
    "Builder.get_plugin_registry", "IBuilderConfig.builder_optimization_level", "IBuilderConfig.max_aux_streams",
    "IBuilderConfig.hardware_compatibility_level", "HardwareCompatibilityLevel", "IBuilderConfig.progress_monitor",
    "IProgressMonitor", "BuilderFlag.REFIT_IDENTICAL", "BuilderFlag.STRIP_PLAN", "BuilderFlag.WEIGHT_STREAMING",
    "BuilderFlag.VERSION_COMPATIBLE", "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "IPluginRegistry.load_library",
    "HardwareCompatibilityLevel.AMPERE_PLUS", "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY",
    "HardwareCompatibilityLevel.NONE", "TensorFormat.DHWC", "ExecutionContextAllocationStrategy",
    "ExecutionContextAllocationStrategy.USER_MANAGED", "ICudaEngine.device_memory_size_v2",
    "IExecutionContext.set_device_memory", "Runtime.engine_host_code_allowed",
}  # fmt: skip
"""Missing in 8.5: the code asks for the release, or `limits` refuses the option, before it uses them."""


@pytest.mark.parametrize("name", sorted(USED.keys() - RTX_ONLY))
def test_a_used_name_exists_in_tensorrt_8_5_or_is_listed_as_newer(name: str) -> None:
    if name.partition(".")[0] not in RTX_ONLY:
        assert ("8.5" in NAMES[name]) != (name in SINCE)


def test_the_lists_name_nothing_that_is_not_used() -> None:
    assert LEGACY.keys() <= USED.keys()
    assert set().union(*NAMES.values()) == RELEASES


def test_the_list_is_that_of_the_module_that_is_installed() -> None:
    module = pytest.importorskip("tensorrt_rtx")
    head = next(line for line in tensorrt_names.NAMES.read_text().splitlines() if line.startswith("# release rtx"))
    if head.split()[3] != module.__version__:
        pytest.skip(f"the list is of {head.split()[3]}, installed is {module.__version__}")
    assert tensorrt_names.names(module) == {name for name, releases in NAMES.items() if "rtx" in releases}


def test_the_list_is_that_of_the_bindings_where_they_are_installed() -> None:
    bindings = importlib.util.find_spec("tensorrt_bindings")
    if bindings is None or not bindings.submodule_search_locations:
        pytest.skip("tensorrt_cu13_bindings is not installed")
    if missing := [tool for tool in ("cc", "nm", "readelf") if shutil.which(tool) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    folder = Path(next(iter(bindings.submodule_search_locations)))
    module = tensorrt_names.in_a_process_of_its_own(folder)
    label = next((name for name, version in tensorrt_names.releases().items() if version == module.version), None)
    if label is None:
        pytest.skip(f"the list has no release {module.version}")
    assert module.names == {name for name, releases in NAMES.items() if label in releases}
