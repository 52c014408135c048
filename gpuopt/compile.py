"""`gpuopt compile` and `gpuopt verify` without their command line: a recipe in, a bundle and a report out."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpuopt
from gpuopt import bundle, environment, gates, io_formats
from gpuopt.artifact import ENGINE_ONNX_FILE, ONNX_FILE
from gpuopt.cache import Cache
from gpuopt.engine_record import ENGINE_FILES, Trust
from gpuopt.errors import AccuracyError, GpuoptError, PrecisionError, SpeedError, StorageError
from gpuopt.gpu_turn import gpu_turn
from gpuopt.pipeline import (
    FIRST_STRONGLY_TYPED,
    LEGACY_OPSET,
    Runner,
    builds_engine,
    check_engine_graph,
    check_provable,
    check_request,
    is_native,
    model_sha256,
    why_not_provable,
    why_not_run,
)
from gpuopt.precision import Choice, Contest, can_check_speed, with_precision
from gpuopt.progress import Progress
from gpuopt.provenance import cyclonedx, slsa
from gpuopt.provenance.origin import (
    CYCLONEDX_FILE,
    MATERIALS_KEY,
    STATEMENT_FILE,
    Origin,
    hashes_of,
    materials_of,
    materials_to_json,
    text_hashes,
)
from gpuopt.recipe import BuildSection, Recipe, load, resolve
from gpuopt.reduction import command as reduction
from gpuopt.report.documents import documents
from gpuopt.report.model import (
    BenchmarkReport,
    EngineReport,
    Failure,
    GateReport,
    ModelReport,
    Report,
    StageReport,
    read_report,
)
from gpuopt.storage import sha256_file


@dataclass(frozen=True)
class Outcome:
    """What a run ends in.

    Attributes:
        error: None if it passed.
        unbuilt: the bundle's graph that engines are still to be built from; empty: none are.
    """

    report: Report
    error: GpuoptError | None
    unbuilt: str = ""


def bundle_folder(recipe: Recipe) -> Path:
    """Where the bundle goes: the recipe's folder, else `<model>.gpuopt` beside the model."""
    if recipe.output.directory:
        return Path(recipe.output.directory)
    if recipe.model.path:
        path = Path(recipe.model.path)
        return path.with_name(f"{path.stem}.gpuopt")
    return Path(f"{(recipe.model.factory or 'model').rpartition(':')[2]}.gpuopt")


def failed_folder(destination: Path) -> Path:
    """Where the report of a failed run goes, so that the bundle folder only ever holds a whole bundle."""
    return destination.with_name(destination.name + ".failed")


def with_defaults(recipe: Recipe) -> Recipe:
    """The recipe with targets, folders and calibration data decided, all paths absolute."""
    from gpuopt.calibration.readers import find_beside

    data = None if recipe.calibrate.random else recipe.calibrate.data
    if data is None and recipe.model.path and not recipe.calibrate.random:
        beside = find_beside(Path(recipe.model.path))
        data = str(beside) if beside else None
    if data is not None and Path(data).expanduser().exists():
        data = str(Path(data).expanduser().resolve())
    ranges = recipe.calibrate.ranges
    if ranges is not None:
        ranges = str(Path(ranges).expanduser().absolute())
    targets = recipe.build.target
    if not targets:
        only_here = recipe.quantize.format == "qoperator"
        targets = ("onnxruntime",) if only_here else environment.default_targets()  # type: ignore[assignment]
    elif "onnxruntime" not in targets:
        targets = (*targets, "onnxruntime")
    tree = recipe.model_dump(mode="json")
    tree["build"]["target"] = list(dict.fromkeys(targets))
    version = environment.tensorrt_version() if "tensorrt" in targets else None
    if recipe.build.legacy is None:
        tree["build"]["legacy"] = version is not None and version < FIRST_STRONGLY_TYPED
    if tree["build"]["legacy"]:
        tree["export"]["opset"] = min(recipe.export.opset, LEGACY_OPSET)
    tree["calibrate"]["data"] = data
    tree["calibrate"]["ranges"] = ranges
    for key, value in (("data", recipe.accuracy.data), ("labels", recipe.accuracy.labels)):
        if value is not None and Path(value).expanduser().exists():
            tree["accuracy"][key] = str(Path(value).expanduser().resolve())
    tree["output"]["directory"] = str(bundle_folder(recipe).absolute())
    if recipe.model.path:
        tree["model"]["path"] = str(Path(recipe.model.path).absolute())
    return resolve(tree)


