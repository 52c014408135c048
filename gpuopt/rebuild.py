"""`gpuopt build` without its command line: a bundle's engine, built and proved here, without PyTorch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

import gpuopt
from gpuopt import bundle, environment, gates, io_formats, onnx_model
from gpuopt.artifact import ENGINE_ONNX_FILE, ONNX_FILE
from gpuopt.cache import Cache
from gpuopt.compile import (
    NO_ENGINE,
    NOT_INT8_YET,
    Outcome,
    benchmark_reports,
    engine_reports,
    failed_folder,
    failure_of,
    manifest_targets,
    now,
    provenance,
    stage_reports,
    verdict,
)
from gpuopt.errors import GpuoptError, UsageError
from gpuopt.pipeline import (
    FIRST_STRONGLY_TYPED,
    LEGACY_OPSET,
    Runner,
    check_build_options,
    check_provable,
    graph_mismatch,
)
from gpuopt.precision import OUT_OF_THE_RACE
from gpuopt.progress import Progress
from gpuopt.provenance.origin import (
    CYCLONEDX_FILE,
    MATERIALS_KEY,
    STATEMENT_FILE,
    Origin,
    hashes_of,
    materials_from_manifest,
    materials_to_json,
    plugins_of,
    text_hashes,
)
from gpuopt.recipe import Recipe, load, parse_setting, resolve, set_value
from gpuopt.report.documents import documents
from gpuopt.report.model import Report, read_report
from gpuopt.storage import storage_errors

_STAGES = ("build", "prove", "benchmark")
_CHANGEABLE = ("build", "verify", "benchmark", "gates")
_FOR_TENSORRT_8 = "with --set build.legacy=true --opset 17"


def build_bundle(
    folder: Path,
    target: str | None,
    settings: Sequence[str],
    cache: Cache,
    progress: Progress,
    command: Sequence[str],
    public_key: str | None = None,
) -> Outcome:
    """Build a bundle's engine for this machine, run it, and put it into the bundle.

    The bundle is replaced in one step, and only by one whose engine holds.

    Args:
        target: None: TensorRT where it and a GPU are present, else TensorRT-RTX.
        settings: `KEY=VALUE` of the sections `build`, `verify`, `benchmark` and `gates`.
        public_key: of whom the bundle has to be signed by; None: no matter.

    Raises:
        StorageError: the bundle is damaged.
        UsageError: a setting of another section, or a graph that the TensorRT here does not read.
        RequirementError: the target cannot be built here.
        PrecisionError: a share of the precision is demanded, and the engine cannot be run here.
    """
    started = time.monotonic()
    manifest = bundle.open_bundle(folder, public_key)
    before = read_report(folder / bundle.REPORT_FILE)
    recipe = _recipe(folder, target, settings)
    engine = recipe.build.target[0]
    environment.check_targets([engine], instead=tuple(environment.ENGINE_PACKAGES))
    check_build_options(recipe)
    if recipe.gates.mode == "fail":
        check_provable(recipe)
    measures_formats = io_formats.asks_for_the_fastest(recipe)
    if measures_formats:
        recipe = io_formats.with_formats(recipe, {})
    runner = Runner(recipe, cache, progress, f"{folder.absolute()} build")
    error: GpuoptError | None = None
    format_race: dict[str, Any] | None = None
    with cache.scratch() as scratch:
        _adopt(runner, folder, manifest["files"], scratch)

        def candidate(name: str, wanted: Recipe) -> tuple[Runner, GpuoptError | None]:
            made = Runner(wanted, cache, progress, f"{folder.absolute()} build {name}")
            _take_over(made, runner)
            progress.line(name)
            try:
                made.run(only=("build", "prove"))
                return made, verdict(made)
            except OUT_OF_THE_RACE as failure:
                return made, failure

        try:
            runner.run(only=("build", "prove") if measures_formats else _STAGES)
            error = verdict(runner)
            if measures_formats and error is None:
                if io_formats.why_not_measured(recipe):
                    format_race = io_formats.unmeasured(recipe)
                    progress.warn(f"build.io_formats auto: {format_race['verdict']}")
                else:
                    choice = io_formats.choose(runner, candidate, cache, progress)
                    recipe, runner, format_race = choice.recipe, choice.runner, choice.table
                runner.run(only=("benchmark",))
        except GpuoptError as failure:
            error = failure
        old = [s for s in before.stages if s.name in _STAGES and s.target == engine]
        kept = [stage for stage in before.stages if stage not in old]
        outdated = {w for stage in old for w in stage.warnings} - {w for stage in kept for w in stage.warnings}
        outdated |= {
            NO_ENGINE,
            NOT_INT8_YET,
            gates.ON_THE_CPU,
            *(f"gate {gates.describe(gate)}" for gate in before.gates),
        }
        report = before.model_copy(
            update={
                "command": list(command),
                "created": now(),
                "gpuopt_version": gpuopt.__version__,
                "status": "failed" if error else "passed",
                "error": failure_of(error, runner.at_work.label if runner.at_work else None),
                "bundle": str(folder.absolute()),
                "stages": [*kept, *stage_reports(runner)],
                "engines": _engines(before, runner),
                "environment": environment.describe(),
                # Speeds are not compared here, and those of another machine say nothing about this engine.
                "race": None,
                "format_race": format_race,
                "benchmarks": benchmark_reports(runner),
                "gates": [],
                "gate_mode": recipe.gates.mode,
                "warnings": [
                    *(warning for warning in before.warnings if warning not in outdated),
                    *(warning for result in runner.results for warning in result.entry.warnings),
                ],
                "seconds": round(time.monotonic() - started, 3),
            }
        )
        if runner.at_work is None:
            # FP16 is timed beside INT8 by `gpuopt compile` alone.
            found, before_gates = [g for g in gates.evaluate(report, recipe) if g.name != "latency_vs_fp16"], error
            error, said = gates.settle(found, recipe.gates.mode, before_gates)
            said += gates.stand_ins(report, recipe)
            for line in said:
                progress.warn(line)
            report = report.model_copy(
                update={
                    "gates": found,
                    "warnings": [*report.warnings, *said],
                    "status": "failed" if error else "passed",
                    "error": report.error if error is before_gates else failure_of(error, "gates"),
                }
            )
        if error is None:
            shipped = _bundle_recipe(folder, io_formats.as_shipped(recipe, format_race), report)
            _write(folder, manifest, shipped, runner, report)
            bundle.remove(failed_folder(folder))
        elif runner.at_work is None:
            _write_failure(failed_folder(folder), recipe, report)
    return Outcome(report, error)


def _recipe(folder: Path, target: str | None, settings: Sequence[str]) -> Recipe:
    tree = load(folder / "recipe.yaml")
    for text in settings:
        key, value = parse_setting(text)
        if key.partition(".")[0] not in _CHANGEABLE:
            raise UsageError(
                f"--set {key}: only keys of {' and '.join(_CHANGEABLE)} can change in a bundle",
                "Everything before the engine is decided: compile again for the rest.",
            )
        if key == "build.legacy":
            raise UsageError(
                "--set build.legacy: it is what the bundle's graph was made by, and cannot change in it",
                "Compile again for the other graph.",
            )
        set_value(tree, key, value)
    plugins = resolve(tree).build.plugins
    if plugins and not any(text.startswith("build.plugins") for text in settings):
        named = ", ".join(plugins)
        raise UsageError(
            f"the bundle's recipe names plugin libraries, whose code would run: {named}",
            "If you trust them, name them again: --set 'build.plugins=[FILE, ...]'.",
        )
    if target == "onnxruntime":
        raise UsageError(
            "'gpuopt build' makes engines of tensorrt and tensorrt-rtx: what ONNX Runtime runs, model.onnx, is in the "
            "bundle already",
            "Give --target tensorrt or tensorrt-rtx, or leave it out.",
        )
    engine = target or environment.default_targets()[0]
    if engine == "onnxruntime":
        raise UsageError(
            "no engine can be built here: neither TensorRT with a GPU nor TensorRT-RTX is there",
            "'gpuopt doctor' says what each needs.",
        )
    set_value(tree, "build.target", [engine, "onnxruntime"])
    set_value(tree, "build.enabled", True)
    recipe = resolve(tree)
    bundle.check_timing_cache(folder, recipe.build.timing_cache)
    _check_graph(folder, recipe, engine)
    return recipe


def _check_graph(folder: Path, recipe: Recipe, engine: str) -> None:
    """Whether the library here makes of the bundle's graph what the bundle promises."""
    version = environment.tensorrt_version() if engine == "tensorrt" else None
    if reason := graph_mismatch(recipe, engine, version):
        again = "without build.legacy" if recipe.build.legacy else _FOR_TENSORRT_8
        raise UsageError(f"this bundle is for another engine: {reason}", f"Compile again {again}.")
    if version is None or version >= FIRST_STRONGLY_TYPED:
        return
    name = next(name for name in (ENGINE_ONNX_FILE, ONNX_FILE) if (folder / name).is_file())
    graph = onnx.load(str(folder / name), load_external_data=False)
    opset = max((entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset > LEGACY_OPSET:
        raise UsageError(
            f"TensorRT {version[0]}.{version[1]} reads ONNX up to opset {LEGACY_OPSET}, {name} has opset {opset}",
            f"Compile again {_FOR_TENSORRT_8}.",
        )


def _adopt(runner: Runner, folder: Path, bundled: Container[str], scratch: Path) -> None:
    """The bundle's graphs as the artifacts they once were: a folder each, with their external data."""
    for kind, name in (("onnx", ONNX_FILE), ("engine_onnx", ENGINE_ONNX_FILE)):
        if (folder / name).is_file():
            made = scratch / kind
            made.mkdir()
            data = onnx_model.bundled_external_files(folder / name, bundled)
            with storage_errors("copy", folder):
                shutil.copyfile(folder / name, made / ONNX_FILE)
                for path in data:
                    copy = made / path.relative_to(folder)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
            runner.adopt(kind, made)
    runner.adopt("reference", folder / "reference")


def _take_over(runner: Runner, other: Runner) -> None:
    """The bundle's artifacts, which another run adopted."""
    for kind in ("onnx", "engine_onnx", "reference"):
        if artifact := other.artifact(kind):
            runner.adopt(kind, artifact.path)


def _bundle_recipe(folder: Path, recipe: Recipe, report: Report) -> Recipe:
    """The bundle's recipe: its targets are those of all the files in it, the engine made now first.

    Where timings were read from is of this build alone: the next one is on another machine.
    """
    tree = recipe.model_dump(mode="json")
    before = resolve(load(folder / "recipe.yaml")).build
    tree["build"].update(timing_cache=before.timing_cache, require_timing_cache=before.require_timing_cache)
    engines = (engine.target for engine in report.engines if engine.target != "onnxruntime")
    tree["build"]["target"] = list(dict.fromkeys((recipe.build.target[0], *engines, "onnxruntime")))
    return resolve(tree)


def _engines(before: Report, runner: Runner) -> list[Any]:
    made = [engine for engine in engine_reports(runner) if engine.target != "onnxruntime"]
    return [*made, *(engine for engine in before.engines if engine.target not in {one.target for one in made})]


def _write_failure(folder: Path, recipe: Recipe, report: Report) -> None:
    """The report of a build whose engine does not hold; the bundle stays as it was."""
    bundle.check_destination(folder)
    about = {"status": report.status, "created": report.created, "gpuopt_version": report.gpuopt_version}
    failed = report.model_copy(update={"bundle": str(folder.absolute())})
    bundle.write(folder, {}, {"recipe.yaml": recipe.to_yaml(), **documents(failed)}, about)


def _write(folder: Path, manifest: Mapping[str, Any], recipe: Recipe, runner: Runner, report: Report) -> None:
    texts = {
        "recipe.yaml": recipe.to_yaml(),
        **documents(report),
    }
    written = {*texts, CYCLONEDX_FILE, STATEMENT_FILE}
    made: dict[str, Path] = {}
    for result in runner.results:
        if result.step.stage.name == "build":
            made.update({path.name: path for path in result.entry.artifacts["engine"].path.iterdir()})
    # What lies beside an engine (record, ranges, timings) is of that engine.
    old = tuple(name.removesuffix("engine") for name in made if name.endswith(".engine"))
    kept = (name for name in manifest["files"] if name not in written and not name.startswith(old))
    files = {**{name: folder / name for name in kept}, **made}
    about = {key: value for key, value in manifest.items() if key not in ("files", "manifest_version")}
    about.update(
        status=report.status,
        command=report.command,
        created=report.created,
        gpuopt_version=report.gpuopt_version,
        targets=manifest_targets(report),
        environment=report.environment,
    )
    # Plugins are named anew for each build; of all else the compilation knew.
    before = (material for material in materials_from_manifest(manifest) if material.role != "plugin")
    materials = (*before, *plugins_of(recipe))
    about[MATERIALS_KEY] = materials_to_json(materials)
    origin = Origin(
        command="build",
        files=hashes_of(files),
        records=text_hashes({"recipe.yaml": texts["recipe.yaml"]}),
        made=set(made),
        materials=materials,
        packages=runner.packages(),
        recipe=recipe,
        report=report,
    )
    texts.update(provenance(origin))
    bundle.write(folder, files, texts, about)
