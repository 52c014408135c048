"""The ranges file: what is written is read again, what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.calibration import ranges
from gpuopt.calibration.collectors import TensorRange
from gpuopt.errors import DataError

numbers = st.floats(allow_nan=False, allow_infinity=False)
intervals = st.tuples(numbers, numbers).map(sorted)


@given(st.dictionaries(st.text(max_size=8), st.tuples(intervals, st.sampled_from(["entropy", "minmax"])), max_size=5))
def test_ranges_are_read_back_exactly_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, tuple[list[float], str]]
) -> None:
    known = {name: TensorRange(low, high, method) for name, ((low, high), method) in values.items()}
    path = tmp_path_factory.getbasetemp() / "ranges.json"
    ranges.save(path, known, {"samples": 3})
    loaded = ranges.load(path)
    assert loaded == known
    assert list(loaded) == list(known)
    assert json.loads(path.read_text())["samples"] == 3


def document(**tensor: Any) -> dict[str, Any]:
    return {"version": 1, "tensors": {"x": {"low": -1, "high": 1, "method": "minmax", **tensor}}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 1}',
        '{"tensors": {}}',
        '{"version": 2, "tensors": {}}',
        '{"version": 1, "tensors": []}',
        '{"version": 1, "tensors": {"x": 1}}',
        '{"version": 1, "tensors": {"x": {"low": 0, "high": 1}}}',
        json.dumps(document(low=None)),
        json.dumps(document(low="a")),
        json.dumps(document(low=[1])),
        json.dumps(document(high=10**400)),
        "[" * 100000,
    ],
)
def test_what_is_no_ranges_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(content)
    with pytest.raises(DataError, match="is not a ranges file"):
        ranges.load(path)


def test_binary_absent_and_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("binary", "absent", "."):
        with pytest.raises(DataError, match="is not a ranges file"):
            ranges.load(tmp_path / name)


@pytest.mark.parametrize(
    "tensor", [{"low": 2}, {"high": float("nan")}, {"low": float("-inf")}, {"high": float("inf")}, {"low": "nan"}]
)
def test_a_reversed_or_infinite_range_is_refused_by_its_tensor(tmp_path: Path, tensor: dict[str, Any]) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps(document(**tensor)))
    with pytest.raises(DataError, match="the range of 'x' is"):
        ranges.load(path)


def test_a_single_value_is_a_range(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps(document(low=1)))
    assert ranges.load(path)["x"].amax == 1
