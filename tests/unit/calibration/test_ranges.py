"""The ranges file: what is written is read again, what is damaged is refused."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.calibration import ranges, reuse
from gpuopt.calibration.collectors import TensorRange
from gpuopt.errors import DataError, StorageError

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
        '{"version": 1, "tensors": {"x": {"low": 0}}}',
        '{"version": 1, "tensors": {"x": {"low": 0, "high": true}}}',
        '{"version": 1, "tensors": {"x": {"low": 0, "hihg": 1}}}',
        '{"version": 1, "version": 1, "tensors": {}}',
        json.dumps(document(low="nan")),
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


@pytest.mark.parametrize("tensor", [{"low": 2}, {"high": float("nan")}, {"low": float("-inf")}, {"high": float("inf")}])
def test_a_reversed_or_infinite_range_is_refused_by_its_tensor(tmp_path: Path, tensor: dict[str, Any]) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps(document(**tensor)))
    with pytest.raises(DataError, match="the range of 'x' is"):
        ranges.load(path)


def test_a_single_value_is_a_range(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(json.dumps(document(low=1)))
    assert ranges.load(path)["x"].amax == 1


def test_a_tensor_has_a_line_in_the_given_order_and_an_edit_changes_one(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    known = {f"t{i}": TensorRange(-i - 0.1, i + 0.1, "minmax") for i in (3, 1, 2)}
    ranges.save(path, known, {"method": "minmax"})
    lines = path.read_text().splitlines()
    assert [line.strip()[:4] for line in lines if '"low"' in line] == ['"t3"', '"t1"', '"t2"']
    before = lines[:]
    ranges.save(path, {**known, "t1": TensorRange(-9, 9, "edited")}, {"method": "minmax"})
    assert sum(a != b for a, b in zip(before, path.read_text().splitlines(), strict=True)) == 1


def test_a_range_without_method_was_edited(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text('{"version": 1, "tensors": {"x": {"low": -1, "high": 1}}}')
    assert ranges.load(path)["x"].method == ranges.EDITED


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"high": 2.0', '"high": 2.0,,', "line 6"),
        ('"low": -2.0', '"low": 3.0', "line 6: the range of 'b' is 3.0 to 2.0"),
        ('"low": -2.0', '"low": "x"', "'b' in line 6: 'low' is missing or no number"),
        ('"low": -2.0', '"low": NaN', "line 6: the range of 'b' is nan"),
        ('"low": -2.0', '"lo": -2.0', "'b' in line 6 has an unknown key 'lo'"),
        ('"b":', '"a":', "'a' stands twice in line 6"),
    ],
)
def test_what_is_wrong_in_an_edited_file_is_named_by_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "ranges.json"
    known = {name: TensorRange(-size, size, "minmax") for name, size in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    ranges.save(path, known, {"samples": 3})
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(DataError, match=re.escape(message)):
        ranges.read(path)


def test_what_is_read_says_where_it_is_from(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    ranges.save(path, {"a": TensorRange(-1, 1, "mse")}, {"method": "mse", "samples": 3, "data": "npz x.npz, 3 samples"})
    file = ranges.read(path)
    assert file.origin == "ranges file ranges.json (mse; npz x.npz, 3 samples)"
    assert file.ranges == {"a": TensorRange(-1, 1, "mse")}


# TensorRT's caches ---------------------------------------------------------------------------------


def cache_line(name: str, scale: float) -> str:
    return f"{name}: {struct.pack('>f', scale).hex()}\n"


names = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=12).map(str.strip)


@given(
    st.dictionaries(names.filter(bool), st.floats(0, 2.0**100, width=32), min_size=1, max_size=6),
    st.sampled_from(["EntropyCalibration2", "EntropyCalibration", "MinMaxCalibration", "LegacyCalibration"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_a_cache_gives_the_scales_that_tensorrt_wrote(
    tmp_path_factory: pytest.TempPathFactory, scales: dict[str, float], calibrator: str, end: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "calibration.cache"
    text = f"TRT-8503-{calibrator}\n" + "".join(cache_line(name, scale) for name, scale in scales.items())
    path.write_bytes(text.replace("\n", end).encode())
    file = ranges.read(path)
    assert list(file.ranges) == list(scales)
    for name, scale in scales.items():
        found = file.ranges[name]
        assert (found.low, found.high, found.method) == (-127 * scale, 127 * scale, f"TensorRT {calibrator}")
    assert file.origin == f"TensorRT calibration cache calibration.cache (TRT-8503-{calibrator})"


def test_a_known_number_and_names_with_colons_and_spaces(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text(
        "TRT-7000-EntropyCalibration2\nprob: 3c010a14\nimport/x:0: 3f800000\n"
        "(Unnamed Layer* 12) [Convolution]_output: 0\n\n"
    )
    found = ranges.read(path).ranges
    assert found["prob"].high == pytest.approx(127 * 0.00787594, rel=1e-5)
    assert found["import/x:0"].high == 127
    assert found["(Unnamed Layer* 12) [Convolution]_output"].amax == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "holds no scale"),
        ("x: 3c010a14\ny", "line 3: 'y' is no line"),
        ("x: 3c010a1z", "line 2"),
        ("x: 3c010a1400", "line 2"),
        (": 3c010a14", "line 2"),
        ("x: bf800000", "line 2: the scale of 'x' is -1.0"),
        ("x: 7fc00000", "line 2: the scale of 'x' is nan"),
        ("x: 7f800000", "line 2: the scale of 'x' is inf"),
        ("x: 3f800000\nx: 3f800001", "line 3: 'x' stands twice"),
    ],
)
def test_a_damaged_cache_is_refused_by_line(tmp_path: Path, body: str, message: str) -> None:
    path = tmp_path / "calibration.cache"
    path.write_text(f"TRT-8503-EntropyCalibration2\n{body}")
    with pytest.raises(DataError, match=re.escape(message)):
        ranges.read(path)


def test_hostile_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    for content in (b"", b"\x00" * 4096, b"TRT-8503-EntropyCalibration2\n\xff: 00", b"{", b"PK\x03\x04", b'"x"'):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a ranges file"):
            ranges.read(path)
    path.write_text('{"version": 1, "tensors": {}}')
    with pytest.raises(DataError, match="holds no range"):
        ranges.read(path)
    with pytest.raises(StorageError, match="cannot read"):
        ranges.read(tmp_path / "absent")
    monkeypatch.setattr(ranges, "_MOST_BYTES", 10)
    with pytest.raises(DataError, match="larger than"):
        ranges.read(path)


# What fits a graph ---------------------------------------------------------------------------------


def file_of(*names: str) -> ranges.RangesFile:
    return ranges.RangesFile({name: TensorRange(-1, 1, "minmax") for name in names}, "ranges file r.json")


def test_what_fits_is_taken_in_the_graph_s_order_and_the_rest_is_said() -> None:
    file = file_of("relu_1", "image", "unused", "(Unnamed Layer* 3) [Shuffle]_output", "relu2")
    found = reuse.match(file, ["image", "relu_1", "relu_2"], {"image", "relu_1", "relu_2", "unused"})
    assert list(found.ranges) == ["image", "relu_1"]
    assert (found.missing, found.unknown) == (("relu_2",), ("relu2",))
    first, second, third = found.warnings
    assert "1 of 3 activations have no range" in first
    assert "'relu2' (did you mean 'relu_2'?)" in second
    assert "1 of its names were made up by TensorRT" in third


def test_a_whole_file_gives_no_warning() -> None:
    assert reuse.match(file_of("a", "b"), ["a"], {"a", "b"}).warnings == ()


def test_another_model_s_file_is_refused() -> None:
    for file in (file_of("x", "y", "z"), file_of("a", "x", "y"), file_of("b")):
        with pytest.raises(DataError, match="is for another model"):
            reuse.match(file, ["a", "c", "d"], {"a", "b", "c", "d"})


def test_a_file_reduced_by_hand_is_taken() -> None:
    assert list(reuse.match(file_of("a"), ["a", "c", "d"], {"a", "c", "d"}).ranges) == ["a"]
