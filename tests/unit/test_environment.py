"""What this machine has, and what each target still needs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from gpuopt import environment
from gpuopt.environment import Gpu
from gpuopt.errors import RequirementError

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Make the machine one with these modules and this number of GPUs."""

    def make(*modules: str, gpus: int = 0) -> None:
        monkeypatch.setattr(environment, "has_module", lambda name: name in modules)
        monkeypatch.setattr(environment, "gpus", lambda: [Gpu("RTX", "8.9")] * gpus)

    return make


@pytest.mark.parametrize(
    ("modules", "gpus", "targets"),
    [
        (("onnxruntime", "tensorrt_rtx", "tensorrt"), 1, ("tensorrt", "onnxruntime")),
        (("onnxruntime", "tensorrt_rtx", "tensorrt"), 0, ("tensorrt-rtx", "onnxruntime")),
        (("onnxruntime", "tensorrt_rtx"), 1, ("tensorrt-rtx", "onnxruntime")),
        (("onnxruntime", "tensorrt"), 0, ("onnxruntime",)),
        (("onnxruntime",), 1, ("onnxruntime",)),
        ((), 0, ("onnxruntime",)),
    ],
)
def test_the_default_targets_follow_packages_and_gpu(
    machine: Machine, modules: tuple[str, ...], gpus: int, targets: tuple[str, ...]
) -> None:
    machine(*modules, gpus=gpus)
    assert environment.default_targets() == targets


def test_a_target_without_its_package_is_refused_with_the_command(machine: Machine) -> None:
    machine("onnxruntime")
    environment.check_targets(["onnxruntime"])
    with pytest.raises(
        RequirementError, match=r"tensorrt-rtx cannot be built here: .*pip install tensorrt-rtx-cu13"
    ) as e:
        environment.check_targets(["onnxruntime", "tensorrt-rtx"])
    assert e.value.hint == "Targets that can: onnxruntime."
    with pytest.raises(RequirementError) as e:
        environment.check_targets(["tensorrt-rtx"], instead=("tensorrt", "tensorrt-rtx"))
    assert e.value.hint == "Targets that can: none."


def test_tensorrt_needs_package_and_gpu(machine: Machine) -> None:
    machine("tensorrt")
    (state,) = [s for s in environment.target_states() if s.target == "tensorrt"]
    assert (state.ready, len(state.needs)) == (False, 1)
    assert "NVIDIA GPU" in state.needs[0]
    with pytest.raises(RequirementError, match="NVIDIA GPU") as caught:
        environment.check_targets(["tensorrt"])
    assert caught.value.hint == "Targets that can: none."
    machine("tensorrt", gpus=1)
    environment.check_targets(["tensorrt"])


def test_a_state_is_ready_exactly_if_nothing_is_needed(machine: Machine) -> None:
    for gpus in (0, 1):
        machine("onnxruntime", gpus=gpus)
        for state in environment.target_states():
            assert state.ready == (not state.needs)
            assert state.note


def test_require_names_the_package_and_its_command(machine: Machine) -> None:
    machine("onnxruntime")
    environment.require("onnxruntime", "verifying")
    with pytest.raises(RequirementError, match="reading images needs the Python package 'PIL'") as caught:
        environment.require("PIL", "reading images")
    assert "pip install pillow" in caught.value.hint
    with pytest.raises(RequirementError) as caught:
        environment.require("other_package", "this")
    assert "pip install other_package" in caught.value.hint


def test_a_module_is_found_without_importing_it() -> None:
    assert environment.has_module("numpy")
    sys.modules.pop("antigravity", None)
    assert environment.has_module("antigravity")
    assert "antigravity" not in sys.modules
    assert not environment.has_module("no_such_module")
    assert not environment.has_module("no_such_module.below")


def test_a_module_in_a_strange_state_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    strange = importlib.util.module_from_spec(ModuleSpec("strange", None))
    strange.__spec__ = None
    monkeypatch.setitem(sys.modules, "strange", strange)
    assert not environment.has_module("strange")


def test_versions_are_those_of_the_distributions() -> None:
    import numpy

    assert environment.version_of("numpy") == numpy.__version__
    assert environment.version_of("no-such-package") is None


def test_the_description_is_json_and_holds_installed_packages_only() -> None:
    found: Any = environment.describe()
    assert json.loads(json.dumps(found)) == found
    assert all(found["packages"].values())
    assert {"numpy", "onnx", "pydantic"} <= found["packages"].keys()
    assert found["python"] == sys.version.split()[0]


def test_every_requirement_has_an_install_command() -> None:
    for module in (*environment.EXPORT_PACKAGES, "onnxruntime", "tensorrt", "tensorrt_rtx"):
        assert environment.install_hint(module).startswith("pip install ")


@pytest.mark.parametrize(
    ("version", "supported"), [((3, 9), False), ((3, 10), True), ((3, 13), True), ((3, 14), False)]
)
def test_the_supported_pythons_are_those_of_the_package(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], supported: bool
) -> None:
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    assert environment.python_is_supported() is supported
