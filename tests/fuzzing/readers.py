"""Every reader of bytes that gpuopt did not write, each with files that it takes, to be damaged."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpuopt import worker
from tests.fuzzing.mutation import evil_pickle


@dataclass(frozen=True)
class Surface:
    """A reader and what it reads.

    Attributes:
        file: name of the damaged file inside the folder.
        seeds: given a folder for anything needed beside it, the undamaged files.
        read: reads the file at a path as gpuopt does.
        torch: whether the reader needs torch, whose import takes seconds.
        is_python: whether most of the reader is gpuopt's own Python, so that its coverage tells something.
        most_bytes: how much memory reading one file may take. docs/hostile-files-and-faults.md states these limits.
    """

    name: str
    file: str
    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path], object]
    torch: bool = False
    is_python: bool = False
    most_bytes: int = 512 << 20


# --- models ------------------------------------------------------------------------------------


def _archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _safetensors() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


def _model_seeds(folder: Path) -> list[bytes]:
    program = {
        "graph_module": {"graph": {"nodes": [{"target": "torch.ops.aten.relu.default", "metadata": {"a": "b"}}]}},
        "range_constraints": {"s0": {"min_val": 0, "max_val": 8}},
        "guards_code": ["L['x'].size()[0] <= 8"],
        "sym": {"expr_str": "Symbol('s0', integer=True)"},
        "in_spec": json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": []}]),
    }
    return [
        _archive({"a/constants.pkl": pickle.dumps(()), "a/data.pkl": pickle.dumps({}), "a/code/x.py": b"x = 1\n"}),
        _archive({"a/archive_format": b"pt2", "a/models/model.json": json.dumps(program).encode(), "a/version": b"0"}),
        _archive({"a/data.pkl": pickle.dumps({"w": [1]}), "a/data/0": bytes(64)}),
        _archive({"a/data.pkl": evil_pickle()}),
        evil_pickle(),
        pickle.dumps({"w": 1.0}, protocol=2),
        _safetensors(),
        *_graph_seeds(folder),
    ]


def _read_model(path: Path) -> None:
    from gpuopt import model_file
    from gpuopt.quantization.existing import file_holds_quantization

    kind = model_file.detect(path)
    model_file.hazards(path, kind)
    file_holds_quantization(path, kind)
    model_file.files_of(path)


def _torch_seeds(folder: Path) -> list[bytes]:
    from tests.integration import small

    kinds = ("torchscript", "exported program", "pickled module", "state dict", "safetensors")
    return [small.save(kind, folder / "seed").read_bytes() for kind in kinds]


def _load_model(path: Path) -> None:
    from gpuopt import torch_model
    from gpuopt.model_file import ModelKind, detect
    from gpuopt.recipe import ModelSection

    kind = detect(path)
    if kind is ModelKind.ONNX:
        return
    weights = kind in (ModelKind.STATE_DICT, ModelKind.SAFETENSORS)
    factory = "tests.integration.small:small_net" if weights else None
    with _as_in_the_worker("export"):
        torch_model.load(ModelSection(path=str(path), factory=factory), kind)


def _graph_seeds(folder: Path) -> list[bytes]:
    import onnx
    from onnx import TensorProto, helper

    from tests.unit.quantization.graphs import depthwise_block

    (folder / "folder").mkdir(exist_ok=True)
    (folder / "data.bin").write_bytes(bytes(64))
    if not (folder / "link").is_symlink():
        (folder / "link").symlink_to("/etc/passwd")
    outside = depthwise_block()
    tensor = outside.graph.initializer[0]
    size = len(tensor.raw_data)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    for key, value in (("location", "data.bin"), ("offset", "0"), ("length", str(size))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])], "b", [], [helper.make_empty_tensor_value_info("b")]
    )
    control = helper.make_model(
        helper.make_graph(
            [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
            "g",
            [
                helper.make_tensor_value_info("c", TensorProto.BOOL, []),
                helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]),
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    models: list[onnx.ModelProto] = [depthwise_block(), outside, control]
    return [model.SerializeToString() for model in models]


def _read_graph(path: Path) -> None:
    from gpuopt import onnx_model
    from gpuopt.inspection import command

    model = onnx_model.load_untrusted(path)
    onnx_model.input_specs(model)
    onnx_model.output_specs(model)
    onnx_model.node_names_made_unique(model)
    command.inspect(path)


def _adopt_graph(path: Path) -> None:
    """The export stage on an ONNX file, ONNX Runtime included."""
    import shutil

    from gpuopt.artifact import Artifact
    from gpuopt.progress import Silent
    from gpuopt.recipe import resolve
    from gpuopt.stages import export
    from gpuopt.stages.context import StageContext

    output = path.parent / "output"
    shutil.rmtree(output, ignore_errors=True)
    (output / "samples").mkdir(parents=True)
    np.savez(output / "samples/samples.npz")
    recipe = resolve({"model": {"path": str(path)}, "precision": "fp32"})
    artifacts = {"samples": Artifact("samples", output / "samples", "")}
    with _as_in_the_worker("export"):
        export.run(StageContext(recipe=recipe, artifacts=artifacts, output=output, progress=Silent()))


@contextlib.contextmanager
def _as_in_the_worker(stage: str) -> Iterator[None]:
    """Errors as the worker hands them out: memory that the machine does not have is one that it knows."""
    try:
        yield
    except Exception as error:
        raise worker._failure(stage, error) from error


# --- recipes, ranges, records, reports -----------------------------------------------------------


def _recipe_seeds(folder: Path) -> list[bytes]:
    root = Path(__file__).parent.parent.parent
    return [path.read_bytes() for path in sorted((root / "recipes").glob("*.yaml"))] + [
        b"model:\n  path: a.pt\ninputs:\n  x: {min: 1x3, opt: 2x3, max: 4x3, dtype: float32}\n"
        b"profiles:\n- x: {shape: 1}\n"
    ]


def _read_recipe(path: Path) -> None:
    from gpuopt.recipe import load, parse_setting, resolve

    recipe = resolve(load(path))
    recipe.to_yaml()
    recipe.extra_profiles()
    parse_setting("a=" + path.read_text(errors="replace")[:2000])


def _sweep_seeds(folder: Path) -> list[bytes]:
    return [
        b"version: 1\noutput: out\nmodels:\n  a: {model: {path: a.onnx}, inputs: {x: {shape: 1x3x8x8}}}\n"
        b"  b: {model: {path: b.pt}, inputs: {ids: {min: 1x8, opt: 2x8, max: 4x8, dtype: int64}}}\n"
        b"precisions: [int8, fp16]\n"
        b"targets: [onnxruntime, {target: tensorrt-rtx, name: ada, gpu: L4, build: {refit: true}}]\n"
        b"batches: [1, 8]\nrecipe: {verify: {batch_invariance: false}}\nexclude: [{model: a, batch: 8}]\nmemory: 2GiB\n"
    ]


def _read_sweep(path: Path) -> None:
    from gpuopt.sweep import command, plan

    found = plan.combinations(plan.read(path))
    command.describe(found, as_json=True)
    for one in found[:4]:
        command._key(one, {})


def _range_seeds(folder: Path) -> list[bytes]:
    tensors = {f"t{index}": {"low": -1.5, "high": 2.0, "method": "minmax"} for index in range(5)}
    return [
        json.dumps({"version": 1, "method": "minmax", "data": "npz", "tensors": tensors}, indent=1).encode(),
        b"TRT-8503-EntropyCalibration2\nimage: 3c010a14\nconv/out: 3d000000\n(Unnamed Layer* 1) [Conv]: 3f800000\n",
    ]


def _read_ranges(path: Path) -> None:
    from gpuopt.calibration import ranges, reuse

    found = ranges.read(path)
    reuse.match(found, ["t0", "image"], {"t0", "t1", "image"})


def _record_seeds(folder: Path) -> list[bytes]:
    from tests.unit.inspection.bundles import PLAN, record

    (folder / "model.tensorrt.engine").write_bytes(PLAN)
    return [record().model_dump_json(indent=2).encode()]


def _read_record(path: Path) -> None:
    from gpuopt import engine_record
    from gpuopt.inspection import command

    engine = path.with_name("model.tensorrt.engine")
    command.inspect(engine)
    record = engine_record.read(engine)
    record.shape_profiles()


def _report_seeds(folder: Path) -> list[bytes]:
    from tests.unit.comparing import samples
    from tests.unit.report import examples

    (folder / "old.json").write_text(samples.report().model_dump_json())
    return [samples.report().model_dump_json().encode(), examples.release().model_dump_json().encode()]


def _compare(path: Path) -> None:
    from gpuopt.comparing import command, page, render

    given = {"--max-p50-regress": "5%"}
    for old, new in ((path.with_name("old.json"), path), (path, path)):
        answer = command.compare(old, new, given, ["all"], ["gpuopt"])
        command.document(answer.comparison)
        render.terminal(answer.comparison)
        render.markdown(answer.comparison)
        page.page(answer.comparison)


# --- bundles -------------------------------------------------------------------------------------

_MEMBERS = ("report.json", "reference/reference.json", "reference/profile0-min.npz", "recipe.yaml", "model.onnx",
            "model.tensorrt.engine.json")  # fmt: skip


def _bundle_seeds(folder: Path) -> list[bytes]:
    from tests.unit.inspection import bundles

    bundles.make(folder / "model.gpuopt")
    return [(folder / "model.gpuopt/manifest.json").read_bytes()]


def _open_bundle(folder: Path) -> None:
    """Everything that reads a bundle without running it; a refusal by one is no reason to leave out the next."""
    from gpuopt import bundle, engine_record, reference
    from gpuopt.comparing import load as reports
    from gpuopt.errors import GpuoptError
    from gpuopt.inspection import command, integrity, render
    from gpuopt.recipe import load, resolve

    def stored() -> None:
        found = reference.load(folder / "reference")
        for corner in found.corners:
            found.feed(corner)
            found.expected(corner)

    def inspected() -> None:
        found = command.inspect(folder)
        found.model_dump_json()
        render.inspection(found)

    steps: tuple[Callable[[], object], ...] = (
        lambda: bundle.open_bundle(folder),
        lambda: integrity.check(folder),
        inspected,
        lambda: reports.load(folder),
        stored,
        lambda: resolve(load(folder / "recipe.yaml")),
        lambda: engine_record.read(folder / "model.tensorrt.engine"),
        lambda: bundle.check_destination(folder),
    )
    for step in steps:
        try:
            step()
        except GpuoptError as error:
            if type(error) is GpuoptError:
                raise


def _member(name: str) -> Surface:
    """A file of a bundle whose manifest was made to fit: whoever damages the file can do that."""

    def seeds(folder: Path) -> list[bytes]:
        _bundle_seeds(folder)
        return [(folder / "model.gpuopt" / name).read_bytes()]

    def read(path: Path) -> None:
        folder = path.parents[name.count("/")]
        manifest = json.loads((folder / "manifest.json").read_bytes())
        from gpuopt.storage import sha256_file

        manifest["files"][name] = sha256_file(path)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        _open_bundle(folder)

    return Surface(f"bundle: {name}", f"model.gpuopt/{name}", seeds, read)


def _verify_seeds(folder: Path) -> list[bytes]:
    _bundle_seeds(folder)
    return _graph_seeds(folder)


def _verify(path: Path) -> None:
    """`gpuopt verify` of a bundle with another graph: ONNX Runtime opens it, and runs it if it can."""
    from gpuopt.compile import verify_bundle
    from gpuopt.progress import Silent
    from gpuopt.storage import sha256_file

    manifest = json.loads((path.parent / "manifest.json").read_bytes())
    manifest["files"]["model.onnx"] = sha256_file(path)
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    verify_bundle(path.parent, Silent(), ["gpuopt"])


# --- calibration data ------------------------------------------------------------------------------


def _array(shape: tuple[int, ...] = (3, 3, 4, 4), dtype: Any = np.float32, fortran: bool = False) -> bytes:
    stream = io.BytesIO()
    values = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    np.save(stream, np.asfortranarray(values) if fortran else values)
    return stream.getvalue()


def _pickled_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return stream.getvalue()


def _data_seeds(folder: Path) -> list[bytes]:
    import base64

    encoded = {"array": base64.b64encode(_array((1, 3, 4, 4))).decode(), "polygraphy_class": "ndarray"}
    return [
        _array(),
        _array(fortran=True),
        _pickled_array(),
        _archive({"x.npy": _array()}),
        _archive({"x.npy": _array()}, zipfile.ZIP_DEFLATED),
        json.dumps([{"x": encoded}, {"x": encoded}]).encode(),
    ]


def _read_data(path: Path) -> None:
    from gpuopt.calibration.readers import open_reader
    from gpuopt.errors import GpuoptError
    from gpuopt.shapes import TensorSpec

    for inputs in ([TensorSpec("x", "float32", ("batch", 3, 4, 4))], []):
        try:
            reader = open_reader(str(path), inputs, None, 8)
            reader.files()
            for _ in reader:
                pass
        except GpuoptError as error:
            if type(error) is GpuoptError:
                raise


def _image_seeds(folder: Path) -> list[bytes]:
    from PIL import Image

    found = []
    for kind in ("PNG", "JPEG", "BMP", "WEBP"):
        stream = io.BytesIO()
        Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)).save(stream, kind)
        found.append(stream.getvalue())
    return found


def _read_images(path: Path) -> None:
    from gpuopt.calibration.readers import ImageOptions, open_reader

    for _ in open_reader(str(path.parent), [], ImageOptions(resize=16, crop=8), 4):
        pass


def _label_seeds(folder: Path) -> list[bytes]:
    return [_array((8,), np.int64), _pickled_array()]


def _read_labels(path: Path) -> None:
    from gpuopt.quantization import evaluation

    evaluation._read_labels(str(path), None)


# --- what lies in the cache ------------------------------------------------------------------------


def _entry_seeds(folder: Path) -> list[bytes]:
    from gpuopt.cache import Cache

    cache = Cache(folder / "cache")
    with cache.scratch() as scratch:
        staged = scratch / "result"
        (staged / "onnx").mkdir(parents=True)
        (staged / "onnx/model.onnx").write_bytes(b"graph")
        cache.store({"stage": "x"}, staged, {"facts": {"a": [1]}, "warnings": ["w"], "seconds": 1.5})
    (path,) = (folder / "cache/entries").glob("*/entry.json")
    (folder / "entry.json").write_bytes(path.read_bytes())
    (folder / "entry-path").write_text(str(path))
    return [path.read_bytes()]


def _look_up(path: Path) -> None:
    from gpuopt.cache import Cache

    place = Path((path.parent / "entry-path").read_text())
    (place.parent / "onnx").mkdir(parents=True, exist_ok=True)
    (place.parent / "onnx/model.onnx").write_bytes(b"graph")
    place.write_bytes(path.read_bytes())
    entry = Cache(path.parent / "cache").lookup({"stage": "x"})
    if entry is not None:
        # What is believed has to be of the kinds that the runner takes it for.
        assert [text.strip() for text in entry.warnings] == ["w"]
        assert (dict(entry.facts), round(entry.seconds, 3)) == ({"a": [1]}, 1.5)


SURFACES: tuple[Surface, ...] = (
    Surface("model file", "model.pt", _model_seeds, _read_model, is_python=True),
    Surface("model, loaded by torch", "model.pt", _torch_seeds, _load_model, torch=True, most_bytes=1 << 30),
    Surface("ONNX", "model.onnx", _graph_seeds, _read_graph),
    Surface("ONNX, export stage", "model.onnx", _graph_seeds, _adopt_graph, most_bytes=10 << 30),
    Surface("recipe", "recipe.yaml", _recipe_seeds, _read_recipe, is_python=True),
    Surface("calibration data", "calibration.data", _data_seeds, _read_data, is_python=True),
    Surface("calibration images", "images/a.png", _image_seeds, _read_images),
    Surface("labels", "labels.npy", _label_seeds, _read_labels),
    Surface("ranges and TensorRT's calibration caches", "ranges.json", _range_seeds, _read_ranges, is_python=True),
    Surface("engine record", "model.tensorrt.engine.json", _record_seeds, _read_record, is_python=True),
    Surface("reports, compare", "new.json", _report_seeds, _compare),
    Surface(
        "bundle: manifest.json",
        "model.gpuopt/manifest.json",
        _bundle_seeds,
        lambda p: _open_bundle(p.parent),
        is_python=True,
    ),
    *map(_member, _MEMBERS),
    Surface("bundle: verified", "model.gpuopt/model.onnx", _verify_seeds, _verify, most_bytes=10 << 30),
    Surface("sweep", "sweep.yaml", _sweep_seeds, _read_sweep, is_python=True),
    Surface("cache entry", "entry.json", _entry_seeds, _look_up),
)


def surface(name: str) -> Surface:
    """The surface of that name."""
    return next(one for one in SURFACES if one.name == name)


def prepare(chosen: Surface, folder: Path) -> tuple[Path, list[bytes]]:
    """Make the folder that the surface reads in; gives the place of the damaged file, and the seeds.

    The current folder becomes that folder, so that relative paths end there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    seeds = chosen.seeds(folder)
    path = folder / chosen.file
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, seeds
