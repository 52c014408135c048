"""Situations in which a compiler might hand out something wrong that looks right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tests.conftest import Gpuopt, Run
from tests.integration import small

ROOT = Path(__file__).parent.parent.parent
HERE = "tests.integration.test_traps"


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, *, values: Tensor) -> Tensor:
        return self.layer(values)


class Branch(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values * 2 if values.sum() > 0 else values * 3


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.words(ids) * mask.unsqueeze(-1)


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 1)

    def forward(self, values: Tensor) -> Tensor:
        return self.layer(values).sum()


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, values: Tensor) -> Tensor:
        return torch.cond(values.sum() > 0, lambda x: self.one(x), lambda x: self.other(x), (values,))


class Untraceable(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise RuntimeError("no exporter, please")
        return values * 2


class Products(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return torch.einsum("BHID, BHJD -> BHIJ", values, values)


class Text(nn.Module):
    def forward(self, values: Tensor) -> dict[str, object]:
        return {"values": values, "unit": "metres"}


def keyword_only() -> nn.Module:
    return KeywordOnly()


def branch() -> nn.Module:
    return Branch()


def conditional() -> nn.Module:
    return Conditional()


def untraceable() -> nn.Module:
    return Untraceable()


def products() -> nn.Module:
    return Products()


def pair() -> nn.Module:
    return Pair()


def text() -> nn.Module:
    return Text()


def dropout() -> nn.Module:
    class Stubborn(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return nn.functional.dropout(values, 0.5, training=True)

    return Stubborn()


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU())


def product_with(value: float) -> onnx.ModelProto:
    """A graph that multiplies with a 64x64 weight full of one value."""
    weight = numpy_helper.from_array(np.full((64, 64), value, np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 64])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def compiled(gpuopt: Gpuopt, *arguments: object, cwd: Path = ROOT) -> Run:
    return gpuopt("compile", *arguments, "-t", "onnxruntime", "--json", cwd=cwd)


def export_cached(result: Run) -> bool:
    assert result.code == 0, result.stderr
    return next(bool(s["cached"]) for s in result.report()["stages"] if s["name"] == "export")


def test_equal_names_in_two_folders_are_two_models(gpuopt: Gpuopt, tmp_path: Path) -> None:
    for folder, size in (("a", 16), ("b", 48)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mymodel.py").write_text(
            f"from torch import nn\ndef make():\n    return nn.Linear(8, {size})\n"
        )
        result = compiled(gpuopt, "mymodel:make", "-p", "fp32", "-i", "input:2x8", cwd=tmp_path / folder)
        assert result.code == 0, result.stderr
        assert result.report()["verification"]["outputs"][0]["shape"] == [2, size]


def test_a_factory_in_a_program_that_ends_is_an_error_of_the_model(gpuopt: Gpuopt, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--epochs'])\n")
    result = compiled(gpuopt, "train:make", "-p", "fp32", "-i", "input:2x8", cwd=tmp_path)
    assert result.code == 3
    assert "the factory train:make fails: SystemExit: 2" in result.report()["error"]["message"]


def test_a_file_s_name_for_a_module_is_told_unless_a_module_has_it(gpuopt: Gpuopt, tmp_path: Path) -> None:
    made = "from torch import nn\ndef make():\n    return nn.Linear(8, 4)\n"
    (tmp_path / "net.py").write_text(made)
    asked = ("net.py:make", "-p", "fp32", "-i", "input:2x8")
    refused = compiled(gpuopt, *asked, cwd=tmp_path)
    assert refused.code == 3
    assert "net.py is a file's name; the module is called net" in refused.report()["error"]["message"]
    (tmp_path / "net.py").unlink()
    (tmp_path / "net").mkdir()
    (tmp_path / "net/py.py").write_text(made)
    assert compiled(gpuopt, *asked, cwd=tmp_path).code == 0


def test_weights_that_a_factory_reads_are_part_of_the_key(gpuopt: Gpuopt, tmp_path: Path) -> None:
    (tmp_path / "fac.py").write_text(
        "import torch\ndef make():\n    m = torch.nn.Linear(8, 4)\n"
        "    m.load_state_dict(torch.load('w.pth'))\n    return m\n"
    )
    arguments = ("fac:make", "-p", "fp32", "-i", "input:2x8")
    torch.save(nn.Linear(8, 4).state_dict(), tmp_path / "w.pth")
    assert export_cached(compiled(gpuopt, *arguments, cwd=tmp_path)) is False
    assert export_cached(compiled(gpuopt, *arguments, cwd=tmp_path)) is True
    torch.save(nn.Linear(8, 4).state_dict(), tmp_path / "w.pth")
    assert export_cached(compiled(gpuopt, *arguments, cwd=tmp_path)) is False


def test_code_that_changes_while_it_is_exported_is_not_believed(gpuopt: Gpuopt, tmp_path: Path) -> None:
    (tmp_path / "fac.py").write_text(
        "import pathlib, torch\n"
        "def make():\n"
        "    text = pathlib.Path(__file__).read_text()\n"
        "    pathlib.Path(__file__).write_text(text.replace('Linear(8, 4)', 'Linear(8, 6)'))\n"
        "    return torch.nn.Linear(8, 4)\n"
    )
    arguments = ("fac:make", "-p", "fp32", "-i", "input:2x8")
    first = compiled(gpuopt, *arguments, cwd=tmp_path)
    assert any("fac.py changed while it was used" in line for line in first.report()["warnings"])
    second = compiled(gpuopt, *arguments, cwd=tmp_path)
    assert export_cached(second) is False
    assert second.report()["verification"]["outputs"][0]["shape"] == [2, 6]


def test_the_code_of_a_trusted_pickle_is_part_of_the_key(gpuopt: Gpuopt, tmp_path: Path) -> None:
    code = "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return x * {}\n"
    (tmp_path / "net.py").write_text(code.format(1))
    script = "import torch, net; torch.save(net.Net(), 'model.pt')"
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    arguments = ("model.pt", "--trust-pickle", "-p", "fp32", "-i", "x:2x8")
    assert export_cached(compiled(gpuopt, *arguments, cwd=tmp_path)) is False
    assert export_cached(compiled(gpuopt, *arguments, cwd=tmp_path)) is True
    (tmp_path / "net.py").write_text(code.format(100))
    assert export_cached(compiled(gpuopt, *arguments, cwd=tmp_path)) is False


def test_external_data_is_part_of_the_key_and_stays_in_its_folder(gpuopt: Gpuopt, tmp_path: Path) -> None:
    def write(scale: float) -> None:
        model = product_with(scale)
        (tmp_path / "weights.bin").unlink(missing_ok=True)
        onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)

    write(1.0)
    arguments = (tmp_path / "model.onnx", "-p", "fp32")
    assert export_cached(compiled(gpuopt, *arguments)) is False
    assert export_cached(compiled(gpuopt, *arguments)) is True
    write(3.0)
    assert export_cached(compiled(gpuopt, *arguments)) is False
    write(5.0)
    (tmp_path / "inner").mkdir()
    (tmp_path / "model.onnx").rename(tmp_path / "inner/model.onnx")
    (tmp_path / "inner/weights.bin").symlink_to(tmp_path / "weights.bin")
    result = compiled(gpuopt, tmp_path / "inner/model.onnx", "-p", "fp32")
    assert result.code == 3
    assert "leaves the model's folder" in result.report()["error"]["message"]


def test_a_python_file_beside_the_model_is_not_run(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("exported program", tmp_path / "model.pt")
    for name in ("google", "random", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("from pathlib import Path\nPath('it-ran').touch()\n")
    import subprocess
    import sys

    program = Path(sys.executable).with_name("gpuopt")
    if not program.exists():
        pytest.skip("gpuopt is not installed as a program here, and 'python -m' itself puts the folder first")
    command = [str(program), "compile", str(model), "-p", "fp32", "-t", "onnxruntime"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "it-ran").exists()


def test_keyword_only_inputs(gpuopt: Gpuopt, tmp_path: Path) -> None:
    shapes = ("--min-shapes", "values:1x8", "--max-shapes", "values:4x8")
    result = compiled(gpuopt, f"{HERE}:keyword_only", "-p", "fp32", *shapes, "-o", tmp_path / "b")
    assert result.code == 0, result.stderr


def test_inputs_are_bound_by_name_never_by_the_order_of_flags(gpuopt: Gpuopt, tmp_path: Path) -> None:
    arguments = (f"{HERE}:pair", "-p", "fp32", "-o", tmp_path / "b", "-i", "mask:1x8:int64")
    swapped = compiled(gpuopt, *arguments, "-i", "ids:1x8:int64")
    assert swapped.code == 0, swapped.stderr
    model = onnx.load(str(tmp_path / "b/model.onnx"))
    gather = next(node for node in model.graph.node if node.op_type == "Gather")
    assert gather.input[1] == "ids"
    wrong = compiled(gpuopt, *arguments, "-i", "idz:1x8:int64")
    assert wrong.code == 2
    assert "Did you mean 'ids'?" in wrong.stderr


def test_a_branch_on_data_is_refused_with_its_line_unless_one_path_is_asked_for(gpuopt: Gpuopt, tmp_path: Path) -> None:
    arguments = (f"{HERE}:branch", "-p", "fp32", "-i", "values:2x8", "-o", tmp_path / "b")
    refused = compiled(gpuopt, *arguments)
    assert refused.code == 5
    assert "data-dependent branch" in refused.stderr
    assert "test_traps.py, line " in refused.stderr
    assert "torch.cond" in refused.stderr
    result = compiled(gpuopt, *arguments, "--set", "export.exporters=torchscript")
    assert result.code == 0, result.stderr
    report = result.report()
    assert any("made a constant of what depends on data" in warning for warning in report["warnings"])


def test_torch_cond_is_taken_and_int8_says_that_nothing_is_left_to_quantize(gpuopt: Gpuopt, tmp_path: Path) -> None:
    arguments = (f"{HERE}:conditional", "-i", "values:2x16", "-o", tmp_path / "b")
    result = compiled(gpuopt, *arguments, "-p", "fp32")
    assert result.code == 0, result.stderr
    assert "If" in {node.op_type for node in onnx.load(str(tmp_path / "b/model.onnx")).graph.node}
    refused = compiled(gpuopt, *arguments, "-p", "int8", "--random-calibration")
    assert refused.code == 6
    assert "inside If" in refused.stderr
    assert "torch.cond" in refused.stderr


def test_a_wrong_scale_is_no_pass(tmp_path: Path) -> None:
    from gpuopt.comparison import compare
    from gpuopt.stages.verify import LIMITS
    from gpuopt.tolerance import problem

    wanted = np.array([[3.0]], np.float32)
    assert "SQNR" in problem(compare(wanted * 2, wanted), LIMITS["int8"])
    assert problem(compare(wanted * 1.01, wanted), LIMITS["int8"]) == ""


def test_random_layers_at_work_are_refused(gpuopt: Gpuopt, tmp_path: Path) -> None:
    result = compiled(gpuopt, f"{HERE}:dropout", "-p", "fp32", "-i", "values:2x64", "-o", tmp_path / "b")
    assert result.code == 3
    assert ".eval()" in result.stderr


def test_what_is_no_tensor_cannot_be_an_output(gpuopt: Gpuopt, tmp_path: Path) -> None:
    result = compiled(gpuopt, f"{HERE}:text", "-p", "fp32", "-i", "values:2x8", "-o", tmp_path / "b")
    assert result.code == 3
    assert "forward returns str" in result.stderr


def test_nothing_to_quantize_is_a_quantization_error(gpuopt: Gpuopt, tmp_path: Path) -> None:
    arguments = (f"{HERE}:tiny", "-i", "input:2x8", "--random-calibration", "-o", tmp_path / "b")
    result = compiled(gpuopt, *arguments)
    assert result.code == 6
    assert "no node can be quantized" in result.stderr


def weights_of(path: Path) -> dict[tuple[int, ...], bytes]:
    """INT8 weights by shape."""
    tensors = onnx.load(str(path)).graph.initializer
    return {tuple(t.dims): numpy_helper.to_array(t).tobytes() for t in tensors if t.data_type == TensorProto.INT8}


def test_a_quantized_graph_is_not_quantized_again(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("exported program", tmp_path / "model.pt")
    small.save_data(tmp_path / "calibration.npz")
    assert compiled(gpuopt, model).code == 0
    again = compiled(
        gpuopt,
        tmp_path / "model.gpuopt/model.onnx",
        "-o",
        tmp_path / "again",
        "--random-calibration",
        "--max-shapes",
        "image:8x3x16x16",
        "--min-shapes",
        "image:1x3x16x16",
    )
    assert again.code == 0, again.stderr
    facts = {stage["name"]: stage["facts"] for stage in again.report()["stages"]}
    assert facts["calibrate"] == {"quantized_before": True}
    assert facts["quantize"]["repaired"] == []
    assert weights_of(tmp_path / "again/model.onnx") == weights_of(tmp_path / "model.gpuopt/model.onnx")


def test_the_output_cannot_be_the_current_folder(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("exported program", tmp_path / "model.pt")
    (tmp_path / "empty").mkdir()
    result = compiled(gpuopt, model, "-p", "fp32", "-o", ".", cwd=tmp_path / "empty")
    assert result.code == 2
    assert (tmp_path / "empty").is_dir()


def test_files_of_the_user_in_our_folders_stay(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("exported program", tmp_path / "model.pt")
    failed = tmp_path / "model.gpuopt.failed"
    failed.mkdir()
    (failed / "thesis.txt").write_text("years")
    assert compiled(gpuopt, model, "-p", "fp32").code == 0
    assert (failed / "thesis.txt").read_text() == "years"
    (tmp_path / "model.gpuopt/NOTES.txt").write_text("mine")
    assert compiled(gpuopt, model, "-p", "fp32").code == 2
    assert (tmp_path / "model.gpuopt/NOTES.txt").read_text() == "mine"


def test_random_calibration_ignores_the_data_beside_the_model(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("exported program", tmp_path / "model.pt")
    (tmp_path / "calibration.npz").write_text("not an archive")
    result = compiled(gpuopt, model, "--random-calibration", "--calibration-samples", 4)
    assert result.code == 0, result.stderr


def test_an_inner_folder_that_is_renamed_is_other_data(gpuopt: Gpuopt, tmp_path: Path) -> None:
    from gpuopt.cache import Cache
    from gpuopt.pipeline import Runner
    from gpuopt.progress import Silent
    from gpuopt.recipe import resolve

    folder = tmp_path / "calibration"
    for name in ("idz", "mask"):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "0.npy", np.zeros((1, 4), np.int64))
    tree = {"model": {"factory": "a:b"}, "calibrate": {"data": str(folder)}}
    runner = Runner(resolve(tree), Cache(tmp_path / "cache"), Silent(), "run")
    before = runner._data_fingerprint(str(folder), 512, 1)
    (folder / "idz").rename(folder / "ids")
    assert runner._data_fingerprint(str(folder), 512, 1) not in (None, before)


def test_a_large_graph_keeps_its_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpuopt import onnx_model

    model = product_with(1.0)
    # 2 GiB of weights do not fit a test; the limit is what makes the difference.
    monkeypatch.setattr(onnx_model, "_MAX_PROTOBUF_BYTES", 1000)
    for kind, data in (("onnx", "model.onnx.data"), ("engine_onnx", "engine.onnx.data")):
        path = onnx_model.save(model, tmp_path / kind)
        assert {p.name for p in path.parent.iterdir()} == {"model.onnx", data}
        assert numpy_helper.to_array(model.graph.initializer[0]).sum() == 64 * 64
        assert numpy_helper.to_array(onnx_model.load(path.parent).graph.initializer[0]).sum() == 64 * 64


def test_a_program_in_training_mode_is_refused(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    program = torch.export.export(model, (torch.randn(4, 3, 8, 8),))
    with (tmp_path / "model.pt").open("wb") as stream:
        torch.export.save(program, stream)
    result = compiled(gpuopt, tmp_path / "model.pt", "-p", "fp32")
    assert result.code == 3
    assert "Call .eval()" in result.stderr


def test_shapes_that_are_left_out_are_the_program_s_own(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("exported program", tmp_path / "model.pt")
    result = compiled(gpuopt, model, "-p", "fp32", "--opt-shapes", "image:4x3x16x16")
    assert result.code == 0, result.stderr
    (entry,) = result.report()["stages"][1]["facts"]["inputs"]
    assert entry["profiles"] == [{"min": "1x3x16x16", "opt": "4x3x16x16", "max": "8x3x16x16"}]


def test_a_shape_taken_from_one_sample_is_told(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("state dict", tmp_path / "model.pt")
    small.save_data(tmp_path / "calibration.npz")
    result = compiled(gpuopt, model, "--model", "tests.integration.small:small_net", "-p", "fp32")
    assert result.code == 0, result.stderr
    assert any("1x3x16x16, and no other" in warning for warning in result.report()["warnings"])


def test_a_failed_export_names_the_line_of_the_model(gpuopt: Gpuopt, tmp_path: Path) -> None:
    result = compiled(gpuopt, f"{HERE}:untraceable", "-p", "fp32", "-i", "values:2x8", "-o", tmp_path / "b")
    assert result.code == 5
    assert "raise RuntimeError" in result.stderr
    assert "test_traps.py, line " in result.stderr
    kept = json.loads((tmp_path / "b.failed/failure/failure.json").read_text())
    assert (kept["stage"], kept["graph"]) == ("export", None)
    log = (tmp_path / "b.failed/failure/log.txt").read_text()
    assert "dynamo:" in log
    assert "torchscript:" in log
    assert "in forward" in log


def test_an_einsum_in_capitals_is_built(gpuopt: Gpuopt, tmp_path: Path) -> None:
    arguments = (f"{HERE}:products", "-p", "fp16", "-t", "tensorrt-rtx", "-i", "values:2x4x8x16", "-o", tmp_path / "b")
    result = gpuopt("compile", *arguments, cwd=ROOT)
    assert result.code == 0, result.stderr


def test_labels_of_an_equation_stay_apart_when_they_are_lowered() -> None:
    from gpuopt.onnx_model import einsum_labels_lowered

    node = onnx.helper.make_node("Einsum", ["a", "b"], ["c"], equation="B...aA,bA->B...ab")
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    einsum_labels_lowered(model)
    left, right, result = model.graph.node[0].attribute[0].s.decode().replace("->", ",").split(",")
    assert left.islower()
    b, a, big_a = left[0], left[-2], left[-1]
    assert len({b, a, big_a, right[0]}) == 4
    assert (right[1], result) == (big_a, f"{b}...{a}{right[0]}")
