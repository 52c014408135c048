"""Writing into a model repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuopt.errors import ConfigurationError, StorageError, UsageError
from gpuopt.triton import repository
from gpuopt.triton.repository import Content, Place


def content(folder: Path, config: str = 'name: "m"\n', warm_up: dict[str, bytes] | None = None) -> Content:
    file = folder / "engine"
    file.write_bytes(b"engine")
    return Content(config, {"model.plan": file}, {"model.plan.json": "{}\n"}, warm_up or {})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_next_version_is_one_above_the_highest(tmp_path: Path) -> None:
    assert repository.place(tmp_path / "new", "m", None).version == 1
    for name in ("1", "7", "007", "0", "old", "8.bak"):
        (tmp_path / "m" / name).mkdir(parents=True)
    assert repository.versions(tmp_path / "m") == [1, 7]
    assert repository.place(tmp_path, "m", None).version == 8
    with pytest.raises(UsageError, match="has version 7"):
        repository.place(tmp_path, "m", 7)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "a b", "ü"])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        repository.place(tmp_path, name, None)


def test_a_configuration_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "r"
    first = content(tmp_path, warm_up={"w": b"1"})
    repository.write(Place(root, "m", 1), first, replace_config=False)
    (root / "m/labels.txt").write_text("by hand")
    (root / "m/link").symlink_to("labels.txt")
    before = tree(root)
    for other in (content(tmp_path, 'name: "n"\n', {"w": b"1"}), content(tmp_path, warm_up={"w": b"2"})):
        with pytest.raises(ConfigurationError, match="another configuration"):
            repository.write(Place(root, "m", 2), other, replace_config=False)
        assert tree(root) == before
    repository.write(Place(root, "m", 2), other, replace_config=True)
    after = tree(root)
    assert after.pop("m/warmup/w") == b"2"
    assert {name: before[name] for name in before if name != "m/warmup/w"}.items() <= after.items()
    assert str((root / "m/link").readlink()) == "labels.txt"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "r"]


def test_a_linked_configuration_is_replaced_by_a_file(tmp_path: Path) -> None:
    root = tmp_path / "r"
    repository.write(Place(root, "m", 1), content(tmp_path), replace_config=False)
    (root / "m/config.pbtxt").rename(tmp_path / "shared.pbtxt")
    (root / "m/config.pbtxt").symlink_to(tmp_path / "shared.pbtxt")
    repository.write(Place(root, "m", 2), content(tmp_path, 'name: "n"\n'), replace_config=True)
    assert not (root / "m/config.pbtxt").is_symlink()
    assert (root / "m/config.pbtxt").read_text() == 'name: "n"\n'
    assert (tmp_path / "shared.pbtxt").read_text() == 'name: "m"\n'
    assert repository.versions(root / "m") == [1, 2]


def test_a_version_that_another_process_wrote_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    root = tmp_path / "r"
    repository.write(Place(root, "m", 1), content(tmp_path), replace_config=False)
    where = repository.place(root, "m", None)
    (root / "m/2").mkdir()
    (root / "m/2/model.plan").write_bytes(b"theirs")
    with pytest.raises(StorageError):
        repository.write(where, content(tmp_path), replace_config=False)
    with pytest.raises(StorageError):
        repository.add_version(where, content(tmp_path))
    assert tree(root / "m/2") == {"model.plan": b"theirs"}


def test_a_model_without_a_file(tmp_path: Path) -> None:
    repository.write_model(tmp_path / "r/e", "a")
    repository.write_model(tmp_path / "r/e", "a")
    with pytest.raises(UsageError, match="exists"):
        repository.write_model(tmp_path / "r/e", "b")
    assert sorted(path.name for path in (tmp_path / "r/e").iterdir()) == ["1", "config.pbtxt"]
