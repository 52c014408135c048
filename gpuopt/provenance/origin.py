"""What both documents are made from: a bundle's files, what went into them, and what took part.

Nothing in it names the building machine: paths are relative to the bundle, or a file's name alone.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

from gpuopt.artifact import folder_hashes
from gpuopt.recipe import Recipe
from gpuopt.report.model import Report
from gpuopt.storage import sha256_file, sha256_json, storage_errors

CYCLONEDX_FILE = "provenance.cdx.json"
STATEMENT_FILE = "provenance.intoto.json"
REFERENCE_FOLDER = "reference/"
MATERIALS_KEY = "materials"
"""Of the manifest: what went in, so that `gpuopt build` can name it where it is no longer there."""

_PATHS = ("model.path", "calibrate.data", "calibrate.ranges", "accuracy.data", "accuracy.labels", "build.timing_cache")
_IDS = uuid.uuid5(uuid.NAMESPACE_URL, "urn:gpuopt:provenance")


@dataclass(frozen=True)
class Material:
    """A file or folder that a bundle was made from.

    Attributes:
        role: `model`, `calibration data`, `calibration ranges`, `evaluation data`, `labels`, `plugin`.
        name: of the file or folder, without the folders above it; of data from code, `package.module:callable`.
        digest: `sha256` of a file; in-toto's `dirHash` of the files read in a folder; of code none.
        files: how many were read.
    """

    role: str
    name: str
    digest: Mapping[str, str]
    files: int


@dataclass(frozen=True)
class Origin:
    """A bundle and where it comes from.

    Attributes:
        command: `compile`, or `build` for an engine that was added to a bundle.
        files: SHA-256 by name in the bundle: what is deployed, and the reference that verifies it.
        records: SHA-256 of documents that equal runs make equal.
        made: names of the files that the command made itself; the others it took over.
        materials: what the files were made from.
        packages: versions by distribution: those that took part.
        recipe: as it was resolved.
        report: of the run.
    """

    command: Literal["compile", "build"]
    files: Mapping[str, str]
    records: Mapping[str, str]
    made: Collection[str]
    materials: tuple[Material, ...]
    packages: Mapping[str, str]
    recipe: Recipe
    report: Report

    @property
    def deployable(self) -> dict[str, str]:
        """The files without the reference, sorted."""
        return {name: digest for name, digest in sorted(self.files.items()) if not name.startswith(REFERENCE_FOLDER)}

    @property
    def model_name(self) -> str:
        """The model's file name, or its factory."""
        model = self.report.model
        return Path(model.path).name if model.path else model.factory or "model"

    @property
    def started(self) -> str:
        """When the run began, as RFC 3339 in UTC."""
        return _utc(datetime.fromisoformat(self.report.created) - timedelta(seconds=self.report.seconds))

    @property
    def finished(self) -> str:
        """When it ended."""
        return _utc(datetime.fromisoformat(self.report.created))


def purl(package: str, version: str) -> str:
    """The package URL of a Python distribution: `pkg:pypi/torch@2.8.0%2Bcpu`."""
    from urllib.parse import quote

    name = package.lower().replace("_", "-")
    return f"pkg:pypi/{name}@{quote(version, safe='.-_~')}"


def identifier(content: Any) -> str:
    """A UUID as URN that equal JSON values share."""
    return f"urn:uuid:{uuid.uuid5(_IDS, sha256_json(content))}"


def hashes_of(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 by name in the bundle, of files and folders as `bundle.write` takes them.

    Raises:
        StorageError: one cannot be read.
    """
    found: dict[str, str] = {}
    for name, source in files.items():
        with storage_errors("read", source):
            if source.is_dir():
                found.update({f"{name}/{inner}": digest for inner, digest in folder_hashes(source).items()})
            else:
                found[name] = sha256_file(source)
    return found


def text_hashes(documents: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of texts as UTF-8."""
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in documents.items()}


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe's JSON without the machine in it: of paths the last part, and not where the result goes."""
    tree: dict[str, Any] = recipe.model_dump(mode="json")
    for key in _PATHS:
        section, _, field = key.partition(".")
        if tree[section][field] is not None:
            tree[section][field] = Path(tree[section][field]).name
    tree["build"]["plugins"] = [Path(plugin).name for plugin in tree["build"]["plugins"]]
    del tree["output"]["directory"]
    return tree


def materials_of(
    recipe: Recipe,
    sources: Collection[str],
    sha256: Callable[[Path], str] = sha256_file,
    images_per_sample: int = 1,
) -> tuple[Material, ...]:
    """What a recipe names as input, hashed.

    Args:
        sources: what was read, as stages declare it: `model`, `data`, `evaluation`, `metric`.
        sha256: of a file; what has hashed it already may tell.
        images_per_sample: of a folder of images.

    Raises:
        StorageError: a file cannot be read.
    """
    from gpuopt.model_file import files_of

    found = []
    calibrate, accuracy = recipe.calibrate, recipe.accuracy
    if recipe.model.path:
        path = Path(recipe.model.path)
        with storage_errors("read", path):
            found += [_file("model", file, sha256) for file in files_of(path)]
    if "data" in sources and calibrate.data is not None:
        found.append(_data("calibration data", calibrate.data, calibrate.samples, sha256, images_per_sample))
    if "evaluation" in sources and accuracy.data is not None:
        found.append(_data("evaluation data", accuracy.data, accuracy.samples, sha256, images_per_sample))
    labels = accuracy.labels if "metric" in sources else None
    for role, name in (("labels", labels), ("calibration ranges", calibrate.ranges)):
        # Labels may be the name of an array inside the data.
        if name is not None and Path(name).is_file():
            with storage_errors("read", Path(name)):
                found.append(_file(role, Path(name), sha256))
    return (*found, *plugins_of(recipe))


def plugins_of(recipe: Recipe) -> tuple[Material, ...]:
    """The plugin libraries that a recipe names, hashed; those that the loader finds elsewhere are left out.

    Raises:
        StorageError: one cannot be read.
    """
    found = []
    for plugin in map(Path, recipe.build.plugins):
        with storage_errors("read", plugin):
            if plugin.is_file():
                found.append(_file("plugin", plugin, sha256_file))
    return tuple(found)


def materials_to_json(materials: Iterable[Material]) -> list[dict[str, Any]]:
    """As the manifest keeps them."""
    return [asdict(material) for material in materials]


def materials_from_manifest(manifest: Mapping[str, Any]) -> tuple[Material, ...]:
    """What a bundle's manifest says of them; nothing in one that was written before they were kept."""
    return tuple(Material(**entry) for entry in manifest.get(MATERIALS_KEY, []))


def dir_hash(hashes: Mapping[str, str]) -> str:
    """in-toto's `dirHash`: what `sha256sum` prints of the files in order of their names, hashed again."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items(), key=lambda item: item[0].encode()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _file(role: str, path: Path, sha256: Callable[[Path], str]) -> Material:
    return Material(role, path.name, {"sha256": sha256(path)}, 1)


def _data(role: str, data: str, limit: int | None, sha256: Callable[[Path], str], images_per_sample: int) -> Material:
    from gpuopt.calibration.reading import data_files

    files = data_files(data, limit, images_per_sample)
    if files is None:
        return Material(role, data, {}, 0)
    root = Path(data).expanduser()
    with storage_errors("read", root):
        if root.is_file():
            return _file(role, root, sha256)
        hashes = {file.relative_to(root).as_posix(): sha256(file) for file in files}
    return Material(role, root.name, {"dirHash": dir_hash(hashes)}, len(hashes))


def _utc(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
