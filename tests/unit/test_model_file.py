"""What a model file is by its content, what is cut off, and what would run code when it is loaded."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from safetensors.torch import save_file
from torch.export.pt2_archive import constants

from gpuopt.errors import ModelError, StorageError
from gpuopt.model_file import ModelKind, detect, hazards

Export = torch.export


class Small(torch.nn.Module):
    """Takes a nested input, holds a parameter and a constant, and computes with its batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.register_buffer("offset", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"y": self.linear(x) + self.offset + more["k"], "z": x * (x.shape[0] * 2)}


class Sequential(torch.nn.Sequential):
    pass


ARGUMENTS: tuple[Any, ...] = (torch.ones(2, 4), {"k": torch.ones(2, 3)})
BATCH = Export.Dim("batch", min=1, max=8)


def small_onnx() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of model file, each under a suffix of another kind."""
    folder = tmp_path_factory.mktemp("models")
    plain = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()).eval()
    old: dict[str, Any] = {"_use_new_zipfile_serialization": False}
    torch.save(plain.state_dict(), folder / "state_dict.onnx")
    torch.save({"state_dict": plain.state_dict(), "epoch": 3}, folder / "checkpoint.zip")
    torch.save(plain.state_dict(), folder / "state_dict_old.json", **old)
    torch.save(plain.state_dict(), folder / "state_dict_protocol4.pt", pickle_protocol=4)
    torch.save(plain, folder / "module.safetensors")
    torch.save(plain, folder / "module_old.txt", **old)
    torch.save(Sequential(torch.nn.Linear(4, 3)), folder / "module_protocol4.pt", pickle_protocol=4)
    (folder / "module_plain.pkl").write_bytes(pickle.dumps(plain))
    torch.jit.trace(plain, torch.ones(2, 4)).save(str(folder / "script.pt2"))
    dynamic = Export.export(Small(), ARGUMENTS, dynamic_shapes=({0: BATCH}, {"k": {0: BATCH}}))
    Export.save(dynamic, folder / "program.pt2")
    shutil.move(folder / "program.pt2", folder / "program.textproto")
    Export.save(Export.export(plain, (torch.ones(2, 4),)), folder / "static.pt2")
    save_file(plain.state_dict(), folder / "weights.bin")
    (folder / "graph.json").write_bytes(small_onnx().SerializeToString())
    return folder


KINDS = {
    "state_dict.onnx": ModelKind.STATE_DICT,
    "checkpoint.zip": ModelKind.STATE_DICT,
    "state_dict_old.json": ModelKind.STATE_DICT,
    "state_dict_protocol4.pt": ModelKind.STATE_DICT,
    "module.safetensors": ModelKind.PICKLED_MODULE,
    "module_old.txt": ModelKind.PICKLED_MODULE,
    "module_protocol4.pt": ModelKind.PICKLED_MODULE,
    "module_plain.pkl": ModelKind.PICKLED_MODULE,
    "script.pt2": ModelKind.TORCHSCRIPT,
    "program.textproto": ModelKind.EXPORTED_PROGRAM,
    "static.pt2": ModelKind.EXPORTED_PROGRAM,
    "weights.bin": ModelKind.SAFETENSORS,
    "graph.json": ModelKind.ONNX,
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_the_kind_is_decided_by_content(folder: Path, name: str, kind: ModelKind) -> None:
    assert detect(folder / name) is kind


@pytest.mark.parametrize("name", [n for n, k in KINDS.items() if k is ModelKind.PICKLED_MODULE])
def test_a_pickled_module_names_the_code_it_would_run(folder: Path, name: str) -> None:
    found = hazards(folder / name, ModelKind.PICKLED_MODULE)
    assert "torch.nn.modules.linear.Linear" in found
    assert not any(global_name.startswith("torch._utils") for global_name in found)


@pytest.mark.parametrize("name", [n for n, k in KINDS.items() if k is not ModelKind.PICKLED_MODULE])
def test_other_kinds_are_without_hazards(folder: Path, name: str) -> None:
    assert hazards(folder / name, KINDS[name]) == []


# Where the cut lies in the raw weights behind torch's old pickles, only loading can tell.
_CUT_FINDS_NOTHING = {name: kind for name, kind in KINDS.items() if name in ("state_dict_old.json", "module_old.txt")}


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_truncated_file_is_a_model_error(folder: Path, name: str, data: st.DataObject) -> None:
    content = (folder / name).read_bytes()
    length = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, min(40, len(content) - 1))))
    path = folder / "truncated"
    path.write_bytes(content[:length])
    try:
        kind = detect(path)
    except ModelError:
        return
    assert kind is _CUT_FINDS_NOTHING.get(name)
    assert length > len(content) // 3
    with pytest.raises((RuntimeError, EOFError, ValueError, pickle.UnpicklingError)):
        torch.load(path, weights_only=kind is ModelKind.STATE_DICT)


@pytest.mark.parametrize("name", ["program.textproto", "static.pt2"])
def test_a_program_cut_behind_an_archive_inside_it_is_a_model_error(folder: Path, name: str) -> None:
    """The sample inputs are a zip of their own, and Python finds the last directory in a file."""
    content = (folder / name).read_bytes()
    ends = [match.end() + 18 for match in re.finditer(rb"PK\x05\x06", content)]
    assert len(ends) == 2
    (folder / "inner").write_bytes(content[: ends[0]])
    with pytest.raises(ModelError, match="truncated or damaged"):
        detect(folder / "inner")


@pytest.mark.parametrize("name", ["graph.json", "weights.bin"])
def test_no_cut_of_a_small_file_goes_unnoticed(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for length in range(len(content)):
        (folder / "cut").write_bytes(content[:length])
        with pytest.raises(ModelError):
            detect(folder / "cut")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damaged_bytes_are_a_kind_or_a_model_error(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(KINDS)))
    content = bytearray((folder / name).read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    path = folder / "damaged"
    path.write_bytes(content)
    try:
        kind = detect(path)
    except ModelError:
        return
    hazards(path, kind)


@pytest.mark.parametrize(
    "content",
    [
        b"not a model",
        b'{"model_type": "bert"}',
        b"\x80",
        b"\x80\x04",
        b"PK\x03\x04",
        b"\x7fELF" + bytes(200),
        bytes(100),
        struct.pack("<Q", 8) + b"{}      ",
        struct.pack("<Q", 9) + b'{"a": 1} ',
        struct.pack("<Q", 25) + b'{"a":{"data_offsets":[]}}',
        struct.pack("<Q", 33) + b'{"a":{"data_offsets":["x", "y"]}}',
        struct.pack("<Q", 5000) + b'{"a":' * 1000,
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".json", ".textproto", ".onnxtxt", ".safetensors"])
def test_what_is_no_model_is_a_model_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    if content.startswith(struct.pack("<Q", 8) + b"{}"):
        assert detect(path) is ModelKind.SAFETENSORS, "a file of no tensors is whole"
        return
    with pytest.raises(ModelError):
        detect(path)


def test_an_empty_file_and_other_zips_are_model_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ModelError, match="is empty"):
        detect(tmp_path / "empty")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(ModelError, match="of no kind that torch writes"):
        detect(tmp_path / "other.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_repacked_zip_is_read_and_its_damage_noticed(folder: Path, tmp_path: Path, method: int) -> None:
    path = tmp_path / "repacked"
    with zipfile.ZipFile(folder / "state_dict.onnx") as source, zipfile.ZipFile(path, "w", method) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert detect(path) is ModelKind.STATE_DICT
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    start = info.header_offset + 30 + len(info.filename)
    noticed = 0
    for position in range(start, start + info.compress_size, 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            detect(path)
        except ModelError:
            noticed += 1
    # LZMA's end mark holds no data: a change there is none.
    assert noticed >= info.compress_size // 7 - 2


def test_a_file_that_cannot_be_read_is_a_storage_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StorageError, match="cannot read"):
            detect(path)


# Exported programs -------------------------------------------------------------------------------


class Attack:
    """Unpickling it makes a file; every test looks whether it came to be."""

    def __init__(self, mark: Path) -> None:
        self.command = f"touch {mark}"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


Content = dict[str, bytes]


def unpacked(path: Path) -> Content:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def pack(path: Path, members: Content, root: str = "program/") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(root + name, content)
    return path


def in_model(change: Callable[[Any], None]) -> Callable[[Content, Path], None]:
    def apply(members: Content, mark: Path) -> None:
        model = json.loads(members["models/model.json"])
        change(model)
        members["models/model.json"] = json.dumps(model).replace("MARK", str(mark)).encode()

    return apply


def in_place_of(name: str, content: Callable[[Path], bytes]) -> Callable[[Content, Path], None]:
    def apply(members: Content, mark: Path) -> None:
        members[name] = content(mark)

    return apply


def saved(mark: Path, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save((Attack(mark),), stream, **options)
    return stream.getvalue()


def hidden_by_memo(mark: Path) -> bytes:
    """A pickle that fetches `os.system` from its memo behind the names of a harmless function."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    decoys = text("torch._utils") + b"0" + text("_rebuild_tensor_v2") + b"0"
    names = text("os") + b"\x940" + text("system") + b"\x940"
    data = b"\x80\x04" + names + decoys + b"h\x00h\x01\x93" + text(f"touch {mark}") + b"\x85R."
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3")
    return stream.getvalue()


