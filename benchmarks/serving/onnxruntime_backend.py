"""Triton's `onnxruntime` backend for a server that has none: ONNX Runtime behind Triton's Python backend.

nvidia-pytriton brings the server with the Python backend alone. Triton takes a folder `backends/onnxruntime` with this
file as `model.py` for a backend of that name, so that it loads the same repository as any other Triton. One thread.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        file = Path(args["model_repository"]) / args["model_version"] / config["default_model_filename"]
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        given = [
            [triton.get_input_tensor_by_name(request, name).as_numpy() for request in requests] for name in self.inputs
        ]
        feed = {name: np.concatenate(arrays) for name, arrays in zip(self.inputs, given, strict=True)}
        sizes = [len(array) for array in given[0]]
        results = self.session.run(self.outputs, feed)
        ends = np.cumsum(sizes)
        responses = []
        for size, end in zip(sizes, ends, strict=True):
            rows = [
                triton.Tensor(name, np.ascontiguousarray(result[end - size : end]))
                for name, result in zip(self.outputs, results, strict=True)
            ]
            responses.append(triton.InferenceResponse(rows))
        return responses
