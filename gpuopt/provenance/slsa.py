"""A bundle's SLSA provenance: an in-toto statement about the files that are deployed.

It is not signed, and gpuopt says it about itself. Whoever signs the bundle signs it too.
"""

from __future__ import annotations

import json
from typing import Any

from gpuopt.provenance.origin import Material, Origin, identifier, public_recipe, purl

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILDER_ID = "urn:gpuopt:builder"
"""gpuopt on a machine that it knows nothing about: what CI's own attestation adds."""


def build_type(command: str) -> str:
    """The URI that says how to read the parameters; the README describes them."""
    return f"urn:gpuopt:{command}:v1"


def render(origin: Origin) -> str:
    """A pure function of the origin; of equal runs only the times differ."""
    report = origin.report
    kept = [name for name in origin.deployable if name not in origin.made]
    definition = {
        "buildType": build_type(origin.command),
        "externalParameters": {"recipe": public_recipe(origin.recipe)},
        "internalParameters": {
            "precision": report.precision,
            "targets": [engine.target for engine in report.engines],
            "made": [name for name in origin.deployable if name in origin.made],
            "kept": kept,
            "python": report.environment["python"],
            "platform": report.environment["platform"],
            "gpus": report.environment["gpus"],
        },
        "resolvedDependencies": [
            *(_material(material) for material in origin.materials),
            *(_descriptor(name, origin.files[name]) for name in kept),
            *({"name": name, "uri": purl(name, version)} for name, version in sorted(origin.packages.items())),
        ],
    }
    subject = [_descriptor(name, digest) for name, digest in origin.deployable.items()]
    builder = {"id": BUILDER_ID, "version": {"gpuopt": report.gpuopt_version}}
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": subject,
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": definition,
            "runDetails": {
                "builder": builder,
                "metadata": {
                    "invocationId": identifier([subject, definition, builder]),
                    "startedOn": origin.started,
                    "finishedOn": origin.finished,
                },
            },
        },
    }
    return json.dumps(statement, indent=2, allow_nan=False) + "\n"


def _descriptor(name: str, digest: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest}}


def _material(material: Material) -> dict[str, Any]:
    descriptor: dict[str, Any] = {"name": material.name}
    if material.digest:
        descriptor["digest"] = dict(material.digest)
    else:
        # SLSA wants a URI or a digest; of code that yields the data there is only its name.
        descriptor["uri"] = f"urn:gpuopt:code:{material.name}"
    annotations: dict[str, Any] = {"role": material.role}
    if "dirHash" in material.digest:
        annotations["files"] = material.files
    return {**descriptor, "annotations": annotations}
