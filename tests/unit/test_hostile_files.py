"""Files that the fuzzing found to end in something else than a message: each with the message that it has now."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gpuopt import bundle, onnx_model, reference
from gpuopt.calibration.readers import ImageOptions, open_reader
from gpuopt.comparing import command as comparing
from gpuopt.errors import DataError, GpuoptError, ModelError, StorageError, UsageError
from gpuopt.quantization import evaluation
from gpuopt.reference import make_feed
from gpuopt.shapes import Corner, TensorSpec
from tests.unit.comparing import samples
from tests.unit.inspection import bundles
from tests.unit.quantization.graphs import depthwise_block


def external(**entries: object) -> onnx.ModelProto:
    """A model whose first weight lies outside of the file, as these entries say."""
    model = depthwise_block()
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return model


def of_unknown_type(kind: int) -> onnx.ModelProto:
    model = depthwise_block()
    model.graph.input[0].type.tensor_type.elem_type = kind
    return model


def without_inputs() -> onnx.ModelProto:
    model = depthwise_block()
    del model.graph.node[0].input[:]
    return model


def loop_with_the_bodies_of_a_branch() -> onnx.ModelProto:
    """onnx 1.23 reserves room for a number of values that is negative."""
    body = helper.make_graph([], "b", [], [])
    node = helper.make_node("Loop", ["c"], ["y"], then_branch=body, else_branch=body)
    values = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("c", "y")]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


GRAPHS: dict[str, tuple[onnx.ModelProto, str]] = {
    "a name that is too long": (external(location="a" * 5000), "cannot be read"),
    "a folder for data": (external(location="folder"), "is missing"),
    "a device": (external(location="/dev/zero"), "leaves the model's folder"),
    "a folder above": (external(location="../data.bin"), "leaves the model's folder"),
    "a link out of it": (external(location="link"), "leaves the model's folder"),
    "an offset beyond the end": (external(location="data.bin", offset=2**62), "cannot be read"),
    "a length beyond the end": (external(location="data.bin", length=2**62), "cannot be read"),
    "no number as an offset": (external(location="data.bin", offset="x"), "cannot be read"),
    "an input of no type": (of_unknown_type(0), "is of the type UNDEFINED"),
    "an input of type 99": (of_unknown_type(99), "is of the type number 99"),
    "a node without inputs": (without_inputs(), "contradict each other"),
    "a loop with a branch's bodies": (loop_with_the_bodies_of_a_branch(), "contradict each other"),
}


@pytest.mark.parametrize(("model", "message"), GRAPHS.values(), ids=GRAPHS)
def test_graphs(model: onnx.ModelProto, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "data.bin").write_bytes(bytes(64))
    (tmp_path / "link").symlink_to("/etc/hostname")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    onnx_model.external_files(path)
    with pytest.raises(ModelError, match=message) as caught:
        onnx_model.input_specs(onnx_model.with_types(onnx_model.load_untrusted(path)))
    assert len(caught.value.lines()) < 1000


def test_inputs_that_no_memory_holds_are_refused_before_they_are_made() -> None:
    corner = Corner("max", {"x": (1 << 20, 1 << 20)})
    with pytest.raises(UsageError, match=r"4096\.0 GiB: x 1048576x1048576"):
        make_feed(corner, [TensorSpec("x", "float32", ("a", "b"))], [], {}, 0)


def test_safetensors_that_declare_what_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="reading safetensors needs it")
    from gpuopt import torch_model
    from gpuopt.model_file import ModelKind, detect
    from gpuopt.recipe import ModelSection

    for entry in (
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]},
        {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]},
    ):
        header = json.dumps({"a": entry}).encode()
        (tmp_path / "model").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
        assert detect(tmp_path / "model") is ModelKind.SAFETENSORS
        settings = ModelSection(path=str(tmp_path / "model"), factory="tests.integration.small:small_net")
        with pytest.raises(ModelError, match="damaged safetensors"):
            torch_model.load(settings, ModelKind.SAFETENSORS)


def test_an_archive_of_torch_that_is_a_bomb(tmp_path: Path) -> None:
    from gpuopt.model_file import ModelKind, detect

    for size, code in (("small", bytes(1 << 20)), ("bomb", bytes(65 << 20))):
        with zipfile.ZipFile(tmp_path / size, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/constants.pkl", b"\x80\x02).")
            archive.writestr("a/code/a.py", code)
    assert detect(tmp_path / "small") is ModelKind.TORCHSCRIPT
    with pytest.raises(ModelError, match="it unpacks to 65 MiB"):
        detect(tmp_path / "bomb")


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


HEADERS = {
    "a size that is a truth value": "{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }",
    "a size with a fraction": "{'descr': '<f4', 'fortran_order': False, 'shape': (1.5,), }",
    "more than there is": "{'descr': '<f4', 'fortran_order': False, 'shape': (2**40,), }",
    "a product beyond 64 bits": "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }",
    "a size of thousands of digits": "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 3000 + ",), }",
    "half a literal": "(" * 5000,
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_of_npy(header: str, tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    path.write_bytes(npy(header, bytes(64)))
    with pytest.raises(DataError):
        list(open_reader(str(path), [TensorSpec("x", "float32", ("n", 4))], None, 4))
    with pytest.raises(DataError, match="cannot be read"):
        evaluation._read_labels(str(path), None)


def test_labels_in_an_archive_are_read_and_a_bomb_is_not(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "data.npz", labels=np.arange(5))
    assert evaluation._read_labels("labels", str(tmp_path / "data.npz")).tolist() == [0, 1, 2, 3, 4]
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (9,), }", bytes(1 << 20)))
    assert evaluation._read_labels("labels", str(tmp_path / "bomb.npz")).shape == (9,)
    with pytest.raises(DataError, match="cannot be read"):
        evaluation._read_labels("none", str(tmp_path / "data.npz"))


def test_an_image_of_more_pixels_than_a_photo_has(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="images need Pillow")
    stream = io.BytesIO()
    image.new("1", (10_000, 9_000)).save(stream, "PNG")
    assert len(stream.getvalue()) < 100_000
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    with pytest.raises(DataError, match="declares 10000x9000 pixels"):
        list(open_reader(str(tmp_path), [], ImageOptions(resize=16, crop=8), 1))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def test_a_report_whose_figures_have_other_types(tmp_path: Path) -> None:
    for name in ("old.json", "new.json"):
        (tmp_path / name).write_text(samples.report().model_dump_json())

    def numbers_for_names(report: Any) -> None:
        for row in report["verification"]["outputs"]:
            row["output"] = row["corner"] = row["graph"] = [1]

    edit(tmp_path / "new.json", numbers_for_names)
    with pytest.raises(GpuoptError) as caught:
        comparing.compare(tmp_path / "old.json", tmp_path / "new.json", {}, ["all"], ["gpuopt"])
    assert type(caught.value) is not GpuoptError


def test_a_manifest_whose_files_are_pairs(tmp_path: Path) -> None:
    folder = bundles.make(tmp_path / "model.gpuopt")
    edit(folder / "manifest.json", lambda manifest: manifest.update(files=list(manifest["files"].items())))
    with pytest.raises(StorageError, match="cannot be read: its files are no mapping"):
        bundle.open_bundle(folder)


@pytest.mark.parametrize("name", ["../../secret", "a/b", "", "x" * 200, 7, None])
def test_a_corner_is_a_file_in_its_folder(name: object, tmp_path: Path) -> None:
    folder = bundles.make(tmp_path / "model.gpuopt")
    edit(folder / "reference/reference.json", lambda document: document["corners"][0].update(name=name))
    with pytest.raises(StorageError, match="a corner called"):
        reference.load(folder / "reference")


def test_reference_arrays_that_are_missing_damaged_or_a_bomb(tmp_path: Path) -> None:
    folder = bundles.make(tmp_path / "model.gpuopt") / "reference"
    stored = reference.load(folder)
    corner = stored.corners[0]
    path = folder / f"{corner.name}.npz"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    for content in (whole[:100], whole[:-30], b"", b"PK", packed.getvalue(), whole.replace(b"NUMPY", b"NUMPX")):
        path.write_bytes(content)
        with pytest.raises(StorageError, match="cannot be read"):
            stored.feed(corner)
    path.unlink()
    with pytest.raises(StorageError, match="cannot be read"):
        stored.expected(corner)
    path.write_bytes(whole)
    assert set(stored.feed(corner)) == {"x"}


def test_a_document_nested_without_end(tmp_path: Path) -> None:
    folder = bundles.make(tmp_path / "model.gpuopt")
    deep = b"[" * 200_000
    for name in ("reference/reference.json", "manifest.json", "report.json"):
        (folder / name).write_bytes(deep)
    with pytest.raises(StorageError):
        reference.load(folder / "reference")
    with pytest.raises(StorageError):
        bundle.open_bundle(folder)
    with pytest.raises(StorageError, match="no report of this gpuopt"):
        comparing.compare(folder / "report.json", folder / "report.json", {}, [], [])


def test_a_document_beyond_any_size(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(StorageError, match="more than 64 MiB"):
        bundle.read_manifest(tmp_path)
    path.rename(tmp_path / "report.json")
    with pytest.raises(StorageError, match="more than 64 MiB"):
        comparing.compare(tmp_path / "report.json", tmp_path / "report.json", {}, [], [])


def test_commands_on_a_bundle_whose_report_or_recipe_is_none(tmp_path: Path) -> None:
    from gpuopt.cache import Cache
    from gpuopt.compile import verify_bundle
    from gpuopt.progress import Silent
    from gpuopt.rebuild import build_bundle

    pytest.importorskip("onnxruntime", reason="verifying needs it")

    def without_engine(files: Path) -> None:
        (files / bundles.ENGINE).unlink()
        (files / f"{bundles.ENGINE}.json").unlink()

    def no_report(files: Path) -> None:
        without_engine(files)
        (files / "report.json").write_text("[]")

    def no_build(files: Path) -> None:
        without_engine(files)
        (files / "recipe.yaml").write_text("model: {path: a.onnx}\nbuild: 7\n")

    for change, kind in ((no_report, StorageError), (no_build, UsageError)):
        folder = bundles.make(tmp_path / "model.gpuopt", change=change)
        with pytest.raises(kind):
            build_bundle(folder, "tensorrt-rtx", [], Cache(tmp_path / "cache"), Silent(), [])
        with pytest.raises(kind):
            verify_bundle(folder, Silent(), [])
