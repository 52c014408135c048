"""A network small enough to export in a second, and the files it can be saved in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.body = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu(self.stem(image))
        hidden = torch.relu(self.body(hidden) + hidden)
        return self.head(hidden.mean((2, 3)))


def small_net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet().eval()


def another_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())


def not_a_module() -> int:
    return 1


def failing() -> nn.Module:
    raise RuntimeError("no weights today")


def feeds() -> Iterator[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    for _ in range(4):
        yield {"image": generator.standard_normal((1, 3, 16, 16), dtype=np.float32)}


def save_data(path: Path, count: int = 40, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    np.savez(path, image=generator.standard_normal((count, 3, 16, 16), dtype=np.float32))
    return path


def save(kind: str, path: Path) -> Path:
    """Save the network as `kind`, under whatever name."""
    model, example = small_net(), torch.randn(2, 3, 16, 16)
    if kind == "torchscript":
        torch.jit.trace(model, example).save(str(path))
    elif kind == "exported program":
        batch = torch.export.Dim("batch", min=1, max=8)
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        with path.open("wb") as stream:
            torch.export.save(program, stream)
    elif kind == "pickled module":
        torch.save(model, path)
    elif kind == "state dict":
        torch.save(model.state_dict(), path)
    elif kind == "safetensors":
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    elif kind == "onnx":
        torch.onnx.export(
            model, (example[:1],), str(path), dynamo=False, input_names=["image"], output_names=["output"]
        )
    else:
        raise ValueError(kind)
    return path
