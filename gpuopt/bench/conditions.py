"""The GPU's state while something is measured: clocks, temperature, power, throttling, other processes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gpuopt.environment import has_module, install_hint

_INTERVAL = 0.15
# NVML's nvmlClocksEventReasons: bits that say that the GPU was held back against its will.
_SLOWDOWNS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@dataclass
class Conditions:
    """What NVML told during a measurement; empty lists where it is not there.

    Attributes:
        sm_mhz, memory_mhz: clocks, a value a sample.
        celsius, watts: of the GPU.
        held_back: reasons for which the GPU ran slower than it could, with the share of the samples.
        others: process ids that used the GPU beside us.
        note: why there is nothing; empty if there is.
    """

    sm_mhz: list[int] = field(default_factory=list)
    memory_mhz: list[int] = field(default_factory=list)
    celsius: list[int] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)
    held_back: dict[str, float] = field(default_factory=dict)
    others: list[int] = field(default_factory=list)
    note: str = ""

    def summary(self) -> dict[str, Any]:
        """JSON: lowest and highest of each, and what held the GPU back."""

        def span(values: list[Any]) -> list[Any] | None:
            return [min(values), max(values)] if values else None

        return {
            "sm_mhz": span(self.sm_mhz),
            "memory_mhz": span(self.memory_mhz),
            "celsius": span(self.celsius),
            "watts": span([round(value, 1) for value in self.watts]),
            "held_back": self.held_back,
            "other_processes": self.others,
            "cpu_load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            "note": self.note,
        }

    def warnings(self) -> list[str]:
        """One line for each thing that spoils figures."""
        lines = [
            f"the GPU was held back during {share:.0%} of the run: {reason}; it is faster without that"
            for reason, share in self.held_back.items()
        ]
        if self.others:
            lines.append(f"{len(self.others)} other processes used the GPU: it is faster alone")
        return lines


@contextlib.contextmanager
def watched(pci_bus_id: str | None, why_not: str = "") -> Iterator[Conditions]:
    """Sample the GPU's state about seven times a second beside the block.

    Args:
        pci_bus_id: of the GPU, as the CUDA driver names it; None: none is watched.
        why_not: the reason for that.
    """
    found = Conditions()
    if pci_bus_id is None:
        found.note = why_not or "no NVIDIA GPU"
        yield found
        return
    if not has_module("pynvml"):
        found.note = f"clocks and throttling were not watched: {install_hint('pynvml')}"
        yield found
        return
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)
    except pynvml.NVMLError as error:
        found.note = f"clocks and throttling were not watched: {error}"
        yield found
        return
    done = threading.Event()
    thread = threading.Thread(target=_sample, args=(pynvml, handle, found, done), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        pynvml.nvmlShutdown()


def _sample(pynvml: Any, handle: Any, found: Conditions, done: threading.Event) -> None:
    reasons = getattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or (
        pynvml.nvmlDeviceGetCurrentClocksThrottleReasons
    )
    seen: dict[str, int] = {}
    count = 0
    others: set[int] = set()
    # One by one: what a GPU or a container does not tell must not hide the rest.
    readings: tuple[Callable[[], object], ...] = (
        lambda: found.sm_mhz.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
        lambda: found.memory_mhz.append(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
        lambda: found.celsius.append(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
        lambda: found.watts.append(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        lambda: others.update(process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
    )
    while True:
        with contextlib.suppress(pynvml.NVMLError):
            bits = reasons(handle)
            count += 1
            for bit, reason in _SLOWDOWNS.items():
                if bits & bit:
                    seen[reason] = seen.get(reason, 0) + 1
        for reading in readings:
            with contextlib.suppress(pynvml.NVMLError):
                reading()
        if done.wait(_INTERVAL):
            break
    others.discard(os.getpid())
    if not count:
        found.note = "this GPU does not tell whether it was held back"
    found.held_back = {reason: hits / count for reason, hits in seen.items()}
    # In a container NVML tells host process ids, ours among them: one is no proof of a neighbour.
    found.others = sorted(others) if len(others) > 1 else []