def remarks(asked: Recipe, recipe: Recipe) -> list[str]:
    """What of a recipe has no effect, or not the one that its words promise, a line each.

    Args:
        asked: as the user wrote it.
        recipe: with its defaults decided.
    """
    notes = []
    if not asked.build.target and not builds_engine(recipe) and recipe.quantize.format == "qdq":
        notes.append(NO_ENGINE)
    if recipe.accuracy.data is not None and recipe.accuracy.max_drop is None and not recipe.analyze.enabled:
        notes.append("the evaluation data plays no part without --max-accuracy-drop")
    if is_native(recipe) and not recipe.build.enabled:
        notes.append(NOT_INT8_YET)
    unused = [
        f"build.{name}"
        for name, value in BuildSection()
        if name not in _OF_EVERY_TARGET and getattr(asked.build, name) != value
    ]
    if io_formats.asks_for_the_fastest(recipe):
        # Told with the formats that are taken.
        unused.remove("build.io_formats")
    if unused and not builds_engine(recipe):
        notes.append(f"only engines have {', '.join(unused)}: without effect on ONNX Runtime's model")
    return notes


def compile_model(
    recipe: Recipe, cache: Cache, progress: Progress, command: Sequence[str], explain: bool = False
) -> Outcome:
    """Run the pipeline and write the bundle, or the report of the failure.

    Args:
        recipe: as the user wrote it; what it leaves open is decided here.
        command: the command line, for the report.
        explain: whether the progress lines say why each stage ran.
    """
    started = time.monotonic()
    asked = recipe
    recipe = with_defaults(asked)
    destination = bundle_folder(recipe)
    notes = remarks(asked, recipe)
    for note in notes:
        progress.warn(note)
    runner: Runner | None = None
    error: GpuoptError | None = None
    choice: Choice | None = None

    judged: list[GateReport] = []
    format_race: dict[str, Any] | None = None
    # Formats are measured of what is finished; until then, and where nothing runs, inputs and outputs are linear.
    measures_formats = io_formats.asks_for_the_fastest(recipe)
    if measures_formats:
        recipe = io_formats.with_formats(recipe, {})

    def finished(failure: GpuoptError | None, stage: str | None = None) -> Report:
        report = _report(recipe, runner, failure, command, time.monotonic() - started)
        about: dict[str, Any] = {
            "warnings": [*notes, *report.warnings],
            "race": choice.table if choice is not None and choice.table else None,
            "format_race": format_race,
            "gates": judged,
            "gate_mode": recipe.gates.mode,
        }
        if stage is not None:
            about["error"] = failure_of(failure, stage)
        return report.model_copy(update=about)

    contest = Contest(recipe, cache, progress, str(destination), verdict, explain)
    at_gates: str | None = None
    try:
        check_engine_graph(recipe)
        check_request(with_precision(recipe, "int8") if recipe.precision == "auto" else recipe)
        if recipe.gates.mode == "fail":
            check_provable(recipe)
        bundle.check_destination(destination)
        bundle.check_timing_cache(destination, recipe.build.timing_cache)
        if recipe.precision == "auto":
            choice = contest.choose()
            error = choice.error
            notes += choice.out
            if choice.winner is not None:
                recipe, runner = choice.winner.recipe, choice.winner.runner
                runner.recipe = recipe
                if not measures_formats:
                    runner.run(only=("benchmark",))
            else:
                # The error is the first candidate's.
                runner = contest.runners[0]
        else:
            runner = Runner(recipe, cache, progress, str(destination), explain)
            runner.run()
            error = verdict(runner)
            if error is None and recipe.precision == "int8" and can_check_speed(recipe):
                choice = contest.check(runner)
                error = choice.error
        if measures_formats and runner is not None and runner.at_work is None and error is None:
            if io_formats.why_not_measured(recipe):
                format_race = io_formats.unmeasured(recipe)
                progress.warn(f"build.io_formats auto: {format_race['verdict']}")
                notes.append(f"build.io_formats auto: {format_race['verdict']}")
            else:
                kept = io_formats.choose(runner, contest.made, cache, progress)
                recipe, runner, format_race = kept.recipe, kept.runner, kept.table
                runner.recipe = recipe
            if not any(result.step.stage.name == "benchmark" for result in runner.results):
                runner.run(only=("benchmark",))
        if runner is not None and runner.at_work is None and (choice is None or choice.winner is not None):
            made = finished(error)
            judged.extend(gates.evaluate(made, recipe))
            before = error
            error, said = gates.settle(judged, recipe.gates.mode, before)
            said += gates.stand_ins(made, recipe)
            at_gates = "gates" if error is not before else None
            for line in said:
                progress.warn(line)
            notes += said
    except GpuoptError as failure:
        error = failure
        if runner is None and contest.runners:
            runner = contest.runners[-1]
    report = finished(error, at_gates)
    try:
        if error is None:
            _write(destination, io_formats.as_shipped(recipe, format_race), runner, report)
            bundle.remove(failed_folder(destination))
        elif runner is not None:
            with reduction.kept(recipe, runner, error, progress) as reduced:
                _write(failed_folder(destination), recipe, runner, report, reduced)
    except GpuoptError as failure:
        if error is None:
            error = failure
            report = finished(error)
        else:
            progress.warn(f"the report was not written: {failure.message}")
        report = report.model_copy(update={"bundle": None})
    unbuilt = ""
    if runner is not None and builds_engine(recipe) and not recipe.build.enabled:
        unbuilt = ENGINE_ONNX_FILE if runner.artifact("engine_onnx") else ONNX_FILE
    return Outcome(report, error, unbuilt)


