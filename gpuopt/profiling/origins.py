"""Which part of the PyTorch module a node of the graph comes from."""

from __future__ import annotations

import re

import onnx

_WEIGHT = re.compile(r"^([A-Za-z_]\w*(?:\.\w+)*)\.(?:weight|bias|running_mean|running_var)(?![A-Za-z])")


def modules(model: onnx.ModelProto) -> dict[str, str]:
    """Module paths, as `layer1.0.conv1`, by node name; nodes of which nothing tells are left out.

    The older exporter writes the scopes into the names of nodes (`/layer1/layer1.0/conv1/Conv`); the newer one keeps
    the parameters' names, which tells the module of nodes with weights. What comes between Q and DQ keeps its name.
    """
    passed_on = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast", "Identity") and node.input
    }
    found = {}
    for node in model.graph.node:
        scope = _scope(node.name)
        for name in node.input if not scope else ():
            while name in passed_on:
                name = passed_on[name]
            if match := _WEIGHT.match(name):
                scope = match[1]
                break
        if scope:
            found[node.name] = scope
    return found


def _scope(name: str) -> str:
    """The module's path in a name with scopes: `/layer1/layer1.0/conv1/Conv` is of `layer1.0.conv1`."""
    if not name.startswith("/"):
        return ""
    path = ""
    for part in name.split("/")[1:-1]:
        path = part if not path or part.startswith(f"{path}.") else f"{path}.{part}"
    return path
