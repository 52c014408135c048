"""What this machine has: packages, GPU and driver, and what each target still needs."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpuopt.errors import RequirementError

CORE_PACKAGES = ("numpy", "onnx", "pydantic", "PyYAML", "rich", "typer")
EXPORT_PACKAGES = ("torch", "onnxscript", "onnxslim", "safetensors")
RUNTIME_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "pycuda",
    "cuda-bindings",
    "pillow",
)

_LIBRARIES = {
    "tensorrt": ("tensorrt", ("tensorrt",)),
    "tensorrt-rtx": ("tensorrt_rtx", ("tensorrt-rtx-cu13",)),
    "onnxruntime": ("onnxruntime", ("onnxruntime", "onnxruntime-gpu")),
}
"""The Python module of a target, and the distributions it comes in."""

ENGINE_PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}
"""The distribution that builds and runs a target's engines."""

_INSTALL = {
    "torch": "pip install torch",
    "onnxscript": "pip install onnxscript",
    "onnxslim": "pip install onnxslim",
    "safetensors": "pip install safetensors",
    "onnxruntime": "pip install onnxruntime (with an NVIDIA GPU: onnxruntime-gpu instead)",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13 (x86-64 Linux or Windows)",
    "tensorrt": "pip install tensorrt (needs an NVIDIA GPU and its driver to build)",
    "PIL": "pip install pillow",
    "matplotlib": "pip install 'gpuopt[plot]'",
    "pycuda": "pip install 'gpuopt[cuda]' (compiles pycuda: needs CUDA's headers and a C++ compiler)",
    "cuda.bindings": "pip install 'gpuopt[cuda]'",
    "pynvml": "pip install nvidia-ml-py",
    "minisign": "pip install 'gpuopt[sign]'",
    "ray": "pip install 'gpuopt[ray]'",
    "fsspec": "pip install 'gpuopt[ray]'",
}


@dataclass(frozen=True)
class Gpu:
    """One CUDA device.

    Attributes:
        name: as `NVIDIA H100 80GB HBM3`.
        compute_capability: as `9.0`.
        driver_version: the CUDA version that the driver supports, as `13.0`.
        total_bytes: its memory.
    """

    name: str
    compute_capability: str
    driver_version: str = ""
    total_bytes: int = 0


@dataclass(frozen=True)
class TargetState:
    """Whether a target can be built here, and what it still needs; each need carries its command."""

    target: str
    ready: bool
    needs: tuple[str, ...]
    note: str


def has_module(name: str) -> bool:
    """Whether a top-level module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def version_of(package: str) -> str | None:
    """Installed version of a distribution."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require(module: str, purpose: str) -> None:
    """Refuse to start what would fail later for want of a package.

    Raises:
        RequirementError: with the command that installs it.
    """
    if not has_module(module):
        raise RequirementError(
            f"{purpose} needs the Python package '{module}', which is not installed",
            f"Install it: {_INSTALL.get(module, f'pip install {module}')}. 'gpuopt doctor' shows everything.",
        )


def gpus() -> list[Gpu]:
    """CUDA devices that the driver reports; empty without a driver. Creates no CUDA context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    supported = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(supported))
    # 1000 * major + 10 * minor, as the CUDA driver API has it.
    driver_version = f"{supported.value // 1000}.{supported.value % 1000 // 10}"
    found = []
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, len(name), device)
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the CUDA driver API.
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        memory = ctypes.c_size_t()
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        capability = f"{major.value}.{minor.value}"
        found.append(Gpu(name.value.decode(errors="replace"), capability, driver_version, memory.value))
    return found


def pci_bus_address(index: int = 0) -> str:
    """Of a GPU, as `0000:65:00.0`; empty without one. Creates no CUDA context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), index) != 0:
        return ""
    return "" if driver.cuDeviceGetPCIBusId(text, len(text), device) != 0 else text.value.decode().lower()