def verify_bundle(
    folder: Path,
    progress: Progress,
    command: Sequence[str],
    trust: Trust | None = None,
    public_key: str | None = None,
) -> Outcome:
    """Check a bundle's hashes and run its ONNX and its engines against its reference; the bundle is not changed.

    Args:
        trust: what its engines may run on the CPU.
        public_key: whose signature the bundle has to bear; None: no matter.

    Raises:
        SignatureError: it does not.
        StorageError: the bundle is damaged.
        RequirementError: ONNX Runtime is missing.
    """
    from gpuopt import reference

    started = time.monotonic()
    manifest = bundle.open_bundle(folder, public_key)
    environment.require("onnxruntime", "verifying a bundle")
    from gpuopt.stages.verify import check

    recipe = resolve(load(folder / "recipe.yaml"))
    stored = reference.load(folder / "reference")
    with progress.stage("verify"):
        graphs = {name: folder / name for name in (ONNX_FILE, ENGINE_ONNX_FILE) if (folder / name).is_file()}
        result = check(graphs, stored, recipe.verify, recipe.graph_precision)
    proofs = _proofs_of_bundle(folder, manifest, recipe, progress, trust)
    failures = [failure for found in (*proofs.values(), result) for failure in found["failures"]]
    error: GpuoptError | None = AccuracyError(failures[0], _ACCURACY_HINT) if failures else None
    for target, proof in proofs.items():
        error = error or low_coverage(target, proof, recipe)
    unproved = why_not_provable(recipe)
    unchecked = [f"verify.min_precision_coverage was not checked here: {unproved}"] if unproved else []
    for warning in unchecked:
        progress.warn(warning)
    before = read_report(folder / bundle.REPORT_FILE)
    seconds = time.monotonic() - started
    stage = StageReport(
        name="verify", target=None, cached=False, reason="asked for", seconds=round(seconds, 3), facts=result
    )
    report = before.model_copy(
        update={
            "command": list(command),
            "created": now(),
            "gpuopt_version": gpuopt.__version__,
            "status": "failed" if error else "passed",
            "error": failure_of(error, "verify"),
            "bundle": str(folder.absolute()),
            "stages": [stage],
            "engines": [
                engine.model_copy(
                    update=_state_of(recipe, engine.target, result if engine.target == "onnxruntime" else proofs)
                )
                for engine in before.engines
            ],
            "verification": result,
            # Speed was measured on the machine of the compilation.
            "race": None,
            "format_race": None,
            "benchmarks": [],
            "gates": [],
            "gate_mode": recipe.gates.mode,
            "warnings": [*result["warnings"], *unchecked],
            "environment": environment.describe(),
            "seconds": round(seconds, 3),
        }
    )
    judged = gates.accuracy_gates(report, recipe)
    settled, said = gates.settle(judged, recipe.gates.mode, error)
    # Without a mode that warns, the verdict is that of the limits alone: not all that was demanded is looked at here.
    error = settled if recipe.gates.mode == "warn" else error
    for warning in said:
        progress.warn(warning)
    report = report.model_copy(
        update={
            "gates": judged,
            "status": "failed" if error else "passed",
            "error": report.error if error else None,
            "warnings": [*report.warnings, *said],
        }
    )
    progress.line(f"{len(manifest['files'])} files match the manifest")
    return Outcome(report, error)


