"""Weights that are loaded into the model of a factory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from gpuopt import torch_model
from gpuopt.errors import ModelError
from gpuopt.model_file import ModelKind
from gpuopt.recipe import ModelSection


class Wrapper(nn.Module):
    """Its own names begin as DataParallel's do; one of them is another's without that beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) * self.weight.sum()  # type: ignore[no-any-return]


def plain() -> nn.Module:
    return nn.Linear(4, 4)


def wrapper() -> nn.Module:
    return Wrapper()


def loaded(weights: nn.Module, factory: Callable[[], nn.Module], folder: Path) -> nn.Module:
    torch.save(weights.state_dict(), folder / "w.pth")
    settings = ModelSection(path=str(folder / "w.pth"), factory=f"{__name__}:{factory.__name__}")
    module = torch_model.load(settings, ModelKind.STATE_DICT).module
    assert isinstance(module, nn.Module)
    return module


@pytest.mark.parametrize("factory", [plain, wrapper])
@pytest.mark.parametrize("parallel", [False, True])
def test_names_of_dataparallel_are_told_from_the_models_own(
    factory: Callable[[], nn.Module], parallel: bool, tmp_path: Path
) -> None:
    saved = factory()
    # Named as in DataParallel, which would move the model to a GPU.
    found = loaded(nn.ModuleDict({"module": saved}) if parallel else saved, factory, tmp_path).state_dict()
    assert found.keys() == saved.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in saved.state_dict().items())


def test_weights_of_another_model_are_named_as_the_file_has_them(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"2 are unexpected \(module\.other\.weight, module\.other\.bias\)"):
        loaded(nn.ModuleDict({"module": nn.ModuleDict({"other": nn.Linear(4, 4)})}), wrapper, tmp_path)
