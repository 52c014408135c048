"""A small U-Net: four scales, 3 x 256 x 256 in, two classes a pixel out; random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (32, 64, 128, 256)


def _twice(channels: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for source in (channels, out):
        layers += [nn.Conv2d(source, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Down by max pooling, up by nearest neighbours and a convolution, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(_twice(source, out) for source, out in zip((3, *WIDTHS), WIDTHS, strict=False))
        pairs = list(zip(WIDTHS[:0:-1], WIDTHS[-2::-1], strict=True))
        self.rise = nn.ModuleList(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(s, o, 1)) for s, o in pairs)
        self.up = nn.ModuleList(_twice(2 * out, out) for _, out in pairs)
        self.head = nn.Conv2d(WIDTHS[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for index, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if index else x)
            skips.append(x)
        for rise, block, skip in zip(self.rise, self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([skip, rise(x)], dim=1))
        return self.head(x)


def unet() -> nn.Module:
    """Without arguments, as a factory has to be."""
    torch.manual_seed(0)
    return UNet()