def _proofs_of_bundle(
    folder: Path, manifest: Mapping[str, Any], recipe: Recipe, progress: Progress, trust: Trust | None
) -> dict[str, Mapping[str, Any]]:
    """Every engine of a bundle that can run here, run: by target."""
    from gpuopt import reference

    proofs: dict[str, Mapping[str, Any]] = {}
    for target, name in ENGINE_FILES.items():
        if name in manifest["files"] and not why_not_run(recipe, target):
            from gpuopt.stages.prove import prove

            with progress.stage(f"prove {target}"), gpu_turn(progress):
                stored = reference.load(folder / "reference")
                proofs[target] = prove(folder / name, stored, recipe.verify, recipe.built_precision, trust)
    return proofs


def _state_of(recipe: Recipe, target: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """What verifying changes in an engine's line of the report."""
    found = result if target == "onnxruntime" else result.get(target)
    if found is None:
        return {"status": "built", "note": not_run(recipe, target), "proof": None}
    state = {"status": "verified" if found["passed"] else "failed"}
    return state if target == "onnxruntime" else {**state, "note": "", "proof": dict(found)}


_OF_EVERY_TARGET = ("target", "enabled", "legacy")
NO_ENGINE = "no engine is built: no TensorRT that can build here is installed; see 'gpuopt doctor'"
NOT_INT8_YET = "nothing is INT8 yet: TensorRT's own calibrator quantizes when 'gpuopt build' builds the engine"
_FLOAT_GRAPH = "FP32: TensorRT's own calibrator quantizes its engine alone"
_ACCURACY_HINT = (
    "See the report's accuracy table. For INT8: better calibration data, --max-accuracy-drop (what costs most falls\n"
    "back; 'gpuopt analyze' shows it), or --precision fp16. Looser limits: --min-cosine, --set verify.min_sqnr_db."
)
_OVERFLOW_HINT = (
    "FP16 ends at 65504. Keep what grows beyond it in FP32: --set 'cast.nodes_to_keep=[PATTERN]' or\n"
    "cast.op_types_to_keep; or scale it in the model, as norm='ortho' does in torch.fft."
)


def _verification(runner: Runner) -> Mapping[str, Any] | None:
    """What the verify stage found; None if it did not run."""
    return next((r.entry.facts for r in runner.results if r.step.stage.name == "verify"), None)


def _proofs(runner: Runner) -> dict[str, Mapping[str, Any]]:
    """What running the engines showed, by target."""
    return {r.step.target: r.entry.facts for r in runner.results if r.step.stage.name == "prove"}


def verdict(runner: Runner) -> GpuoptError | None:
    """What is wrong with a finished run: accuracy, then precision; None if nothing is."""
    proofs = _proofs(runner)
    found = [f for facts in (*proofs.values(), _verification(runner) or {}) for f in facts.get("failures", [])]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        recipe = runner.recipe
        in_fp16 = recipe.precision == "fp16" or (recipe.precision == "int8" and recipe.cast.remainder == "fp16")
        overflows = "NaN or infinity" in found[0] and in_fp16
        return AccuracyError(found[0] + more, _OVERFLOW_HINT if overflows else _ACCURACY_HINT)
    for target, proof in proofs.items():
        if error := low_coverage(target, proof, runner.recipe):
            return error
    return None


def low_coverage(target: str, proof: Mapping[str, Any], recipe: Recipe) -> PrecisionError | None:
    """The error of an engine whose layers compute less of their time in the asked-for precision than was demanded."""
    wanted = recipe.verify.min_precision_coverage
    share = (proof["coverage"]["time_share"] or {}).get(recipe.precision, 0.0)
    if wanted is None or share >= wanted:
        return None
    return PrecisionError(
        f"{target}: {share:.1%} of the computing layers' time is in {recipe.precision.upper()}, "
        f"{wanted:.1%} was demanded",
        "The report's layer table shows what is not; 'gpuopt quantize --explain' says why.",
    )


def _report(
    recipe: Recipe, runner: Runner | None, error: GpuoptError | None, command: Sequence[str], seconds: float
) -> Report:
    results = runner.results if runner else []
    # Before the first stage there is nothing to report beside the error.
    written = bundle_folder(recipe) if error is None else failed_folder(bundle_folder(recipe)) if runner else None
    at_work = runner.at_work.label if runner and runner.at_work else None
    if at_work is None and isinstance(error, (AccuracyError, PrecisionError)):
        at_work = "verify"
    if at_work is None and isinstance(error, SpeedError):
        at_work = "race"
    facts: dict[str, Any] = {}
    for result in results:
        facts.update({result.step.stage.name: result.entry.facts})
    try:
        digest = model_sha256(Path(recipe.model.path)) if recipe.model.path else None
    except StorageError:
        digest = None
    return Report(
        command=list(command),
        gpuopt_version=gpuopt.__version__,
        created=now(),
        status="failed" if error else "passed",
        error=failure_of(error, at_work),
        model=ModelReport(
            path=recipe.model.path,
            factory=recipe.model.factory,
            kind=facts.get("export", {}).get("model_kind"),
            sha256=digest,
        ),
        precision=recipe.precision,
        bundle=str(written) if written is not None else None,
        stages=stage_reports(runner) if runner else [],
        engines=engine_reports(runner) if runner else [],
        verification=dict(facts["verify"]) if "verify" in facts else None,
        benchmarks=benchmark_reports(runner) if runner else [],
        warnings=[warning for result in results for warning in result.entry.warnings],
        environment=environment.describe(),
        seconds=round(seconds, 3),
    )


def stage_reports(runner: Runner) -> list[StageReport]:
    """A part for every stage that finished."""
    return [
        StageReport(
            name=result.step.stage.name,
            target=result.step.target or None,
            cached=result.cached,
            reason=result.reason,
            seconds=result.entry.seconds,
            # The single timings stand under `benchmarks`.
            facts={name: value for name, value in result.entry.facts.items() if name != "timings_ms"},
            warnings=list(result.entry.warnings),
        )
        for result in runner.results
    ]


def benchmark_reports(runner: Runner) -> list[BenchmarkReport]:
    """What was measured of each file."""
    found = (result.entry.facts for result in runner.results if result.step.stage.name == "benchmark")
    return [BenchmarkReport.model_validate(facts) for facts in found]


def engine_reports(runner: Runner) -> list[EngineReport]:
    """A line for every deployable file that a run made."""
    engines = []
    verification, proofs = _verification(runner), _proofs(runner)
    for result in runner.results:
        if result.step.stage.name != "build":
            continue
        facts = result.entry.facts
        artifact = result.entry.artifacts["engine"]
        proof = proofs.get(facts["target"])
        engines.append(
            EngineReport(
                target=facts["target"],
                file=facts["file"],
                size_bytes=facts["size_bytes"],
                sha256=sha256_file(artifact.path / facts["file"]),
                status="built" if proof is None else "verified" if proof["passed"] else "failed",
                library_version=facts["library_version"],
                compute_capabilities=facts["compute_capabilities"],
                note="" if proof is not None else not_run(runner.recipe, facts["target"]),
                proof=dict(proof) if proof is not None else None,
            )
        )
    graph = runner.artifact("onnx")
    finished = {result.step.stage.name for result in runner.results}
    if graph is not None and (verification is not None or "build" in finished or runner.at_work is None):
        path = graph.path / ONNX_FILE
        status = "built" if verification is None else "verified" if verification["passed"] else "failed"
        engines.append(
            EngineReport(
                target="onnxruntime",
                file=ONNX_FILE,
                size_bytes=sum(p.stat().st_size for p in graph.path.iterdir()),
                sha256=sha256_file(path),
                status=status,
                library_version=environment.version_of("onnxruntime")
                or environment.version_of("onnxruntime-gpu")
                or "",
                compute_capabilities=[],
                note=_FLOAT_GRAPH if is_native(runner.recipe) else "",
            )
        )
    return engines


def not_run(recipe: Recipe, target: str) -> str:
    """Why an engine was built and not run."""
    missing = why_not_run(recipe, target)
    if target == "tensorrt-rtx" and missing == "no NVIDIA GPU":
        return "built ahead of time; needs an RTX GPU to run"
    return f"not run here: {missing}" if missing else "not run: verify.enabled is false"


def _write(
    destination: Path, recipe: Recipe, runner: Runner | None, report: Report, further: Mapping[str, Path] | None = None
) -> None:
    files: dict[str, Path] = dict(further or {})
    whole = runner is not None and runner.at_work is None
    if runner is not None and whole:
        graph, stored = runner.artifact("onnx"), runner.artifact("reference")
        ranges, engine_graph = runner.artifact("ranges"), runner.artifact("engine_onnx")
        if graph and stored:
            files.update({path.name: path for path in graph.path.iterdir()})
            files["reference"] = stored.path
        if engine_graph and builds_engine(recipe):
            files.update({ENGINE_ONNX_FILE if p.name == ONNX_FILE else p.name: p for p in engine_graph.path.iterdir()})
        if ranges:
            files["calibration.ranges.json"] = ranges.path / "ranges.json"
        for result in runner.results:
            if result.step.stage.name == "build":
                files.update({path.name: path for path in result.entry.artifacts["engine"].path.iterdir()})
    texts = {
        "recipe.yaml": recipe.to_yaml(),
        **documents(report),
    }
    about = {
        "gpuopt_version": report.gpuopt_version,
        "created": report.created,
        "command": report.command,
        "status": report.status,
        "model": report.model.model_dump(mode="json"),
        "precision": report.precision,
        "targets": manifest_targets(report),
        "environment": report.environment,
    }
    if runner is not None and report.status == "passed":
        materials = materials_of(recipe, runner.sources(), runner.file_sha256, runner.images_per_sample())
        about[MATERIALS_KEY] = materials_to_json(materials)
        origin = Origin(
            command="compile",
            files=hashes_of(files),
            records=text_hashes({"recipe.yaml": texts["recipe.yaml"]}),
            made=set(files),
            materials=materials,
            packages=runner.packages(),
            recipe=recipe,
            report=report,
        )
        texts.update(provenance(origin))
    bundle.check_destination(destination)
    bundle.write(destination, files, texts, about)


def manifest_targets(report: Report) -> list[dict[str, Any]]:
    """What a manifest says of each deployable file; the rest is in the report."""
    kept = {"target", "file", "library_version", "compute_capabilities", "note"}
    return [engine.model_dump(mode="json", include=kept) for engine in report.engines]


def provenance(origin: Origin) -> dict[str, str]:
    """The documents that say where a bundle comes from, by name."""
    return {CYCLONEDX_FILE: cyclonedx.render(origin), STATEMENT_FILE: slsa.render(origin)}


def failure_of(error: GpuoptError | None, stage: str | None) -> Failure | None:
    """An error as the report has it."""
    if error is None:
        return None
    return Failure(kind=error.kind, exit_code=error.exit_code, message=error.message, hint=error.hint, stage=stage)


def now() -> str:
    """The time, for reports: UTC, seconds."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
