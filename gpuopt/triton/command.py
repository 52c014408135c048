"""`gpuopt triton` without its command line."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import gpuopt
from gpuopt import bundle as bundles
from gpuopt import engine_record
from gpuopt.errors import ConfigurationError, UsageError
from gpuopt.storage import sha256_file
from gpuopt.triton import check, config, ensemble, repository, schema, served
from gpuopt.triton.model import Checked, FindingReport, Written
from gpuopt.triton.options import Options
from gpuopt.triton.repository import Content, Place
from gpuopt.triton.rules import RULES
from gpuopt.triton.rules.finding import Finding
from gpuopt.triton.served import DEFAULT_FILES, Backend, Served


@dataclass(frozen=True)
class EnsembleRequest:
    """A pipeline around the model; its other steps are in the repository already.

    Attributes:
        renamed: `MODEL.INPUT` to the `MODEL.OUTPUT` that it takes, where names differ.
    """

    name: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What to write.

    Attributes:
        name: of the model; empty: the bundle's, without `.gpuopt`.
        version: None: the next one.
        existing: what becomes of the configuration of a model that is there: it has to be the same, or it is kept, or
            replaced.
        public_key: whose signature the bundle and those of other engines have to bear; None: no matter.
    """

    bundle: Path
    repository: Path
    name: str = ""
    version: int | None = None
    backend: Backend | None = None
    torchscript: Path | None = None
    options: Options = field(default_factory=Options)
    existing: Literal["same", "keep", "replace"] = "same"
    ensemble: EnsembleRequest | None = None
    public_key: str | None = None


def write(request: Request, command: Sequence[str]) -> Written:
    """Write a bundle's model into a repository as a new version.

    Everything that can be told before is told before anything is written.

    Raises:
        StorageError, EngineError, SignatureError: the bundle is damaged, or not signed as it has to be.
        UsageError: something is asked for that the model does not admit.
        ConfigurationError: the model is there with another configuration, or what is asked for breaks a rule.
    """
    bundles.open_bundle(request.bundle, request.public_key)
    model = served.of_bundle(request.bundle, request.backend, request.torchscript)
    name = request.name or request.bundle.absolute().name.removesuffix(".gpuopt")
    where = repository.place(request.repository, name, request.version)
    others = _others(model, request.options, request.public_key)
    own = model.record.compute_capabilities if model.record is not None else ()
    file = DEFAULT_FILES[model.backend]
    engines = {capability: _engine_file(capability) for capability in others}
    if others and len(own) == 1:
        engines.setdefault(own[0], file)
    made = config.make(model, name, request.options, engines)
    content = _content(made, model, {engines[capability]: other for capability, other in others.items()})
    is_kept = request.existing == "keep" and where.config_file.is_file()
    used, what = made.config, "what is asked for"
    if is_kept:
        check.demand(check.findings(made.config, model, None), what)
        used, what = check.read(where.model_folder)[0], f"{where.config_file} does not fit the new version"
    found = [*check.findings(used, model, None), *check.of_new_version(used, model, where, content.files)]
    check.demand(found, what)
    pipeline = _ensemble(where, used, request.ensemble) if request.ensemble is not None else None
    state = _place(where, content, is_kept, replaces=request.existing == "replace")
    present, folder = check.read(where.model_folder)
    found = check.findings(present, model, folder)
    added = [where.version_folder / name for name in (*content.files, *content.documents)]
    if pipeline is not None:
        repository.write_model(where.repository / pipeline.name, schema.render(pipeline))
    return Written(
        command=list(command),
        bundle=str(request.bundle),
        repository=str(request.repository),
        model=name,
        version=where.version,
        backend=model.backend,
        files={str(path.relative_to(request.repository)): sha256_file(path) for path in added},
        config_state=state,
        config=where.config_file.read_text(encoding="utf-8", errors="replace"),
        ensemble=pipeline.name if pipeline is not None else "",
        findings=[_report(finding) for finding in found],
        warnings=list(made.warnings),
    )


def check_config(
    bundle: Path,
    path: Path,
    backend: Backend | None,
    torchscript: Path | None,
    command: Sequence[str],
    public_key: str | None = None,
) -> Checked:
    """Ask every rule about a configuration and the bundle whose model it is for.

    Raises:
        UsageError: there is no configuration.
        ConfigurationError: it cannot be read as one.
        StorageError, EngineError, SignatureError: the bundle is damaged, or not signed as it has to be.
    """
    bundles.open_bundle(bundle, public_key)
    written, folder = check.read(path)
    if backend is None and not written.HasField("ensemble_scheduling"):
        backend = _stated_backend(written, bundle)
    model = None if written.HasField("ensemble_scheduling") else served.of_bundle(bundle, backend, torchscript)
    found = check.findings(written, model, folder)
    return Checked(
        command=list(command),
        bundle=str(bundle),
        config=str(path),
        passed=not any(finding.severity == "error" for finding in found),
        rules=len(RULES),
        findings=[_report(finding) for finding in found],
    )


