"""Signatures of bundles: minisign's, over the manifest, which holds the SHA-256 of everything else.

They are made with minisign's own command; see docs/commands.md. Checking needs the package py-minisign, no network.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuopt import environment
from gpuopt.errors import RequirementError, SignatureError, UsageError, one_line
from gpuopt.storage import storage_errors

_MOST_BYTES = 1 << 16
_MAKE = "Sign the bundle again: minisign -S -s KEY -m BUNDLE/manifest.json"


@dataclass(frozen=True)
class Signed:
    """A signature that holds.

    Attributes:
        key_id: of the key it was made with, as minisign prints it.
        trusted_comment: what the signer wrote; it is signed, too.
    """

    key_id: str
    trusted_comment: str


def verify(content: bytes, file: Path, public_key: str) -> Signed:
    """Check a signature.

    Args:
        content: what has to be signed.
        file: the signature.
        public_key: file of a public key that minisign wrote, or the key itself, `RW...`.

    Raises:
        RequirementError: py-minisign is missing.
        UsageError: `public_key` is neither.
        SignatureError: the signature is missing, damaged, of another key or of other content.
    """
    minisign = _library()
    key = _public_key(minisign, public_key)
    key_id = _key_id(key)
    if not file.is_file():
        raise SignatureError(f"there is no signature {file}, and one by key {key_id} is demanded", _MAKE)
    with storage_errors("read", file):
        told = _head(file)
    try:
        found = minisign.Signature.from_bytes(told)
    except minisign.Error as error:
        raise SignatureError(f"{file} is not a whole signature of minisign: {error}", _MAKE) from error
    try:
        key.verify(content, found)
    except minisign.Error as error:
        raise SignatureError(
            f"{file} is not a signature of the manifest by key {key_id}: {one_line(error)}",
            "The bundle was changed or signed by someone else: do not run it. Copy it again from its source.",
        ) from error
    return Signed(key_id, "".join(c if c.isprintable() else " " for c in found.trusted_comment))


def _library() -> Any:
    try:
        import minisign
    except ImportError as error:
        raise RequirementError(
            f"checking a signature needs the package py-minisign, which cannot be imported: {one_line(error)}",
            f"Install it: {environment.install_hint('minisign')}.",
        ) from error
    if not all(hasattr(minisign, name) for name in ("Error", "PublicKey", "Signature")):
        raise RequirementError(
            "checking a signature needs the package py-minisign; another one has taken its module's name, 'minisign'",
            f"pip uninstall minisign; {environment.install_hint('minisign')}",
        )
    return minisign


def _public_key(minisign: Any, given: str) -> Any:
    try:
        is_file = Path(given).is_file()
    except (OSError, ValueError):
        is_file = False
    try:
        if not is_file:
            return minisign.PublicKey.from_base64(given)
        with storage_errors("read", Path(given)):
            return minisign.PublicKey.from_bytes(_head(Path(given)))
    except minisign.Error as error:
        if is_file:
            what = f"holds no public key of minisign: {error}"
        elif given.startswith("RW"):
            what = f"is neither a file nor a public key of minisign: {error}"
        else:
            what = "is neither a file nor a public key of minisign: there is no such file"
        raise UsageError(
            f"--public-key {given} {what}", "Give minisign.pub, or the line in it that begins with RW."
        ) from error


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(_MOST_BYTES)


def _key_id(key: Any) -> str:
    # Two bytes of algorithm, then the key's number, which minisign prints with its last byte first.
    return base64.b64decode(key.to_base64())[2:10][::-1].hex().upper()
