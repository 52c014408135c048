"""The documentation against the program: every command, flag, exit code, recipe and recipe key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
import yaml

from gpuopt import errors, recipe
from gpuopt.cli import app
from tests.conftest import Gpuopt

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs/commands.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
GOLDEN = ROOT / "tests/golden"
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_every_command_has_its_section() -> None:
    documented = re.findall(r"^### `gpuopt ([\w-]+)`", REFERENCE, re.MULTILINE)
    assert sorted(documented) == COMMANDS
    assert sorted(re.findall(r"^\| \[`gpuopt ([\w-]+)`\]", README, re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_is_in_its_section(command: str) -> None:
    section = REFERENCE.split(f"### `gpuopt {command}`")[1].split("\n### ")[0].split("\n## ")[0]
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    for parameter in parameters:
        if parameter.param_type_name == "option":
            flag = max(parameter.opts, key=len)
            assert f"`{flag}" in section, f"{flag} of gpuopt {command} is not documented"


def test_the_table_of_exit_codes_is_the_program_s() -> None:
    section = README.split("## Exit codes")[1].split("\n## ")[0]
    table = dict(re.findall(r"^\| (\d+) \| (\w+) \|", section, re.MULTILINE))
    program = {str(kind.exit_code): kind.kind for kind in errors.KINDS}
    program |= {"0": "success", str(errors.INTERRUPTED_EXIT_CODE): "interrupted"}
    assert table == program
    assert len({kind.exit_code for kind in errors.KINDS}) == len(errors.KINDS)


def test_every_recipe_section_is_documented() -> None:
    for name, field in recipe.Recipe.model_fields.items():
        assert f"`{name}`" in README, f"recipe key {name} ({field.annotation}) is not documented"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_valid_explained_and_listed(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    loaded = recipe.resolve(recipe.load(path))
    assert recipe.resolve(yaml.safe_load(loaded.to_yaml())) == loaded
    assert f"recipes/{path.name}" in README


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_help_text_is_the_golden_one(command: str, gpuopt: Gpuopt, request: pytest.FixtureRequest) -> None:
    shown = gpuopt(*command.split(), "--help").stdout
    golden = GOLDEN / f"help{'-' + command if command else ''}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(shown)
    assert shown == golden.read_text()


def _anchors(path: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#{1,6} (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_within_the_documents_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


def test_no_document_names_this_machine() -> None:
    for path in [*DOCUMENTS, *(ROOT / "recipes").iterdir()]:
        assert not re.search(r"/(root|work|home)/", path.read_text()), path