def failure(answer: Checked) -> ConfigurationError | None:
    """The error of a check that did not pass; None if it did."""
    wrong = [finding for finding in answer.findings if finding.severity == "error"]
    if not wrong:
        return None
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return ConfigurationError(f"{answer.config}: {wrong[0].field}: {wrong[0].message}{more}", wrong[0].fix)


def _stated_backend(written: schema.ModelConfig, bundle: Path) -> Backend | None:
    """The backend that a configuration names, if the bundle has something for it; else the bundle's own choice."""
    platforms = {platform: backend for backend, platform in served.PLATFORMS.items()}
    stated = written.backend or platforms.get(written.platform, "")
    if stated == "onnxruntime":
        return "onnxruntime"
    return "tensorrt" if stated == "tensorrt" and engine_record.find_engine(bundle) else None


def _others(model: Served, options: Options, public_key: str | None) -> dict[str, Served]:
    """Engines for further GPUs, by compute capability."""
    if options.engines_for and model.record is None:
        raise UsageError(
            "--engine-for adds engines for other GPUs to an engine", "Leave it out, or choose --backend tensorrt."
        )
    found: dict[str, Served] = {}
    for capability, folder in options.engines_for:
        bundles.open_bundle(folder, public_key)
        other = served.engine_of(folder)
        same = (other.inputs, other.outputs, other.profiles) == (model.inputs, model.outputs, model.profiles)
        if not same:
            raise UsageError(
                f"the engine of {folder} has other inputs, outputs or profiles", "Compile both with the same shapes."
            )
        known = other.record.compute_capabilities if other.record is not None else ()
        chosen = capability or (known[0] if len(known) == 1 else "")
        if not chosen or (known and capability and capability not in known and not _is_open(known)):
            raise UsageError(
                f"--engine-for {folder}: its engine is for {', '.join(known) or 'GPUs that its record does not name'}",
                "Write CAPABILITY=BUNDLE, as in 8.6=model-a10.gpuopt, with one that the engine runs on.",
            )
        if chosen in found:
            raise UsageError(f"--engine-for: two engines are for {chosen}", "Leave one of the two out.")
        found[chosen] = other
    return found


def _is_open(capabilities: Sequence[str]) -> bool:
    return any("newer" in capability for capability in capabilities)


def _engine_file(capability: str) -> str:
    return f"model_cc{capability.replace('.', '')}.plan"


def _content(made: config.Made, model: Served, others: Mapping[str, Served]) -> Content:
    file = DEFAULT_FILES[model.backend]
    files = {file: model.file, **{path.name: path for path in model.more}}
    documents = {}
    for name, one in ((file, model), *others.items()):
        files[name] = one.file
        if one.record is not None:
            record = one.record.model_copy(update={"file": name})
            documents[engine_record.record_path(Path(name)).name] = record.model_dump_json(indent=2) + "\n"
    head = (
        f"# Written by gpuopt {gpuopt.__version__} for {model.file.name}; 'gpuopt triton --check' compares the two.\n"
    )
    return Content(head + schema.render(made.config), files, documents, made.warm_up)


def _place(
    where: Place, content: Content, is_kept: bool, replaces: bool
) -> Literal["written", "unchanged", "kept", "replaced"]:
    if is_kept:
        repository.add_version(where, content)
        return "kept"
    if not where.config_file.is_file():
        repository.write(where, content, replace_config=True)
        return "written"
    before = where.config_file.read_bytes()
    repository.write(where, content, replace_config=replaces)
    return "unchanged" if where.config_file.read_bytes() == before else "replaced"


def _ensemble(where: Place, own: schema.ModelConfig, asked: EnsembleRequest) -> schema.ModelConfig:
    """The pipeline's configuration; `own` is the one that the model will have."""
    for name in (asked.name, *asked.before, *asked.after):
        repository.check_name(name)
    if asked.name in (*asked.before, where.model, *asked.after):
        raise UsageError(f"--ensemble {asked.name} is one of its own steps", "Give it another name.")
    before, after = ([ensemble.read(where.repository, name) for name in names] for names in (asked.before, asked.after))
    own = copy.deepcopy(own)
    own.name = where.model
    made = ensemble.make(asked.name, [*before, own, *after], asked.renamed)
    check.demand(check.findings(made, None, None), f"ensemble '{asked.name}'")
    repository.has_model(where.repository / asked.name, schema.render(made))
    return made


def _report(finding: Finding) -> FindingReport:
    return FindingReport(**dataclasses.asdict(finding))
