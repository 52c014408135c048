"""Whether something loads here: all reasons against it, found without loading anything."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuopt import environment
from gpuopt.environment import Gpu
from gpuopt.inspection import runtime_limits
from gpuopt.inspection.loading import of_engine, of_graph
from gpuopt.inspection.model import FileFacts
from tests.unit.inspection.bundles import ENGINE, record

Machine = Callable[..., None]
FITS = FileFacts(name=ENGINE, size_bytes=record().size_bytes, sha256=record().sha256)
H100 = Gpu("NVIDIA H100", "9.0", "13.0")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    def make(
        *gpus: Gpu, version: str = "8.5.3.1", modules: tuple[str, ...] = ("tensorrt", "tensorrt_rtx", "pycuda")
    ) -> None:
        monkeypatch.setattr(environment, "has_module", lambda name: name in modules)
        monkeypatch.setattr(environment, "gpus", lambda: list(gpus))
        monkeypatch.setattr(environment, "stated_library_version", lambda target: version)

    return make


def test_an_engine_loads_where_everything_fits(machine: Machine) -> None:
    machine(H100)
    found = of_engine(FITS, record(), "")
    assert (found.verdict, found.reasons, found.needs) == ("yes", (), ())


def test_every_reason_is_told_and_not_the_first_alone(machine: Machine) -> None:
    machine(Gpu("NVIDIA L4", "8.9", "12.4"), version="10.3.0", modules=("tensorrt",))
    cut = FITS.model_copy(update={"size_bytes": 3})
    found = of_engine(cut, record(), "")
    assert found.verdict == "no"
    said = " | ".join(found.reasons)
    for reason in (
        "has 3 bytes, its record says 64",
        "was built with TensorRT 8.5.3.1, 10.3.0 is installed",
        "was built for compute capability 9.0, NVIDIA L4 has 8.9",
        "was built with a driver for CUDA 13.0, the one here is for CUDA 12.4",
        "pycuda is not installed: pip install",
    ):
        assert reason in said
    assert len(found.reasons) == 5


def test_a_changed_file_and_an_rtx_engine_on_an_unfit_gpu(machine: Machine) -> None:
    machine(H100, version="1.7.0")
    changed = FITS.model_copy(update={"sha256": "0" * 64})
    rtx = record(target="tensorrt-rtx", library_version="1.7.0", compute_capabilities=())
    reasons = of_engine(changed, rtx, "").reasons
    assert reasons[0].startswith(f"{ENGINE} was changed: SHA-256 000000000000...")
    assert reasons[1].startswith("TensorRT-RTX does not run on NVIDIA H100")


def test_a_machine_with_nothing(machine: Machine) -> None:
    machine(modules=(), version="")
    reasons = of_engine(FITS, record(), "").reasons
    assert reasons[0].startswith("the library of tensorrt, 8.5.3.1, is not installed: pip install tensorrt")
    assert "there is no NVIDIA GPU here, or no driver" in reasons


def test_no_record_is_unknown(machine: Machine) -> None:
    machine(H100)
    found = of_engine(FITS, None, "no record")
    assert (found.verdict, found.reasons) == ("unknown", ("no record",))


def test_a_version_that_nothing_states_is_unknown_unless_something_else_speaks_against_it(machine: Machine) -> None:
    machine(H100, version="")
    found = of_engine(FITS, record(), "")
    assert found.verdict == "unknown"
    assert found.reasons == ("which version of tensorrt is installed is not known unless it is loaded",)
    machine(version="")
    assert of_engine(FITS, record(), "").verdict == "no"


def test_what_has_to_be_named_is_told(machine: Machine) -> None:
    machine(H100)
    needs = of_engine(FITS, record(plugins=("liba.so",), version_compatible=True), "").needs
    assert needs[0].startswith("--plugin FOLDER/liba.so")
    assert needs[1].startswith("--allow-host-code")


def test_graphs_need_onnx_runtime_and_their_operators(machine: Machine) -> None:
    gemm = ("", "Gemm", 20)
    machine(modules=())
    assert of_graph(10, {"": 20}, [gemm]).verdict == "no"
    machine(modules=("onnxruntime",))
    assert of_graph(10, {"": 20, "com.microsoft": 1}, [gemm, ("com.microsoft", "FusedConv", 1)]).verdict == "yes"
    found = of_graph(10, {"": 20, "my.domain": 1}, [gemm, ("my.domain", "Own", 1)])
    assert found.verdict == "unknown"
    assert "my.domain" in found.reasons[0]


def test_what_is_known_of_a_release_depends_on_its_version(machine: Machine) -> None:
    known = {}
    for version in ("1.22.0", "1.31.1", "1.32.0", "2.0.0", ""):
        machine(modules=("onnxruntime",), version=version)
        known[version] = of_graph(11, {"": 20}, []).verdict
    assert known == {"1.22.0": "unknown", "1.31.1": "yes", "1.32.0": "yes", "2.0.0": "yes", "": "unknown"}


def test_the_operators_that_onnx_runtime_is_said_to_have_are_those_that_it_has() -> None:
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    has = {(schema.domain, schema.name) for schema in state.get_all_operator_schema()}
    assert {("com.microsoft", name) for name in runtime_limits._MICROSOFT.split()} <= has
    beside = f"{runtime_limits._BESIDE_ONNX} {runtime_limits._BESIDE_ONNX_AT_TIMES}"
    assert {("", name) for name in beside.split()} <= has


def test_the_version_is_read_from_the_source_where_no_distribution_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "__init__.py"
    source.write_text('import nothing_that_exists\n\n__version__ = "8.5.3.1"\n')
    spec = importlib.util.spec_from_file_location("tensorrt", source)
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == "tensorrt" else find(name, *a))
    monkeypatch.setattr(environment, "version_of", lambda package: None)
    assert environment.stated_library_version("tensorrt") == "8.5.3.1"
    source.write_text("from .bindings import __version__\n")
    assert environment.stated_library_version("tensorrt") == ""
