"""The bundle that a file lies in: what its manifest, report, recipe and reference tell of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuopt import bundle, reference
from gpuopt.engine_record import profile_records
from gpuopt.errors import GpuoptError, StorageError
from gpuopt.inspection.model import OriginFacts, ProfileFacts
from gpuopt.recipe import load, resolve
from gpuopt.report import model
from gpuopt.report.model import EngineReport, Report
from gpuopt.shapes import Profile


@dataclass(frozen=True)
class Home:
    """A bundle, as far as it can be read.

    Attributes:
        report: None: there is none, as in a folder of `gpuopt quantize`, or it cannot be read.
        profiles: of the reference; empty where there is none.
        io_formats: dtype and layout that the recipe asks for, by tensor.
        problems: what cannot be read, one line each.
    """

    folder: Path
    manifest: dict[str, Any]
    report: Report | None
    profiles: tuple[Profile, ...]
    io_formats: dict[str, str]
    problems: tuple[str, ...]

    def hash_fits(self, name: str, sha256: str) -> bool:
        """Whether the manifest lists a file with this hash."""
        return bool(self.manifest["files"].get(name) == sha256)

    def engine(self, name: str) -> EngineReport | None:
        """The report's line of a file."""
        lines = self.report.engines if self.report is not None else []
        return next((line for line in lines if line.file == name), None)

    def profile_facts(self) -> tuple[ProfileFacts, ...]:
        return profile_records(self.profiles)

    def origin(self) -> OriginFacts:
        """Where the bundle comes from; what its manifest lacks is empty."""
        model, here = self._part("model"), self._part("environment")
        exported = self.report.facts("export") if self.report is not None else {}
        return OriginFacts(
            model_path=_stated(model.get("path")),
            model_factory=_stated(model.get("factory")),
            model_kind=_stated(model.get("kind")),
            model_sha256=_stated(model.get("sha256")),
            exporter=_stated(exported.get("exporter")),
            gpuopt_version=plain(self.manifest.get("gpuopt_version", "")),
            created=plain(self.manifest.get("created", "")),
            command=tuple(map(plain, _list(self.manifest.get("command")))),
            python=plain(here.get("python", "")),
            platform=plain(here.get("platform", "")),
            packages={plain(name): plain(version) for name, version in _mapping(here.get("packages")).items()},
            gpus=tuple(plain(_mapping(gpu).get("name", "")) for gpu in _list(here.get("gpus"))),
        )

    def _part(self, key: str) -> dict[str, Any]:
        return _mapping(self.manifest.get(key))


def of_bundle(folder: Path) -> Home:
    """Read what a bundle says of itself.

    Raises:
        StorageError: its manifest cannot be read.
    """
    manifest = bundle.read_manifest(folder)
    problems = []
    report: Report | None = None
    if (folder / bundle.REPORT_FILE).is_file():
        try:
            report = read_report(folder)
        except StorageError as error:
            problems.append(error.message)
    profiles: tuple[Profile, ...] = ()
    if (folder / "reference").is_dir():
        try:
            profiles = reference.load(folder / "reference").profiles
        except GpuoptError as error:
            problems.append(error.message)
    formats: dict[str, str] = {}
    if (folder / "recipe.yaml").is_file():
        try:
            asked = resolve(load(folder / "recipe.yaml")).build.io_formats
            formats = dict(asked) if isinstance(asked, dict) else {}
        except GpuoptError as error:
            problems.append(error.message)
    return Home(folder, manifest, report, profiles, formats, tuple(problems))


def of_file(path: Path) -> Home | None:
    """The bundle whose manifest lists the file; None: it lies in none."""
    try:
        if path.name in bundle.read_manifest(path.parent)["files"]:
            return of_bundle(path.parent)
    except StorageError:
        pass
    return None


def read_report(folder: Path) -> Report:
    """A bundle's report.

    Raises:
        StorageError: it cannot be read.
    """
    return model.read_report(folder / bundle.REPORT_FILE)


def plain(value: object) -> str:
    """A value as text that JSON can hold: names on the disk, and so command lines, need not be UTF-8."""
    return str(value).encode(errors="replace").decode()


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _stated(value: Any) -> str | None:
    return plain(value) if isinstance(value, str) else None
