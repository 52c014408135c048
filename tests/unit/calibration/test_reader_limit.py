"""The limit of samples: which are given, which files are read, and what stays untouched."""

from __future__ import annotations

import base64
import io
import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gpuopt.calibration.readers import open_reader
from gpuopt.calibration.readers.base import spread
from gpuopt.errors import DataError, UsageError
from gpuopt.shapes import TensorSpec
from tests.unit.calibration.specs import sample_specs

X = TensorSpec("x", "float32", ("N", 3))
IDS = TensorSpec("ids", "int64", ("N",))
PICTURE = TensorSpec("images", "float32", ("N", 3, 8, 8))
COUNT = 10


def rows(count: int = COUNT) -> np.ndarray:
    """Row i holds i three times."""
    return np.repeat(np.arange(count, dtype=np.float32)[:, np.newaxis], 3, axis=1)


def write_npz(folder: Path) -> Path:
    np.savez(folder / "c.npz", x=rows())
    return folder / "c.npz"


def write_packed_npz(folder: Path) -> Path:
    np.savez_compressed(folder / "c.npz", x=rows())
    return folder / "c.npz"


def write_npy(folder: Path) -> Path:
    np.save(folder / "c.npy", rows())
    return folder / "c.npy"


def write_npy_folder(folder: Path) -> Path:
    for index, row in enumerate(rows()):
        np.save(folder / f"{index:02}.npy", row)
    return folder


def write_npz_folder(folder: Path) -> Path:
    for index, row in enumerate(rows()):
        np.savez(folder / f"{index:02}.npz", x=row)
    return folder


def write_columns(folder: Path) -> Path:
    (folder / "x").mkdir()
    for index, row in enumerate(rows()):
        np.save(folder / "x" / f"{index:02}.npy", row)
    return folder


def encoded(array: np.ndarray) -> dict[str, str]:
    stream = io.BytesIO()
    np.save(stream, array)
    return {"array": base64.b64encode(stream.getvalue()).decode(), "polygraphy_class": "ndarray"}


def write_json(folder: Path) -> Path:
    (folder / "c.json").write_text(json.dumps([{"x": encoded(row)} for row in rows()]))
    return folder / "c.json"


WRITERS = [write_npz, write_packed_npz, write_npy, write_npy_folder, write_npz_folder, write_columns, write_json]


@given(st.integers(0, 500), st.integers(1, 500))
def test_positions_are_distinct_in_order_and_even(available, limit):
    positions = spread(available, limit)
    assert len(positions) == min(available, limit)
    if limit >= available:
        assert list(positions) == list(range(available))
        return
    gaps = np.diff([*positions, available])
    assert positions[0] == 0
    assert available // limit <= gaps.min() <= gaps.max() <= available // limit + 1


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("limit", [1, 3, 4, 9, 10, 11, None])
@pytest.mark.parametrize("inputs", [[X], []])
def test_samples_of_each_kind(tmp_path, write, limit, inputs):
    path = write(tmp_path)
    reader = open_reader(str(path), inputs, limit=limit)
    given_count = min(limit or COUNT, COUNT)
    expected = list(range(given_count)) if write is write_json else list(spread(COUNT, limit))
    for _ in range(2):
        feeds = [next(iter(feed.values())) for feed in reader]
        assert [int(feed.flat[0]) for feed in feeds] == expected
        assert {feed.size for feed in feeds} == {3}
    if write is write_json:
        assert reader.total is None
        assert ("at most" in reader.description) == (limit is not None)
    else:
        assert reader.total == given_count
        assert reader.description.endswith(f"{limit} of 10 samples" if (limit or COUNT) < COUNT else ", 10 samples")
    if path.is_dir():
        assert [int(file.stem) for file in reader.files()] == expected
    else:
        assert reader.files() == [path]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_members_of_an_archive_are_skipped_alike(tmp_path, save):
    save(tmp_path / "c.npz", x=rows(1000), ids=np.arange(1000), flags=np.arange(1000) % 2 == 1)
    inputs = [X, IDS, TensorSpec("flags", "bool", ("N",))]
    feeds = list(open_reader(str(tmp_path / "c.npz"), inputs, limit=300))
    assert [int(feed["ids"][0]) for feed in feeds] == list(spread(1000, 300))
    assert all((feed["x"] == feed["ids"][0]).all() and feed["flags"][0] == feed["ids"][0] % 2 for feed in feeds)


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_slices_of_a_fixed_batch(tmp_path, kind):
    path = tmp_path / f"c.{kind}"
    if kind == "npz":
        np.savez(path, x=rows(14))
    else:
        np.save(path, rows(14))
    reader = open_reader(str(path), [TensorSpec("x", "float32", (4, 3))], limit=2)
    assert reader.description == f"{kind} c.{kind}, 2 of 3 samples (2 left over)"
    assert [feed["x"][:, 0].tolist() for feed in reader] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_skipping_takes_no_memory(tmp_path):
    np.savez_compressed(tmp_path / "c.npz", x=np.zeros((16, 1 << 20), np.float32))
    tracemalloc.start()
    try:
        for feed in open_reader(str(tmp_path / "c.npz"), [], limit=2):
            del feed
        assert tracemalloc.get_traced_memory()[1] < 3 * (4 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["npz", "npy", "json"])
