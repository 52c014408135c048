"""Data and trained networks of `benchmarks/accuracy.py`; run by it, in a process of its own.

scikit-learn's 1797 handwritten digits (8x8 grey, real, shipped with the package) are scaled to
3x32x32, so that published architectures apply. Two folds: each half is held out once, so that every
one of the 1797 images is predicted by a network that never saw it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

SEED = 7
SIDE = 32
BATCH = 64
LARGEST_BATCH = 64
CALIBRATION_IMAGES = 256
OPSET = 20


def split(fold: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images (N, 3, 32, 32), their labels, held-out images, their labels; normalised by the training half."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedKFold

    digits = load_digits()
    folds = StratifiedKFold(2, shuffle=True, random_state=SEED).split(digits.data, digits.target)
    train, held_out = list(folds)[fold]
    small = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
    images = nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear", antialias=False).expand(-1, 3, -1, -1)
    mean, deviation = images[train].mean(), images[train].std()
    images = ((images - mean) / deviation).contiguous()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return images[train], labels[train], images[held_out], labels[held_out]


def resnet18() -> nn.Module:
    from torchvision import models

    model = models.resnet18(num_classes=10)
    # The stem for small images: 3x3, no pooling.
    model.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def _regnet() -> nn.Module:
    from torchvision.models import regnet_x_400mf

    model = regnet_x_400mf(num_classes=10)
    model.stem[0].stride = (1, 1)
    return model


def _mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2(num_classes=10)
    model.features[0][0].stride = (1, 1)
    return model


def mobilenet_v3_small() -> nn.Module:
    from torchvision import models

    model = models.mobilenet_v3_small(num_classes=10)
    model.features[0][0].stride = (1, 1)
    return model


def imagenet_mobilenet_v3_small() -> nn.Module:
    """For images of 224 pixels. With the statistics torchvision starts from, signals fade until FP16 has none left."""
    from torchvision import models

    return _with_fitting_statistics(models.mobilenet_v3_small())


def imagenet_resnet50() -> nn.Module:
    """For images of 224 pixels. With the statistics torchvision starts from, all biases of convolutions are 0."""
    from torchvision import models

    return _with_fitting_statistics(models.resnet50())


def _with_fitting_statistics(model: nn.Module) -> nn.Module:
    """Random weights, but statistics of BatchNorm as such images have them, as a trained network's."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    images = torch.randn(16, 3, 224, 224) / 4
    for cells in (4, 14, 56):
        images += nn.functional.interpolate(torch.randn(16, 3, cells, cells), 224) / 2
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def _convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    # convnext_atto's widths and depths; patches of 2 instead of 4, since the images are small.
    return ConvNeXt(num_classes=10, depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), patch_size=2, conv_mlp=True)


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    # vit_tiny's width and heads, half its depth; 16 patches.
    return VisionTransformer(img_size=SIDE, patch_size=8, num_classes=10, embed_dim=192, depth=6, num_heads=3)


@dataclass(frozen=True)
class Recipe:
    """How a network is made and trained; the rate is the cycle's highest."""

    make: Callable[[], nn.Module]
    epochs: int
    batch: int
    rate: float


NETWORKS = {
    "resnet18": Recipe(resnet18, 10, 64, 2e-3),
    "regnet_x_400mf": Recipe(_regnet, 16, 64, 3e-3),
    "mobilenet_v2": Recipe(_mobilenet_v2, 20, 64, 3e-3),
    "mobilenet_v3_small": Recipe(mobilenet_v3_small, 40, 64, 4e-3),
    "convnext_atto": Recipe(_convnext, 25, 64, 2e-3),
    "vit_tiny": Recipe(_vit, 80, 32, 1e-3),
}


def _augment(images: torch.Tensor) -> torch.Tensor:
    """Shift by up to an eighth of the side, turn by up to 10 degrees, scale by up to a tenth."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * (10 * torch.pi / 180)
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.1
    shift = (torch.rand(count, 2) * 2 - 1) * 0.25
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], 1).view(count, 2, 3)
    grid = nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def fit(name: str, fold: int, quick: bool) -> nn.Module:
    """Train with AdamW, one cycle of the learning rate, weight decay and augmentation."""
    recipe = NETWORKS[name]
    epochs = 2 if quick else recipe.epochs
    torch.manual_seed(SEED + fold)
    model = recipe.make()
    x, y, _, _ = split(fold)
    steps = len(x) // recipe.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=epochs * steps)
    started = time.perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        for chosen in torch.randperm(len(x)).split(recipe.batch)[:steps]:
            loss = nn.functional.cross_entropy(model(_augment(x[chosen])), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 5 == 0 or epoch == epochs:
            took = time.perf_counter() - started
            print(
                f"{name} fold {fold}: epoch {epoch} of {epochs}, loss {loss.item():.4f}, {took:.0f} s", file=sys.stderr
            )
    return model.eval()


def _logits(model: nn.Module, images: torch.Tensor) -> NDArray[np.float32]:
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(BATCH)]).numpy()


def export(model: nn.Module, path: Path) -> None:
    """The FP32 graph that every quantizer gets: torch's exporter, then onnxslim; batch from 1 to 64."""
    import onnx
    import onnxslim

    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    example = (torch.zeros(2, 3, SIDE, SIDE),)
    program = torch.export.export(model, example, dynamic_shapes=({0: batch},))
    exported = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, input_names=["image"], output_names=["logits"], verbose=False
    )
    assert exported is not None
    graph = onnxslim.slim(exported.model_proto)
    graph.ir_version = 10
    onnx.save(graph, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("fold", type=int, choices=(0, 1))
    parser.add_argument("folder", type=Path, help="gets model.pth, model.onnx, calibration.npz and evaluation.npz")
    parser.add_argument("--quick", action="store_true", help="two epochs")
    options = parser.parse_args()
    # One thread: the same weights on any number of cores, and no waiting where other programs want them.
    torch.set_num_threads(1)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.pth"
    if weights.exists():
        model = NETWORKS[options.network].make()
        model.load_state_dict(torch.load(weights))
        model.eval()
    else:
        model = fit(options.network, options.fold, options.quick)
        partial = weights.with_suffix(".partial")
        torch.save(model.state_dict(), partial)
        partial.replace(weights)
    train_x, _, test_x, test_y = split(options.fold)
    logits = _logits(model, test_x)
    np.savez(folder / "calibration.npz", image=train_x[:CALIBRATION_IMAGES].numpy())
    np.savez(folder / "evaluation.npz", image=test_x.numpy(), label=test_y.numpy(), logits=logits)
    export(model, folder / "model.onnx")
    print(f"{options.network} fold {options.fold}: {(logits.argmax(1) == test_y.numpy()).mean():.2%}", file=sys.stderr)


if __name__ == "__main__":
    main()
