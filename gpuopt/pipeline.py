"""The stages, in order, and the runner: what each needs, cache, time, progress, errors."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpuopt
from gpuopt import environment, time_limit
from gpuopt.artifact import Artifact, folder_sha256
from gpuopt.cache import Cache, Entry, explain
from gpuopt.errors import DataError, GpuoptError, PrecisionError, RequirementError, StorageError, UsageError
from gpuopt.progress import Progress
from gpuopt.recipe import FACTORY_PATTERN, ModelSection, Recipe
from gpuopt.stages.context import StageContext
from gpuopt.storage import sha256_file, sha256_json, storage_errors
from gpuopt.worker import Worker

if TYPE_CHECKING:
    from gpuopt.model_file import ModelKind


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline and everything that decides its result.

    Attributes:
        name: also the module below `gpuopt.stages` whose `run` does the work.
        needs: kinds of artifacts it reads; one with a `?` may be absent.
        makes: kinds of artifacts it may write.
        sections: parts of the recipe it reads, as `section` or `section.field`.
        packages: distributions whose version can change its result.
        applies: whether a recipe wants the stage.
        sources: what it reads beside artifacts: `model`, `data` (for calibration), `evaluation` (data), `metric`.
        per_target: whether it runs once for each engine target.
        fits: whether it can run for a target on this machine.
        else_for: the target it runs for where it fits none.
    """

    name: str
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    sections: tuple[str, ...]
    packages: tuple[str, ...]
    applies: Callable[[Recipe], bool] = lambda recipe: True
    sources: tuple[str, ...] = ()
    per_target: bool = False
    fits: Callable[[Recipe, str], bool] = lambda recipe, target: True
    else_for: str = ""


def _is_int8(recipe: Recipe) -> bool:
    """Whether gpuopt itself quantizes."""
    return recipe.precision == "int8" and recipe.quantize.quantizer == "gpuopt"


def is_native(recipe: Recipe) -> bool:
    """Whether TensorRT's own calibrator does."""
    return recipe.precision == "int8" and recipe.quantize.quantizer == "tensorrt"


def _corrects_biases(recipe: Recipe) -> bool:
    return _is_int8(recipe) and recipe.quantize.format == "qdq" and recipe.quantize.bias_correction != "off"


def is_benchmarked(recipe: Recipe) -> bool:
    """Whether speed is measured: asked for, or needed by a gate."""
    gates = recipe.gates
    wanted = gates.max_latency_ms or gates.min_throughput is not None or gates.max_device_memory is not None
    return recipe.benchmark.enabled == "on" or (recipe.benchmark.enabled == "auto" and bool(wanted))


def why_not_run(recipe: Recipe, target: str) -> str:
    """Why a recipe's engine for a target cannot run here; empty if it can."""
    if recipe.build.strip_weights and target != "onnxruntime":
        return "it holds no weights (build.strip_weights) until it is refitted"
    return environment.why_not_run(target)


def builds_engine(recipe: Recipe) -> bool:
    """Whether a target other than ONNX Runtime is asked for."""
    return any(target != "onnxruntime" for target in recipe.build.target)


def _has_fp16(recipe: Recipe) -> bool:
    remainder = _is_int8(recipe) and recipe.has_fp16_scales and builds_engine(recipe)
    return recipe.precision == "fp16" or remainder


def _has_budget(recipe: Recipe) -> bool:
    return _is_int8(recipe) and recipe.accuracy.max_drop is not None


def _analyzes(recipe: Recipe) -> bool:
    return _has_budget(recipe) or (_is_int8(recipe) and recipe.analyze.enabled)


def _changes_after_budget(recipe: Recipe) -> bool:
    return _has_budget(recipe) and _corrects_biases(recipe)


FIRST_STRONGLY_TYPED = (10, 0)
"""The release of TensorRT from which precision is what the graph says."""
LEGACY_OPSET = 17
"""The newest that TensorRT 8.5 and 8.6 read."""

_ORT = ("onnxruntime", "onnxruntime-gpu", "onnx", "numpy")

# What decides where Q/DQ go; equalisation and bias correction are stages of their own.
_PLACEMENT = (
    "quantize.format", "quantize.per_channel", "quantize.op_types", "quantize.op_types_to_exclude",
    "quantize.nodes_to_exclude", "quantize.min_channels", "cast.remainder", "build.legacy",
)  # fmt: skip
_RANGES = ("calibrate.method", "calibrate.percentile", "calibrate.values")
_EQUALIZATION = ("quantize.equalize", "quantize.smooth_alpha")
_SAMPLES = ("inputs", "layout", "calibrate.images", "calibrate.random", "export.seed")

