"""`gpuopt reduce` without its command line, and what `compile` does after a failure."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpuopt
from gpuopt import bundle, environment, request, time_limit
from gpuopt.artifact import ONNX_FILE, Artifact
from gpuopt.cache import Cache
from gpuopt.errors import (
    BuildError,
    ExportError,
    GpuoptError,
    QuantizationError,
    ReductionError,
    StorageError,
    UsageError,
    one_line,
)
from gpuopt.pipeline import Runner, builds_engine, is_native
from gpuopt.progress import Progress, Silent
from gpuopt.recipe import FACTORY_PATTERN, Recipe, resolve
from gpuopt.reduction import reproduction
from gpuopt.reduction.attempts import BY_PIPELINE, Check
from gpuopt.reduction.reproduction import Wish
from gpuopt.shapes import Profile
from gpuopt.storage import check_exists
from gpuopt.tolerance import Limits

FOLDER = "failure"
"""Its name beside the report of a failed compilation."""

_SECONDS_TO_WRITE = 5.0
_FRAME = re.compile(r'^ +File "([^"]+)", line \d+', re.MULTILINE)


@dataclass(frozen=True)
class Request:
    """What `gpuopt reduce` was asked.

    Attributes:
        subject: an ONNX file, or the folder of a failed compilation.
        recipe: as `recipe_of` gives it.
        against: another ONNX file, or `optimized`; None: look for a failure, not for a difference.
        output: the folder to write; None: `SUBJECT.failure` beside an ONNX file or its bundle, `failure` in a failed
            folder.
    """

    subject: Path
    recipe: Recipe
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
        StorageError: the other graph is not there.
        UsageError: it is a folder.
    """
    other = None if against in (None, "optimized") else Path(str(against))
    if other is not None and not other.is_file():
        check_exists(other)
        raise UsageError(f"{other} is not a file", "Give --against another ONNX file, or 'optimized'.")
    return Wish(seconds, keep_weights, other, Limits(min_cosine, min_sqnr, min_agreement=0.9))


def recipe_of(subject: Path, flags: request.Flags, settings: Sequence[str]) -> Recipe:
    """What a subject is tried by: an ONNX file's shapes and target, or a failed compilation's recipe; flags go first.

    Raises:
        UsageError: a flag is wrong, the folder is none of a failed compilation, or its recipe would run code.
    """
    if subject.is_dir():
        return _recipe_of_failed(failed_folder(subject), flags, settings)
    from gpuopt.compile import with_defaults

    precision = [] if any(text.startswith("precision=") for text in settings) else ["precision=fp32"]
    named = replace(flags, model=str(subject))
    return with_defaults(request.recipe(None, named, [*precision, *settings]))


def _recipe_of_failed(folder: Path, flags: request.Flags, settings: Sequence[str]) -> Recipe:
    """Whoever made the folder does not decide which code runs here, nor which file is written."""
    recipe = request.recipe(folder / "recipe.yaml", flags, settings)
    named = {text.partition("=")[0].strip() for text in settings} | ({"build.plugins"} if flags.plugins else set())

    def is_named(key: str) -> bool:
        return key in named or key.partition(".")[0] in named

    unnamed = {key: value for key, value in _code_in(recipe).items() if not is_named(key)}
    if unnamed:
        words = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in unnamed.items())
        again = " ".join(f"--set {shlex.quote(one)}" for one in words)
        raise UsageError(
            f"{folder / 'recipe.yaml'} names code that would run: {', '.join(unnamed)}",
            f"If you trust it, name it again: {again}",
        )
    if is_named("build.timing_cache"):
        return recipe
    tree = recipe.model_dump(mode="json")
    tree["build"] |= {"timing_cache": None, "require_timing_cache": False}
    return resolve(tree)


