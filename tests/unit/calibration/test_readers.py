"""Readers of calibration data: every kind from real files, every refusal with its message."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gpuopt.calibration.readers import (
    ImageOptions,
    find_beside,
    open_reader,
    random_reader,
)
from gpuopt.calibration.reading import data_files
from gpuopt.errors import DataError, GpuoptError, RequirementError, UsageError
from gpuopt.shapes import TensorSpec
from tests.unit.calibration.specs import sample_specs

X = TensorSpec("x", "float32", ("N", 3, 4))
IDS = TensorSpec("ids", "int64", ("N", "S"))
PICTURE = TensorSpec("images", "float32", ("N", 3, 8, 8))


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def refusal(kind: type[GpuoptError], data: object, inputs: list[TensorSpec], *image: ImageOptions) -> str:
    """Message and hint of the error that opening and reading to the end raises, as a user sees them."""
    with pytest.raises(kind) as caught:
        list(open_reader(str(data), inputs, *image))
    text = f"{caught.value.message}\n{caught.value.hint}"
    assert caught.value.message
    assert caught.value.hint
    assert text.count("\n") <= 2
    return text


# .npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_cut_into_samples(tmp_path, save):
    x, ids = numbers(5, 3, 4), np.arange(35).reshape(5, 7)
    save(tmp_path / "c.npz", x=x, ids=ids)
    reader = open_reader(str(tmp_path / "c.npz"), [X, IDS])
    assert reader.total == 5
    assert reader.description == "npz c.npz, 5 samples"
    assert reader.files() == [tmp_path / "c.npz"]
    for _ in range(2):
        feeds = list(reader)
        assert [f["x"].shape for f in feeds] == [(1, 3, 4)] * 5
        np.testing.assert_array_equal(np.concatenate([f["x"] for f in feeds]), x)
        np.testing.assert_array_equal(np.concatenate([f["ids"] for f in feeds]), ids)


def test_npz_iterations_are_independent(tmp_path):
    np.savez(tmp_path / "c.npz", x=numbers(3, 3, 4))
    reader = open_reader(str(tmp_path / "c.npz"), [X])
    first, second = iter(reader), iter(reader)
    a = next(first)["x"]
    next(second), next(second)
    np.testing.assert_array_equal(next(iter(reader))["x"], a)
    np.testing.assert_array_equal(next(first)["x"], numbers(3, 3, 4)[1:2])


def test_npz_without_known_inputs(tmp_path):
    np.savez(tmp_path / "c.npz", a=numbers(2, 5), b=np.array([True, False]))
    reader = open_reader(str(tmp_path / "c.npz"), [])
    assert sample_specs(reader) == [TensorSpec("a", "float32", (1, 5)), TensorSpec("b", "bool", (1,))]


@pytest.mark.parametrize(
    ("shape", "spec_shape", "samples", "sample_shape"),
    [
        ((12, 3), (4, 3), 3, (4, 3)),
        ((14, 3), (4, 3), 3, (4, 3)),
        ((6, 4, 3), (4, 3), 6, (4, 3)),
        ((6, 1, 3), ("N", 3), 6, (1, 3)),
        ((6, 5, 3), ("N", 3), 6, (5, 3)),
        ((6,), (), 6, ()),
        ((6, 3), (1, 3), 6, (1, 3)),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_stacks_follow_the_rank_and_the_fixed_batch(tmp_path, kind, shape, spec_shape, samples, sample_shape):
    values = numbers(*shape)
    path = tmp_path / f"c.{kind}"
    if kind == "npz":
        np.savez(path, x=values)
    else:
        np.save(path, values)
    reader = open_reader(str(path), [TensorSpec("x", "float32", spec_shape)])
    feeds = [feed["x"] for feed in reader]
    assert reader.total == len(feeds) == samples
    assert {feed.shape for feed in feeds} == {sample_shape}
    flat = np.concatenate([feed.reshape(-1) for feed in feeds])
    np.testing.assert_array_equal(flat, values.reshape(-1)[: flat.size])
    assert ("(2 left over)" in reader.description) == (shape[0] == 14)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_streamed(tmp_path, save):
    sample, count = 3 << 20, 12
    save(tmp_path / "c.npz", x=np.tile(numbers(1, sample // 4), (count, 1)))
    tracemalloc.start()
    try:
        seen = 0
        for feed in open_reader(str(tmp_path / "c.npz"), [TensorSpec("x", "float32", ("N", sample // 4))]):
            seen += feed["x"].nbytes
            del feed
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == count * sample
    assert peak < 3 * sample


def test_npz_names_must_match(tmp_path):
    np.savez(tmp_path / "c.npz", imgs=numbers(2, 3, 4), mask=numbers(2, 3))
    text = refusal(DataError, tmp_path / "c.npz", [TensorSpec("img", "float32", ("N", 3, 4)), IDS])
    assert "missing 'img', 'ids', unexpected 'imgs', 'mask'" in text
    assert "Rename 'imgs' to 'img'?" in text


def test_npz_sample_counts_must_agree(tmp_path):
    np.savez(tmp_path / "c.npz", x=numbers(2, 3, 4), ids=np.zeros((3, 7), np.int64))
    text = refusal(DataError, tmp_path / "c.npz", [X, IDS])
    assert "different numbers of samples: 'x' has 2, 'ids' has 3" in text


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 12), (2, 2, 2, 3, 4), ()])
def test_npz_shape_must_fit(tmp_path, shape):
    np.savez(tmp_path / "c.npz", x=np.zeros(shape, np.float32))
    text = refusal(DataError, tmp_path / "c.npz", [X])
    assert "'x'" in text
    assert "c.npz" in text
    assert "3x4" in text


def test_npz_of_objects_is_refused_and_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    np.savez(tmp_path / "c.npz", x=np.array([Trap(), None], object))
    np.save(tmp_path / "c.npy", np.array([Trap(), None], object), allow_pickle=True)
    for name in ("c.npz", "c.npy"):
        assert "Python objects" in refusal(DataError, tmp_path / name, [X])
    (tmp_path / "folder").mkdir()
    (tmp_path / "c.npy").rename(tmp_path / "folder" / "c.npy")
    assert "Python objects" in refusal(DataError, tmp_path / "folder", [X])
    assert not (tmp_path / "executed").exists()


def test_npz_in_fortran_order_is_refused(tmp_path):
    np.savez(tmp_path / "c.npz", x=np.asfortranarray(numbers(2, 3, 4)))
    text = refusal(DataError, tmp_path / "c.npz", [X])
    assert "array 'x'" in text
    assert "Fortran order" in text
    assert "ascontiguousarray" in text


def test_npz_of_one_dimension_has_no_order(tmp_path):
    np.savez(tmp_path / "c.npz", x=np.asfortranarray(numbers(4)))
    assert len(list(open_reader(str(tmp_path / "c.npz"), []))) == 4


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("keep", [8, 40, 127, 128, 200, -1])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_truncated_member_is_named(tmp_path, keep, compression):
    write_zip(tmp_path / "c.npz", {"x.npy": npy_bytes(numbers(5, 3, 4))[:keep]}, compression)
    text = refusal(DataError, tmp_path / "c.npz", [X])
    assert "array 'x' of" in text
    assert "c.npz" in text


def test_truncated_archive_is_named(tmp_path):
    np.savez(tmp_path / "c.npz", x=numbers(50, 3, 4))
    whole = (tmp_path / "c.npz").read_bytes()
    (tmp_path / "c.npz").write_bytes(whole[: len(whole) // 2])
    assert "c.npz is truncated or no .npz archive" in refusal(DataError, tmp_path / "c.npz", [X])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_data_are_found_by_the_checksum(tmp_path, save):
    save(tmp_path / "c.npz", x=numbers(50_000, 3, 4))
    whole = bytearray((tmp_path / "c.npz").read_bytes())
    whole[-400] ^= 0x04
    (tmp_path / "c.npz").write_bytes(whole)
    text = refusal(DataError, tmp_path / "c.npz", [X])
    assert "array 'x'" in text
    assert "truncated or damaged: Bad CRC-32" in text or "truncated or damaged: Error -3" in text


def header_bytes(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (117 - len(text)) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize("inputs", [[], [X], [TensorSpec("x", "float32", ("N", "C", "L"))]])
@pytest.mark.parametrize("shape", ["(3, 100000, 1000000)", "(1, 1000000000000)", "(-1, 3, 4)"])
def test_declared_sizes_are_not_believed(tmp_path, inputs, shape):
    data = header_bytes(shape) + bytes(4096)
    write_zip(tmp_path / "c.npz", {"x.npy": data})
    (tmp_path / "c.npy").write_bytes(data)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_zip(folder / "a.npz", {"x.npy": data})
    tracemalloc.start()
    try:
        for path in (tmp_path / "c.npz", tmp_path / "c.npy", folder):
            refusal(DataError, path, inputs)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_header_of_a_declared_gigabyte_is_not_read(tmp_path):
    data = b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30) + bytes(1 << 20)
    write_zip(tmp_path / "c.npz", {"x.npy": data})
    assert "a header of 1073741824 bytes" in refusal(DataError, tmp_path / "c.npz", [X])


def test_member_that_unpacks_to_a_huge_row_is_refused_first(tmp_path):
    """A real archive of 300 kB whose one member unpacks to 300 MB."""
    with (
        zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w") as member,
    ):
        member.write(header_bytes("(1, 75, 1048576)"))
        for _ in range(300):
            member.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        assert "has shape 1x75x1048576, expected Nx3x4" in refusal(DataError, tmp_path / "c.npz", [X])
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_other_members_and_packings(tmp_path):
    write_zip(tmp_path / "a.npz", {"x.npy": npy_bytes(numbers(2, 3, 4))}, zipfile.ZIP_LZMA)
    assert "packed in an unusual way" in refusal(DataError, tmp_path / "a.npz", [X])
    write_zip(tmp_path / "b.npz", {"x": b"text"})
    assert "array 'x' of" in refusal(DataError, tmp_path / "b.npz", [X])
    write_zip(tmp_path / "c.npz", {"x": npy_bytes(numbers(2, 3, 4)), "x.npy": npy_bytes(numbers(2, 3, 4))})
    assert "array 'x' is twice" in refusal(DataError, tmp_path / "c.npz", [X])
    np.savez(tmp_path / "d.npz")
    assert "d.npz holds no array" in refusal(DataError, tmp_path / "d.npz", [])
    np.savez(tmp_path / "e.npz", x=np.array(["a", "b"]))
    assert "dtype <U1, which no input takes" in refusal(DataError, tmp_path / "e.npz", [])


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), stored=st.booleans(), npy=st.booleans())
def test_one_wrong_byte_gives_samples_or_a_data_error(tmp_path, position, byte, stored, npy):
    path = tmp_path / "c.bin"
    values = numbers(4, 3, 4)
    if npy:
        path.write_bytes(npy_bytes(values))
    else:
        write_zip(path, {"x.npy": npy_bytes(values)}, zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = byte
    path.write_bytes(data)
    for inputs in ([X], []):
        with contextlib.suppress(DataError):
            assert list(open_reader(str(path), inputs))


# Checks of feeds


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_located(tmp_path, bad):
    x = numbers(5, 3, 4)
    x[3, 1, 1:3] = bad
    np.savez(tmp_path / "c.npz", x=x)
    text = refusal(DataError, tmp_path / "c.npz", [X])
    assert "input 'x' of sample 3 (c.npz) holds 2 NaN or infinite of 12 values" in text


@pytest.mark.parametrize(
    ("given_dtype", "wanted"),
    [
        ("float64", "float32"),
        ("float16", "float32"),
        (">f4", "float32"),
        ("int32", "int64"),
        ("int64", "int32"),
        ("uint8", "int64"),
        ("bool", "bool"),
        ("float32", "float16"),
    ],
)
def test_casts_within_a_kind_are_silent(tmp_path, given_dtype, wanted):
    np.savez(tmp_path / "c.npz", x=np.ones((2, 3), given_dtype))
    feeds = list(open_reader(str(tmp_path / "c.npz"), [TensorSpec("x", wanted, ("N", 3))]))
    assert all(feed["x"].dtype == np.dtype(wanted) and feed["x"].dtype.isnative for feed in feeds)
    assert all((feed["x"] == 1).all() for feed in feeds)


@pytest.mark.parametrize(
    ("given_dtype", "wanted", "words"),
    [
        ("float32", "int64", "array.astype('int64')"),
        ("uint8", "float32", "Scale and normalise"),
        ("int64", "float32", "array.astype('float32')"),
        ("bool", "int64", "array.astype('int64')"),
        ("complex64", "float32", "which no input takes"),
    ],
)
def test_casts_between_kinds_are_refused(tmp_path, given_dtype, wanted, words):
    np.savez(tmp_path / "c.npz", x=np.ones((2, 3), given_dtype))
    text = refusal(DataError, tmp_path / "c.npz", [TensorSpec("x", wanted, ("N", 3))])
    assert f"dtype {given_dtype}" in text
    assert words in text


def test_integers_that_do_not_fit_are_refused(tmp_path):
    np.savez(tmp_path / "c.npz", x=np.array([[0], [1 << 40]]))
    text = refusal(DataError, tmp_path / "c.npz", [TensorSpec("x", "int32", ("N", 1))])
    assert "sample 1 (c.npz) holds integers that int32 cannot" in text


def test_values_that_overflow_a_narrower_float_are_refused(tmp_path):
    np.savez(tmp_path / "c.npz", x=np.array([[1.0], [1e6]]))
    text = refusal(DataError, tmp_path / "c.npz", [TensorSpec("x", "float16", ("N", 1))])
    assert "sample 1 (c.npz) holds 1 NaN or infinite" in text


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 3, 4)])
def test_no_samples(tmp_path, shape):
    np.savez(tmp_path / "c.npz", x=np.zeros(shape, np.float32))
    text = refusal(DataError, tmp_path / "c.npz", [TensorSpec("x", "float32", (8 if shape[0] else "N", 3, 4))])
    assert "hold no sample: npz c.npz, 0 samples" in text


# .npy and folders


def test_npy_stack_needs_one_input(tmp_path):
    np.save(tmp_path / "c.npy", numbers(3, 3, 4))
    assert "cannot feed a model with 2 inputs: 'x', 'ids'" in refusal(DataError, tmp_path / "c.npy", [X, IDS])
    reader = open_reader(str(tmp_path / "c.npy"), [])
    assert sample_specs(reader) == [TensorSpec("input", "float32", (1, 3, 4))]
    assert reader.description == "npy c.npy, 3 samples"


def test_npy_stack_in_fortran_order_and_truncated(tmp_path):
    values = np.asfortranarray(numbers(3, 3, 4))
    np.save(tmp_path / "c.npy", values)
    feeds = [feed["x"] for feed in open_reader(str(tmp_path / "c.npy"), [X])]
    np.testing.assert_array_equal(np.concatenate(feeds), values)
    assert all(feed.flags.c_contiguous and type(feed) is np.ndarray for feed in feeds)
    data = (tmp_path / "c.npy").read_bytes()
    (tmp_path / "c.npy").write_bytes(data[:-5])
    assert "c.npy is truncated: it declares 144 bytes and has 139" in refusal(DataError, tmp_path / "c.npy", [X])


def test_npy_folder(tmp_path):
    samples = numbers(3, 3, 4)
    for index in (2, 0, 1):
        np.save(tmp_path / f"{index}.npy", samples[index] if index else samples[:1])
    (tmp_path / "._0.npy").write_bytes(b"left by a file manager")
    (tmp_path / "notes.txt").write_text("irrelevant")
    reader = open_reader(str(tmp_path), [X])
    assert reader.total == 3
    assert reader.files() == [tmp_path / f"{index}.npy" for index in range(3)]
    assert reader.description == f"npy folder {tmp_path.name}, 3 samples"
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in reader]), samples)


def test_npy_folder_errors_name_the_file(tmp_path):
    np.save(tmp_path / "0.npy", numbers(3, 4))
    np.save(tmp_path / "1.npy", numbers(3, 5))
    text = refusal(DataError, tmp_path, [X])
    assert "sample 1 (1.npy) has shape 1x3x5, expected Nx3x4" in text
    assert "Make a subfolder" in refusal(DataError, tmp_path, [X, IDS])
    (tmp_path / "1.npy").write_bytes(b"")
    assert "1.npy is not a readable .npy array" in refusal(DataError, tmp_path, [X])
    (tmp_path / "1.npy").unlink()
    reader = open_reader(str(tmp_path), [X])
    (tmp_path / "0.npy").unlink()
    with pytest.raises(DataError, match=r"cannot read .*0\.npy"):
        list(reader)


def test_npz_folder(tmp_path):
    samples = numbers(3, 3, 4)
    for index in range(3):
        np.savez(tmp_path / f"{index}.npz", x=np.asfortranarray(samples[index]), ids=np.arange(7)[np.newaxis])
    reader = open_reader(str(tmp_path), [X, IDS])
    feeds = list(reader)
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in feeds]), samples)
    assert {feed["ids"].shape for feed in feeds} == {(1, 7)}
    assert reader.description == f"npz folder {tmp_path.name}, 3 samples"
    assert len(reader.files()) == 3
    np.savez(tmp_path / "1.npz", x=samples[0])
    assert "sample 1 (1.npz) does not name the model's inputs: missing 'ids'" in refusal(DataError, tmp_path, [X, IDS])
    (tmp_path / "1.npz").write_bytes(b"PK\x03\x04")
    assert "1.npz is truncated or no .npz archive" in refusal(DataError, tmp_path, [X, IDS])


def test_npz_folder_without_known_inputs_keeps_to_the_first_names(tmp_path):
    np.savez(tmp_path / "0.npz", a=numbers(1, 2))
    np.savez(tmp_path / "1.npz", b=numbers(1, 2))
    assert "sample 1 (1.npz)" in refusal(DataError, tmp_path, [])


@pytest.mark.parametrize("known", [True, False])
def test_subfolder_for_each_input(tmp_path, known):
    for name, array in (("x", numbers(1, 3, 4)), ("ids", np.zeros((1, 7), np.int64))):
        (tmp_path / name).mkdir()
        for index in range(2):
            np.save(tmp_path / name / f"{index}.npy", array + index)
    reader = open_reader(str(tmp_path), [X, IDS] if known else [])
    assert [int(feed["ids"][0, 0]) for feed in reader] == [0, 1]
    assert reader.total == 2
    assert len(reader.files()) == 4
    np.save(tmp_path / "x" / "2.npy", numbers(1, 3, 4))
    assert "differ in '2.npy'" in refusal(DataError, tmp_path, [X, IDS] if known else [])
    assert "missing 'y', unexpected" in refusal(DataError, tmp_path, [TensorSpec("y", "float32", ("N",))])


def test_mixed_and_empty_folders(tmp_path):
    assert "holds no calibration data" in refusal(DataError, tmp_path, [X])
    np.save(tmp_path / "a.npy", numbers(3, 4))
    save_image(tmp_path / "a.png", 8, 8)
    assert len(list(open_reader(str(tmp_path), [X]))) == 1
    np.savez(tmp_path / "a.npz", x=numbers(3, 4))
    assert "holds both .npz and .npy" in refusal(DataError, tmp_path, [X])


# Images


def save_image(path: Path, width: int, height: int, colour: tuple[int, int, int] = (255, 128, 0)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


def test_image_folder_with_imagenet_defaults(tmp_path):
    save_image(tmp_path / "b" / "2.jpg", 40, 20)
    save_image(tmp_path / "a" / "1.PNG", 10, 30)
    save_image(tmp_path / "a" / "3.webp", 9, 9)
    save_image(tmp_path / "4.bmp", 16, 16)
    reader = open_reader(str(tmp_path), [PICTURE])
    names = [path.relative_to(tmp_path).as_posix() for path in reader.files()]
    assert names == ["4.bmp", "a/1.PNG", "a/3.webp", "b/2.jpg"]
    assert reader.total == 4
    feeds = [feed["images"] for feed in reader]
    assert {(feed.shape, feed.dtype.name) for feed in feeds} == {((1, 3, 8, 8), "float32")}
    pixels = (np.array([255, 128, 0]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(feeds[0][0, :, 3, 3], pixels, rtol=1e-5)


def test_a_fixed_batch_takes_as_many_images(tmp_path):
    for number in range(7):
        save_image(tmp_path / f"{number}.png", 12, 12, (number * 30,) * 3)
    fixed = TensorSpec("images", "float32", (3, 3, 8, 8))
    reader = open_reader(str(tmp_path), [fixed])
    assert (reader.total, reader.rest) == (2, 1)
    assert [file.stem for file in reader.files()] == list("012345")
    assert ", 2 samples of 3 images (1 left over); shorter side 9, crop 8x8" in reader.description
    feeds = [feed["images"] for feed in reader]
    assert [feed.shape for feed in feeds] == [(3, 3, 8, 8)] * 2
    alone = [feed["images"] for feed in open_reader(str(tmp_path), [PICTURE])]
    np.testing.assert_array_equal(np.concatenate(feeds), np.concatenate(alone)[:6])
    some = open_reader(str(tmp_path), [fixed], limit=1)
    assert [file.stem for file in some.files()] == list("012")
    assert some.files() == data_files(str(tmp_path), 1, images_per_sample=3)


def test_a_fixed_batch_has_images_of_one_size_and_enough_of_them(tmp_path):
    save_image(tmp_path / "0.png", 12, 12)
    open_sizes = TensorSpec("images", "float32", (2, 3, "H", "W"))
    text = refusal(DataError, tmp_path, [open_sizes], ImageOptions(resize=12))
    assert "holds 1 images, fewer than the 2 of the input's fixed batch" in text
    save_image(tmp_path / "1.png", 14, 12)
    text = refusal(DataError, tmp_path, [open_sizes], ImageOptions(resize=12))
    assert "1.png becomes 3x12x14, the first of its batch 3x12x12" in text
    assert "image option crop" in text


def test_image_geometry_is_shorter_side_then_centre(tmp_path):
    gradient = np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1))
    Image.fromarray(np.stack([gradient] * 3, axis=-1)).save(tmp_path / "a.png")
    options = ImageOptions(resize=16, crop=8, mean=(0.0,), std=(1.0,), scale=1.0)
    (feed,) = open_reader(str(tmp_path), [PICTURE], options)
    # 64x32 becomes 32x16, of which columns 12 to 19 are kept.
    row = feed["images"][0, 0, 0]
    np.testing.assert_allclose(row, np.arange(12, 20) * 8 + 2, atol=2)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("color", "first"), [("rgb", 200), ("bgr", 50), ("gray", 124)])
def test_image_layout_and_colour(tmp_path, layout, color, first):
    save_image(tmp_path / "a.png", 12, 12, (200, 100, 50))
    channels = 1 if color == "gray" else 3
    shape = (1, channels, 8, 8) if layout == "nchw" else (1, 8, 8, channels)
    options = ImageOptions(crop=8, layout=layout, color=color, mean=(0.0,), std=(1.0,), scale=1.0)
    (feed,) = open_reader(str(tmp_path), [TensorSpec("images", "float32", shape)], options)
    assert feed["images"].shape == shape
    assert feed["images"][0, 0, 0, 0] == first


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_images_as_bytes_are_the_file_s_pixels(tmp_path, layout):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shape = (1, 8, 8, 3) if layout == "nhwc" else (1, 3, 8, 8)
    options = ImageOptions(resize=8, crop=8, layout=layout, as_bytes=True)
    reader = open_reader(str(tmp_path), [TensorSpec("x", "uint8", shape)], options)
    (feed,) = reader
    assert feed["x"].dtype == np.uint8
    assert np.array_equal(feed["x"][0] if layout == "nhwc" else feed["x"][0].transpose(1, 2, 0), pixels)
    assert reader.description.endswith("shorter side 8, crop 8x8, bytes")


def test_floats_for_an_input_of_bytes_are_told_what_to_save(tmp_path):
    np.savez(tmp_path / "c.npz", x=np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(DataError) as caught:
        list(open_reader(str(tmp_path / "c.npz"), [TensorSpec("x", "uint8", (1, 8, 8, 3))]))
    assert caught.value.hint == "The compiled model takes bytes: save the images before they are scaled and normalised."


def test_image_defaults_follow_the_input(tmp_path):
    save_image(tmp_path / "a.png", 30, 20, (255, 255, 255))
    (gray,) = open_reader(str(tmp_path), [TensorSpec("i", "float32", (1, 1, 8, 12))])
    assert gray["i"].shape == (1, 1, 8, 12)
    np.testing.assert_allclose(gray["i"], (1 - 0.449) / 0.226, rtol=1e-5)
    (last,) = open_reader(str(tmp_path), [TensorSpec("i", "float32", ("N", 8, 8, 3))])
    np.testing.assert_allclose(last["i"][0, 0, 0], [2.2489, 2.4286, 2.64], rtol=1e-3)
    (bgr,) = open_reader(str(tmp_path), [PICTURE], ImageOptions(color="bgr"))
    np.testing.assert_allclose(bgr["images"][0, :, 0, 0], [2.64, 2.4286, 2.2489], rtol=1e-3)


def test_image_sizes_unknown(tmp_path):
    save_image(tmp_path / "a.png", 30, 20)
    free = TensorSpec("i", "float32", ("N", 3, "H", "W"))
    for inputs in ([free], []):
        text = refusal(UsageError, tmp_path, inputs)
        assert "resize 256 and crop 224" in text
    (feed,) = open_reader(str(tmp_path), [free], ImageOptions(resize=10))
    assert feed["i"].shape == (1, 3, 10, 15)
    assert sample_specs(open_reader(str(tmp_path), [], ImageOptions(crop=16))) == [
        TensorSpec("input", "float32", (1, 3, 16, 16))
    ]


def test_image_errors(tmp_path):
    save_image(tmp_path / "a.png", 30, 20)
    assert "image option resize" in refusal(DataError, tmp_path, [PICTURE], ImageOptions(crop=64))
    assert "sample 0 (a.png) has shape 1x3x4x4" in refusal(
        DataError, tmp_path, [PICTURE], ImageOptions(resize=4, crop=4)
    )
    assert "cannot feed input 'x' of shape Nx3x4" in refusal(DataError, tmp_path, [X])
    assert "cannot feed a model with 2 inputs" in refusal(DataError, tmp_path, [PICTURE, IDS])
    whole = (tmp_path / "a.png").read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not an image", whole[:20] + b"\xff" * 20 + whole[40:]):
        (tmp_path / "a.png").write_bytes(broken)
        assert f"image {tmp_path / 'a.png'} cannot be read" in refusal(DataError, tmp_path, [PICTURE])
    save_image(tmp_path / "a.png", 30, 20)
    assert "is a single image" in refusal(DataError, tmp_path / "a.png", [PICTURE])


@pytest.mark.parametrize("color", ["gray", "rgb"])
def test_pixels_of_more_than_8_bits_are_refused(tmp_path, color):
    Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)).save(tmp_path / "a.png")
    text = refusal(DataError, tmp_path, [PICTURE], ImageOptions(color=color))
    assert f"image {tmp_path / 'a.png'} cannot be read" in text
    assert "are not 8 bits: save it with 8 bits, or give a .npz" in text


def half_red(path: Path, exif: bytes) -> None:
    """16x8, red on the left, black on the right."""
    picture = Image.new("RGB", (16, 8))
    picture.paste((255, 0, 0), (0, 0, 8, 8))
    picture.save(path, exif=exif)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize(("orientation", "red"), [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")])
def test_images_are_turned_upright_by_exif(tmp_path, suffix, orientation, red):
    exif = Image.Exif()
    exif[0x0112] = orientation
    half_red(tmp_path / f"a{suffix}", exif.tobytes())
    free = TensorSpec("i", "float32", ("N", 3, "H", "W"))
    (feed,) = open_reader(str(tmp_path), [free], ImageOptions(mean=(0.0,), std=(1.0,), layout="nchw"))
    pixels = feed["i"][0, 0]
    assert pixels.shape == ((8, 16) if red in ("left", "right") else (16, 8))
    height, width = pixels.shape
    halves = {
        "left": pixels[:, : width // 2],
        "right": pixels[:, width // 2 :],
        "top": pixels[: height // 2],
        "bottom": pixels[height // 2 :],
    }
    assert max(halves, key=lambda half: float(halves[half].mean())) == red


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!", b"Exif\0\0MM\0*\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_unreadable_exif_does_no_harm(tmp_path, suffix, exif):
    half_red(tmp_path / f"a{suffix}", exif)
    (feed,) = open_reader(str(tmp_path), [PICTURE])
    assert feed["images"].shape == (1, 3, 8, 8)


def test_image_options_are_checked():
    for options, words in (
        ({"layout": "chw"}, "layout 'chw'"),
        ({"color": "cmyk"}, "color 'cmyk'"),
        ({"resize": 0}, "resize 0"),
        ({"mean": (0.1, 0.2)}, "2 numbers"),
        ({"std": (0.0,)}, "std is not positive"),
    ):
        with pytest.raises(UsageError, match=words):
            ImageOptions(**options)


def test_pillow_is_asked_for_only_by_images(tmp_path, monkeypatch):
    save_image(tmp_path / "images" / "a.png", 8, 8)
    np.save(tmp_path / "c.npy", numbers(2, 3, 4))
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert open_reader(str(tmp_path / "c.npy"), [X]).total == 2
    assert "pip install pillow" in refusal(RequirementError, tmp_path / "images", [PICTURE])


# Polygraphy


def encoded(array: np.ndarray, form: str = "now") -> dict[str, object]:
    data = npy_bytes(array)
    if form == "legacy":
        text = base64.b64encode(data).decode()
        return {"array": text, "__polygraphy_encoded_ndarray": "polygraphy_serialized_json_type"}
    if form == "latin-1":
        return {"array": data.decode("latin-1"), "polygraphy_class": "ndarray"}
    if form == "npz":
        stream = io.BytesIO()
        np.savez(stream, array)
        data = stream.getvalue()
    node = {"array": base64.b64encode(data).decode(), "polygraphy_class": "ndarray"}
    return {"values": node, "polygraphy_class": "LazyArray"} if form == "lazy" else node


@pytest.mark.parametrize("form", ["now", "legacy", "latin-1", "npz", "lazy"])
def test_polygraphy_arrays_of_all_versions(tmp_path, form):
    samples = numbers(3, 1, 3, 4)
    (tmp_path / "inputs.json").write_text(json.dumps([{"x": encoded(s, form)} for s in samples]))
    reader = open_reader(str(tmp_path / "inputs.json"), [X])
    assert reader.total is None
    assert reader.description == "Polygraphy JSON inputs.json"
    assert reader.files() == [tmp_path / "inputs.json"]
    for _ in range(2):
        np.testing.assert_array_equal(np.stack([feed["x"] for feed in reader]), samples)


def test_polygraphy_fortran_arrays_and_single_feeds(tmp_path):
    sample = np.asfortranarray(numbers(1, 3, 4))
    (tmp_path / "inputs.json").write_text("\n " + json.dumps({"x": encoded(sample)}))
    (feed,) = open_reader(str(tmp_path / "inputs.json"), [X])
    np.testing.assert_array_equal(feed["x"], sample)


def test_polygraphy_run_results(tmp_path):
    iterations = [
        {
            "outputs": {"x": encoded(sample, "lazy")},
            "runtime": 0.1,
            "runner_name": "onnxrt",
            "polygraphy_class": "IterationResult",
        }
        for sample in numbers(2, 1, 3, 4)
    ]
    document = {"lst": [["onnxrt", iterations]], "polygraphy_class": "RunResults"}
    (tmp_path / "results.json").write_text(json.dumps(document))
    assert len(list(open_reader(str(tmp_path / "results.json"), [X]))) == 2


def test_polygraphy_folder(tmp_path):
    for index, sample in enumerate(numbers(3, 1, 3, 4)):
        (tmp_path / f"{index:010}.json").write_text(json.dumps({"x": encoded(sample)}))
    reader = open_reader(str(tmp_path), [X])
    assert len(list(reader)) == len(reader.files()) == 3


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("[", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "hold no sample"),
        ("[1, 2]", "is not a list of feeds"),
        ('[{"x": [1, 2]}]', "input 'x', sample 0 of"),
        ('[{"x": {"tensor": "gAJ=", "polygraphy_class": "Tensor"}}]', "pickled torch.Tensor"),
        ('[{"x": {"array": "AAAA", "polygraphy_class": "ndarray"}}]', "not a readable .npy array"),
        ('[{"x": {"array": "UEsDBA==", "polygraphy_class": "ndarray"}}]', "truncated or no .npz"),
        ('[{"polygraphy_class": "ndarray"}]', "missing 'x'"),
    ],
)
def test_polygraphy_errors(tmp_path, document, words):
    (tmp_path / "inputs.json").write_text(document)
    text = refusal(DataError, tmp_path / "inputs.json", [X])
    assert words in text
    assert "inputs.json" in text


def test_polygraphy_truncated_array(tmp_path):
    node = {"array": base64.b64encode(npy_bytes(numbers(1, 3, 4))[:-8]).decode(), "polygraphy_class": "ndarray"}
    (tmp_path / "inputs.json").write_text(json.dumps([{"x": node}]))
    assert "it declares 48 bytes and has 40" in refusal(DataError, tmp_path / "inputs.json", [X])


def test_json_above_two_gibibytes_is_refused(tmp_path):
    path = tmp_path / "inputs.json"
    with path.open("wb") as stream:
        stream.write(b"[")
        stream.truncate((2 << 30) + 1)
    assert "larger than 2 GiB" in refusal(DataError, path, [X])


# Callables


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Write a module of its own into the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"data_{abs(hash(request.node.nodeid))}"

    def write(text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "body",
    [
        "yield {'x': np.full((1, 3, 4), i, np.float32), 'ids': np.full((1, 7), i)}",
        "yield np.full((3, 4), i, np.float32), np.full((7,), i)",
        "yield {'x': np.full((3, 4), i).tolist(), 'ids': [[i] * 7]} if False else "
        "(np.full((1, 3, 4), float(i)), [[i] * 7])",
    ],
)
def test_callable(module, body):
    name = module(f"import numpy as np\ndef samples():\n    for i in range(3):\n        {body}\n")
    reader = open_reader(f"{name}:samples", [X, IDS])
    assert reader.total is None
    assert reader.files() == []
    assert reader.description == f"callable {name}:samples"
    for _ in range(2):
        feeds = list(reader)
        assert [int(feed["ids"][0, 0]) for feed in feeds] == [0, 1, 2]
        assert {feed["x"].shape for feed in feeds} == {(1, 3, 4)}


def test_a_generator_gives_its_samples_once(module):
    name = module(
        "import numpy as np\nmade = (np.full((1, 3, 4), float(i)) for i in range(3))\ndef samples():\n    return made\n"
    )
    reader = open_reader(f"{name}:samples", [X])
    next(iter(reader))
    with pytest.raises(DataError, match="a generator that was used already"):
        next(iter(reader))


def test_callable_may_reuse_its_buffer(module):
    name = module(
        "import numpy as np\nb = np.zeros((1, 3, 4), np.float32)\n"
        "def samples():\n    for i in range(3):\n        b[:] = i\n        yield b\n"
    )
    feeds = list(open_reader(f"{name}:samples", [X]))
    assert [float(feed["x"][0, 0, 0]) for feed in feeds] == [0, 1, 2]


def test_callable_without_known_inputs(module):
    name = module("import numpy as np\none = lambda: [np.ones(2)]\ntwo = lambda: [(np.ones(2), np.ones(3))]\n")
    assert [s.name for s in sample_specs(open_reader(f"{name}:one", []))] == ["input"]
    assert [s.name for s in sample_specs(open_reader(f"{name}:two", []))] == ["input0", "input1"]


def test_callable_of_torch_tensors(module):
    pytest.importorskip("torch")
    name = module(
        "import torch\ndef good():\n    yield torch.ones(1, 3, 4)\n"
        "def bad():\n    yield torch.ones(1, 3, 4)\n    yield torch.ones(1, 3, 4, requires_grad=True)\n"
    )
    (feed,) = open_reader(f"{name}:good", [X])
    assert type(feed["x"]) is np.ndarray
    assert "failed at sample 1: RuntimeError" in refusal(DataError, f"{name}:bad", [X])


@pytest.mark.parametrize(
    ("text", "attribute", "words"),
    [
        ("import no_such_package", "f", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise ValueError('first\\nsecond')", "f", "importing {name} failed: ValueError: first second\n"),
        ("import sys; sys.exit(3)", "f", "SystemExit: 3"),
        ("def samples(): pass", "sample", "Did you mean 'samples'?"),
        ("samples = [1]", "samples", "has no callable 'samples'"),
        ("def f(): pass", "f", "failed at sample 0: TypeError"),
        ("def f():\n    yield [[0.0] * 4] * 3\n    1 / 0", "f", "of '{name}:f' has 3 value(s) for 1 input(s)"),
        ("def f():\n    raise KeyError('k')\n    yield", "f", "failed at sample 0: KeyError: 'k'"),
        ("def f():\n    return iter(())", "f", "hold no sample"),
        ("def f():\n    yield {}", "f", "missing 'x'"),
        ("def f():\n    yield {'x': 'text'}", "f", "which no input takes"),
        ("def f():\n    yield {'x': object()}", "f", "which no input takes"),
    ],
)
def test_callable_errors(module, text, attribute, words):
    name = module(text)
    assert words.format(name=name) in refusal(DataError, f"{name}:{attribute}", [X])


def test_missing_module_and_path(module, tmp_path):
    module("")
    assert "ModuleNotFoundError" in refusal(DataError, "no_such_module_here:samples", [X])
    assert "'missing.npz' does not exist" in refusal(DataError, "missing.npz", [X])
    (tmp_path / "a:b").mkdir()
    assert "folder a:b holds no calibration data" in refusal(DataError, "a:b", [X])


def test_files_of_other_kinds(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"")
    assert "a.npz is empty" in refusal(DataError, tmp_path / "a.npz", [X])
    (tmp_path / "a.csv").write_text("1,2,3")
    assert "is neither .npz, .npy nor JSON" in refusal(DataError, tmp_path / "a.csv", [X])
    np.savez(tmp_path / "b.npz", x=numbers(2, 3, 4))
    (tmp_path / "b.npz").rename(tmp_path / "b.data")
    assert open_reader(str(tmp_path / "b.data"), [X]).total == 2


# The rest


def test_find_beside(tmp_path):
    model = tmp_path / "model.pt"
    assert find_beside(model) is None
    (tmp_path / "calibration").mkdir()
    assert find_beside(model) == tmp_path / "calibration"
    (tmp_path / "calibration.json").write_text("[]")
    assert find_beside(model) == tmp_path / "calibration.json"
    (tmp_path / "calibration.npz").write_bytes(b"")
    assert find_beside(model) == tmp_path / "calibration.npz"


def test_random_reader():
    inputs = [
        TensorSpec("x", "float32", (1, 300)),
        TensorSpec("r", "float16", (1, 300)),
        TensorSpec("ids", "int64", (1, 300)),
        TensorSpec("tokens", "int32", (1, 300)),
        TensorSpec("mask", "bool", (1, 300)),
    ]
    reader = random_reader(inputs, 3, 7, {"r": (2.0, 3.0), "tokens": (5, 8)})
    first, second = list(reader), list(reader)
    assert reader.total == len(first) == 3
    assert reader.files() == []
    assert reader.description == "3 random samples, seed 7"
    for a, b in zip(first, second, strict=True):
        for spec in inputs:
            assert a[spec.name].dtype == np.dtype(spec.dtype)
            np.testing.assert_array_equal(a[spec.name], b[spec.name])
    assert not np.array_equal(first[0]["x"], first[1]["x"])
    assert abs(first[0]["x"].std() - 1) < 0.2
    assert 2 <= first[0]["r"].min() < first[0]["r"].max() <= 3
    assert set(first[0]["ids"].flat) == {0, 1}
    assert set(first[0]["tokens"].flat) == {5, 6, 7}
    assert set(first[0]["mask"].flat) == {True, False}
    longer = list(random_reader(inputs, 5, 7, {"r": (2.0, 3.0), "tokens": (5, 8)}))
    np.testing.assert_array_equal(longer[1]["x"], first[1]["x"])
    assert not np.array_equal(next(iter(random_reader(inputs, 1, 8, {})))["x"], first[0]["x"])


@pytest.mark.parametrize(
    ("inputs", "count", "seed", "ranges", "words"),
    [
        ([X], 1, 0, {}, "symbolic shape Nx3x4"),
        ([TensorSpec("x", "float32", (1,))], 0, 0, {}, "0 random samples"),
        ([TensorSpec("x", "float32", (1,))], 1, -1, {}, "seed -1"),
        ([TensorSpec("x", "float32", (1,))], 1, 0, {"xs": (0, 1)}, "names 'xs'"),
        ([TensorSpec("x", "float32", (1,))], 1, 0, {"x": (1, 1)}, "is empty"),
        ([TensorSpec("x", "float32", (1,))], 1, 0, {"x": (0, float("inf"))}, "is empty"),
        ([TensorSpec("x", "int8", (1,))], 1, 0, {"x": (0, 200)}, "beyond int8"),
        ([TensorSpec("x", "bfloat16", (1,))], 1, 0, {}, "dtype bfloat16"),
    ],
)
def test_random_reader_errors(inputs, count, seed, ranges, words):
    with pytest.raises(UsageError, match=words):
        random_reader(inputs, count, seed, ranges)
