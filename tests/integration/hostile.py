"""A classifier with one convolution whose input INT8 cannot hold, and metrics for it, good and bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

OUTLIER = 3000.0
CLASSES = 16


class HostileNet(nn.Module):
    """Channel 0 before `third` is `OUTLIER` times larger than the others, and `third` takes it back: in FP32 nothing
    changes, and one scale for the whole tensor leaves the other channels a fraction of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.third = nn.Conv2d(32, 32, 3, padding=1)
        self.fourth = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32 * 8 * 8, CLASSES)
        with torch.no_grad():
            self.second.weight[0] *= OUTLIER
            self.second.bias[0] *= OUTLIER
            self.third.weight[:, 0] /= OUTLIER

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu(self.first(image))
        hidden = torch.relu(self.second(hidden))
        hidden = torch.relu(self.third(hidden))
        hidden = torch.relu(self.fourth(hidden))
        return self.head(hidden.flatten(1))


def build() -> HostileNet:
    torch.manual_seed(0)
    return HostileNet().eval()


def images(count: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8), dtype=np.float32)


def save_project(folder: Path, count: int = 200) -> Path:
    """model.pt, calibration.npz, and evaluation.npz with the FP32 model's own answers as labels."""
    model = build()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "model.pt")
    np.savez(folder / "calibration.npz", image=images(40, 1))
    evaluation = images(count, 2)
    with torch.no_grad():
        labels = model(torch.from_numpy(evaluation)).argmax(1).numpy()
    np.savez(folder / "evaluation.npz", image=evaluation, labels=labels)
    np.save(folder / "labels.npy", labels)
    return folder / "model.pt"


def failing(predictions: object, labels: object) -> float:
    raise RuntimeError("no figures today")


def not_a_number(predictions: object, labels: object) -> float:
    return float("nan")


def sharpness(predictions: np.ndarray[Any, Any], labels: object) -> float:
    """Lower wherever a single INT8 layer has rounded: FP32's own answers are the best ones."""
    model = build()
    with torch.no_grad():
        best = model(torch.from_numpy(images(len(predictions), 2))).numpy()
    return -float(np.abs(predictions - best).max())