def _code_in(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe runs code of whoever wrote it, by key."""
    keys: dict[str, Any] = {
        "model.factory": recipe.model.factory,
        "model.trust_pickle": recipe.model.trust_pickle,
        "accuracy.metric": recipe.accuracy.metric,
        "build.plugins": list(recipe.build.plugins),
    }
    data = {"calibrate.data": recipe.calibrate.data, "accuracy.data": recipe.accuracy.data}
    keys |= {key: text for key, text in data.items() if text and FACTORY_PATTERN.match(text)}
    return {key: value for key, value in keys.items() if value}


def replay(folder: Path, plugins: Sequence[Path], seconds: float, progress: Progress) -> None:
    """Try the graph of a failure again.

    Raises:
        GpuoptError: as it failed, if it fails again.
        UsageError, StorageError: the folder holds no failure.
        ReductionError: the time ran out.
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
        UsageError: the subject is neither, or the folder to be written holds other files.
        RequirementError: what the target needs is not here.
        ModelError, StorageError: it cannot be read or written.
    """
    if asked.subject.is_dir():
        if asked.against is not None:
            raise UsageError("--against compares ONNX files", f"Name a graph as the subject, not {asked.subject}.")
        folder = failed_folder(asked.subject)
        destination = (asked.output or folder / FOLDER).absolute()
    else:
        check_exists(asked.subject)
        folder = None
        destination = (asked.output or _beside(asked.subject)).absolute()
    place = destination.resolve()
    inside = folder is not None and place == folder / FOLDER
    if folder is not None and not inside and place.is_relative_to(folder):
        raise UsageError(
            f"{destination} lies in the folder of the failed compilation",
            f"Name a folder elsewhere with --output, or leave it out for {FOLDER}/.",
        )
    bundle.check_destination(folder if folder is not None and inside else destination)
    if folder is not None:
        bundle.open_bundle(folder)
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


def _beside(graph: Path) -> Path:
    """Where the failure of a graph goes: a bundle holds nothing but what its manifest lists."""
    from gpuopt.inspection import home

    path = graph.absolute()
    return (path.parent if home.of_file(path) is not None else path).with_name(f"{graph.stem}.failure")


def failed_folder(subject: Path) -> Path:
    """The folder of a failed compilation, given itself or its failure; no links are on its path.

    Raises:
        UsageError: it is none.
    """
    place = subject.resolve()
    for folder in (place, place.parent):
        if (folder / "recipe.yaml").is_file() and (folder / bundle.MANIFEST_FILE).is_file():
            return folder
    raise UsageError(
        f"{subject} is no folder of a failed compilation", "Name MODEL.gpuopt.failed, or an ONNX file to try."
    )


def _again(folder: Path, asked: Request, cache: Cache, progress: Progress, made: Path) -> dict[str, Any]:
    """Run a failed compilation again, most of it from the cache, and reduce where it fails."""
    runner = Runner(asked.recipe, cache, progress, str(folder))
    try:
        runner.run()
    except GpuoptError as error:
        return describe(asked.recipe, runner, error, asked.wish, progress, made)
    raise ReductionError("the compilation passes now", "Compile again: its bundle was not written.")


def _of_graph(asked: Request, progress: Progress, made: Path) -> dict[str, Any]:
    recipe = asked.recipe
    target = recipe.build.target[0]
    stage = "difference" if asked.against is not None else "run" if target == "onnxruntime" else "build"
    check = Check(stage, recipe, target if stage == "build" else "")
    environment.check_targets([check.target or "onnxruntime"])
    profile = _profile(asked.subject, recipe)
    return reproduction.reproduce(asked.subject, profile, check, asked.wish, progress, made)


def _profile(graph: Path, recipe: Recipe) -> Profile:
    """The shapes of a graph's inputs: those asked for, else its own, else those that its bundle was compiled for."""
    from gpuopt import interface, onnx_model
    from gpuopt.inspection import home
    from gpuopt.interface import StatedInput
    from gpuopt.shapes import ShapeRange

    model = onnx_model.with_types(onnx_model.load_untrusted(graph))
    stated = []
    found = home.of_file(graph)
    compiled_for = found.profiles[0] if found is not None and found.profiles else {}
    asked = {name for name, section in recipe.inputs.items() if section.range() is not None}
    for spec in onnx_model.input_specs(model):
        fixed = tuple(size for size in spec.shape if isinstance(size, int))
        whole = len(fixed) == len(spec.shape)
        # What is asked for may go beyond what the bundle was compiled for.
        known = None if {spec.name, ""} & asked else compiled_for.get(spec.name)
        stated.append(StatedInput(spec, ShapeRange(fixed, fixed, fixed) if whole else known))
    return interface.resolve(recipe, [one.spec.name for one in stated], stated, []).profiles[0]


def _into_failed(folder: Path, files: Mapping[str, Path]) -> None:
    """Put a failure into the folder of the compilation: the whole folder is written anew, in one step."""
    # Anything that came meanwhile would be lost.
    manifest = bundle.open_bundle(folder)
    kept = {name: folder / name for name in manifest["files"] if not name.startswith(f"{FOLDER}/")}
    about = {key: value for key, value in manifest.items() if key not in ("files", "manifest_version")}
    bundle.write(folder, {**kept, **{f"{FOLDER}/{name}": path for name, path in files.items()}}, {}, about)


@contextlib.contextmanager
def kept(recipe: Recipe, runner: Runner | None, error: GpuoptError, progress: Progress) -> Iterator[dict[str, Path]]:
    """What `compile` keeps of a failure inside a library: files for the failed folder, by name.

    Nothing that goes wrong here hides the failure itself.
    """
    with tempfile.TemporaryDirectory(prefix="gpuopt-failure-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        if runner is None or runner.at_work is None or not is_in_library(error):
            yield {}
            return
        wish = Wish(seconds_for_tries(recipe.failure.seconds), recipe.failure.keep_weights)
        try:
            document = describe(recipe, runner, error, wish, progress, made)
        except Exception as problem:  # the libraries have just failed, and may raise anything
            # The time may be up; nothing is left but to write what is known.
            time_limit.lift()
            reason = f"the failure could not be reduced: {one_line(problem)}"
            progress.warn(reason)
            made = Path(scratch) / "noted"
            try:
                made.mkdir()
                document = reproduction.note(error, _check_of(recipe, runner), reason, made)
            except (StorageError, OSError):
                yield {}
                return
        from gpuopt.compile import bundle_folder
        from gpuopt.compile import failed_folder as of_bundle

        replay = reproduction.replay_command(of_bundle(bundle_folder(recipe)) / FOLDER, document)
        progress.line(f"failure: {told_of(document)}; again: {replay}")
        yield {f"{FOLDER}/{path.name}": path for path in made.iterdir()}


def seconds_for_tries(asked: float) -> float:
    """As many of the seconds asked for as leave time to write what is found before `--timeout` is up.

    The last try may take as long as all others together.
    """
    ends = time_limit.ends()
    return asked if ends is None else min(asked, (ends - time.monotonic() - _SECONDS_TO_WRITE) / 2)


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
    check = _check_of(recipe, runner)
    graph, stored = _graph_of(recipe, runner, check.stage)
    if graph is None or stored is None:
        reason = f"the {check.stage} stage takes none"
        return reproduction.note(error, check, reason, made)
    if wish.seconds <= 0:
        return reproduction.note(error, check, "no time was left for it (failure.seconds, --timeout)", made)
    from gpuopt import reference

    profile = reference.load(stored.path).profiles[0]
    path = graph.path / ONNX_FILE
    quiet = Silent() if check.stage in BY_PIPELINE else progress
    try:
        found = reproduction.reproduce(path, profile, check, replace(wish, kind=error.kind), quiet, made)
    except ReductionError as refusal:
        return reproduction.note(error, check, refusal.message, made)
    # Of the failure that was met, not of its repetition.
    reproduction.write_log(error, made)
    return found


def _check_of(recipe: Recipe, runner: Runner) -> Check:
    """The step at work as what a graph is tried on."""
    step = runner.at_work
    return Check(step.stage.name, recipe, step.target) if step is not None else Check("", recipe)


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
        return f"log and versions, and no graph ({document['why_no_graph']})"
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
