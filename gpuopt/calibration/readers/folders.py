"""Folders with a sample in each file, or in a row of files: one for each input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gpuopt.calibration.readers import npy
from gpuopt.calibration.readers.base import Inputs, RawSample, SampleReader, label, reading
from gpuopt.calibration.readers.checks import Array, check_names, listed
from gpuopt.errors import DataError


class FolderReader(SampleReader):
    """A sample in each row of files; only the rows that are chosen are kept and ever opened."""

    def __init__(
        self, kind: str, folder: Path, rows: Sequence[tuple[Path, ...]], inputs: Inputs, limit: int | None
    ) -> None:
        super().__init__(f"{kind} folder {label(folder)}", inputs, len(rows), limit)
        self._folder = folder
        self._rows = [rows[position] for position in self._positions]

    def files(self) -> list[Path]:
        return [path for row in self._rows for path in row]

    def _samples(self) -> Iterator[RawSample]:
        for row in self._rows:
            yield self._load(row), self._source(row)

    def _source(self, row: tuple[Path, ...]) -> str:
        """What a row is called in messages."""
        return row[0].name if len(row) > 1 else str(row[0].relative_to(self._folder))

    @abstractmethod
    def _load(self, row: tuple[Path, ...]) -> Mapping[str, Array]:
        """The arrays of one sample."""


class NpzFolder(FolderReader):
    """A .npz for each sample, keyed by input name."""

    def __init__(self, folder: Path, paths: Sequence[Path], inputs: Inputs, limit: int | None) -> None:
        super().__init__("npz", folder, [(path,) for path in paths], inputs, limit)

    def _load(self, row: tuple[Path, ...]) -> Mapping[str, Array]:
        (path,) = row
        feed = {}
        with reading(path), npy.open_archive(path, str(path)) as archive:
            for name, info in npy.members(archive, str(path)).items():
                where = f"array '{name}' of {path}"
                with npy.open_member(archive, info, where) as stream:
                    feed[name] = npy.read_whole(stream, info.file_size, self._inputs.get(name), where)
        return feed


class NpyFolder(FolderReader):
    """A .npy for each sample and input; `columns` holds each input's files, named alike."""

    def __init__(self, folder: Path, columns: Mapping[str, Sequence[Path]], inputs: Inputs, limit: int | None) -> None:
        if inputs:
            check_names(columns, inputs, str(folder))
        first, *others = columns
        expected = {path.name for path in columns[first]}
        for name in others:
            odd = sorted(expected ^ {path.name for path in columns[name]})
            if odd:
                raise DataError(
                    f"the subfolders '{first}' and '{name}' of {folder} differ in {listed(odd)}",
                    "Give a sample's files the same name in every input's subfolder.",
                )
        super().__init__("npy", folder, list(zip(*columns.values(), strict=True)), inputs, limit)
        self._names = list(columns)

    def _load(self, row: tuple[Path, ...]) -> Mapping[str, Array]:
        feed = {}
        for name, path in zip(self._names, row, strict=True):
            with reading(path):
                feed[name] = npy.map_file(path)
        return feed
