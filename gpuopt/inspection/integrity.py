"""`gpuopt check` without its command line: is a bundle whole, does it fit together, who signed it?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpuopt import bundle, engine_record, signature
from gpuopt.backends.tensorrt import preflight
from gpuopt.errors import EngineError, StorageError
from gpuopt.inspection.home import plain, read_report
from gpuopt.inspection.model import IntegrityReport, SignatureFacts
from gpuopt.storage import storage_errors

_AGAIN = "Copy the bundle again, or compile again."
_QUANTIZE_FILE = "quantize.json"


def check(folder: Path, public_key: str | None = None) -> IntegrityReport:
    """Check signature, manifest and hashes, the engines' records, and the report, in this order.

    Args:
        public_key: whose signature is demanded, as `signature.verify` takes it; None: none is.

    Raises:
        SignatureError: the signature is missing, damaged or of another key.
        StorageError: the manifest or a file is missing or changed, or manifest and report contradict each other.
        EngineError: an engine has no record, or is not what it says.
    """
    manifest = bundle.open_bundle(folder, public_key)
    signed = SignatureFacts(state="none")
    file = folder / bundle.SIGNATURE_FILE
    if public_key is not None:
        with storage_errors("read", folder):
            content = (folder / bundle.MANIFEST_FILE).read_bytes()
        found = signature.verify(content, file, public_key)
        signed = SignatureFacts(state="valid", key_id=found.key_id, trusted_comment=found.trusted_comment)
    elif file.is_file():
        signed = SignatureFacts(state="unchecked")
    engines = _check_engines(folder, manifest)
    has_report = _check_report(folder, manifest)
    with storage_errors("read", folder):
        size = sum((folder / name).stat().st_size for name in manifest["files"])
    return IntegrityReport(
        bundle=plain(folder),
        files=len(manifest["files"]),
        size_bytes=size,
        engines=engines,
        status=manifest["status"] if has_report else None,
        precision=manifest["precision"] if has_report else None,
        signature=signed,
    )


def _check_engines(folder: Path, manifest: dict[str, Any]) -> tuple[str, ...]:
    """Names of the engines, each of which is what its record and the manifest's target say."""
    targets = _targets(folder, manifest)
    engines = sorted(name for name in manifest["files"] if name.endswith(".engine"))
    records = sorted(name for name in manifest["files"] if name.endswith(".engine.json"))
    if alone := sorted({name.removesuffix(".json") for name in records} - {*engines}):
        raise StorageError(f"bundle {folder}: {alone[0]} is missing, its record is there", _AGAIN)
    gone = sorted({*targets} - {*manifest["files"]})
    if gone and manifest.get("status") != "failed":
        raise StorageError(f"bundle {folder}: {gone[0]} is a target of the manifest and not in its files", _AGAIN)
    for name in engines:
        record = engine_record.read(folder / name)
        preflight.check_file(folder / name, record)
        if record.file != name:
            raise EngineError(f"the record of {name} is that of {record.file}", _AGAIN)
        told = targets.get(name)
        if told is None:
            raise StorageError(f"bundle {folder}: {name} is no target of the manifest", _AGAIN)
        for key, value in (("target", record.target), ("library_version", record.library_version)):
            if told.get(key) != value:
                raise StorageError(
                    f"bundle {folder}: {key} of {name} is {told.get(key)} in the manifest, {value} in its record",
                    _AGAIN,
                )
    return tuple(engines)


def _targets(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        return {str(entry["file"]): dict(entry) for entry in manifest.get("targets", [])}
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"bundle {folder}: the manifest's targets cannot be read: {error}", _AGAIN) from error


def _check_report(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether there is a report, which then says what the manifest says; `gpuopt quantize` writes none."""
    if bundle.REPORT_FILE not in manifest["files"]:
        if _QUANTIZE_FILE in manifest["files"]:
            return False
        raise StorageError(f"bundle {folder}: it has no {bundle.REPORT_FILE}", _AGAIN)
    report = read_report(folder)
    for key, value in (("status", report.status), ("precision", report.precision), ("created", report.created)):
        if manifest.get(key) != value:
            raise StorageError(
                f"bundle {folder}: {key} is {manifest.get(key)} in the manifest, {value} in the report", _AGAIN
            )
    for engine in report.engines:
        # What a failed run had made before it failed is not in its folder.
        left_out = report.status == "failed" and engine.file not in manifest["files"]
        if not left_out and manifest["files"].get(engine.file) != engine.sha256:
            raise StorageError(f"bundle {folder}: {engine.file} is not the file that the report is about", _AGAIN)
    return True
