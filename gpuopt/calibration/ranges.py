"""The ranges file: readable, editable, diffable, reusable. Calibration caches of TensorRT are read as well.

    {
      "version": 1,
      "method": "entropy",                                     and whatever else is known of their origin
      "tensors": {
        "image": {"low": -2.1, "high": 2.1, "method": "entropy"},
        ...                                                    a tensor a line, in the graph's order
      }
    }

A cache of TensorRT is text: a line such as `TRT-8503-EntropyCalibration2`, then `name: 3c010a14` lines whose
last word is the scale as the hexadecimal digits of an IEEE 754 single-precision number, the largest first
(TensorRT's documentation, "INT8 calibration table"). The scale is the range's end divided by 127.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuopt.calibration.collectors import TensorRange
from gpuopt.errors import DataError
from gpuopt.storage import storage_errors, write_text

RANGES_FILE = "ranges.json"
METHODS_TO_CHOOSE_FROM = ("minmax", "entropy", "mse")
"""What `auto` decides between; one pass over the data gives all of them."""
EDITED = "edited"
"""The method of a range that states none."""

_VERSION = 1
_LEVELS = 127
_MOST_BYTES = 64 << 20
_KEYS = ("low", "high", "method")
_CACHE_HEADER = re.compile(r"TRT-(\d+)-(\w+)")
_CACHE_SCALE = re.compile(r"[0-9a-fA-F]{1,8}")
UNNAMED = "(Unnamed "
"""How TensorRT's own names begin, which it gives to tensors without one: no ONNX graph has them."""


@dataclass(frozen=True)
class RangesFile:
    """What a file says.

    Attributes:
        ranges: by tensor name, in the file's order.
        origin: one line for the report.
        equalized: how the graph's channels were evened out before these ranges were found; empty: not at all.
    """

    ranges: Mapping[str, TensorRange]
    origin: str
    equalized: str = ""


def candidate_file(method: str) -> str:
    """Name of the file with one method's ranges, where the choice is still open."""
    return f"ranges.{method}.json"


def save(path: Path, ranges: Mapping[str, TensorRange], about: Mapping[str, Any]) -> None:
    """Write ranges by tensor name, in the graph's order, a line each, with what they came from."""
    head = json.dumps({"version": _VERSION, **about}, indent=2, allow_nan=False)[: -len("\n}")]
    lines = [
        f"    {json.dumps(name)}: " + json.dumps({"low": r.low, "high": r.high, "method": r.method}, allow_nan=False)
        for name, r in ranges.items()
    ]
    body = ",\n".join(lines)
    write_text(path, f'{head},\n  "tensors": {{\n{body}\n  }}\n}}\n')


def load(path: Path) -> dict[str, TensorRange]:
    """The ranges of a ranges file.

    Raises:
        DataError: it is not one, or a range is reversed or not finite; the message names the line.
    """
    return _tensors(path, _text(path))[0]


def read(path: Path) -> RangesFile:
    """Read a user's file, a ranges file or a calibration cache of TensorRT, told apart by content.

    Raises:
        DataError: it is neither, or something in it is wrong; the message names the line.
        StorageError: it cannot be read.
    """
    with storage_errors("read", path), path.open("rb") as stream:
        stream.read(1)
    text = _text(path)
    header = _CACHE_HEADER.fullmatch(text.lstrip().partition("\n")[0].strip())
    if header:
        return _cache(path, text, header)
    ranges, document = _tensors(path, text)
    if not ranges:
        raise DataError(f"{path} holds no range", "Give the calibration.ranges.json of a bundle, or calibrate again.")
    known = [str(document[key]) for key in ("method", "data") if isinstance(document.get(key), str)]
    origin = f"ranges file {path.name}" + (f" ({'; '.join(known)})" if known else "")
    return RangesFile(ranges, origin, str(document.get("equalized") or ""))


def _text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MiB")
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise _no_ranges_file(path, error) from error


def _no_ranges_file(path: Path, error: object) -> DataError:
    return DataError(f"{path} is not a ranges file: {error}", "Calibrate again to write it anew.")


def _tensors(path: Path, text: str) -> tuple[dict[str, TensorRange], Mapping[str, Any]]:
    try:
        document = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, text))
        if document["version"] != _VERSION:
            raise ValueError(f"version {document['version']}")
        ranges = {name: _range(name, entry, text) for name, entry in document["tensors"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else error
        raise _no_ranges_file(path, reason) from error
    for name, r in ranges.items():
        if not (math.isfinite(r.low) and math.isfinite(r.high) and r.low <= r.high):
            raise DataError(
                f"{path}{_line(text, name)}: the range of '{name}' is {r.low} to {r.high}",
                "Write finite numbers, low <= high.",
            )
    return ranges, document


def _unique(pairs: list[tuple[str, Any]], text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"'{name}' stands twice{_line(text, name, 1)}")
        found[name] = value
    return found


def _range(name: str, entry: Any, text: str) -> TensorRange:
    where = f"'{name}'{_line(text, name)}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} has no low and high")
    if unknown := [key for key in entry if key not in _KEYS]:
        raise ValueError(f"{where} has an unknown key '{unknown[0]}'; known are {', '.join(_KEYS)}")
    values = []
    for key in ("low", "high"):
        if isinstance(entry.get(key), bool) or not isinstance(entry.get(key), (int, float)):
            raise ValueError(f"{where}: '{key}' is missing or no number")
        values.append(float(entry[key]))
    return TensorRange(values[0], values[1], str(entry.get("method", EDITED)))


def _line(text: str, name: str, skip: int = 0) -> str:
    """` in line 7`, where the key `name` stands after `skip` others of that name; empty if it is not found."""
    keys = {json.dumps(name), json.dumps(name, ensure_ascii=False)}
    pattern = re.compile("(?:" + "|".join(map(re.escape, keys)) + r")\s*:")
    for match in pattern.finditer(text):
        if skip == 0:
            return f" in line {text.count(chr(10), 0, match.start()) + 1}"
        skip -= 1
    return ""


def _cache(path: Path, text: str, header: re.Match[str]) -> RangesFile:
    version, calibrator = header.groups()
    ranges: dict[str, TensorRange] = {}
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    filled = [(number, line) for number, line in lines if line]
    for number, line in filled[1:]:
        name, colon, digits = line.rpartition(":")
        name, digits = name.strip(), digits.strip()
        if not colon or not name or not _CACHE_SCALE.fullmatch(digits):
            raise DataError(
                f"{path}, line {number}: '{line[:60]}' is no line of a TensorRT calibration cache",
                "Such a line is a tensor's name, a colon and up to eight hexadecimal digits. Is the file truncated?",
            )
        scale = struct.unpack(">f", int(digits, 16).to_bytes(4, "big"))[0]
        if not math.isfinite(scale) or scale < 0:
            raise DataError(
                f"{path}, line {number}: the scale of '{name}' is {scale}", "A scale is finite and not negative."
            )
        if name in ranges and ranges[name].high != scale * _LEVELS:
            raise DataError(f"{path}, line {number}: '{name}' stands twice", "Leave one of the two lines.")
        ranges[name] = TensorRange(-scale * _LEVELS, scale * _LEVELS, f"TensorRT {calibrator}")
    if not ranges:
        raise DataError(f"{path} holds no scale", "The TensorRT calibration cache is empty or truncated.")
    return RangesFile(ranges, f"TensorRT calibration cache {path.name} (TRT-{version}-{calibrator})")
