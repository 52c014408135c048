"""Writing a model: what is refused, and that nothing is written then."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from gpuopt.errors import ConfigurationError, StorageError, UsageError
from gpuopt.triton import command, repository
from gpuopt.triton.command import EnsembleRequest, Request
from gpuopt.triton.options import Options
from tests.unit.inspection import bundles


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return bundles.make(tmp_path / "model.gpuopt")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "r"


def write(bundle: Path, root: Path, **changes: object) -> str:
    return command.write(Request(bundle, root, "m", **changes), []).config_state  # type: ignore[arg-type]


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_kept_configuration_names_the_new_version_s_files(bundle: Path, root: Path) -> None:
    write(bundle, root)
    config = root / "m/config.pbtxt"
    before, text = tree(root), config.read_text()
    for change, told in (
        (text.replace("model.plan", "net.plan"), "version 2 has no net.plan"),
        (text + 'cc_model_filenames { key: "8.6" value: "a10.plan" }', "version 2 has no a10.plan"),
        (text + "version_policy { specific { versions: 9 } }", "version 9 is not there"),
        (text.replace('name: "m"', 'name: "n"'), "the model's folder is 'm'"),
    ):
        config.write_text(change)
        with pytest.raises(ConfigurationError, match=told):
            write(bundle, root, existing="keep")
        assert tree(root) == before
    config.write_text(text + "version_policy { specific { versions: [1, 2] } }")
    assert write(bundle, root, existing="keep") == "kept"
    assert repository.versions(root / "m") == [1, 2]


def test_a_new_configuration_names_the_version_s_files(bundle: Path, root: Path, tmp_path: Path) -> None:
    fragment = tmp_path / "more.pbtxt"
    fragment.write_text('default_model_filename: "net.plan"')
    for options, told in (
        (Options(merged=fragment), "version 1 has no net.plan"),
        (Options(version_policy="specific:9"), "version 9 is not there"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            write(bundle, root, options=options)
        assert not root.exists()
    write(bundle, root, options=Options(version_policy="specific:1,9"))


def step(root: Path, name: str, output: str) -> None:
    repository.write_model(
        root / name,
        'backend: "python" max_batch_size: 8 input { name: "raw" data_type: TYPE_UINT8 dims: [-1] } '
        f'output {{ name: "x" {output} }}',
    )


def test_a_pipeline_that_is_none_leaves_the_model_unwritten(bundle: Path, root: Path, tmp_path: Path) -> None:
    step(root, "decode", "data_type: TYPE_FP16 dims: [16, 8, 8]")
    step(root, "wrong", "data_type: TYPE_FP16 dims: [16, 8, 9]")
    repository.write_model(root / "taken", "")
    before = tree(tmp_path)
    for asked, error, told in (
        (EnsembleRequest("e", ("wrong",)), ConfigurationError, "m.x takes"),
        (EnsembleRequest("e", ("none",)), UsageError, "has no model 'none'"),
        (EnsembleRequest("taken", ("decode",)), UsageError, "exists"),
        (EnsembleRequest("m", ("decode",)), UsageError, "one of its own steps"),
        (EnsembleRequest("../e", ("decode",)), UsageError, "'../e' is no model's name"),
        (EnsembleRequest("e", ("../r/decode",)), UsageError, "is no model's name"),
        (EnsembleRequest("e", (), ("../r/decode",)), UsageError, "is no model's name"),
    ):
        with pytest.raises(error, match=told):
            write(bundle, root, ensemble=asked)
        assert tree(tmp_path) == before
    write(bundle, root, ensemble=EnsembleRequest("e", ("decode",)))
    assert {"e/config.pbtxt", "m/config.pbtxt"} <= set(tree(root))


def test_a_pipeline_around_a_kept_configuration(bundle: Path, root: Path) -> None:
    step(root, "decode", "data_type: TYPE_FP16 dims: [16, 8, 8]")
    write(bundle, root)
    config = root / "m/config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 8", "max_batch_size: 4").replace('name: "m"\n', ""))
    write(bundle, root, existing="keep", ensemble=EnsembleRequest("e", ("decode",)))
    made = (root / "e/config.pbtxt").read_text()
    assert "max_batch_size: 4" in made
    assert 'model_name: "m"' in made


def test_weights_outside_the_bundle_are_not_deployed(root: Path, tmp_path: Path) -> None:
    def outside(files: Path) -> None:
        model = onnx.load(str(files / "model.onnx"))
        onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../secret")
        model.graph.initializer[0].ClearField("raw_data")
        (files / "model.onnx").write_bytes(model.SerializeToString())

    (tmp_path / "secret").write_text("a secret")
    bundle = bundles.make(tmp_path / "model.gpuopt", change=outside)
    with pytest.raises(StorageError, match=r"external data '\.\./secret' is no file of the bundle"):
        write(bundle, root, backend="onnxruntime")
    assert not list(root.rglob("secret"))