STAGES = (
    Stage(
        "samples", (), ("samples",), ("inputs", "layout", "calibrate.images"), ("numpy", "pillow"), sources=("data",)
    ),
    Stage(
        "export", ("samples",), ("onnx", "reference"), ("model", "inputs", "layout", "profiles", "export"),
        ("torch", "onnxscript", *_ORT), sources=("model",),
    ),
    Stage("simplify", ("onnx", "reference"), ("onnx",), ("simplify",), ("onnxslim", *_ORT)),
    Stage(
        "layout", ("onnx", "reference"), ("onnx", "reference"), ("layout", "precision"), _ORT,
        applies=lambda recipe: recipe.layout.changes,
    ),
    Stage(
        "equalize", ("onnx", "reference"), ("onnx", "float_onnx"),
        (*_SAMPLES, *_RANGES, "calibrate.samples", "calibrate.ranges", "calibrate.max_memory", *_PLACEMENT,
         *_EQUALIZATION), _ORT,
        applies=_is_int8, sources=("data",),
    ),
    Stage(
        "calibrate", ("onnx", "reference"), ("ranges",),
        ("calibrate", "inputs", "layout", "export.seed", "quantize.format", "quantize.min_channels"), _ORT,
        applies=_is_int8, sources=("data",),
    ),
    Stage(
        "choose", ("onnx", "ranges?", "reference"), ("ranges",), (*_SAMPLES, "calibrate.samples", *_PLACEMENT), _ORT,
        applies=lambda recipe: _is_int8(recipe) and recipe.calibrate.method == "auto", sources=("data",),
    ),
    # The three below decide what falls back to FP16; where the budget holds, the last two have nothing to do.
    Stage(
        "measure", ("onnx", "ranges?", "reference"), ("accuracy", "held"), (*_PLACEMENT, *_SAMPLES, "accuracy"),
        _ORT, applies=_has_budget, sources=("evaluation", "metric"),
    ),
    Stage(
        "analyze", ("onnx", "ranges?", "reference", "held?"), ("sensitivity",),
        (*_PLACEMENT, *_SAMPLES, "analyze.samples"), _ORT, applies=_analyzes, sources=("evaluation",),
    ),
    Stage(
        "fallback", ("onnx", "ranges?", "reference", "accuracy", "sensitivity?"), ("fallback",),
        (*_PLACEMENT, *_SAMPLES, "accuracy"), _ORT, applies=_has_budget, sources=("evaluation", "metric"),
    ),
    Stage(
        "quantize", ("onnx", "ranges?", "reference?", "fallback?"), ("onnx", "engine_onnx", "placement"), _PLACEMENT,
        _ORT, applies=_is_int8,
    ),
    Stage(
        "correct", ("onnx", "engine_onnx?", "float_onnx", "reference"), ("onnx", "engine_onnx"),
        (*_SAMPLES, "calibrate.samples", "quantize.bias_correction"), _ORT,
        applies=_corrects_biases, sources=("data",),
    ),
    Stage(
        "confirm", ("onnx", "float_onnx", "reference", "accuracy"), (), (*_SAMPLES, "accuracy"),
        _ORT, applies=_changes_after_budget, sources=("evaluation", "metric"),
    ),
    Stage(
        "cast", ("onnx", "engine_onnx?"), ("onnx", "engine_onnx"), ("cast", "build.legacy"), _ORT, applies=_has_fp16
    ),
    Stage(
        "build", ("onnx", "engine_onnx?", "reference"), ("engine",),
        ("build", "precision", "cast"),
        ("tensorrt", "tensorrt-rtx-cu13"), applies=lambda recipe: recipe.build.enabled and not is_native(recipe),
        per_target=True,
    ),
    # TensorRT calibrates while it builds: here the data decides the engine.
    Stage(
        "build", ("onnx", "reference"), ("engine",),
        ("build", "precision", "cast", "quantize.quantizer", "calibrate.method", "calibrate.samples", *_SAMPLES),
        ("tensorrt", "numpy"), applies=lambda recipe: recipe.build.enabled and is_native(recipe), sources=("data",),
        per_target=True,
    ),
    Stage(
        "prove", ("engine", "reference"), ("proof",),
        ("verify", "precision", "build.plugins", "build.version_compatible"),
        ("tensorrt", "tensorrt-rtx-cu13", "pycuda", "numpy"),
        applies=lambda recipe: recipe.verify.enabled and recipe.build.enabled, per_target=True,
        fits=lambda recipe, target: not why_not_run(recipe, target),
    ),
    Stage(
        "verify", ("onnx", "engine_onnx?", "reference"), ("verification",),
        ("verify", "precision", "quantize.quantizer"), _ORT,
        applies=lambda recipe: recipe.verify.enabled,
    ),
    Stage(
        "benchmark", ("engine?", "onnx", "reference"), (),
        ("benchmark", "build.plugins", "build.version_compatible"), ("tensorrt", "pycuda", "cuda-bindings", *_ORT),
        applies=is_benchmarked, per_target=True, fits=lambda recipe, target: not why_not_run(recipe, target),
        else_for="onnxruntime",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A stage of a concrete run."""

    stage: Stage
    target: str = ""
    """Of a stage that runs once for each."""

    @property
    def label(self) -> str:
        return f"{self.stage.name} {self.target}".strip()


@dataclass(frozen=True)
class StepResult:
    """A finished step."""

    step: Step
    entry: Entry
    cached: bool
    reason: str


def plan(recipe: Recipe, until: str | None = None) -> list[Step]:
    """The steps of a run, in order; engine targets must be resolved (`build.target` not empty).

    Args:
        until: name of the last stage; None: all of them.
    """
    steps: list[Step] = []
    for stage in STAGES:
        if stage.applies(recipe) and stage.per_target:
            engines = recipe.build.target if recipe.build.enabled else ()
            targets: list[str] = [t for t in engines if t != "onnxruntime" and stage.fits(recipe, t)]
            steps.extend(Step(stage, target) for target in targets or [stage.else_for] if target)
        elif stage.applies(recipe):
            steps.append(Step(stage))
        if stage.name == until:
            break
    return steps


class Runner:
    """Runs the steps of one recipe; `results` holds what has finished, also after a failure."""

    def __init__(self, recipe: Recipe, cache: Cache, progress: Progress, run_name: str, explain: bool = False) -> None:
        self.recipe = recipe
        self.cache = cache
        self.progress = progress
        self.results: list[StepResult] = []
        self.at_work: Step | None = None
        self._run_name = run_name
        self._explain = explain
        self._worker = Worker()
        self._artifacts: dict[str, Artifact] = {}
        self._of_target: dict[str, dict[str, Artifact]] = {}
        self._data_hashes: dict[tuple[str | None, int | None, int], str | None] = {}
        self._graph_batch: int | None = None
        self._file_hashes: dict[Path, str] = {}
        self._key_parts: dict[str, Mapping[str, str]] = {}
        self._started = time.time()
        self._code_before: Mapping[str, str] = {}
        self._last: Mapping[str, Mapping[str, str]] = cache.recall("last", run_name) or {}

    def run(self, until: str | None = None, only: Sequence[str] | None = None) -> None:
        """Run every step up to and with the stage `until`, by default all.

        Args:
            only: names of the stages to run; None: all. What they need has to be adopted.

        Raises:
            GpuoptError: of the step that failed; `at_work` names it.
        """
        self.cache.tidy()
        try:
            with self._worker as worker:
                steps = [step for step in plan(self.recipe, until) if only is None or step.stage.name in only]
                # Before anything is imported: what a later step runs, an earlier one may have imported.
                self._started, self._code_before = time.time(), self._known_code(steps)
                for number, step in enumerate(steps, 1):
                    self.at_work = step
                    with self.progress.stage(f"[{number}/{len(steps)}] {step.label}"):
                        result = self._run_step(step, worker)
                    self.results.append(result)
                    made = self._of_target.setdefault(step.target, {}) if step.target else self._artifacts
                    made.update(result.entry.artifacts)
                    self._tell(result)
            self.at_work = None
        finally:
            if self._key_parts:
                # For --explain alone: no reason for a run to fail, on a cache that cannot be written for one.
                with contextlib.suppress(StorageError):
                    self.cache.remember("last", self._run_name, {**self._last, **self._key_parts})

    def kill(self) -> None:
        """End the process of the step at work while another thread waits in `run`, which raises then."""
        self._worker.kill()

    def adopt(self, kind: str, folder: Path) -> None:
        """Take a folder as an artifact that an earlier stage made."""
        self._artifacts[kind] = Artifact(kind, folder, folder_sha256(folder))

    def artifact(self, kind: str, target: str = "") -> Artifact | None:
        """The newest artifact of a kind, or a target's own."""
        return (self._of_target.get(target, {}) if target else self._artifacts).get(kind)

    def images_per_sample(self) -> int:
        """Of a folder of images, as many as make one sample to calibrate on; one where nothing is calibrated."""
        return self._images_in(self._artifacts) if self.recipe.precision == "int8" else 1

    def file_sha256(self, path: Path) -> str:
        """SHA-256 of a file of data, read once in a run."""
        if path not in self._file_hashes:
            self._file_hashes[path] = sha256_file(path)
        return self._file_hashes[path]

    def packages(self) -> dict[str, str]:
        """Versions of the distributions that took part in the finished steps."""
        names = {
            package
            for result in self.results
            for package in result.step.stage.packages
            if package not in environment.ENGINE_PACKAGES.values()
            or package == environment.ENGINE_PACKAGES.get(result.step.target)
        }
        versions = {name: environment.version_of(name) for name in names}
        for result in self.results:
            # A TensorRT that did not come as a distribution is known by the engines that it built.
            name = environment.ENGINE_PACKAGES.get(result.step.target)
            if name is not None and result.step.stage.name == "build" and not versions.get(name):
                versions[name] = result.entry.facts["library_version"]
        return {name: version for name, version in sorted(versions.items()) if version}

    def sources(self) -> set[str]:
        """What the finished steps read beside artifacts: `model`, `data`, `evaluation`, `metric`."""
        return {source for result in self.results for source in result.step.stage.sources}

    def _run_step(self, step: Step, worker: Worker) -> StepResult:
        parts = self._parts(step)
        has_data, known = self._data(step.stage)[0], self._metric_fingerprint() is not None
        reason = "its data comes from code, which runs each time" if has_data and known else "first run"
        if parts is not None:
            entry = self.cache.lookup(parts)
            if entry:
                self._key_parts[step.label] = parts
                return StepResult(step, entry, True, "nothing it depends on changed")
            reason = explain(self._last.get(step.label), parts)
        with self.cache.scratch() as scratch:
            staged = scratch / "result"
            with storage_errors("write in", scratch):
                staged.mkdir()
                outcome, seconds = worker.run(step.stage.name, self._context(step, staged, parts))
                for leftover in staged.iterdir():
                    if leftover.name not in step.stage.makes:
                        _remove(leftover)
            warnings = list(outcome.warnings)
            if outcome.dependencies is not None:
                self.cache.remember("sources", self._code(step.stage), asdict(outcome.dependencies))
                # Which files the code is made of is known only now.
                parts = self._parts(step)
                changed = _changed_since(self._started, outcome.dependencies.files, self._code_before)
            else:
                file = self.recipe.model.path if "model" in step.stage.sources else None
                changed = Path(file).name if file and parts and self._parts(step) != parts else ""
            if changed:
                warnings.append(f"{changed} changed while it was used, so that this result is not used again")
                parts = None
            parts = parts or {"stage": step.label, "content": folder_sha256(staged)}
            record = {"facts": dict(outcome.facts), "warnings": warnings, "seconds": round(seconds, 3)}
            entry = self.cache.store(parts, staged, record)
        self._key_parts[step.label] = parts
        return StepResult(step, entry, False, reason)

    def _context(self, step: Step, staged: Path, parts: Mapping[str, str] | None) -> StageContext:
        return StageContext(
            recipe=self.recipe.restricted_to(step.stage.sections),
            artifacts=self._inputs(step),
            output=staged,
            progress=self.progress,
            data=self._data(step.stage)[0],
            samples=self._data(step.stage)[1],
            target=step.target,
            journal=self.cache.journal(parts) if parts is not None else None,
            cache_folder=self.cache.folder,
            deadline=time_limit.ends(),
        )

    def _inputs(self, step: Step) -> dict[str, Artifact]:
        found = {}
        present = {**self._artifacts, **self._of_target.get(step.target, {})}
        for need in step.stage.needs:
            kind = need.removesuffix("?")
            if kind == "engine_onnx" and not builds_engine(self.recipe):
                continue
            if kind in present:
                found[kind] = present[kind]
            elif kind == need:
                raise GpuoptError(f"stage {step.stage.name} needs '{kind}', which no earlier stage made")
        return found

    def _tell(self, result: StepResult) -> None:
        entry = result.entry
        took = "cached" if result.cached else f"{entry.seconds:.1f} s"
        reason = f"   {result.reason}" if self._explain else ""
        self.progress.line(f"{result.step.label:<22}{took:>8}{reason}")
        for warning in entry.warnings:
            self.progress.warn(warning)

    def _parts(self, step: Step) -> dict[str, str] | None:
        """Everything that decides a step's result; None if that cannot be known beforehand."""
        stage = step.stage
        parts = {"stage": stage.name, "gpuopt": own_version()}
        if stage.name == "benchmark":
            parts["CPU"] = f"{os.cpu_count()} of {environment.processor()}"
        if step.target:
            parts["target"] = step.target
            parts.update(_build_machine(self.recipe))
        for section in stage.sections:
            parts.update(_flatten(section, self._setting(section)))
        for kind, artifact in self._inputs(step).items():
            parts[f"input.{kind}"] = artifact.sha256
        for package in stage.packages:
            parts[f"version of {package}"] = environment.version_of(package) or ""
        if "model" in stage.sources:
            fingerprint = self._model_fingerprint()
            if fingerprint is None:
                return None
            parts["input.model"] = fingerprint
        if stage.name == "calibrate" and self.recipe.calibrate.ranges:
            ranges = Path(self.recipe.calibrate.ranges)
            with storage_errors("read", ranges):
                parts["input.calibration ranges"] = sha256_file(ranges)
        elif "data" in stage.sources or "evaluation" in stage.sources:
            kind = "calibration" if "data" in stage.sources else "evaluation"
            fingerprint = self._hash_once(*self._data(stage), self._images_in(self._inputs(step)))
            if fingerprint is None:
                return None
            parts[f"input.{kind} data"] = fingerprint
        if "evaluation" in stage.sources:
            source = "accuracy.data" if self.recipe.accuracy.data else "calibrate.data"
            parts["evaluation samples"] = f"{self._data(stage)[1]} of {source}"
        if "metric" in stage.sources:
            fingerprint = self._metric_fingerprint()
            if fingerprint is None:
                return None
            parts["input.metric"] = fingerprint
        return parts

    def _setting(self, section: str) -> Any:
        value: Any = self.recipe.model_dump(mode="json")
        for name in section.split("."):
            value = value[name]
        # Where the model and the data lie is no part of what they are, nor is how much memory there is.
        dropped = {
            "model": ("path",),
            "calibrate": ("data", "ranges", "max_memory"),
            "accuracy": ("data",),
            # Each step has its own target in its key; where timings are kept does not change what is asked for.
            "build": ("target", "enabled", "timing_cache", "require_timing_cache"),
        }.get(section, ())
        if section == "calibrate.ranges":
            return value is not None
        if section == "calibrate.max_memory":
            return None
        return {k: v for k, v in value.items() if k not in dropped} if isinstance(value, dict) else value

    def _model_fingerprint(self) -> str | None:
        model = self.recipe.model
        found: dict[str, Any] = {}
        if model.path:
            found["file"] = model_sha256(Path(model.path))
        if _runs_user_code(model):
            found["code"] = self._code_fingerprint(_code_name(model.factory, model.path), model.factory)
            if found["code"] is None:
                return None
        return sha256_json(found)

    def _metric_fingerprint(self) -> str | None:
        metric, labels = self.recipe.accuracy.metric, self.recipe.accuracy.labels
        found: dict[str, Any] = {}
        if labels and Path(labels).is_file():
            with storage_errors("read", Path(labels)):
                found["labels"] = sha256_file(Path(labels))
        if metric:
            found["code"] = self._code_fingerprint(_code_name("metric", metric), metric)
            if found["code"] is None:
                return None
        return sha256_json(found)

    def _code_fingerprint(self, name: str, function: str | None) -> dict[str, Any] | None:
        known = self.cache.recall("sources", name)
        if not isinstance(known, dict):
            return None
        package = (function or "").partition(":")[0].partition(".")[0]
        hashes = _hashes(known["files"])
        if len(hashes) < len(known["files"]):
            return None
        versions = {package: environment.version_of(package)} if package else {}
        versions |= {name: environment.version_of(name) for name in known["distributions"]}
        return {"files": hashes, "versions": versions}

    def _known_code(self, steps: Iterable[Step]) -> Mapping[str, str]:
        """Hashes of the files that the user's code was made of when the steps ran last, as far as they are here."""
        names = {self._code(step.stage) for step in steps if {"model", "metric"} & set(step.stage.sources)}
        known = [self.cache.recall("sources", name) for name in sorted(names)]
        return _hashes(sorted({file for one in known if isinstance(one, dict) for file in one["files"]}))

    def _code(self, stage: Stage) -> str:
        """What the user's code that a stage runs is remembered by."""
        if "metric" in stage.sources:
            return _code_name("metric", self.recipe.accuracy.metric)
        return _code_name(self.recipe.model.factory, self.recipe.model.path)

    def _data(self, stage: Stage) -> tuple[str | None, int | None]:
        """The data that a stage reads, and how many samples of it at most (None: all)."""
        from gpuopt.calibration.held_out import MOST_SAMPLES
        from gpuopt.stages.samples import COUNT

        calibrate, accuracy = self.recipe.calibrate, self.recipe.accuracy
        if "evaluation" in stage.sources:
            wanted = self.recipe.analyze.samples if stage.name == "analyze" else accuracy.samples
            return accuracy.data or calibrate.data, wanted or (None if accuracy.data else calibrate.samples)
        if "data" in stage.sources:
            some = min(MOST_SAMPLES, calibrate.samples)
            limits = {"samples": COUNT, "equalize": some, "correct": some, "choose": some}
            return calibrate.data, limits.get(stage.name, calibrate.samples)
        return None, None

    def _images_in(self, found: Mapping[str, Artifact]) -> int:
        """Of a folder of images, as many as readers take for one sample, by the artifacts `reference` and `onnx`.

        TensorRT's calibrator feeds the shapes that the engine has. Stages run the graph, which takes one image where
        its batch is open, whatever it is compiled for.
        """
        from gpuopt import reference
        from gpuopt.calibration.readers import images_per_sample

        calibrate, accuracy = self.recipe.calibrate, self.recipe.accuracy
        folders = [data for data in (calibrate.data, accuracy.data) if data and Path(data).expanduser().is_dir()]
        if not folders or "reference" not in found:
            return 1
        compiled = images_per_sample(reference.load(found["reference"].path).inputs)
        if compiled == 1 or is_native(self.recipe):
            return compiled
        if self._graph_batch is None:
            from gpuopt import onnx_model

            # No stage changes it.
            self._graph_batch = images_per_sample(onnx_model.inputs_of_artifact(found["onnx"].path))
        return self._graph_batch

    def _hash_once(self, data: str | None, limit: int | None, images: int) -> str | None:
        """`_data_fingerprint`: several stages read the same data, and that may be large."""
        if (data, limit, images) not in self._data_hashes:
            self._data_hashes[data, limit, images] = self._data_fingerprint(data, limit, images)
        return self._data_hashes[data, limit, images]

    def _data_fingerprint(self, data: str | None, limit: int | None, images: int) -> str | None:
        from gpuopt.calibration.reading import data_files

        if data is None:
            return "none"
        files = data_files(data, limit, images)
        if files is None:
            return None
        with storage_errors("read", Path(data)):
            return sha256_json([[os.path.relpath(file, data), self.file_sha256(file)] for file in files])


def _build_machine(recipe: Recipe) -> dict[str, str]:
    """What an engine and its proof depend on beside the recipe: GPU and driver, and plugin libraries.

    TensorRT times kernels on the GPU. TensorRT-RTX builds without one, but its record names what was there.
    """
    parts = {}
    for gpu in environment.gpus()[:1]:
        parts["GPU"] = f"{gpu.name} ({gpu.compute_capability}), driver for CUDA {gpu.driver_version}"
    for plugin in map(Path, recipe.build.plugins):
        if plugin.is_file():
            parts[f"input.plugin {plugin.name}"] = sha256_file(plugin)
    return parts


def _runs_user_code(model: ModelSection) -> bool:
    return bool(model.factory) or model.trust_pickle


def _code_name(*words: str | None) -> str:
    """The same words mean other code in another folder or on another path."""
    return json.dumps([*words, str(Path.cwd()), os.environ.get("PYTHONPATH")])


def model_sha256(path: Path) -> str:
    """Hash of a model file and, for ONNX, of the external data that it names.

    Raises:
        StorageError: a file cannot be read.
    """
    from gpuopt.model_file import files_of

    with storage_errors("read", path):
        return sha256_json([sha256_file(file) for file in files_of(path)])


def graph_mismatch(recipe: Recipe, target: str, version: tuple[int, int] | None) -> str:
    """Why the engines' graph of a recipe is none for a target; empty if it is.

    Args:
        version: of TensorRT; None: not known.
    """
    if recipe.precision == "fp32" or is_native(recipe):
        return ""
    old = target == "tensorrt" and version is not None and version < FIRST_STRONGLY_TYPED
    new = target == "tensorrt-rtx" or (version is not None and version >= FIRST_STRONGLY_TYPED)
    name = "TensorRT-RTX" if target == "tensorrt-rtx" or version is None else f"TensorRT {version[0]}.{version[1]}"
    if recipe.build.legacy and new:
        return (
            f"{name} computes in FP32 what is FP32 in the graph, and so is all of a graph for TensorRT 8 "
            "(build.legacy=true)"
        )
    if not recipe.build.legacy and old and recipe.precision != "fp16":
        return f"{name} does not read INT8 in a graph that is for TensorRT 10 and newer (build.legacy=false)"
    return ""


def check_engine_graph(recipe: Recipe) -> None:
    """Refuse targets that one graph cannot serve.

    Raises:
        UsageError: the engine would be of another precision than asked for, or cannot be built.
    """
    # The TensorRT here says nothing about the one that `gpuopt build` will meet elsewhere.
    version = environment.tensorrt_version() if recipe.build.enabled else None
    engines = [target for target in recipe.build.target if target != "onnxruntime"]
    reason = next((found for target in engines if (found := graph_mismatch(recipe, target, version))), "")
    if not reason:
        return
    if len(engines) > 1:
        raise UsageError(
            f"one graph cannot serve {' and '.join(engines)} here: {reason}",
            "Compile for one target at a time, each with an --output of its own.",
        )
    raise UsageError(reason, f"Leave out build.legacy={str(bool(recipe.build.legacy)).lower()}.")


def why_not_provable(recipe: Recipe) -> str:
    """Why a demanded share of the asked-for precision cannot be shown here; empty if it can, or none is demanded."""
    engines = [target for target in recipe.build.target if target != "onnxruntime"]
    if not recipe.verify.min_precision_coverage:
        return ""
    if not engines:
        return "no engine is made, only a model for ONNX Runtime"
    if not recipe.build.enabled:
        return "no engine is built (build.enabled is false)"
    if not recipe.verify.enabled:
        return "no engine is run (verify.enabled is false)"
    reasons = {target: why_not_run(recipe, target) for target in engines}
    return next((f"the engine for {target} does not run: {reason}" for target, reason in reasons.items() if reason), "")


def check_provable(recipe: Recipe) -> None:
    """Refuse a demand that nothing here can show to be met: it would pass unseen.

    Raises:
        PrecisionError: a share of the asked-for precision is demanded, and no engine will be run.
    """
    if reason := why_not_provable(recipe):
        raise PrecisionError(
            f"verify.min_precision_coverage demands {recipe.verify.min_precision_coverage:.1%}, "
            f"and nothing can be proved here: {reason}",
            "Run it where the engine runs, or leave the demand to 'gpuopt build' there\n"
            "(--set verify.min_precision_coverage=80%).",
        )


def check_own_quantizer(recipe: Recipe, command: str) -> None:
    """Refuse TensorRT's own calibrator for a command that shows what gpuopt's quantizer does.

    Raises:
        UsageError: the recipe names it.
    """
    if recipe.quantize.quantizer == "tensorrt":
        raise UsageError(
            f"the recipe says quantize.quantizer tensorrt, and '{command}' is about gpuopt's own quantizer",
            "Give --set quantize.quantizer=gpuopt, or use 'gpuopt compile'.",
        )


def check_request(recipe: Recipe, builds: bool = True) -> None:
    """Refuse at once what would fail after minutes of work.

    Args:
        builds: whether engines will be built, so that their libraries have to be there.

    Raises:
        RequirementError: a package or a GPU that the recipe needs is missing.
        UsageError: TensorRT has no calibrators any more, labels come without data, or the TensorRT here does not
            have an option.
        DataError: INT8 without data or ranges, or with ranges that cannot be read; evaluation data or labels that are
            not there.
        StorageError: the model file is not there.
        UsageError: a factory beside a file that is a whole model.
    """
    from gpuopt.model_file import ModelKind, detect

    if builds and recipe.build.enabled:
        environment.check_targets(recipe.build.target)
        _check_native(recipe)
        check_build_options(recipe)
    environment.require("onnxruntime", "verifying what was built")
    kind = ModelKind.FACTORY
    if recipe.model.path:
        if Path(recipe.model.path).is_dir():
            raise StorageError(f"{recipe.model.path} is a folder, not a model file", "Name the file inside it.")
        kind = detect(Path(recipe.model.path))
        _check_factory(recipe.model, kind)
    if kind is not ModelKind.ONNX:
        for package in ("torch", "onnxscript"):
            environment.require(package, "exporting a PyTorch model")
    if kind is ModelKind.SAFETENSORS:
        environment.require("safetensors", "reading safetensors")
    calibrate = recipe.calibrate
    _check_evaluation(recipe)
    has_samples = recipe.accuracy.data is not None or calibrate.data is not None or calibrate.random
    if _analyzes(recipe) and calibrate.ranges is not None and not has_samples:
        raise DataError(
            "ranges without data: there are no samples to measure the accuracy on",
            "Give --evaluation-data PATH or --calibration-data PATH besides.",
        )
    if recipe.precision == "int8" and calibrate.ranges is not None:
        from gpuopt.calibration import ranges

        ranges.read(Path(calibrate.ranges))
        return
    undecided = recipe.precision == "int8" and calibrate.data is None and not calibrate.random
    if undecided and not _holds_quantization(recipe.model, kind):
        raise DataError(
            "INT8 needs calibration data, and there is none beside the model",
            "Put calibration.npz or a folder calibration/ beside the model; or --calibration-data PATH; or\n"
            "--calibration-data package.module:callable; or --calibration-ranges FILE. (--random-calibration: smoke "
            "tests only.)",
        )


def _check_factory(model: ModelSection, kind: ModelKind) -> None:
    from gpuopt.model_file import ModelKind

    # A pickle that nobody vouches for is refused for what it would run.
    untrusted = kind is ModelKind.PICKLED_MODULE and not model.trust_pickle
    if model.factory and kind not in (ModelKind.STATE_DICT, ModelKind.SAFETENSORS) and not untrusted:
        raise UsageError(
            f"{model.path} is a whole model ({kind.value}): the factory {model.factory} would play no part",
            "Leave out --model (of a recipe: --set model.factory=null), or give the weights alone: a state dict.\n"
            "To compile the model that the factory makes, name it in place of the file.",
        )


def check_build_options(recipe: Recipe) -> None:
    """Refuse options that the libraries here lack, also where an engine that was built without them is in the cache.

    Raises:
        UsageError: names the option and the release that has it.
        RequirementError: attempts are to be raced and the engines cannot be run here.
    """
    from gpuopt.backends.tensorrt import limits
    from gpuopt.stages.build import asked_options

    for target in recipe.build.target:
        if target != "onnxruntime" and (version := environment.library_version(target)):
            limits.check(target, version, asked_options(recipe))
            if recipe.build.attempts > 1 and (reason := why_not_run(recipe, target)):
                raise RequirementError(
                    f"build.attempts races engines, and those of {target} cannot be run here: {reason}",
                    "Build once: --set build.attempts=1.",
                )


def _check_native(recipe: Recipe) -> None:
    version = environment.tensorrt_version()
    if is_native(recipe) and version is not None and version[0] >= 11:
        raise UsageError(
            f"TensorRT {version[0]}.{version[1]} has no calibrators any more: INT8 comes from Q/DQ in the graph alone",
            "Leave out --quantizer tensorrt, so that gpuopt calibrates and places Q/DQ.",
        )


def _holds_quantization(model: ModelSection, kind: ModelKind) -> bool:
    """Whether the model file shows Q/DQ of its own, which need no calibration."""
    if not model.path:
        return False
    from gpuopt.quantization.existing import file_holds_quantization

    return file_holds_quantization(Path(model.path), kind)


def _check_evaluation(recipe: Recipe) -> None:
    data, labels = recipe.accuracy.data, recipe.accuracy.labels
    if labels is not None and data is None and recipe.calibrate.random:
        raise UsageError(
            f"labels '{labels}' for random samples: nobody knows what those show",
            "Give the labels' data with --evaluation-data PATH, or leave out --labels.",
        )
    if data is not None and not Path(data).exists() and not FACTORY_PATTERN.match(data):
        raise DataError(
            f"evaluation data '{data}' does not exist",
            "Give a path or package.module:callable, as for --calibration-data.",
        )
    if labels is None or Path(labels).is_file():
        return
    keys: list[str] = []
    if data is not None and zipfile.is_zipfile(data):
        with zipfile.ZipFile(data) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
    if labels not in keys:
        raise DataError(
            f"labels '{labels}' are neither a file nor an array of the evaluation data",
            "Give --labels PATH.npy, or the name of an array in the .npz of --evaluation-data.",
        )


def _hashes(files: Sequence[str]) -> dict[str, str]:
    """Of those that can be read."""
    found = {}
    for name in files:
        with contextlib.suppress(OSError):
            state = Path(name).stat()
            large = state.st_size >= _LARGE_FILE
            found[name] = _sha256_of(name, state.st_size, state.st_mtime_ns) if large else sha256_file(Path(name))
    return found


_LARGE_FILE = 2**24
"""Bytes of a file, weights or data, that is read again only where its size or time is another."""


@functools.lru_cache(maxsize=64)
def _sha256_of(name: str, size: int, modified_ns: int) -> str:
    """Of a file as it is now; size and time are what tells one state from another."""
    return sha256_file(Path(name))


_CLOCK_STEP = 0.02
"""Seconds by which a file's time may lag behind the clock: the kernel's own is coarser."""


def _changed_since(started: float, files: Sequence[str], before: Mapping[str, str]) -> str:
    """The name of a file that is not what it was at `started`, empty if none.

    It is told by the hash of then, and for source files that were not known then by their times. Another file that is
    new may well be the code's own: downloaded, unpacked, cached.
    """
    for path in (Path(name) for name in files if Path(name).is_file()):
        if str(path) in before:
            changed = sha256_file(path) != before[str(path)]
        else:
            state = path.stat()
            changed = path.suffix == ".py" and max(state.st_mtime, state.st_ctime) > started - _CLOCK_STEP
        if changed:
            return path.name
    return ""


@functools.cache
def own_version() -> str:
    folder = Path(gpuopt.__file__).parent
    code = {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*.py")}
    return f"{gpuopt.__version__}+{sha256_json(code)[:12]}"


def _flatten(prefix: str, value: Any) -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {k: v for name, item in value.items() for k, v in _flatten(f"{prefix}.{name}", item).items()}
    return {prefix: json.dumps(value)}


def _remove(path: Path) -> None:
    import shutil

    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
