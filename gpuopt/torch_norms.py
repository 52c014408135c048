"""The Convs that read a PyTorch model's inputs and the BatchNorms behind them, found by watching one run.

Watching torch's operators serves modules, TorchScript and exported programs alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpuopt.calibration.first_layers import FirstConv, Norm
from gpuopt.torch_model import TorchModel, as_tensors

_CONVS = ("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "mkldnn_convolution")
_NORMS = ("batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training")


def first_convs(model: TorchModel, feed: Mapping[str, Any]) -> list[FirstConv]:
    """The first Conv of every input that has a trained BatchNorm right behind it.

    Args:
        model: in evaluation mode.
        feed: numpy arrays by input name.
    """
    tensors = as_tensors(feed)
    with torch.inference_mode(), _Watch(tensors) as watch:
        model.forward(tensors)
    buffers = {buffer.data_ptr(): name for name, buffer in model.module.named_buffers()}
    found = []
    for name, conv in watch.convs.items():
        norm = watch.norms.get(name)
        if norm is None:
            continue
        mean, variance = norm["running_mean"], norm["running_var"]
        label = buffers.get(mean.data_ptr(), "").removesuffix(".running_mean")
        kept = Norm(label, _array(mean), _array(variance))
        if kept.is_trained:
            found.append(_first_conv(name, conv, kept))
    return found


class _Watch(TorchDispatchMode):  # type: ignore[misc]
    """Notes the arguments of the first Conv of each input, and of the BatchNorm that reads its output."""

    def __init__(self, inputs: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.convs: dict[str, dict[str, Any]] = {}
        self.norms: dict[str, dict[str, Any]] = {}
        # The tensors are kept, so that no other object takes their identity.
        self._inputs = list(inputs.items())
        self._outputs: list[tuple[str, torch.Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        operator = function.__name__.partition(".")[0]
        if operator in _CONVS and (name := _named(self._inputs, args[0])) is not None and name not in self.convs:
            given = _arguments(function, args, kwargs or {})
            if not given.get("transposed") and not isinstance(given["padding"], str):
                self.convs[name] = given
                self._outputs.append((name, result))
        elif operator in _NORMS and (name := _named(self._outputs, args[0])) is not None:
            given = _arguments(function, args, kwargs or {})
            if not given.get("training") and given.get("running_mean") is not None:
                self.norms.setdefault(name, given)
        return result


def _named(tensors: list[tuple[str, torch.Tensor]], wanted: Any) -> str | None:
    return next((name for name, tensor in tensors if tensor is wanted), None)


def _arguments(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """An operator's arguments by name, defaults filled in."""
    schema = function._schema.arguments
    values = {a.name: a.default_value for a in schema if a.has_default_value()}
    values.update({a.name: value for a, value in zip(schema, args, strict=False)})
    return {**values, **kwargs}


def _first_conv(name: str, given: Mapping[str, Any], norm: Norm) -> FirstConv:
    weight = _array(given["weight"])
    bias = given.get("bias")
    axes = weight.ndim - 2
    strides, pads, dilations = (_sizes(given[key], axes) for key in ("stride", "padding", "dilation"))
    zeros = torch.zeros(weight.shape[0])
    return FirstConv(name, weight, _array(zeros if bias is None else bias), strides, pads, dilations, norm)


def _sizes(value: Any, axes: int) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in value) if isinstance(value, (list, tuple)) else (int(value),)
    return sizes * axes if len(sizes) == 1 else sizes


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().float().numpy().copy()
