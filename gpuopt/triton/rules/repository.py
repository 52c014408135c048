"""Name, platform, versions, files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gpuopt.storage import sha256_file
from gpuopt.triton import repository
from gpuopt.triton.rules.finding import Finding, Subject, error, warning
from gpuopt.triton.schema import ModelConfig
from gpuopt.triton.served import DEFAULT_FILES, PLATFORMS


def name(subject: Subject) -> Iterator[Finding]:
    """A name is that of the model's folder."""
    written = subject.config.name
    if subject.folder is not None and written and written != subject.folder.name:
        yield error(
            "name", "name", f"'{written}', the model's folder is '{subject.folder.name}'",
            "Write the folder's name, or leave it out.",
        )  # fmt: skip


def platform(subject: Subject) -> Iterator[Finding]:
    """Platform and backend are a pair, and the one that runs this file."""
    backend, written = subject.config.backend, subject.config.platform
    if subject.config.HasField("ensemble_scheduling"):
        if written != "ensemble" or backend:
            yield error(
                "platform", "platform", f"'{written}', backend '{backend}'", 'Write platform: "ensemble" alone.'
            )
        return
    if written == "ensemble":
        yield error(
            "platform", "platform", "'ensemble' without ensemble_scheduling", "Write the steps, or another one."
        )
        return
    wanted = PLATFORMS.get(backend)
    if written and wanted and written != wanted and not (backend == "pytorch" and written == "pytorch"):
        yield error("platform", "platform", f"'{written}' does not go with backend '{backend}'", f"Write {wanted}.")
    if written and not backend and written not in (*PLATFORMS.values(), "pytorch"):
        yield error("platform", "platform", f"'{written}' is unknown", f"Write one of {', '.join(PLATFORMS.values())}.")
    served = subject.served
    if served is not None and subject.backend != served.backend:
        yield error(
            "platform", "backend", f"'{subject.backend or 'none'}' does not run {served.file.name}",
            f'Write backend: "{served.backend}".',
        )  # fmt: skip
    if not backend and not written:
        yield warning(
            "platform", "backend", "neither backend nor platform is written: Triton guesses by the file's name",
            f'Write backend: "{served.backend if served is not None else "..."}".',
        )  # fmt: skip


def one_source(subject: Subject) -> Iterator[Finding]:
    """`default_model_filename` is a file's name, not a path."""
    for field, written in (
        ("default_model_filename", subject.config.default_model_filename),
        *((f"cc_model_filenames {k}", subject.config.cc_model_filenames[k]) for k in subject.config.cc_model_filenames),
    ):
        if written.startswith("/") or ".." in written.split("/"):
            yield error("one_source", field, f"'{written}' leaves the version's folder", "Write a file's name.")


def versions(subject: Subject) -> Iterator[Finding]:
    """There is a version, and those that the policy asks for are there."""
    if subject.folder is None:
        return
    there = repository.versions(subject.folder)
    if not there:
        yield error(
            "versions", "version_policy", f"{subject.folder.name} has no version's folder",
            "Make one: a number that does not begin with 0.",
        )  # fmt: skip
    yield from version_policy(subject.config, there)


def version_policy(config: ModelConfig, there: Sequence[int]) -> Iterator[Finding]:
    """Whether the policy lets Triton serve one of the versions that are there."""
    policy = config.version_policy
    missing = [version for version in policy.specific.versions if version not in there]
    # Triton leaves out what is not there, and refuses the model where nothing is left.
    found = error if len(missing) == len(policy.specific.versions) else warning
    for version in missing:
        yield found(
            "versions", "version_policy.specific", f"version {version} is not there",
            f"There are {', '.join(map(str, there)) or 'none'}.",
        )  # fmt: skip
    if policy.HasField("specific") and not policy.specific.versions:
        yield error("versions", "version_policy.specific", "it names no version", "Name one, or write latest.")
    if policy.HasField("latest") and policy.latest.num_versions == 0:
        yield error("versions", "version_policy.latest.num_versions", "0 versions", "Write 1 or more.")


