"""Signatures of bundles: made by minisign, checked before anything of the bundle is believed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import gpuopt
from gpuopt import bundle, engine, environment, signature
from gpuopt.bench import command as bench
from gpuopt.compile import verify_bundle
from gpuopt.errors import GpuoptError, RequirementError, SignatureError, StorageError, UsageError
from gpuopt.inspection.command import inspect
from gpuopt.inspection.integrity import check
from gpuopt.profiling import command as profiling
from gpuopt.progress import choose
from gpuopt.triton import command as triton
from gpuopt.triton.options import Options
from gpuopt.triton.repository import write_model
from tests.unit.inspection import bundles

minisign = pytest.importorskip("minisign", reason="py-minisign is not installed: pip install 'gpuopt[sign]'")
TOOL = shutil.which("minisign")
needs_tool = pytest.mark.skipif(TOOL is None, reason="the command minisign is not installed: apt install minisign")


class Key:
    """A key pair, and its public half in a file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.pair = minisign.KeyPair.generate()
        self.text: str = self.pair.public_key.to_base64().decode()
        self.file = folder / f"{name}.pub"
        self.file.write_bytes(bytes(self.pair.public_key) + b"\n")

    def sign(self, folder: Path, **options: Any) -> None:
        made = self.pair.secret_key.sign((folder / "manifest.json").read_bytes(), **options)
        (folder / bundle.SIGNATURE_FILE).write_bytes(bytes(made) + b"\n")


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return Key(tmp_path, "release")


@pytest.fixture
def signed(tmp_path: Path, key: Key) -> Path:
    folder = bundles.make(tmp_path / "model.gpuopt")
    key.sign(folder, trusted_comment="release 7")
    return folder


def test_a_signature_holds_by_file_and_by_text(signed: Path, key: Key) -> None:
    for given in (str(key.file), key.text):
        found = check(signed, given).signature
        assert (found.state, found.trusted_comment) == ("valid", "release 7")
        assert len(found.key_id) == 16


def test_the_old_form_of_minisign_s_signatures_holds(signed: Path, key: Key) -> None:
    key.sign(signed, prehash=False)
    assert check(signed, key.text).signature.state == "valid"


def test_a_signed_bundle_is_a_bundle_and_loses_its_signature_when_it_is_written_anew(signed: Path) -> None:
    bundle.open_bundle(signed)
    bundle.check_destination(signed)
    assert inspect(signed).bundle.signature  # type: ignore[union-attr]
    bundle.write(signed, {}, {"report.json": "{}"}, {})
    assert sorted(path.name for path in signed.iterdir()) == ["manifest.json", "report.json"]
    (signed / bundle.SIGNATURE_FILE).write_text("x")
    bundle.remove(signed)
    assert not signed.exists()


def test_only_the_signature_s_own_place_is_tolerated(signed: Path) -> None:
    (signed / "reference" / bundle.SIGNATURE_FILE).write_text("x")
    with pytest.raises(StorageError, match=r"reference/manifest.json.minisig is not in the manifest"):
        bundle.open_bundle(signed)


def test_a_linked_signature_is_refused(signed: Path, tmp_path: Path, key: Key) -> None:
    (signed / bundle.SIGNATURE_FILE).rename(tmp_path / "elsewhere")
    (signed / bundle.SIGNATURE_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=r"manifest.json.minisig is a link"):
        bundle.open_bundle(signed, key.text)