def opaque_object(members: Content, mark: Path) -> None:
    name = "data/constants/model_constants_config.json"
    members[name] = members[name].replace(b"tensor_0", b"opaque_obj_0")
    del members["data/constants/tensor_0"]
    data = pickle.dumps(Attack(mark))
    # A whole number of float32, as the configuration says; unpickling stops before the padding.
    members["data/constants/opaque_obj_0"] = data + bytes(-len(data) % 4)


def pickled_weight(members: Content, mark: Path) -> None:
    name = "data/weights/model_weights_config.json"
    members[name] = members[name].replace(b'"use_pickle": false', b'"use_pickle": true')
    members["data/weights/weight_0"] = saved(mark)


def first_node(**changes: Any) -> Callable[[Any], None]:
    return lambda model: model["graph_module"]["graph"]["nodes"][1].update(changes)


def renamed(old: str, new: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        text = json.dumps(model).replace(json.dumps(old), json.dumps(new))
        model.clear()
        model.update(json.loads(text))

    return change


def set_size(expression: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = expression

    return change


def set_context(context: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        spec = json.loads(signature["out_spec"])
        spec[1]["context"] = context if isinstance(context, dict) else json.dumps(context)
        signature["out_spec"] = json.dumps(spec)

    return change


WIDE = "".join(chr(ord(letter) + 0xFEE0) if letter.isalpha() else letter for letter in "eval(chr(1))")
"""In letters of double width, which Python reads as the plain ones."""

RUN = "__import__('os').system('touch MARK')"
ATTACKS: dict[str, tuple[str, Callable[[Content, Path], None]]] = {
    "sample inputs": ("posix.system", in_place_of("data/sample_inputs/model.pt", saved)),
    "sample inputs, protocol 4": (
        "posix.system",
        in_place_of("data/sample_inputs/model.pt", lambda mark: saved(mark, pickle_protocol=4)),
    ),
    "sample inputs, old format": (
        "a pickle of an old format",
        in_place_of("data/sample_inputs/model.pt", lambda m: saved(m, _use_new_zipfile_serialization=False)),
    ),
    "sample inputs, plain pickle": (
        "a pickle of an old format",
        in_place_of("data/sample_inputs/model.pt", lambda mark: pickle.dumps(Attack(mark))),
    ),
    "names behind decoys": ("os.system", in_place_of("data/sample_inputs/model.pt", hidden_by_memo)),
    "legacy weights": ("posix.system", in_place_of("data/weights/model.pt", saved)),
    "pickled weight": ("pickled content", pickled_weight),
    "opaque object": ("opaque_obj_0", opaque_object),
    "call of torch.load": ("a call of torch.load", in_model(first_node(target="torch.load"))),
    "call of os.system": ("a call of os.system", in_model(first_node(target="os.system"))),
    "load_library": ("a call of", in_model(first_node(target="torch.ops.load_library.__call__"))),
    "globals": ("a call of", in_model(first_node(target="torch.ops.aten.add.__init__.__globals__.get"))),
    "operator.call": ("a call of", in_model(first_node(target="_operator.call"))),
    "methodcaller": ("a call of", in_model(first_node(target="_operator.methodcaller"))),
    "call without inputs": (
        "a call of os.system",
        in_model(lambda m: m["graph_module"]["graph"]["nodes"].append({"target": "os.system"})),
    ),
    "size": ("the expression", in_model(set_size(RUN))),
    "size in other letters": ("the expression", in_model(set_size(WIDE))),
    "size with an attribute": ("the expression", in_model(set_size("s0.__class__"))),
    "guard": ("the condition", in_model(lambda m: m.update(guards_code=[RUN]))),
    "guard of lambdas": ("the condition", in_model(lambda m: m.update(guards_code=["(lambda: 1)()"]))),
    "guard of two lines": ("the condition", in_model(lambda m: m.update(guards_code=["1)\n  print(2"]))),
    "guard of attributes": (
        "the condition",
        in_model(lambda m: m.update(guards_code=["L['x'].size.__globals__ == 1"])),
    ),
    "guard of torch": ("the condition", in_model(lambda m: m.update(guards_code=["torch.load('x') == 1"]))),
    "name of an input": ("the text", in_model(renamed("x", f"x={RUN}"))),
    "name of an argument": ("the text", in_model(renamed("self", f"self={RUN}"))),
    "key of an output": ("the text", in_model(set_context(["y", f'z", {RUN}) #']))),
    "enum in an output": (
        "an import",
        in_model(set_context(["y", {"__enum__": True, "fqn": "antigravity:x", "name": "y"}])),
    ),
    "factory in an output": (
        "an import",
        in_model(
            set_context({"default_factory_module": "os", "default_factory_name": "x", "dict_context": ["y", "z"]})
        ),
    ),
    "compiled code": ("unknown content", in_place_of("data/aotinductor/model/x.so", lambda _: b"\x7fELF")),
    "description under another suffix": (
        "a call of os.system",
        lambda members, mark: (
            in_model(first_node(target="os.system"))(members, mark),
            members.update({"models/model.jsoN": members.pop("models/model.json")}),
        )[-1],
    ),
    "sample inputs under another case": (
        "unknown content",
        lambda members, mark: (
            members.pop("data/sample_inputs/model.pt"),
            members.update({"data/sample_inputs/model.PT": saved(mark)}),
        )[-1],
    ),
    "second member that differs by case": (
        "two members of one name",
        lambda members, mark: members.update({"data/sample_inputs/MODEL.pt": saved(mark)}),
    ),
    "old program format": (
        "posix.system",
        lambda members, mark: members.update({"serialized_constants.pt": saved(mark)}),
    ),
    "deep nesting": ("cannot be checked", in_place_of("models/model.json", lambda _: b"[" * 100000)),
    "other encoding": (
        "cannot be checked",
        lambda members, mark: members.update(
            {"models/model.json": members["models/model.json"].decode().encode("utf-16")}
        ),
    ),
}


@pytest.mark.parametrize(("said", "attack"), ATTACKS.values(), ids=ATTACKS)
def test_a_program_that_would_run_code_is_reported_and_nothing_runs(
    folder: Path, tmp_path: Path, said: str, attack: Callable[[Content, Path], None]
) -> None:
    members = unpacked(folder / "program.textproto")
    mark = tmp_path / "mark"
    attack(members, mark)
    path = pack(tmp_path / "attack.pt2", members)
    assert detect(path) is ModelKind.EXPORTED_PROGRAM
    found = hazards(path, ModelKind.EXPORTED_PROGRAM)
    assert any(said in hazard for hazard in found), found
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("name", ["sample inputs, old format", "names behind decoys", "opaque object", "guard"])
def test_torch_itself_runs_what_is_reported(folder: Path, tmp_path: Path, name: str) -> None:
    """That the attacks above are real: each of these runs when torch loads or opens the program."""
    members = unpacked(folder / "program.textproto")
    if name == "guard" and b'"guards_code"' not in members["models/model.json"]:
        pytest.skip("this torch stores no conditions")
    if name == "opaque object" and not hasattr(constants, "OPAQUE_OBJ_FILENAME_PREFIX"):
        pytest.skip("this torch stores no opaque objects")
    mark = tmp_path / "mark"
    ATTACKS[name][1](members, mark)
    path = pack(tmp_path / "attack.pt2", members)
    failure = ""
    try:
        with path.open("rb") as stream:
            Export.load(stream).module()(*ARGUMENTS)
    except Exception as error:
        failure = repr(error)
    assert mark.exists(), failure


def test_a_program_repacked_without_change_has_no_hazards(folder: Path, tmp_path: Path) -> None:
    path = pack(tmp_path / "clean.pt2", unpacked(folder / "program.textproto"))
    assert hazards(path, ModelKind.EXPORTED_PROGRAM) == []


def test_a_zip_that_torch_would_read_differently_is_reported(folder: Path, tmp_path: Path) -> None:
    """Python takes a shifted directory for bytes before the archive; torch goes to where it is said to lie."""
    whole = (folder / "program.textproto").read_bytes()
    path = tmp_path / "shifted.pt2"
    for content in (whole[:4] + whole, whole + b"more", whole[:-2] + struct.pack("<H", 4) + b"more"):
        path.write_bytes(content)
        assert hazards(path, ModelKind.EXPORTED_PROGRAM)
    members = unpacked(folder / "program.textproto")
    plain = pack(path, members).read_bytes()
    assert hazards(path, ModelKind.EXPORTED_PROGRAM) == []
    path.write_bytes(plain[:40] + plain)
    assert hazards(path, ModelKind.EXPORTED_PROGRAM) == ["a zip archive of unusual layout"]


def test_a_member_whose_name_python_cuts_short_is_reported(folder: Path, tmp_path: Path) -> None:
    members = unpacked(folder / "program.textproto")
    members["byteorderXmodels"] = b"little"
    del members["byteorder"]
    path = pack(tmp_path / "named.pt2", members)
    path.write_bytes(path.read_bytes().replace(b"byteorderXmodels", b"byteorder\0models"))
    assert hazards(path, ModelKind.EXPORTED_PROGRAM) == ["a member with a disguised name"]


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(30, 16)
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embed(ids)).mean(1)


class Branch(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


class Halves(torch.nn.Module):
    """Sizes that are expressions, conditions on them, and an operator with a text argument."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = x.shape[1] // 2
        flat = x[:, :half].reshape(x.shape[0] * half)
        return torch.einsum("i,i->i", flat, flat), torch.nn.functional.pad(x, (0, half)), x[:, half:]


class Image(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear")


AUTO = Export.Dim.AUTO
DYNAMIC = Export.Dim.DYNAMIC
SEQUENCE = Export.Dim("sequence", min=1, max=64)
CLEAN: dict[str, tuple[Callable[[], torch.nn.Module], torch.Tensor, Any]] = {
    "encoder": (Encoder, torch.zeros(2, 5, dtype=torch.long), {0: BATCH, 1: SEQUENCE}),
    "control flow": (Branch, torch.ones(2, 3), None),
    "expressions": (Halves, torch.ones(2, 6), {0: AUTO, 1: AUTO}),
    "image": (Image, torch.ones(2, 3, 16, 16), {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}),
}


@pytest.mark.parametrize(("make", "example", "shapes"), CLEAN.values(), ids=CLEAN)
def test_a_clean_program_has_no_hazards(
    tmp_path: Path, make: Callable[[], torch.nn.Module], example: torch.Tensor, shapes: Any
) -> None:
    program = Export.export(make().eval(), (example,), dynamic_shapes=(shapes,) if shapes else None)
    Export.save(program, tmp_path / "clean.pt2")
    assert hazards(tmp_path / "clean.pt2", ModelKind.EXPORTED_PROGRAM) == []


def test_the_checks_need_no_torch() -> None:
    """The module says so of itself; a machine without torch must be able to say what a file is."""
    source = Path(importlib.import_module("gpuopt.model_file").__file__ or "").read_text()
    assert "import torch" not in source