def files(subject: Subject) -> Iterator[Finding]:
    """Every version holds the files that the configuration names."""
    if subject.folder is None:
        return
    for version in repository.versions(subject.folder):
        yield from named_files(subject, version, functools.partial(_holds, subject.folder / str(version)))


def _holds(folder: Path, file: str) -> bool:
    return (folder / file).exists()


def named_files(subject: Subject, version: int, is_there: Callable[[str], bool]) -> Iterator[Finding]:
    """Whether a version holds the files that the configuration names."""
    default = next((name for backend, name in DEFAULT_FILES.items() if backend == subject.backend), "")
    if not default:
        return
    named = subject.config.cc_model_filenames
    written = subject.config.default_model_filename
    for field, file in (
        ("default_model_filename", written or default),
        *((f"cc_model_filenames {capability}", named[capability]) for capability in sorted(named)),
    ):
        if is_there(file):
            continue
        if field == "default_model_filename" and named and not written:
            yield warning(
                "files", field, f"version {version} has no {file}: it runs on compute capabilities "
                f"{', '.join(sorted(named))} alone", "Put it there if the server has other GPUs.",
            )  # fmt: skip
        else:
            yield error("files", field, f"version {version} has no {file}", "Put it there, or write the file's name.")


def is_this_engine(subject: Subject) -> Iterator[Finding]:
    """One of the versions is the bundle's engine: else the comparison says nothing of what is served."""
    if subject.folder is None or subject.served is None or not repository.versions(subject.folder):
        return
    wanted = subject.served.record.sha256 if subject.served.record is not None else sha256_file(subject.served.file)
    size = subject.served.file.stat().st_size
    for version in repository.versions(subject.folder):
        for path in sorted((subject.folder / str(version)).iterdir()):
            if path.is_file() and path.stat().st_size == size and sha256_file(path) == wanted:
                return
    yield warning(
        "is_this_engine", "versions", f"no version holds {subject.served.file.name} of this bundle",
        "Add it with 'gpuopt triton', or name the bundle that is deployed.",
    )  # fmt: skip


def ensemble(subject: Subject) -> Iterator[Finding]:
    """Each tensor of an ensemble is made once, inputs are read, outputs are made, and steps are in the repository."""
    config = subject.config
    if not config.HasField("ensemble_scheduling"):
        return
    steps = config.ensemble_scheduling.step
    if not steps:
        yield error("ensemble", "ensemble_scheduling.step", "there is none", "Write the models to run.")
    if config.instance_group:
        yield error("ensemble", "instance_group", "an ensemble has no instances", "Give them to its steps.")
    if config.HasField("optimization"):
        yield warning("ensemble", "optimization", "an ensemble computes nothing itself", "Give it to its steps.")
    made = [entry.name for entry in config.input]
    read: set[str] = set()
    for step in steps:
        if not step.model_name:
            yield error("ensemble", "ensemble_scheduling.step.model_name", "it is not set", "Name a model.")
        if subject.folder is not None and step.model_name and not (subject.folder.parent / step.model_name).is_dir():
            yield error(
                "ensemble", f"step '{step.model_name}'", "the repository has no such model", "Put it there first."
            )
        for field, mapping in (("input_map", step.input_map), ("output_map", step.output_map)):
            if not mapping:
                yield error("ensemble", f"step '{step.model_name}'.{field}", "it is empty", "Map every tensor.")
        read |= set(step.input_map.values())
        made += step.output_map.values()
    for tensor in sorted({tensor for tensor in made if made.count(tensor) > 1}):
        yield error("ensemble", f"tensor '{tensor}'", "it is made twice", "Map one of the two to another name.")
    for tensor in sorted(read - set(made)):
        yield error("ensemble", f"tensor '{tensor}'", "no step makes it, and it is no input", "Map it to one that is.")
    for entry in config.output:
        if entry.name not in made:
            yield error("ensemble", f"output '{entry.name}'", "no step makes it", "Map a step's output to it.")
    for entry in config.input:
        if entry.name not in read:
            yield error("ensemble", f"input '{entry.name}'", "no step reads it", "Map it to a step's input.")