def test_skipped_samples_are_not_checked_and_errors_name_the_position(tmp_path, kind):
    values = rows()
    values[[1, 7]] = np.nan  # 4 samples of 10 are 0, 2, 5, 7; 3 are 0, 3, 6.
    path = tmp_path / f"c.{kind}"
    if kind == "npz":
        np.savez(path, x=values)
    elif kind == "npy":
        np.save(path, values)
    else:
        path.write_text(json.dumps([{"x": encoded(row)} for row in values]))
    if kind == "json":
        assert len(list(open_reader(str(path), [X], limit=1))) == 1
        with pytest.raises(DataError, match="sample 1 "):
            list(open_reader(str(path), [X], limit=2))
        return
    assert len(list(open_reader(str(path), [X], limit=3))) == 3
    with pytest.raises(DataError, match="sample 7 "):
        list(open_reader(str(path), [X], limit=4))


@pytest.mark.parametrize("write", [write_npy_folder, write_npz_folder, write_columns])
def test_files_that_are_not_chosen_are_not_opened(tmp_path, write):
    write(tmp_path)
    reader = open_reader(str(tmp_path), [X], limit=4)
    for file in tmp_path.rglob("*.np?"):
        if file not in reader.files():
            file.write_bytes(b"broken")
    for again in (reader, open_reader(str(tmp_path), [X], limit=4)):
        assert len(list(again)) == 4
    with pytest.raises(DataError, match=r"01\.np"):
        list(open_reader(str(tmp_path), [X]))


def test_images_of_all_class_folders_are_chosen(tmp_path):
    for label in range(5):
        (tmp_path / f"class{label}").mkdir()
        for index in range(6):
            Image.new("RGB", (8, 8), (label * 50,) * 3).save(tmp_path / f"class{label}" / f"{index}.png")
    reader = open_reader(str(tmp_path), [PICTURE], limit=10)
    assert [file.parent.name for file in reader.files()] == [f"class{label}" for label in range(5) for _ in "ab"]
    assert reader.total == 10
    assert reader.description.startswith(f"image folder {tmp_path.name}, 10 of 30 samples; shorter side 9, crop 8x8,")
    for file in tmp_path.rglob("*.png"):
        if file not in reader.files():
            file.write_bytes(b"broken")
    levels = [float(feed["images"].mean()) for feed in reader]
    assert len({round(level, 3) for level in levels}) == 5
    assert levels == sorted(levels)
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        list(open_reader(str(tmp_path), [PICTURE]))


def test_json_folder_stops_at_the_limit(tmp_path):
    for index, row in enumerate(rows(4)):
        (tmp_path / f"{index}.json").write_text(json.dumps([{"x": encoded(row)}] * 2))
    (tmp_path / "2.json").write_text("broken")
    reader = open_reader(str(tmp_path), [X], limit=3)
    assert [int(feed["x"].flat[0]) for feed in reader] == [0, 0, 1]
    assert len(reader.files()) == 4
    assert reader.description == f"Polygraphy JSON folder {tmp_path.name}, 4 files, at most 3 samples"


def test_callable_is_asked_for_no_sample_too_many(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("limited_data.py").write_text(
        "import numpy as np\nclosed = []\n"
        "def samples():\n    try:\n        for i in range(3):\n            yield np.full(3, float(i))\n"
        "        raise RuntimeError('one too many')\n    finally:\n        closed.append(True)\n"
    )
    reader = open_reader("limited_data:samples", [X], limit=3)
    assert reader.total is None
    assert reader.description == "callable limited_data:samples, at most 3 samples"
    for count in (1, 2):
        assert [int(feed["x"][0, 0]) for feed in reader] == [0, 1, 2]
        assert len(sys.modules["limited_data"].closed) == count
    assert len(list(open_reader("limited_data:samples", [X], limit=1))) == 1
    with pytest.raises(DataError, match="failed at sample 3"):
        list(open_reader("limited_data:samples", [X], limit=4))
    sys.modules.pop("limited_data")


def test_first_sample_states_the_shapes(tmp_path):
    assert sample_specs(open_reader(str(write_npz(tmp_path)), [], limit=2)) == [TensorSpec("x", "float32", (1, 3))]


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_must_leave_a_sample(tmp_path, limit):
    with pytest.raises(UsageError, match=f"limit of {limit} samples"):
        open_reader(str(write_npz(tmp_path)), [X], limit=limit)


def test_empty_data_stay_an_error(tmp_path):
    np.savez(tmp_path / "c.npz", x=np.zeros((0, 3), np.float32))
    with pytest.raises(DataError, match=r"hold no sample: npz c\.npz, 0 samples"):
        list(open_reader(str(tmp_path / "c.npz"), [X], limit=5))
