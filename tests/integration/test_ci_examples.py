"""The pipelines in examples/ci: their form, their commands and flags, and release.sh for real."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from gpuopt import bundle
from gpuopt.cli import app
from tests.conftest import Gpuopt
from tests.integration import small

CI = Path(__file__).parent.parent.parent / "examples/ci"
GITHUB, GITLAB, RELEASE = CI / "github-actions.yml", CI / "gitlab-ci.yml", CI / "release.sh"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

GITLAB_KEYWORDS = {"stages", "workflow", "variables", "default", "include", "image", "cache"}
GITLAB_JOB_KEYS = {
    "extends", "stage", "image", "tags", "timeout", "cache", "script", "before_script", "artifacts", "needs", "rules",
    "allow_failure", "interruptible", "release",
}  # fmt: skip
GITHUB_PERMISSIONS = {"contents", "id-token", "attestations", "pull-requests"}


def github() -> Any:
    document = yaml.safe_load(GITHUB.read_text())
    # YAML 1.1 reads the key `on` as a truth value.
    document["on"] = document.pop(True)
    return document


def gitlab() -> Any:
    return yaml.safe_load(GITLAB.read_text())


def github_steps() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, job in github()["jobs"].items():
        for step in job["steps"]:
            yield name, step


def scripts() -> dict[str, str]:
    """Every piece of shell in the three files, by where it stands."""
    found = {"release.sh": RELEASE.read_text()}
    for number, (job, step) in enumerate(github_steps()):
        if "run" in step:
            found[f"github {job} {number} {step.get('name', '')}".strip()] = step["run"]
    for name, job in gitlab().items():
        for key in ("before_script", "script") if isinstance(job, dict) else ():
            # GitLab runs the lines of a job in one shell.
            if key in job:
                found[f"gitlab {name} {key}"] = "\n".join(job[key])
    return found


SCRIPTS = scripts()


def test_the_workflow_has_the_form_that_github_documents() -> None:
    document = github()
    assert set(document) <= {"name", "on", "permissions", "concurrency", "defaults", "env", "jobs"}
    assert document["defaults"] == {"run": {"shell": "bash"}}, "without it there is no pipefail"
    for name, job in document["jobs"].items():
        assert {"runs-on", "steps", "permissions", "timeout-minutes"} <= set(job), name
        needs = job.get("needs", [])
        assert {needs} if isinstance(needs, str) else set(needs) <= set(document["jobs"])
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            assert set(step) <= {"name", "id", "if", "uses", "with", "run", "env"}


def test_no_job_on_github_may_more_than_it_needs() -> None:
    document = github()
    assert document["permissions"] == {}
    permissions = {name: job["permissions"] for name, job in document["jobs"].items()}
    assert {right for rights in permissions.values() for right in rights} <= GITHUB_PERMISSIONS
    # What runs the model's code, and so the pull request's, may write nothing and keeps no token in the checkout.
    assert permissions["compile"] == {"contents": "read"}
    checkout = next(s for _, s in github_steps() if s.get("uses", "").startswith("actions/checkout@"))
    assert checkout["with"]["persist-credentials"] is False
    assert "pull_request_target" not in document["on"]
    secrets = [step for _, step in github_steps() if "secrets." in json.dumps(step)]
    assert [step["name"] for step in secrets] == ["Sign"], "a secret is there for the one step that needs it"


def test_actions_are_pinned_by_version() -> None:
    used = [step["uses"] for _, step in github_steps() if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w/-]+@(v\d+(\.\d+)*|[0-9a-f]{40})", action), action
    images = [
        gitlab()["default"]["image"],
        *(j["image"] for j in gitlab().values() if isinstance(j, dict) and "image" in j),
    ]
    assert all(re.search(r":v?\d+\.\d+", image) for image in images)


def test_what_others_write_never_becomes_shell() -> None:
    for where, script in SCRIPTS.items():
        assert "${{" not in script, f"{where}: an expression is pasted into the script before the shell reads it"


def test_no_secret_is_printed_or_an_argument() -> None:
    for where, script in SCRIPTS.items():
        for line in script.splitlines():
            if re.search(r"\$\{?\w*(TOKEN|PASSWORD)\b", line):
                # printf is a builtin: nothing shows in the list of processes, and it writes into a pipe.
                assert re.match(r"\s*printf '.*' \"\$.*\" \|", line), f"{where}: {line}"
        assert "set -x" not in script


def test_the_pipeline_has_the_form_that_gitlab_documents() -> None:
    document = gitlab()
    jobs = {name: job for name, job in document.items() if name not in GITLAB_KEYWORDS}
    for name, job in jobs.items():
        assert set(job) <= GITLAB_JOB_KEYS, name
        if not name.startswith("."):
            assert job["stage"] in document["stages"]
            assert job["script"]
        assert set(job.get("needs", [])) <= set(jobs)
        if "extends" in job:
            assert job["extends"] in jobs
    assert jobs["compile"]["artifacts"]["reports"]["junit"]
    assert jobs["compile"]["cache"]["when"] == "always"


@pytest.mark.parametrize(("path", "schema"), [(GITHUB, "github-workflows"), (GITLAB, "gitlab-ci")])
def test_the_files_are_valid_by_the_services_schemas(path: Path, schema: str) -> None:
    # The package brings the schemas with it: nothing is downloaded.
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    if schema == "gitlab-ci":
        command += ["--data-transform", "gitlab-ci"]
    checked = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("where", SCRIPTS)
def test_every_script_is_bash(where: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=SCRIPTS[where], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("where", SCRIPTS)
def test_shellcheck_has_no_complaint(where: str) -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(
        [shellcheck, "--shell=bash", "-"], input=SCRIPTS[where], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def calls(script: str) -> Iterator[list[str]]:
    """The arguments of every call of gpuopt in a script or its usage text."""
    for line in script.replace("\\\n", " ").splitlines():
        for match in re.finditer(r'(?:\bgpuopt|"\$gpuopt_command") ((?:compile|compare|build|verify)\b[^|;)]*)', line):
            if match.start() == 0 or not line.lstrip().startswith(("#", "say")):
                words = shlex.split(match[1].partition("||")[0], comments=True)
                yield words


def flags_used() -> Iterator[tuple[str, str, str]]:
    for where, script in SCRIPTS.items():
        for command, *arguments in calls(script.replace("release.sh model.pt releases 1.4.0 --", "gpuopt compile")):
            for argument in arguments:
                if argument.startswith("--") and argument != "--":
                    yield where, command, argument.partition("=")[0]


def test_every_flag_of_gpuopt_is_one_that_the_program_has() -> None:
    used = list(flags_used())
    assert {command for _, command, _ in used} == {"compile", "compare"}
    assert {"--max-accuracy-drop", "--max-latency", "--max-engine-size"} <= {flag for _, _, flag in used}
    for where, command, flag in used:
        known = {opt for p in COMMANDS[command].params for opt in p.opts} if command in COMMANDS else set()
        assert flag in known, f"{where}: gpuopt {command} {flag}"


def test_the_values_of_the_flags_are_valid_too(gpuopt: Gpuopt, tmp_path: Path) -> None:
    (tmp_path / "calibration.npz").touch()
    values = {"$MODEL": "model.pt", "$BUNDLE": "model.gpuopt"}
    seen = 0
    for where, script in SCRIPTS.items():
        for command, *arguments in calls(
            script.replace("release.sh model.pt releases 1.4.0 --", "gpuopt compile x.pt")
        ):
            words = [values.get(argument, argument) for argument in arguments]
            if command != "compile" or any("$" in word for word in words):
                continue
            result = gpuopt("compile", *words, "-c", tmp_path / "calibration.npz", "--dry-run", cwd=tmp_path)
            assert result.code == 0, f"{where}: {result.stderr}"
            seen += 1
    assert seen == 3


# What stands in for `gpuopt compare` where its exit code is the test's choice, and for minisign. Everything else is
# gpuopt itself.
STAND_IN = """#!/usr/bin/env bash
if [ "$1" = compare ] && [ -n "$COMPARE_LOG" ]; then
    printf '%s\\n' "$@" > "$COMPARE_LOG"
    exit "${COMPARE_CODE:-0}"
