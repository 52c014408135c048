"""The architectures that the integration tests compile: real ones, random weights, small inputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


def _with_statistics(model: nn.Module) -> nn.Module:
    """Let BatchNorm see data, as training does: without it activations of a deep network fade to nothing."""
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(8, 3, 64, 64))
    return model.eval()


def resnet18() -> nn.Module:
    from torchvision.models import resnet18 as build

    return _with_statistics(build(weights=None))


def mobilenet_v3() -> nn.Module:
    from torchvision.models import mobilenet_v3_small as build

    return _with_statistics(build(weights=None))


def vit() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, num_classes=100)


class _DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64)
        self.down = nn.ModuleList(_DoubleConv(i, o) for i, o in zip((3, *widths), widths, strict=False))
        self.bottom = _DoubleConv(64, 128)
        self.rise = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in ((128, 64), (64, 32), (32, 16)))
        self.up = nn.ModuleList(_DoubleConv(2 * o, o) for o in (64, 32, 16))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            image = block(image)
            skips.append(image)
            image = nn.functional.max_pool2d(image, 2)
        image = self.bottom(image)
        for rise, block, skip in zip(self.rise, self.up, reversed(skips), strict=True):
            image = block(torch.cat([skip, rise(image)], dim=1))
        return self.head(image)


def unet() -> nn.Module:
    return UNet()


class Encoder(nn.Module):
    """A text encoder with padding mask: batch and sequence are dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(1000, 64)
        self.position = nn.Embedding(128, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu", norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 32)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        places = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.token(ids) + self.position(places)
        hidden = self.layers(hidden, src_key_padding_mask=mask == 0)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        return {"hidden": hidden, "embedding": self.head(pooled)}


def encoder() -> nn.Module:
    return Encoder()


class TwoByTwo(nn.Module):
    """Two inputs of different rank, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU())
        self.table = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64))
        self.label = nn.Linear(128, 16)
        self.value = nn.Linear(128, 1)

    def forward(self, image: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.image(image).mean((2, 3)), self.table(table)], dim=1)
        return self.label(both), self.value(both).squeeze(-1)


def two_by_two() -> nn.Module:
    return TwoByTwo()


class Spectral(nn.Module):
    """A global filter network: two-dimensional Fourier transforms, there and back, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.weight = nn.Parameter(0.2 * torch.randn(32, 16, 9, 2))
        self.mix = nn.Sequential(nn.Conv2d(32, 64, 1), nn.GELU(), nn.Conv2d(64, 32, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.weight)
        x = x + self.mix(torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho"))
        return self.head(x.mean((2, 3)))


def spectral() -> nn.Module:
    return Spectral()


def images(count: int = 8, size: int = 64) -> Iterator[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    for _ in range(count):
        yield {"x": generator.standard_normal((1, 3, size, size), dtype=np.float32)}


def unet_images() -> Iterator[dict[str, np.ndarray]]:
    for feed in images(size=32):
        yield {"image": feed["x"]}


def tokens() -> Iterator[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    for index in range(8):
        length = 8 + 4 * index
        mask = np.ones((1, length), np.int64)
        mask[0, length - index :] = 0
        yield {"ids": generator.integers(0, 1000, (1, length)), "mask": mask}


def pairs() -> Iterator[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    for feed in images(size=32):
        yield {"image": feed["x"], "table": generator.standard_normal((1, 20), dtype=np.float32)}