def respace(folder: Path) -> None:
    """The same JSON in other bytes."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))


def relist(folder: Path) -> None:
    """What an attacker does who changes a file and makes the manifest fit."""
    (folder / bundles.ENGINE).write_bytes(b"ftrt evil")
    files = {p.name: p for p in folder.iterdir() if p.name not in ("manifest.json", bundle.SIGNATURE_FILE)}
    kept = (folder / bundle.SIGNATURE_FILE).read_bytes()
    bundle.write(folder, files, {}, {"status": "passed"})
    (folder / bundle.SIGNATURE_FILE).write_bytes(kept)


def edit_signature(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda f: (f / bundle.SIGNATURE_FILE).write_bytes(change((f / bundle.SIGNATURE_FILE).read_bytes()))


TAMPERING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: (f / bundle.SIGNATURE_FILE).unlink(), "there is no signature"),
    "empty": (edit_signature(lambda s: b""), "is not a whole signature"),
    "cut": (edit_signature(lambda s: s[:150]), "is not a whole signature"),
    "binary": (edit_signature(lambda s: b"\xff\xfe\0" * 99), "is not a whole signature"),
    "huge": (edit_signature(lambda s: s + b"\n" * (1 << 20)), "is not a whole signature"),
    "comment": (edit_signature(lambda s: s.replace(b"release 7", b"release 8")), "is not a signature of the manifest"),
    "manifest respaced": (respace, "is not a signature of the manifest"),
    "manifest relisted": (relist, "is not a signature of the manifest"),
    "manifest no JSON": (lambda f: (f / "manifest.json").write_text("{"), "is not a signature of the manifest"),
}


@pytest.mark.parametrize(("tamper", "said"), TAMPERING.values(), ids=TAMPERING)
def test_tampering_is_an_error_of_its_own_kind(
    signed: Path, key: Key, tamper: Callable[[Path], Any], said: str
) -> None:
    tamper(signed)
    for call in (check, bundle.open_bundle):
        with pytest.raises(SignatureError) as caught:
            call(signed, key.text)
        assert said in caught.value.message
        assert caught.value.exit_code == 17


def test_another_key_another_bundle_and_a_stolen_key_number_are_refused(signed: Path, key: Key, tmp_path: Path) -> None:
    other = Key(tmp_path, "other")
    with pytest.raises(SignatureError, match="incompatible key identifiers"):
        check(signed, other.text)
    elsewhere = bundles.make(tmp_path / "another.gpuopt", about={"more": 1})
    shutil.copyfile(signed / bundle.SIGNATURE_FILE, elsewhere / bundle.SIGNATURE_FILE)
    with pytest.raises(SignatureError, match="signature verification failed"):
        check(elsewhere, key.text)
    # The number of a key is no secret: a forger gives his own key the victim's.
    number = key.pair.secret_key._keynum_sk.key_id
    other.pair.secret_key._keynum_sk.key_id[:] = number
    other.sign(signed)
    with pytest.raises(SignatureError, match="signature verification failed"):
        check(signed, key.text)


def test_a_changed_file_under_a_valid_signature_is_noticed(signed: Path, key: Key) -> None:
    (signed / bundles.ENGINE).write_bytes(b"ftrt evil")
    with pytest.raises(StorageError, match=f"{bundles.ENGINE} changed"):
        check(signed, key.text)


@pytest.mark.parametrize(
    "given", ["", "RW", "absent.pub", "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO", "\0"]
)
def test_what_is_no_public_key_is_a_usage_error(signed: Path, given: str) -> None:
    with pytest.raises(UsageError, match="is neither a file nor a public key"):
        check(signed, given)


def test_a_key_file_that_is_not_there_is_told_so(signed: Path) -> None:
    with pytest.raises(UsageError, match=r"release\.pub .*: there is no such file"):
        check(signed, "release.pub")


def test_a_file_that_holds_no_public_key_is_a_usage_error(signed: Path, key: Key, tmp_path: Path) -> None:
    for content in (b"", b"\xff\xfe", bytes(key.pair.secret_key), (signed / bundle.SIGNATURE_FILE).read_bytes()):
        (tmp_path / "wrong.pub").write_bytes(content)
        with pytest.raises(UsageError, match="holds no public key"):
            check(signed, str(tmp_path / "wrong.pub"))


def test_nothing_is_opened_before_the_signature_holds(
    signed: Path, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*arguments: object, **named: object) -> None:
        raise AssertionError("the engine was opened")

    monkeypatch.setattr(environment, "why_not_run", lambda *_: "")
    monkeypatch.setattr(engine._TensorRTEngine, "__init__", opened)
    other = Key(tmp_path, "other")
    calls: list[Callable[[str], Any]] = [
        lambda k: gpuopt.load(signed, public_key=k),
        lambda k: gpuopt.load(signed / bundles.ENGINE, public_key=k),
        lambda k: gpuopt.load(signed, target="onnxruntime", public_key=k),
        lambda k: verify_bundle(signed, choose(True), [], public_key=k),
        lambda k: bench.bench(bench.Request(signed, public_key=k), [], choose(True)),
        lambda k: bench.bench(bench.Request(signed / bundles.ENGINE, public_key=k), [], choose(True)),
        lambda k: profiling.profile(signed / bundles.ENGINE, 1, [], choose(True), public_key=k),
    ]
    for call in calls:
        with pytest.raises(SignatureError):
            call(other.text)
    for path in (signed, signed / bundles.ENGINE):
        with pytest.raises(AssertionError, match="the engine was opened"):
            gpuopt.load(path, public_key=key.file)
    shutil.copyfile(signed / bundles.ENGINE, tmp_path / "alone.engine")
    with pytest.raises(StorageError, match="is not a gpuopt bundle"):
        gpuopt.load(tmp_path / "alone.engine", public_key=key.file)


def test_a_model_repository_is_made_of_signed_bundles(signed: Path, key: Key, tmp_path: Path) -> None:
    unsigned = bundles.make(tmp_path / "other.gpuopt", engine=bundles.record(compute_capabilities=("8.6",)))
    root = tmp_path / "repository"

    def write(key_text: str, *engines: Path) -> None:
        options = Options(engines_for=tuple(("", engine) for engine in engines))
        triton.write(triton.Request(signed, root, "m", options=options, public_key=key_text), [])

    other = Key(tmp_path, "other").text
    for attempt in (lambda: write(other), lambda: write(key.text, unsigned)):
        with pytest.raises(SignatureError):
            attempt()
    assert not root.exists()
    write(key.text)
    write_model(root / "e", 'platform: "ensemble" ensemble_scheduling { }')
    for path in (root / "m", root / "e"):
        with pytest.raises(SignatureError):
            triton.check_config(signed, path, None, None, [], other)
        with pytest.raises(StorageError, match="No such file or directory"):
            triton.check_config(tmp_path / "none", path, None, None, [])
    assert triton.check_config(signed, root / "m", None, None, [], key.text).passed


def test_a_linked_engine_does_not_borrow_a_signature(signed: Path, key: Key, tmp_path: Path) -> None:
    (tmp_path / "evil.engine").write_bytes(b"ftrt evil")
    (signed / bundles.ENGINE).unlink()
    (signed / bundles.ENGINE).symlink_to(tmp_path / "evil.engine")
    with pytest.raises(StorageError, match="is a link"):
        gpuopt.load(signed / bundles.ENGINE, public_key=key.text)


def test_without_the_package_the_command_is_told(signed: Path, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minisign", ModuleType("minisign"))
    with pytest.raises(RequirementError, match="another one has taken its module's name"):
        check(signed, key.text)
    monkeypatch.setitem(sys.modules, "minisign", None)
    with pytest.raises(RequirementError) as caught:
        check(signed, key.text)
    assert "gpuopt[sign]" in caught.value.hint


def test_what_the_signer_wrote_cannot_steer_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(trusted_comment="a\x1b[2Jb")
    library = SimpleNamespace(
        Error=GpuoptError,
        Signature=SimpleNamespace(from_bytes=lambda content: made),
        PublicKey=SimpleNamespace(
            from_base64=lambda text: SimpleNamespace(to_base64=lambda: b"QUJDREVGR0hJSktM", verify=lambda *a: None)
        ),
    )
    monkeypatch.setattr(signature, "_library", lambda: library)
    (tmp_path / "s").write_text("x")
    assert signature.verify(b"", tmp_path / "s", "K").trusted_comment == "a [2Jb"


def run_tool(*arguments: object) -> str:
    assert TOOL is not None
    finished = subprocess.run([TOOL, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=60)
    return finished.stdout


@needs_tool
@pytest.mark.parametrize("form", [(), ("-l",)], ids=["hashed", "legacy"])
def test_the_tool_s_signature_is_accepted(tmp_path: Path, form: tuple[str, ...]) -> None:
    folder = bundles.make(tmp_path / "model.gpuopt")
    shown = run_tool("-G", "-W", "-f", "-p", tmp_path / "tool.pub", "-s", tmp_path / "tool.key")
    run_tool("-S", *form, "-s", tmp_path / "tool.key", "-m", folder / "manifest.json", "-t", "release 9")
    found = check(folder, str(tmp_path / "tool.pub")).signature
    assert (found.state, found.trusted_comment) == ("valid", "release 9")
    assert f"minisign public key {found.key_id}" in (tmp_path / "tool.pub").read_text()
    line = (tmp_path / "tool.pub").read_text().splitlines()[1]
    assert line in shown
    assert check(folder, line).signature == found
    respace(folder)
    with pytest.raises(SignatureError):
        check(folder, line)


@needs_tool
def test_the_tool_accepts_the_package_s_signature(signed: Path, key: Key) -> None:
    assert "release 7" in run_tool("-V", "-p", key.file, "-m", signed / "manifest.json")
