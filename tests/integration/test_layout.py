"""Layout and bytes through the whole program: compile, verify, load, inspect; TensorRT-RTX engines of all of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import gpuopt as package
from tests.conftest import Gpuopt

torch = pytest.importorskip("torch")

NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, kernel=3, stride=1, padding=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, kernel, stride, padding)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, image):
        x = self.norm(self.stem(image)).relu()
        x = x + self.body(x).relu()
        return self.head(x), x.mean((2, 3))


def make():
    torch.manual_seed(0)
    return Net().eval()


def patches():
    torch.manual_seed(0)
    return Net(4, 4, 0).eval()
"""
BYTES = (
    "--input-layout", "nhwc", "--input-dtype", "uint8", "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225",
)  # fmt: skip
SHAPES = ("--min-shapes", "image:1x3x16x16", "--max-shapes", "image:4x3x16x16")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    generator = np.random.default_rng(0)
    np.savez("bytes.npz", image=generator.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8))
    np.savez("floats.npz", image=generator.standard_normal((40, 3, 16, 16)).astype(np.float32))
    return tmp_path


def pytorch(image: np.ndarray) -> list[np.ndarray]:
    """The original model on normalised bytes."""
    import net  # type: ignore[import-not-found]

    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalised = ((image / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.no_grad():
        return [output.numpy() for output in net.make()(torch.from_numpy(normalised))]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_bundle_takes_the_decoder_s_bytes(
    precision: str, here: Path, gpuopt: Gpuopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("net:make", "-p", precision, *SHAPES, *BYTES, "--output-layout", "output_0=nhwc", "-c", "bytes.npz")
    result = gpuopt("compile", *asked, "-o", "out.gpuopt", "--json")
    assert result.code == 0, result.stderr
    report = json.loads(result.stdout)
    facts = next(stage["facts"] for stage in report["stages"] if stage["name"] == "layout")
    assert [(e["name"], e["dtype"], e["profiles"][0]["max"]) for e in facts["inputs"]] == [
        ("image", "uint8", "4x16x16x3")
    ]
    assert [entry["shape"] for entry in facts["outputs"]] == ["batchx16x16x5", "batchx16"]
    assert facts["transposes"]["inserted"] == 2
    assert facts["normalization"]["image"]["factor"] == "weights"
    assert facts["normalization"]["image"]["center"] == "Sub"
    assert 0 <= facts["largest_difference"] < 1e-5
    assert "Transposes: 2 inserted" in Path("out.gpuopt/report.md").read_text()
    record = json.loads(next(Path("out.gpuopt").glob("*.engine.json")).read_text())
    assert [(t["name"], t["dtype"], t["shape"]) for t in record["inputs"]] == [("image", "uint8", ["batch", 16, 16, 3])]
    again = gpuopt("verify", "out.gpuopt")
    assert again.code == 0, again.stderr
    monkeypatch.syspath_prepend(str(here))
    image = np.random.default_rng(7).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    with package.load("out.gpuopt", target="onnxruntime") as engine:
        found = engine.infer({"image": image})
    wanted = pytorch(image)
    least = {"fp32": 100, "fp16": 50, "int8": 20}[precision]
    for actual, expected in zip(found.values(), [wanted[0].transpose(0, 2, 3, 1), wanted[1]], strict=True):
        error = np.sum((actual - expected) ** 2)
        assert error == 0 or 10 * np.log10(np.sum(expected**2) / error) > least
    shown = gpuopt("inspect", "out.gpuopt")
    assert "uint8" in shown.stdout


def test_the_first_convolution_of_bytes_is_in_int8_and_centred(here: Path, gpuopt: Gpuopt) -> None:
    result = gpuopt("quantize", "net:make", *SHAPES, *BYTES, "-c", "bytes.npz", "-o", "out", "--json")
    assert result.code == 0, result.stderr
    ranges = json.loads(Path("out/calibration.ranges.json").read_text())
    (name,) = [name for name in ranges["tensors"] if name.startswith("image")]
    low, high = ranges["tensors"][name]["low"], ranges["tensors"][name]["high"]
    assert -125 < low < -100
    assert 130 < high < 152
    graph = onnx.load("out/engine.onnx").graph
    first = next(node for node in graph.node if node.op_type == "Conv")
    makers = {output: node for node in graph.node for output in node.output}
    assert [makers[name].op_type for name in first.input[:2]] == ["DequantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize(("precision", "center"), [("fp32", "bias"), ("int8", "Sub, bias")])
def test_what_pads_nothing_takes_the_centre_into_its_bias(
    precision: str, center: str, here: Path, gpuopt: Gpuopt
) -> None:
    asked = ("net:patches", "-p", precision, *SHAPES, *BYTES, "-c", "bytes.npz", "-t", "onnxruntime")
    result = gpuopt("compile", *asked, "-o", "out.gpuopt", "--json")
    assert result.code == 0, result.stderr
    facts = next(s["facts"] for s in json.loads(result.stdout)["stages"] if s["name"] == "layout")
    assert facts["normalization"]["image"]["center"] == center
    if precision == "int8":
        graph = onnx.load("out.gpuopt/model.onnx").graph
        first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
        scale = next(tensor for tensor in graph.initializer if tensor.name == first.input[1])
        assert onnx.numpy_helper.to_array(scale) == 1.0


def test_data_in_the_original_form_are_refused(here: Path, gpuopt: Gpuopt) -> None:
    result = gpuopt("compile", "net:make", *SHAPES, *BYTES, "-c", "floats.npz", "-o", "out.gpuopt")
    assert result.code == 4
    assert "in the original model's form" in result.stderr
    assert len(result.stderr.strip().splitlines()[-3:]) == 3
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output-layout", "nhwc"), "output 'output_1' is batchx16: only with 3 to 5 dimensions"),
        (("--input-layout", "picture=nhwc"), "'picture' is no input of the model"),
        (("--mean", "0.5"), "mean, std and scale are for bytes"),
        (("--input-layout", "nhcw"), "layout.input"),
        (("--input-dtype", "uint8", "--mean", "0.5,0.5"), "2 numbers, input 'image' has 3 channels"),
    ],
)
def test_what_cannot_be_is_a_mistake_of_usage(flags: tuple[str, ...], message: str, here: Path, gpuopt: Gpuopt) -> None:
    result = gpuopt("compile", "net:make", "-p", "fp32", *SHAPES, *flags, "-t", "onnxruntime", "-o", "out.gpuopt")
    assert result.code == 2, result.stderr
    assert message in result.stderr
    assert not Path("out.gpuopt").exists()


def save_photos(count: int) -> None:
    from PIL import Image

    Path("photos").mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        pixels = generator.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(f"photos/{index:02}.png")


def test_a_folder_of_images_calibrates_a_fixed_batch(here: Path, gpuopt: Gpuopt) -> None:
    save_photos(33)
    asked = ("compile", "net:make", "-p", "int8", "--input", "image:4x3x16x16", "-c", "photos", "-t", "onnxruntime")
    asked = (*asked, "--set", "calibrate.samples=4", "-o", "out.gpuopt", "--json")
    report = gpuopt(*asked).report()
    calibration = next(stage["facts"] for stage in report["stages"] if stage["name"] == "calibrate")
    assert "4 of 8 samples of 4 images (1 left over)" in calibration["data"]
    materials = json.loads(Path("out.gpuopt/manifest.json").read_text())["materials"]
    assert [material["files"] for material in materials if material["role"] == "calibration data"] == [16]
    # The last of the first sample's photos counts, the second sample is not read.
    for photo, is_read in (("03", True), ("06", False)):
        Path(f"photos/{photo}.png").write_bytes(Path("photos/32.png").read_bytes())
        cached = {stage["name"]: stage["cached"] for stage in gpuopt(*asked).report()["stages"]}
        assert cached["calibrate"] is not is_read


def test_an_open_graph_takes_single_images_whatever_it_is_compiled_for(here: Path, gpuopt: Gpuopt) -> None:
    save_photos(33)
    assert gpuopt("compile", "net:make", "-p", "fp32", *SHAPES, "-t", "onnxruntime", "-o", "open.gpuopt").code == 0
    asked = ("compile", "open.gpuopt/model.onnx", "-p", "int8", "--input", "image:4x3x16x16", "-c", "photos")
    asked = (*asked, "-t", "onnxruntime", "-o", "out.gpuopt", "--json")
    report = gpuopt(*asked).report()
    calibration = next(stage["facts"] for stage in report["stages"] if stage["name"] == "calibrate")
    assert "photos, 33 samples;" in calibration["data"]
    # The photo that fills no batch of four.
    Path("photos/32.png").write_bytes(Path("photos/31.png").read_bytes())
    assert not {stage["name"]: stage["cached"] for stage in gpuopt(*asked).report()["stages"]}["calibrate"]


def test_what_needs_no_images_takes_fewer_than_a_batch(here: Path, gpuopt: Gpuopt) -> None:
    save_photos(3)
    asked = ("compile", "net:make", "--input", "image:4x3x16x16", "-c", "photos", "-t", "onnxruntime", "--json")
    needless = gpuopt(*asked, "-p", "fp32", "-o", "out.gpuopt")
    assert needless.code == 0, needless.stderr
    materials = json.loads(Path("out.gpuopt/manifest.json").read_text())["materials"]
    assert [material["files"] for material in materials if material["role"] == "calibration data"] == [3]
    needed = gpuopt(*asked, "-p", "int8", "-o", "int8.gpuopt")
    assert needed.code == 4
    assert "photos holds 3 images, fewer than the 4 of the input's fixed batch" in needed.stderr


def test_the_largest_shape_alone_is_enough_for_images(here: Path, gpuopt: Gpuopt) -> None:
    save_photos(8)
    asked = ("compile", "net:make", "-p", "int8", "--max-shapes", "image:4x3x16x16", "-c", "photos")
    report = gpuopt(*asked, "-t", "onnxruntime", "-o", "out.gpuopt", "--json").report()
    (stated,) = next(stage["facts"] for stage in report["stages"] if stage["name"] == "export")["inputs"]
    assert stated["profiles"] == [{"min": "1x3x16x16", "opt": "4x3x16x16", "max": "4x3x16x16"}]
    assert any("comes from one calibration sample, 1x3x16x16" in warning for warning in report["warnings"])


def test_images_of_a_folder_are_bytes_and_the_scale_is_checked(here: Path, gpuopt: Gpuopt) -> None:
    save_photos(33)
    result = gpuopt("quantize", "net:make", *SHAPES, *BYTES, "-c", "photos", "-o", "out", "--json")
    assert result.code == 0, result.stderr
    document = json.loads(result.stdout)
    assert "bytes" in document["calibration"]["data"]
    assert "crop 16x16" in document["calibration"]["data"]
    assert not any("prepared as for ImageNet" in warning for warning in document["warnings"])


def test_a_change_of_layout_alone_gives_the_same_bits(here: Path, gpuopt: Gpuopt) -> None:
    asked = ("net:make", "-p", "fp32", *SHAPES, "--input-layout", "nhwc", "-t", "tensorrt-rtx", "--random-calibration")
    result = gpuopt("compile", *asked, "-o", "out.gpuopt", "--json")
    assert result.code == 0, result.stderr
    facts = next(s["facts"] for s in json.loads(result.stdout)["stages"] if s["name"] == "layout")
    assert facts["largest_difference"] == 0
    assert facts["normalization"] == {}


def test_formats_that_cannot_be_measured_stay_linear_and_auto(here: Path, gpuopt: Gpuopt) -> None:
    from gpuopt import environment

    if not environment.why_not_run("tensorrt-rtx"):
        pytest.skip("engines of TensorRT-RTX run here: formats are measured")
    asked = ("net:make", "-p", "fp16", *SHAPES, "--io-format", "auto", "-t", "tensorrt-rtx", "-o", "out.gpuopt")
    for command in (("compile", *asked), ("build", "out.gpuopt")):
        result = gpuopt(*command, "--json")
        assert result.code == 0, result.stderr
        race = json.loads(result.stdout)["format_race"]
        assert (race["chosen"], race["candidates"]) == ("linear", [])
        assert "nothing could be measured here" in race["verdict"]
        assert "io_formats: auto" in Path("out.gpuopt/recipe.yaml").read_text()
    assert "Nothing could be measured here" in Path("out.gpuopt/report.md").read_text()
    assert "Nothing could be measured here" in Path("out.gpuopt/report.html").read_text()


@pytest.mark.parametrize(
    ("bytes_in", "written"),
    [
        (False, "fp32:hwc"), (False, "fp32:chw32"), (False, "fp16:hwc8"), (False, "fp16:chw32"), (False, "fp16:hwc16"),
        (True, "uint8:chw"), (True, "uint8:hwc"),
    ],
)  # fmt: skip
def test_tensorrt_rtx_builds_every_format_of_an_image(bytes_in: bool, written: str, here: Path, gpuopt: Gpuopt) -> None:
    pytest.importorskip("tensorrt_rtx")
    dtype = ("--input-dtype", "uint8") if bytes_in else ()
    asked = ("net:make", "-p", "fp16", *SHAPES, *dtype, "--io-format", f"image={written}", "-t", "tensorrt-rtx")
    result = gpuopt("compile", *asked, "-o", "out.gpuopt", "--json")
    assert result.code == 0, result.stderr
    record = json.loads(next(Path("out.gpuopt").glob("*.engine.json")).read_text())
    wanted = {"fp32": "float32", "fp16": "float16", "uint8": "uint8"}[written.partition(":")[0]]
    assert record["inputs"][0]["dtype"] == wanted
    build = next(s for s in json.loads(result.stdout)["stages"] if s["name"] == "build")
    assert build["facts"]["options"]["io_formats"] == {"image": written}


def test_bytes_have_no_other_format(here: Path, gpuopt: Gpuopt) -> None:
    pytest.importorskip("tensorrt_rtx")
    asked = ("net:make", "-p", "fp16", *SHAPES, "--input-dtype", "uint8", "--io-format", "image=uint8:hwc8")
    result = gpuopt("compile", *asked, "-t", "tensorrt-rtx", "-o", "out.gpuopt")
    assert result.code == 7
    assert "an input or output cannot have the asked-for format" in result.stderr


def test_the_report_says_which_layout_onnxruntime_computes_in(here: Path, gpuopt: Gpuopt) -> None:
    result = gpuopt("compile", "net:make", "-p", "fp32", *SHAPES, *BYTES, "-c", "bytes.npz", "-t", "onnxruntime",
                    "-o", "out.gpuopt", "--json")  # fmt: skip
    assert result.code == 0, result.stderr
    (found,) = json.loads(result.stdout)["verification"]["layout_kernels"].values()
    # The convolutions over 16 channels, at least: ONNX Runtime's own blocks of channels, confirmed in its graph.
    assert found["nchwc"] >= 2
    assert found["nodes"] > found["nchwc"] + found["reorders"]
    for report in ("report.md", "report.html"):
        assert "work on blocks of channels (NCHWc)" in Path("out.gpuopt", report).read_text()


def test_baselines_of_a_bundle_that_takes_bytes(here: Path, gpuopt: Gpuopt) -> None:
    asked = ("net:make", "-p", "fp32", *SHAPES, *BYTES, "-c", "bytes.npz", "-t", "onnxruntime", "-o", "out.gpuopt")
    assert gpuopt("compile", *asked).code == 0
    only = ("--only", "baselines", "--baseline", "onnxruntime cpu", "--baseline", "torch eager")
    result = gpuopt("bench", "out.gpuopt", *only, "--seconds", "0.1", "--json")
    assert result.code == 0, result.stderr
    rows = [row for row in json.loads(result.stdout)["rows"] if not row["failed"]]
    names = [row["name"].rpartition(", ")[2] for row in rows[1:]]
    assert names == ["channels_last", "nchw"]


def test_a_wrong_scale_is_found_in_the_bytes(here: Path, gpuopt: Gpuopt) -> None:
    Path("trained.py").write_text("""
import numpy as np
import torch
from net import Net


def make():
    torch.manual_seed(0)
    model = Net().train()
    images = torch.from_numpy(np.load("bytes.npz")["image"].astype(np.float32) / 255).permute(0, 3, 1, 2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        for _ in range(60):
            model((images - mean[:, None, None]) / std[:, None, None])
    return model.eval()
""")
    said = {}
    for name, scale in (("right", "1/255"), ("wrong", "1")):
        asked = ("trained:make", *SHAPES, *BYTES, "--scale", scale, "-c", "bytes.npz", "-o", name, "--json")
        result = gpuopt("quantize", *asked)
        assert result.code == 0, result.stderr
        said[name] = [finding["check"] for finding in json.loads(result.stdout)["calibration"]["findings"]]
    assert "scale" not in said["right"]
    assert "scale" in said["wrong"]
