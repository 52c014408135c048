"""Feeds in the JSON of NVIDIA's Polygraphy (polygraphy/json/serde.py), old and new.

An array is {"array": base64 of a .npy, "polygraphy_class": "ndarray"}. Older versions marked it
with the key `__polygraphy_encoded_ndarray`, wrote the bytes as Latin-1, or a .npz of one array.
`RunResults` (`--save-outputs`) hold feeds below lst / runner / iterations / outputs.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpuopt.calibration.readers import npy
from gpuopt.calibration.readers.base import KINDS_HINT, Inputs, RawSample, SampleReader, label, reading
from gpuopt.calibration.readers.checks import Array
from gpuopt.errors import DataError
from gpuopt.shapes import TensorSpec

_LARGEST_JSON = 2 << 30


class PolygraphyReader(SampleReader):
    """One document, or those of a folder; each may hold any number of feeds."""

    def __init__(self, path: Path, paths: Sequence[Path], inputs: Inputs, limit: int | None) -> None:
        source = f"Polygraphy JSON {label(path)}"
        if path.is_dir():
            source = f"Polygraphy JSON folder {label(path)}, {len(paths)} files"
        super().__init__(source, inputs, None, limit)
        self._paths = list(paths)
        for one in paths:
            if one.stat().st_size > _LARGEST_JSON:
                raise DataError(
                    f"{one} is larger than 2 GiB, and JSON has to be read whole",
                    "Save the samples as a .npz keyed by input name, which is streamed.",
                )

    def files(self) -> list[Path]:
        """All files: which of them a limit leaves unread shows only in reading."""
        return list(self._paths)

    def _samples(self) -> Iterator[RawSample]:
        for path in self._paths:
            with reading(path):
                text = path.read_bytes()
            try:
                document = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} is not valid JSON: {error}", KINDS_HINT) from error
            for index, feed in enumerate(_feeds(document)):
                yield (
                    {
                        name: _decode(node, self._inputs.get(name), f"input '{name}', sample {index} of {path}")
                        for name, node in _arrays(feed, path).items()
                    },
                    path.name,
                )


def _feeds(document: Any) -> list[Any]:
    """The feeds of a Polygraphy document: a list, one feed, or the first runner of `RunResults`."""
    if isinstance(document, dict) and isinstance(document.get("lst"), list):
        document = document["lst"]
        first = document[0] if document else None
        if isinstance(first, list) and len(first) == 2 and isinstance(first[1], list):
            document = first[1]
    return document if isinstance(document, list) else [document]


def _arrays(feed: Any, path: Path) -> dict[str, Any]:
    """The encoded arrays of a feed by input name, without the keys that mark Polygraphy's classes."""
    if isinstance(feed, dict) and "runner_name" in feed and "outputs" in feed:  # An IterationResult.
        feed = feed["outputs"]
    if not isinstance(feed, dict):
        raise DataError(
            f"{path} is not a list of feeds, each with arrays by input name",
            "Write it with 'polygraphy run --save-inputs', or save a .npz.",
        )
    return {
        name: node
        for name, node in feed.items()
        if name != "polygraphy_class" and not name.startswith("__polygraphy_encoded_")
    }


def _decode(node: Any, spec: TensorSpec | None, where: str) -> Array:
    if isinstance(node, dict) and "values" in node:  # Polygraphy's LazyArray.
        node = node["values"]
    if isinstance(node, dict) and "tensor" in node:
        raise DataError(
            f"{where} is a pickled torch.Tensor",
            "Let the data loader yield numpy arrays (tensor.numpy()) and save again.",
        )
    text = node.get("array") if isinstance(node, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where} is not an array that Polygraphy wrote", KINDS_HINT)
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = text.encode("latin-1", errors="replace")
    if not data.startswith(npy.NPZ_START):
        return npy.read_whole(io.BytesIO(data), len(data), spec, where)
    with npy.open_archive(io.BytesIO(data), where) as archive:
        infos = list(npy.members(archive, where).values())
        if len(infos) != 1:
            raise DataError(f"{where} holds {len(infos)} arrays, expected one", npy.DAMAGED_HINT)
        with npy.open_member(archive, infos[0], where) as stream:
            return npy.read_whole(stream, infos[0].file_size, spec, where)