def free_gpu_memory(index: int = 0) -> int | None:
    """Bytes free on a GPU; None without one. Uses its primary context, which is created where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), index) != 0:
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) != 0:
        return None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        driver.cuCtxPushCurrent_v2(context)
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)
    return None if failed else free.value


def target_states() -> list[TargetState]:
    """Every target with what it still needs here."""
    devices = gpus()
    runtime = has_module("onnxruntime")
    states = [
        TargetState(
            "onnxruntime",
            runtime,
            () if runtime else (f"onnxruntime: {_INSTALL['onnxruntime']}",),
            "runs here, on the CPU" if not devices else "runs here",
        )
    ]
    rtx = has_module("tensorrt_rtx")
    states.append(
        TargetState(
            "tensorrt-rtx",
            rtx,
            () if rtx else (f"tensorrt_rtx: {_INSTALL['tensorrt_rtx']}",),
            "builds ahead of time, without a GPU; its engines run on GeForce and workstation RTX GPUs",
        )
    )
    needs = []
    if not has_module("tensorrt"):
        needs.append(f"tensorrt: {_INSTALL['tensorrt']}")
    if not devices:
        needs.append("an NVIDIA GPU with its driver: TensorRT builds on the GPU it builds for")
    states.append(TargetState("tensorrt", not needs, tuple(needs), "builds for the GPU of this machine"))
    return states


def why_not_run(target: str, index: int = 0) -> str:
    """What is missing to run a target's engines on the GPU of that index; empty if nothing is."""
    if target == "onnxruntime":
        return "" if has_module("onnxruntime") else f"onnxruntime: {_INSTALL['onnxruntime']}"
    devices = gpus()
    if index not in range(len(devices)):
        return f"no NVIDIA GPU {index}" if devices else "no NVIDIA GPU"
    module = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}[target]
    for name in (module, "pycuda"):
        if not has_module(name):
            return f"{name} is not installed: {_INSTALL[name]}"
    device = devices[index]
    capability = tuple(map(int, device.compute_capability.split(".")))
    if target == "tensorrt-rtx" and capability < (10, 0) and capability not in ((8, 0), (8, 6), (8, 9)):
        return f"TensorRT-RTX does not run on {device.name} (compute capability {device.compute_capability})"
    return ""


def processor() -> str:
    """The CPU's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def stated_library_version(target: str) -> str:
    """Version of a target's library here as its distribution or its source states it; empty where neither does.

    Imports nothing.
    """
    module, packages = _LIBRARIES[target]
    if found := [version for version in map(version_of, packages) if version is not None]:
        return ", ".join(found)
    try:
        spec = importlib.util.find_spec(module)
        source = Path(spec.origin).read_text() if spec and spec.origin and spec.origin.endswith(".py") else ""
    except (ImportError, OSError, ValueError):
        return ""
    stated = re.search(r"""^__version__ *= *["']([^"']+)["']""", source, re.MULTILINE)
    return stated[1] if stated else ""


def has_library(target: str) -> bool:
    """Whether a target's library can be imported, without importing it."""
    return has_module(_LIBRARIES[target][0])


def library_install_hint(target: str) -> str:
    """The command that installs a target's library."""
    return _INSTALL[_LIBRARIES[target][0]]


def library_version(target: str) -> str:
    """Version of a target's library here; empty without it. Imports it only where nothing else tells."""
    module = _LIBRARIES[target][0]
    if stated := stated_library_version(target):
        return stated
    if not has_module(module):
        return ""
    try:
        return str(importlib.import_module(module).__version__)
    except (ImportError, OSError, AttributeError):
        return ""


def tensorrt_version() -> tuple[int, int] | None:
    """Major and minor version of the TensorRT here; None without it."""
    version = library_version("tensorrt")
    if not version:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def default_targets() -> tuple[str, ...]:
    """TensorRT where it and a GPU are present, else TensorRT-RTX; ONNX Runtime always."""
    ready = {state.target for state in target_states() if state.ready}
    engine = next((target for target in ("tensorrt", "tensorrt-rtx") if target in ready), None)
    return (engine, "onnxruntime") if engine else ("onnxruntime",)


def check_targets(targets: Sequence[str], instead: Sequence[str] = tuple(_LIBRARIES)) -> None:
    """Refuse targets that cannot be built here before any work is done.

    Args:
        instead: those that could be asked for as well.

    Raises:
        RequirementError: says what to install.
    """
    states = {state.target: state for state in target_states()}
    for target in targets:
        state = states[target]
        if not state.ready:
            ready = [other for other in states if states[other].ready and other in instead]
            raise RequirementError(
                f"target {target} cannot be built here: {state.needs[0]}",
                f"Targets that can: {', '.join(ready) or 'none'}.",
            )


def describe() -> dict[str, Any]:
    """Python, platform, package versions and GPUs, for reports and manifests."""
    names = (*CORE_PACKAGES, *EXPORT_PACKAGES, *RUNTIME_PACKAGES)
    versions = {name: version_of(name) for name in names}
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name, version in versions.items() if version},
        "gpus": [asdict(gpu) for gpu in gpus()],
    }


def missing_module(error: ModuleNotFoundError, who: str) -> RequirementError:
    """An import that failed, as a requirement with the command that meets it."""
    module = (error.name or "").partition(".")[0]
    return RequirementError(
        f"{who} needs the Python package '{module}', which is not installed", f"Install it: {install_hint(module)}."
    )


def install_hint(module: str) -> str:
    """The command that installs a module's package."""
    return _INSTALL.get(module, f"pip install {module}")


def python_is_supported() -> bool:
    """Whether this Python is one that gpuopt is tested on."""
    return (3, 10) <= sys.version_info[:2] <= (3, 13)
