"""`gpuopt reduce` without its command line, and what `compile` does after a failure."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpuopt
from gpuopt import bundle, request, time_limit
from gpuopt.artifact import ONNX_FILE, Artifact
from gpuopt.cache import Cache
from gpuopt.errors import (
    BuildError,
    ExportError,
    GpuoptError,
    QuantizationError,
    ReductionError,
    UsageError,
    one_line,
)
from gpuopt.pipeline import Runner, builds_engine, is_native
from gpuopt.progress import Progress, Silent
from gpuopt.recipe import Recipe, load, resolve
from gpuopt.reduction import reproduction
from gpuopt.reduction.attempts import BY_PIPELINE, Check
from gpuopt.reduction.reproduction import Wish
from gpuopt.shapes import Profile
from gpuopt.tolerance import Limits

FOLDER = "failure"
"""Its name beside the report of a failed compilation."""

_FRAME = re.compile(r'^ +File "([^"]+)", line \d+', re.MULTILINE)


@dataclass(frozen=True)
class Request:
    """What `gpuopt reduce` was asked.

    Attributes:
        subject: an ONNX file, or the folder of a failed compilation.
        recipe: for an ONNX file, its shapes and target; None for a folder.
        against: another ONNX file, or `optimized`; None: look for a failure, not for a difference.
        output: the folder to write; None: `SUBJECT.failure` beside an ONNX file, `failure` in a failed folder.
    """

    subject: Path
    recipe: Recipe | None
    against: str | None
    output: Path | None
    wish: Wish


@dataclass(frozen=True)
class Answer:
    """Where it lies, and what `failure.json` says."""

    folder: Path
    document: dict[str, Any]


def wish(seconds: float, keep_weights: bool, against: str | None, min_cosine: float, min_sqnr: float) -> Wish:
    """The flags of `gpuopt reduce` as a wish.

    Raises:
        UsageError: the other graph does not exist.
    """
    other = None if against in (None, "optimized") else Path(str(against))
    if other is not None and not other.is_file():
        raise UsageError(f"{other} does not exist", "Give --against another ONNX file, or 'optimized'.")
    return Wish(seconds, keep_weights, other, Limits(min_cosine, min_sqnr, min_agreement=0.9))


def recipe_of(subject: Path, flags: request.Flags, settings: Sequence[str]) -> Recipe | None:
    """The recipe of an ONNX file: its shapes and target; None for a folder, which has one.

    Raises:
        UsageError: a flag is wrong.
    """
    if subject.is_dir():
        return None
    from gpuopt.compile import with_defaults

    precision = [] if any(text.startswith("precision=") for text in settings) else ["precision=fp32"]
    named = replace(flags, model=str(subject))
    return with_defaults(request.recipe(None, named, [*precision, *settings]))


def replay(folder: Path, plugins: Sequence[Path], seconds: float, progress: Progress) -> None:
    """Try the graph of a failure again.

    Raises:
        GpuoptError: as it failed, if it fails again.
        UsageError, StorageError: the folder holds no failure.
    """
    inner = folder / FOLDER
    place = inner if inner.is_dir() else folder
    with progress.stage("replay"):
        document, error = reproduction.replay(place, tuple(plugins), seconds)
    if error is None:
        progress.line(f"it does not fail here any more; it was: {document['error']['message']}")
        return
    raise error


def reduce(asked: Request, cache: Cache, progress: Progress) -> Answer:
    """Write the smallest graph that fails, or differs, as the subject does.

    Raises:
        ReductionError: nothing fails or differs here.
        UsageError: the subject is neither, or the output folder holds other files.
        ModelError, StorageError: it cannot be read or written.
    """
    if asked.subject.is_dir():
        folder = failed_folder(asked.subject)
        destination = (asked.output or folder / FOLDER).absolute()
    else:
        if not asked.subject.is_file():
            raise UsageError(f"{asked.subject} does not exist", "Name an ONNX file or MODEL.gpuopt.failed.")
        folder = None
        destination = (asked.output or asked.subject.with_name(f"{asked.subject.stem}.failure")).absolute()
    inside = folder is not None and destination.parent == folder.absolute()
    if not inside:
        bundle.check_destination(destination)
    with tempfile.TemporaryDirectory(prefix="gpuopt-reduce-") as scratch:
        made = Path(scratch) / FOLDER
        made.mkdir()
        if folder is not None:
            document = _again(folder, asked, cache, progress, made)
        else:
            document = _of_graph(asked, progress, made)
        files = {path.name: path for path in made.iterdir()}
        if inside and folder is not None:
            _into_failed(folder, files)
        else:
            about = {key: document[key] for key in ("gpuopt_version", "created")}
            bundle.write(destination, files, {}, about)
    return Answer(destination, document)


def failed_folder(subject: Path) -> Path:
    """The folder of a failed compilation, given itself or its failure.

    Raises:
        UsageError: it is none.
    """
    for folder in (subject, subject.parent):
        if (folder / "recipe.yaml").is_file() and (folder / bundle.MANIFEST_FILE).is_file():
            return folder
    raise UsageError(
        f"{subject} is no folder of a failed compilation", "Name MODEL.gpuopt.failed, or an ONNX file to try."
    )


def _again(folder: Path, asked: Request, cache: Cache, progress: Progress, made: Path) -> dict[str, Any]:
    """Run a failed compilation again, most of it from the cache, and reduce where it fails."""
    if asked.against is not None:
        raise UsageError("--against compares ONNX files", f"Name a graph as the subject, not {folder.name}.")
    recipe = resolve(load(folder / "recipe.yaml"))
    runner = Runner(recipe, cache, progress, str(folder))
    try:
        runner.run()
    except GpuoptError as error:
        return describe(recipe, runner, error, asked.wish, progress, made)
    raise ReductionError("the compilation passes now", "Compile again: its bundle was not written.")


def _of_graph(asked: Request, progress: Progress, made: Path) -> dict[str, Any]:
    if asked.recipe is None:
        raise UsageError("an ONNX file needs a recipe for its shapes", "Give --input NAME:SHAPE.")
    recipe = asked.recipe
    target = recipe.build.target[0]
    stage = "difference" if asked.against is not None else "run" if target == "onnxruntime" else "build"
    check = Check(stage, recipe, target if stage == "build" else "")
    profile = _profile(asked.subject, recipe)
    return reproduction.reproduce(asked.subject, profile, check, asked.wish, progress, made)


def _profile(graph: Path, recipe: Recipe) -> Profile:
    from gpuopt import interface, onnx_model
    from gpuopt.interface import StatedInput
    from gpuopt.shapes import ShapeRange

    model = onnx_model.with_types(onnx_model.load_untrusted(graph))
    stated = []
    for spec in onnx_model.input_specs(model):
        fixed = tuple(size for size in spec.shape if isinstance(size, int))
        whole = len(fixed) == len(spec.shape)
        stated.append(StatedInput(spec, ShapeRange(fixed, fixed, fixed) if whole else None))
    return interface.resolve(recipe, [one.spec.name for one in stated], stated, []).profiles[0]


def _into_failed(folder: Path, files: Mapping[str, Path]) -> None:
    """Put a failure into the folder of the compilation: the whole folder is written anew, in one step."""
    manifest = bundle.read_manifest(folder)
    kept = {name: folder / name for name in manifest["files"] if not name.startswith(f"{FOLDER}/")}
    about = {key: value for key, value in manifest.items() if key not in ("files", "manifest_version")}
    bundle.write(folder, {**kept, **{f"{FOLDER}/{name}": path for name, path in files.items()}}, {}, about)


@contextlib.contextmanager
def kept(recipe: Recipe, runner: Runner | None, error: GpuoptError, progress: Progress) -> Iterator[dict[str, Path]]:
    """What `compile` keeps of a failure inside a library: files for the failed folder, by name.

    Nothing that goes wrong here hides the failure itself.
    """
    with tempfile.TemporaryDirectory(prefix="gpuopt-failure-") as scratch:
        made = Path(scratch)
        if runner is None or runner.at_work is None or not is_in_library(error):
            yield {}
            return
        ends = time_limit.ends()
        left = recipe.failure.seconds if ends is None else min(recipe.failure.seconds, ends - time.monotonic())
        wish = Wish(left, recipe.failure.keep_weights)
        try:
            document = describe(recipe, runner, error, wish, progress, made)
        except Exception as problem:  # the libraries have just failed, and may raise anything
            progress.warn(f"the failure could not be reduced: {one_line(problem)}")
            yield {}
            return
        from gpuopt.compile import bundle_folder
        from gpuopt.compile import failed_folder as of_bundle

        replay = reproduction.replay_command(of_bundle(bundle_folder(recipe)) / FOLDER, document)
        progress.line(f"failure: {told_of(document)}: {replay}")
        yield {f"{FOLDER}/{path.name}": path for path in made.iterdir()}


def is_in_library(error: GpuoptError) -> bool:
    """Whether a stage failed inside a library: a builder or exporter refused, or the innermost frame is not ours."""
    if isinstance(error, (BuildError, ExportError)):
        return True
    if type(error) not in (GpuoptError, QuantizationError):
        return False
    # A chain begins with its cause.
    first = error.details.partition("\nThe above exception")[0].partition("\nDuring handling")[0]
    frames = _FRAME.findall(first)
    ours = str(Path(gpuopt.__file__).parent)
    return bool(frames) and not frames[-1].startswith(ours)


def describe(
    recipe: Recipe, runner: Runner, error: GpuoptError, wish: Wish, progress: Progress, made: Path
) -> dict[str, Any]:
    """Write the failure of the step at work into an empty folder: its graph where it has one, reduced.

    Returns:
        What `failure.json` holds.
    """
    step = runner.at_work
    stage, target = (step.stage.name, step.target) if step is not None else ("", "")
    check = Check(stage, recipe, target)
    graph, stored = _graph_of(recipe, runner, stage)
    if graph is None or stored is None:
        return reproduction.note(error, check, f"no ONNX graph goes into the {stage} stage that can be tried", made)
    if wish.seconds <= 0:
        return reproduction.note(error, check, "no time was left for it (failure.seconds, --timeout)", made)
    from gpuopt import reference

    profile = reference.load(stored.path).profiles[0]
    path = graph.path / ONNX_FILE
    quiet = Silent() if stage in BY_PIPELINE else progress
    try:
        found = reproduction.reproduce(path, profile, check, replace(wish, kind=error.kind), quiet, made)
    except ReductionError as reason:
        return reproduction.note(error, check, reason.message, made)
    # Of the failure that was met, not of its repetition.
    reproduction.write_log(error, made)
    return found


def _graph_of(recipe: Recipe, runner: Runner, stage: str) -> tuple[Artifact | None, Artifact | None]:
    """The graph that the failing stage can be tried on, and the reference with its shapes."""
    if stage == "build" and not is_native(recipe):
        engine = runner.artifact("engine_onnx") if builds_engine(recipe) else None
        return engine or runner.artifact("onnx"), runner.artifact("reference")
    if stage in BY_PIPELINE:
        for result in runner.results:
            if result.step.stage.name == "export":
                return result.entry.artifacts["onnx"], result.entry.artifacts["reference"]
    return None, None


def told_of(document: Mapping[str, Any]) -> str:
    """One line for people."""
    if not document.get("graph"):
        return f"log and versions; no graph: {document['why_no_graph']}"
    operators = ", ".join(dict.fromkeys(document["operators"]))
    less = "" if document["finished"] else ", the time ran out before the smallest"
    weights = "" if document["fails_with_these_weights"] else "; it needs the model's weights: --keep-weights"
    return f"{document['nodes']} of {document['nodes_before']} nodes still fail ({operators}){less}{weights}"


def render(answer: Answer, shown: str) -> str:
    """The answer as the terminal shows it."""
    document = answer.document
    lines = [
        f"failure    {document['error']['kind']}: {document['error']['message']}",
        f"reduced    {told_of(document)}",
        f"folder     {shown}",
        f"replay     {reproduction.replay_command(Path(shown), document)}",
    ]
    return "\n".join(lines)
