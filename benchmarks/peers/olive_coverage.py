"""Convert an FP32 ONNX graph by Olive; runs in Olive's own environment (`setup.sh olive`).

    PYTHON benchmarks/peers/olive_coverage.py FP32-BUNDLE OUTPUT.onnx fp16|int8 SAMPLES

Olive's passes OnnxFloatToFloat16 and OnnxStaticQuantization at their defaults, but for what TensorRT asks
for: INT8 and symmetric, activations and weights, biases in floating point. Random data, as for gpuopt.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from olive.data.registry import Registry
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.float16_conversion import OnnxFloatToFloat16
from olive.passes.onnx.quantization import OnnxStaticQuantization


class RandomSamples(torch.utils.data.Dataset):
    """Inputs of the shapes that the graph is tuned for, without their batch, and no label."""

    def __init__(self, record: str, samples: int) -> None:
        found = json.loads(Path(record).read_text())
        self._shapes = {name: sizes["opt"].split("x")[1:] for name, sizes in found["profiles"][0].items()}
        self._dtypes = {spec["name"]: getattr(torch, spec["dtype"]) for spec in found["inputs"]}
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if index >= self._samples:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        feed = {}
        for name, dtype in self._dtypes.items():
            shape = [int(size) for size in self._shapes[name]]
            random = torch.randn if dtype.is_floating_point else partial(torch.randint, 0, 2)
            feed[name] = random(shape, generator=generator).to(dtype)
        return feed, torch.tensor(0)


@Registry.register_dataset("random_samples")
def random_samples(record: str, samples: int, **_: object) -> RandomSamples:
    """The dataset, as Olive asks for it."""
    return RandomSamples(record, samples)


def data(bundle: Path, samples: int) -> dict[str, object]:
    """Olive's word for it."""
    params = {"record": str(bundle / "reference/reference.json"), "samples": samples}
    return {
        "name": "calibration",
        "load_dataset_config": {"type": "random_samples", "params": params},
        "dataloader_config": {"params": {"batch_size": 1}},
    }


def main() -> None:
    bundle, output, precision, samples = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    if precision == "fp16":
        step = create_pass_from_dict(OnnxFloatToFloat16, {"keep_io_types": True}, disable_search=True)
    else:
        options = {
            "data_config": data(bundle, samples),
            "precision": "int8",
            "activation_type": "int8",
            "activation_symmetric": True,
            "weight_symmetric": True,
            "extra_options": {"QuantizeBias": False},
        }
        step = create_pass_from_dict(OnnxStaticQuantization, options, disable_search=True)
    # In a folder of its own: the pass leaves files beside the graph that it reads.
    source = Path(shutil.copy(bundle / "model.onnx", output.with_name("fp32.onnx")))
    made = step.run(ONNXModelHandler(str(source)), str(output.with_name("made.onnx")))
    shutil.copy(made.model_path, output)


if __name__ == "__main__":
    main()
