"""What GPUs can do at most, from their vendor's data sheets: dense rates, without structured sparsity."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Rates of one GPU.

    Attributes:
        bytes_per_second: of device memory.
        operations_per_second: by precision; a multiply-accumulate is two. FP32 is TF32 where the GPU has it.
        source: the data sheet.
    """

    bytes_per_second: float
    operations_per_second: dict[str, float]
    source: str


def _peak(gigabytes: float, fp16: float, int8: float, fp32: float, source: str) -> Peak:
    rates = {"fp16": fp16 * 1e12, "bf16": fp16 * 1e12, "int8": int8 * 1e12, "fp8": int8 * 1e12, "fp32": fp32 * 1e12}
    return Peak(gigabytes * 1e9, rates, source)


# By the words of the driver's name; the first entry whose words all occur is taken.
_PEAKS: tuple[tuple[tuple[str, ...], Peak], ...] = (
    (("H200",), _peak(4800, 989, 1979, 494, "NVIDIA H200 data sheet, SXM")),
    (("H100", "NVL"), _peak(3900, 835, 1671, 418, "NVIDIA H100 data sheet, NVL")),
    (("H100", "PCIe"), _peak(2000, 756, 1513, 378, "NVIDIA H100 data sheet, PCIe")),
    (("H100",), _peak(3350, 989, 1979, 494, "NVIDIA H100 data sheet, SXM5")),
    (("A100", "40GB"), _peak(1555, 312, 624, 156, "NVIDIA A100 data sheet, 40 GB")),
    (("A100",), _peak(2039, 312, 624, 156, "NVIDIA A100 data sheet, SXM 80 GB")),
    (("A30",), _peak(933, 165, 330, 82, "NVIDIA A30 data sheet")),
    (("A10",), _peak(600, 125, 250, 62.5, "NVIDIA A10 data sheet")),
    (("RTX A6000",), _peak(768, 155, 310, 77, "NVIDIA RTX A6000 data sheet")),
    (("L40S",), _peak(864, 362, 733, 183, "NVIDIA L40S data sheet")),
    (("L4",), _peak(300, 121, 242, 60, "NVIDIA L4 data sheet")),
    (("T4",), _peak(320, 65, 130, 8.1, "NVIDIA T4 data sheet")),
    (("V100",), _peak(900, 125, 62.8, 15.7, "NVIDIA V100 data sheet, SXM2")),
    (("RTX 4090",), _peak(1008, 330, 661, 83, "NVIDIA Ada GPU architecture paper, RTX 4090")),
    (("Orin",), _peak(204.8, 42.5, 85, 10.6, "NVIDIA Jetson AGX Orin technical brief, 64 GB")),
)


def peak_of(gpu: str) -> Peak | None:
    """The data sheet's rates of a GPU by the driver's name of it; None if it is not in the table."""
    words = set(gpu.replace("-", " ").split())
    for wanted, peak in _PEAKS:
        if all(word in words or (" " in word and word in gpu) for word in wanted):
            return peak
    return None
