"""What can be shown of running engines without a GPU; the rest is in tests/gpu."""

from __future__ import annotations

import numpy as np
import pytest

from gpuopt.backends.tensorrt.runtime import LoadedEngine, as_engine_inputs
from gpuopt.engine_record import EngineRecord
from gpuopt.errors import DataError, EngineError
from gpuopt.shapes import TensorSpec

INPUTS = (TensorSpec("image", "float16", ("batch", 3)), TensorSpec("ids", "int32", ("batch",)))


def test_feeds_get_the_dtypes_of_the_engine() -> None:
    feeds = {"image": np.ones((2, 3), np.float32), "ids": np.array([1, -(2**31)], np.int64)}
    given = as_engine_inputs(INPUTS, feeds)
    assert {name: value.dtype.name for name, value in given.items()} == {"image": "float16", "ids": "int32"}
    assert given["ids"].tolist() == feeds["ids"].tolist()
    same = np.ones((2, 3), np.float16)
    assert as_engine_inputs(INPUTS[:1], {"image": same})["image"] is same


def test_numbers_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(DataError, match="'ids' holds values that int32, which the engine takes, cannot"):
        as_engine_inputs(INPUTS[1:], {"ids": np.array([2**31], np.int64)})


def test_a_plan_without_weights_is_not_run() -> None:
    record = EngineRecord.model_construct(file="model.tensorrt.engine", weights_stripped=True)
    with pytest.raises(EngineError, match=r"model\.tensorrt\.engine holds no weights"):
        LoadedEngine(b"", record, None)  # type: ignore[arg-type]
