"""A bundle as a CycloneDX document: what it consists of, what it was made from, and with which tools.

Packages stand among the tools: they made the bundle and are no part of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gpuopt.artifact import ENGINE_ONNX_FILE, ONNX_FILE
from gpuopt.provenance.origin import Material, Origin, identifier, purl

SPEC_VERSION = "1.7"


def render(origin: Origin) -> str:
    """A pure function of the origin; of equal runs only the timestamp differs."""
    materials = {f"material:{number}": material for number, material in enumerate(origin.materials, 1)}
    document: dict[str, Any] = {
        "metadata": {
            "lifecycles": [{"phase": "build"}],
            "tools": {"components": _tools(origin)},
            "component": _bundle(origin, materials),
            "properties": _machine(origin),
        },
        "components": [
            *(_material(reference, material) for reference, material in materials.items()),
            *(_file(origin, name, digest) for name, digest in sorted({**origin.files, **origin.records}.items())),
        ],
        "dependencies": _dependencies(origin, materials),
    }
    head = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": identifier(document),
        "version": 1,
    }
    document["metadata"] = {"timestamp": origin.finished, **document["metadata"]}
    return json.dumps({**head, **document}, indent=2, allow_nan=False) + "\n"


def _tools(origin: Origin) -> list[dict[str, Any]]:
    version = origin.report.gpuopt_version
    tools = [
        {
            "type": "application",
            "bom-ref": "tool:gpuopt",
            "name": "gpuopt",
            "version": version,
            "purl": purl("gpuopt", version),
        }
    ]
    for name, version in sorted(origin.packages.items()):
        tools.append(
            {
                "type": "library",
                "bom-ref": f"tool:{name}",
                "name": name,
                "version": version,
                "purl": purl(name, version),
            }
        )
    return tools


def _bundle(origin: Origin, materials: Mapping[str, Material]) -> dict[str, Any]:
    report = origin.report
    facts = report.interface()
    parameters: dict[str, Any] = {}
    if data := [reference for reference, material in materials.items() if material.role.endswith(" data")]:
        parameters["datasets"] = [{"ref": reference} for reference in data]
    if "inputs" in facts:
        parameters["inputs"] = [{"format": _tensor(entry)} for entry in facts["inputs"]]
        parameters["outputs"] = [{"format": _tensor(entry)} for entry in facts["outputs"]]
    card: dict[str, Any] = {"modelParameters": parameters} if parameters else {}
    if metrics := _metrics(origin):
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return {
        "type": "machine-learning-model",
        "bom-ref": "bundle",
        "name": origin.model_name,
        "description": f"{origin.model_name} compiled by gpuopt to {report.precision.upper()}",
        **({"modelCard": card} if card else {}),
        "properties": _properties(
            {
                "command": origin.command,
                "precision": report.precision,
                "targets": ", ".join(engine.target for engine in report.engines),
                "model kind": report.model.kind,
                "model factory": report.model.factory,
                "random calibration data": "true" if report.facts("calibrate").get("random") else None,
            }
        ),
    }


def _tensor(entry: Mapping[str, Any]) -> str:
    """An input or output in a line: name, dtype and shapes."""
    profiles = entry.get("profiles")
    if profiles is None:
        return f"{entry['name']}: {entry['dtype']} {entry['shape']}"
    shapes = ", ".join(f"{p['min']} .. {p['max']}" if p["min"] != p["max"] else str(p["min"]) for p in profiles)
    return f"{entry['name']}: {entry['dtype']} {shapes}"


def _metrics(origin: Origin) -> list[dict[str, str]]:
    """How near each file comes to the original model where it is farthest from it."""
    rows = {engine.file: list(engine.proof["outputs"]) for engine in origin.report.engines if engine.proof is not None}
    for row in (origin.report.verification or {}).get("outputs", []):
        rows.setdefault(row["graph"], []).append(row)
    metrics = []
    for name, outputs in sorted(rows.items()):
        for key, kind in (("cosine", "lowest cosine similarity"), ("sqnr_db", "lowest SQNR in dB")):
            if values := [row[key] for row in outputs if row.get(key) is not None]:
                metrics.append({"type": kind, "value": f"{min(values):.6g}", "slice": name})
    return metrics


def _machine(origin: Origin) -> list[dict[str, str]]:
    environment = origin.report.environment
    named: dict[str, Any] = {"python": environment["python"], "platform": environment["platform"]}
    for number, gpu in enumerate(environment["gpus"]):
        named[f"gpu:{number}:name"] = gpu["name"]
        named[f"gpu:{number}:compute capability"] = gpu["compute_capability"]
        named[f"gpu:{number}:CUDA driver version"] = gpu.get("driver_version") or None
        named[f"gpu:{number}:memory in bytes"] = gpu.get("total_bytes") or None
    return _properties(named)


def _material(reference: str, material: Material) -> dict[str, Any]:
    kinds = {"model": "machine-learning-model", "plugin": "library"}
    kind = kinds.get(material.role, "data")
    component: dict[str, Any] = {"type": kind, "bom-ref": reference, "name": material.name}
    if "sha256" in material.digest:
        component["hashes"] = _hashes(material.digest["sha256"])
    if kind == "data":
        component["data"] = [{"type": "dataset" if material.role.endswith(" data") else "other", "name": material.name}]
    files = material.files if "dirHash" in material.digest else None
    component["properties"] = _properties(
        {"role": material.role, "dirHash": material.digest.get("dirHash"), "files": files}
    )
    return component


def _file(origin: Origin, name: str, digest: str) -> dict[str, Any]:
    component: dict[str, Any] = {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": _hashes(digest)}
    engine = next((engine for engine in origin.report.engines if engine.file == name), None)
    if engine is not None:
        component["properties"] = _properties(
            {
                "target": engine.target,
                "library version": engine.library_version or None,
                "compute capabilities": ", ".join(engine.compute_capabilities) or None,
                "status": engine.status,
            }
        )
    return component


def _dependencies(origin: Origin, materials: Mapping[str, Material]) -> list[dict[str, Any]]:
    """The bundle on its files, the graphs on what they were made from, the engines on their graph."""
    files = sorted({**origin.files, **origin.records})
    graph = ENGINE_ONNX_FILE if ENGINE_ONNX_FILE in origin.files else ONNX_FILE
    sources = [reference for reference, material in materials.items() if material.role != "plugin"]
    plugins = [reference for reference, material in materials.items() if material.role == "plugin"]
    edges = [_edge("bundle", (f"file:{name}" for name in files))]
    for name in files:
        if name in (ONNX_FILE, ENGINE_ONNX_FILE):
            edges.append(_edge(f"file:{name}", sources))
        elif name.endswith(".engine") and graph in origin.files:
            edges.append(_edge(f"file:{name}", [f"file:{graph}", *plugins]))
    return edges


def _edge(reference: str, on: Iterable[str]) -> dict[str, Any]:
    return {"ref": reference, "dependsOn": list(on)}


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _properties(named: Mapping[str, Any]) -> list[dict[str, str]]:
    """Properties in gpuopt's namespace; None is left out."""
    return [
        {"name": f"gpuopt:{name.replace(' ', '_')}", "value": str(value)}
        for name, value in named.items()
        if value is not None
    ]
