"""A serialized engine for one target."""

from __future__ import annotations

from gpuopt import reference
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.backends.tensorrt import builder
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.stages.context import StageContext

ENGINE_FILE = {"tensorrt": "model.tensorrt.engine", "tensorrt-rtx": "model.tensorrt-rtx.engine"}


def run(context: StageContext) -> StageOutcome:
    """Make `engine` for `context.target` from the deployed ONNX and the profiles.

    Raises:
        RequirementError: the target's library, driver or GPU is missing.
        BuildError: the library refuses the graph.
    """
    settings = context.recipe.build
    stored = reference.load(context.folder("reference"))
    options = BuildOptions(
        compute_capabilities=settings.compute_capability,
        optimization_level=settings.optimization_level,
        workspace_bytes=settings.workspace,
    )
    onnx_path = context.engine_graph() / ONNX_FILE
    built = builder.build(context.target, onnx_path, stored.profiles, options, context.progress)
    path = context.made("engine") / ENGINE_FILE[context.target]
    path.write_bytes(built.plan)
    facts = {
        "target": context.target,
        "file": path.name,
        "library_version": built.version,
        "size_bytes": len(built.plan),
        "compute_capabilities": _capabilities(context.target, settings.compute_capability),
        "builder_messages": list(built.messages),
    }
    return StageOutcome(facts)


def _capabilities(target: str, chosen: tuple[str, ...]) -> list[str]:
    if target == "tensorrt":
        return ["this machine's GPU"]
    return list(chosen) or ["8.0 and newer"]