fi
exec "$PYTHON" -m gpuopt "$@"
"""
MINISIGN = """#!/usr/bin/env bash
cat > "$MINISIGN_LOG"
printf '%s\\n' "$@" >> "$MINISIGN_LOG"
while [ $# -gt 1 ] && [ "$1" != -m ]; do shift; done
echo signature > "$2.minisig"
exit "${MINISIGN_CODE:-0}"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder with a space in its name, and the stand-ins."""
    folder = tmp_path_factory.mktemp("my project")
    small.save("exported program", folder / "my model.pt")
    small.save_data(folder / "calibration.npz")
    (folder / "bin").mkdir()
    for name, text in (("stand in", STAND_IN), ("minisign", MINISIGN)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder


Release = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def release(project: Path, cache_folder: Path, tmp_path: Path) -> Release:
    """Runs release.sh on the model; keyword arguments are environment variables."""

    def run(*arguments: str, options: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
        words = (*options, "my model.pt", str(tmp_path / "all releases"), *arguments)
        environment = {
            **os.environ,
            "GPUOPT": str(project / "bin" / "stand in"),
            "PYTHON": sys.executable,
            "PATH": f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "GPUOPT_CACHE_DIR": str(cache_folder),
            "COMPARE_LOG": str(tmp_path / "compare.log"),
            "MINISIGN_LOG": str(tmp_path / "minisign.log"),
            **variables,
        }
        return subprocess.run(
            [str(RELEASE), *words], cwd=project, env=environment, capture_output=True, text=True, check=False
        )

    return run


TARGET = ("--", "-t", "onnxruntime", "-q")


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock")
class TestRelease:
    def test_a_release_becomes_current_and_a_failing_one_does_not(self, release: Release, tmp_path: Path) -> None:
        releases = tmp_path / "all releases"
        first = release("1.0", *TARGET)
        assert first.returncode == 0, first.stderr
        assert (releases / "current").readlink() == Path("1.0")
        bundle.open_bundle(releases / "current")

        # Accuracy that cannot be reached: gpuopt's exit code is the script's.
        before = (releases / "1.0" / "manifest.json").read_bytes()
        failing = release("1.1", *TARGET, "--min-cosine", "0.99999999")
        assert failing.returncode == 8, failing.stderr
        assert "current stays" in failing.stderr
        assert (releases / "current").readlink() == Path("1.0")
        assert (releases / "current" / "manifest.json").read_bytes() == before
        assert (releases / "1.1.failed" / "report.md").is_file()
        assert sorted(p.name for p in releases.iterdir()) == [".lock", "1.0", "1.1.failed", "current"]

        # The same version again, once it passes; the comparison gets both bundles.
        second = release("1.1", *TARGET, options=("--max-p99-regress", "7%"))
        assert second.returncode == 0, second.stderr
        assert (releases / "current").readlink() == Path("1.1")
        assert (releases / "1.0" / "manifest.json").read_bytes() == before
        assert sorted(p.name for p in releases.iterdir()) == [".lock", "1.0", "1.1", "current"]
        asked = (tmp_path / "compare.log").read_text().splitlines()
        assert asked[1:3] == [str(releases / "current"), str(releases / "1.1.candidate")]
        assert asked[3:] == ["--max-p99-regress", "7%", "--markdown", str(releases / "1.1.compare.md")]

    def test_a_release_that_is_worse_or_of_another_kind_is_kept_back(self, release: Release, tmp_path: Path) -> None:
        releases = tmp_path / "all releases"
        assert release("1.0", *TARGET).returncode == 0
        worse = release("1.1", *TARGET, COMPARE_CODE="15")
        assert worse.returncode == 15
        bundle.open_bundle(releases / "1.1.failed")
        assert release("1.1", *TARGET, COMPARE_CODE="16").returncode == 16
        assert (releases / "current").readlink() == Path("1.0")
        assert not (releases / "1.1").exists()
        accept = ("--accept-incomparable",)
        assert release("1.1", *TARGET, options=accept, COMPARE_CODE="15").returncode == 15
        assert release("1.1", *TARGET, options=accept, COMPARE_CODE="16").returncode == 0
        assert (releases / "current").readlink() == Path("1.1")

    def test_a_release_is_really_compared_with_the_current_one(self, release: Release, tmp_path: Path) -> None:
        releases = tmp_path / "all releases"
        target = TARGET
        # What is not the test's subject, the noise of a busy machine, is let through.
        lax = ("--max-p99-regress", "10000%")
        assert release("1.0", *target, COMPARE_LOG="").returncode == 0
        same = release("1.1", *target, options=lax, COMPARE_LOG="")
        assert same.returncode in (0, 15), same.stderr
        told = (releases / "1.1.compare.md").read_text()
        assert "latency" in told
        larger = release("1.2", *target, "-p", "fp32", options=lax, COMPARE_LOG="")
        assert larger.returncode == 15, larger.stderr
        assert "size" in (releases / "1.2.compare.md").read_text()
        assert (releases / "1.2.failed/report.md").is_file()
        assert (releases / "current").readlink() != Path("1.2")

    def test_the_manifest_is_signed_in_the_bundle(self, release: Release, tmp_path: Path) -> None:
        releases = tmp_path / "all releases"
        signing = {"MINISIGN_KEY": "/a key", "MINISIGN_PASSWORD": "open sesame"}
        failing = release("1.0", *TARGET, **signing, MINISIGN_CODE="2")
        assert failing.returncode == 2
        assert [p.name for p in releases.iterdir()] == [".lock"]
        signed = release("1.0", *TARGET, **signing)
        assert signed.returncode == 0, signed.stderr
        assert (releases / "1.0/manifest.json.minisig").read_text() == "signature\n"
        password, *arguments = (tmp_path / "minisign.log").read_text().splitlines()
        assert password == "open sesame"
        assert arguments[:4] == ["-S", "-s", "/a key", "-m"]
        assert "sesame" not in signed.stdout + signed.stderr + " ".join(arguments)
        bundle.open_bundle(releases / "1.0")

    @pytest.mark.parametrize("version", ["../1.0", ".hidden", "a/b", "current", "1.failed", "-x", "a b", ""])
    def test_a_version_that_is_no_name_is_refused(self, release: Release, tmp_path: Path, version: str) -> None:
        refused = release(version, *TARGET)
        assert refused.returncode == 2, refused.stderr
        assert not (tmp_path / "all releases" / "current").exists()

    def test_what_is_there_is_not_replaced(self, release: Release, tmp_path: Path) -> None:
        releases = tmp_path / "all releases"
        (releases / "1.0").mkdir(parents=True)
        assert "releases do not change" in release("1.0", *TARGET).stderr
        (releases / "current").mkdir()
        refused = release("1.1", *TARGET)
        assert refused.returncode == 2
        assert "is not a link" in refused.stderr
        assert sorted(p.name for p in releases.iterdir()) == ["1.0", "current"]

    def test_two_at_a_time_are_refused(self, release: Release, tmp_path: Path) -> None:
        releases = tmp_path / "all releases"
        releases.mkdir()
        with (releases / ".lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            refused = release("1.0", *TARGET)
        assert refused.returncode == 2
        assert "another release is being made" in refused.stderr

    def test_wrong_usage_shows_the_usage(self) -> None:
        for words, code in (((), 2), (("a", "b"), 2), (("--unknown",), 2), (("--help",), 0)):
            shown = subprocess.run([str(RELEASE), *words], capture_output=True, text=True, check=False)
            assert shown.returncode == code
            assert "Usage: release.sh" in shown.stdout + shown.stderr or "--help" in shown.stderr
