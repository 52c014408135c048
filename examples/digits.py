"""A complete small project for gpuopt: train a network, save what the compiler needs, check the result.

    python examples/digits.py train --output demo
    cd demo && gpuopt compile model.pt --precision int8 && cd ..
    python examples/digits.py evaluate --bundle demo/model.gpuopt --data demo/evaluation.npz

The data are scikit-learn's 1797 handwritten digits, 8x8 grey pixels each, which come with the
package: nothing is downloaded. Three quarters train the network, the rest is held out.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import nn
except ModuleNotFoundError as error:
    sys.exit(f"digits: this example needs {error.name}; `make setup` installs what is missing")

if TYPE_CHECKING:
    from typing import TypeAlias

    Images: TypeAlias = NDArray[np.float32]
    Labels: TypeAlias = NDArray[np.int64]

SEED = 7
EPOCHS = 20
BATCH = 64
# The compiled model takes any batch from one image to this many.
LARGEST_BATCH = 64
CALIBRATION_IMAGES = 256


def say(text: str) -> None:
    """Progress goes to standard error; standard output is for results."""
    print(f"digits: {text}", file=sys.stderr, flush=True)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, the pattern of ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + x)


class DigitNet(nn.Module):
    """About 130,000 weights. The argument's name, `image`, becomes the name of the engine's input."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            ResidualBlock(32),
            nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            ResidualBlock(64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(image))


def load_split() -> tuple[Images, Images, Labels, Labels]:
    """Training and held-out images, normalised as the network expects them, and their labels."""
    digits = load_digits()
    images = digits.images.astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, random_state=SEED, stratify=labels
    )
    # The held-out images must not take part in anything, the normalisation included.
    mean, deviation = train_x.mean(), train_x.std()
    return (train_x - mean) / deviation, (test_x - mean) / deviation, train_y, test_y


def fit(images: Images, labels: Labels) -> DigitNet:
    """Train the network; the same seed gives the same weights."""
    torch.manual_seed(SEED)
    model = DigitNet()
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    steps = EPOCHS * -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        for chosen in torch.randperm(len(x)).split(BATCH):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        if epoch % 5 == 0:
            say(f"epoch {epoch} of {EPOCHS}: training loss {total / len(x):.4f}")
    model.eval()
    return model


def export(model: DigitNet, path: Path) -> None:
    """Save the network as an exported program: the graph and the weights, no Python code."""
    # The example's batch is 2 because a 1 would be taken for a size that never changes.
    example = torch.zeros(2, 1, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    program = torch.export.export(model, (example,), dynamic_shapes={"image": {0: batch}})
    # Through memory, because torch warns about every file whose name does not end in .pt2.
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())


def train(output: Path) -> None:
    """Train, then write the model, the calibration data and the held-out data."""
    started = time.perf_counter()
    # More threads gain nothing on images this small and wait for each other where other programs
    # want the cores too: a few seconds become minutes. One gives the same weights on any number of cores.
    torch.set_num_threads(1)
    train_x, test_x, train_y, test_y = load_split()
    say(f"training on {len(train_x)} images, {len(test_x)} are held out")
    model = fit(train_x, train_y)
    with torch.inference_mode():
        logits = model(torch.from_numpy(test_x)).numpy()

    output.mkdir(parents=True, exist_ok=True)
    export(model, output / "model.pt")
    # Calibration shows the compiler typical inputs; it needs no labels and no held-out image. The
    # key is the name of the model's input, and beside model.pt the file is found by its name.
    np.savez(output / "calibration.npz", image=train_x[:CALIBRATION_IMAGES])
    np.savez(output / "evaluation.npz", image=test_x, label=test_y, fp32_logits=logits)
    accuracy = (logits.argmax(1) == test_y).mean()
    say(f"held-out accuracy {accuracy:.2%} after {time.perf_counter() - started:.0f} s")
    say(f"wrote model.pt, calibration.npz and evaluation.npz to {output}")


def evaluate(bundle: Path, data: Path) -> None:
    """Compare the compiled network with PyTorch on the held-out images."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        sys.exit("digits: this step needs onnxruntime; `make setup` installs it")
    network = bundle / "model.onnx"
    if not network.is_file():
        sys.exit(f"digits: {network} is not there; `gpuopt compile` writes it")
    arrays = np.load(data)
    images, labels, fp32 = arrays["image"], arrays["label"], arrays["fp32_logits"]
    # The CPU runs the same INT8 graph that the engine is built from, so this works without a GPU.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # It warns about each INT8 weight that it cannot fold into FP32.
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    int8 = np.concatenate([session.run(None, {name: batch})[0] for batch in batches])

    expected, actual = fp32.argmax(1), int8.argmax(1)
    rows = [
        ("held-out images", f"{len(labels)}"),
        ("PyTorch FP32 accuracy", f"{(expected == labels).mean():.2%}"),
        ("INT8 accuracy", f"{(actual == labels).mean():.2%}"),
        ("same answer", f"{(expected == actual).mean():.2%}"),
        ("report", f"{bundle / 'report.md'}"),
    ]
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and check the digits network of gpuopt's demo.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the network and save what the compiler needs")
    training.add_argument("--output", type=Path, default=Path("demo"), help="folder to write to")
    checking = commands.add_parser("evaluate", help="compare a compiled bundle with PyTorch")
    checking.add_argument("--bundle", type=Path, required=True, help="the folder that gpuopt wrote")
    checking.add_argument("--data", type=Path, required=True, help="evaluation.npz of the training")
    options = parser.parse_args()
    try:
        if options.command == "train":
            train(options.output)
        else:
            evaluate(options.bundle, options.data)
    except OSError as error:
        sys.exit(f"digits: {error.strerror or error}: {error.filename or ''}".rstrip(": "))


if __name__ == "__main__":
    main()
