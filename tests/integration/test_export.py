"""`hone export`: a checkpoint becomes a model directory with exactly the trained weights."""

from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from cluster.errors import ConfigError, StageError
from cluster.run_dir import RunDir
from serve import export
from tests.learner_cases import assert_same_weights, make_run_with_checkpoints


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run_with_checkpoints(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(("asked", "version"), [(1, 1), (2, 2), (None, 2)])
def test_an_export_holds_the_weights_of_its_version(
    run_dir: RunDir, tmp_path: Path, asked: int | None, version: int
):
    dest = export.write(run_dir, tmp_path / "model", asked)
    expected = run_dir.path.parent / f"version_{version}.safetensors"
    assert_same_weights(dest / "model.safetensors", expected, 0)
    causal_lm = AutoModelForCausalLM.from_pretrained(dest, dtype=torch.float32)
    loaded = dict(causal_lm.named_parameters())
    for name, tensor in load_file(expected).items():
        assert torch.equal(loaded[name], tensor), name
    assert {"config.json", "tokenizer.json"} <= {path.name for path in dest.iterdir()}


def test_a_version_that_is_not_kept_names_those_that_are(run_dir: RunDir, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--version 7: not kept .*: 1, 2\)"):
        export.write(run_dir, tmp_path / "model", 7)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(run_dir: RunDir, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="export"):
        export.write(run_dir, tmp_path / "file" / "model", None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_an_export_to_a_file_system_of_fsspec(run_dir: RunDir, tmp_path: Path, scheme: str):
    exports = f"{scheme}://{tmp_path}/exports"
    url = f"{exports}/model"
    assert export.upload(run_dir, url, 1) == url
    files, place = fsspec.url_to_fs(url)
    names = {name.rpartition("/")[2] for name in files.ls(place, detail=False)}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    loaded = load(files.cat(f"{place}/model.safetensors"))
    for name, tensor in load_file(run_dir.path.parent / "version_1.safetensors").items():
        assert torch.equal(loaded[name], tensor), name
    with pytest.raises(ConfigError, match="must not exist yet"):
        export.upload(run_dir, url, 1)
    with pytest.raises(ConfigError, match="nonsense"):
        export.upload(run_dir, "nonsense://exports", 1)
    with pytest.raises(ConfigError, match="--version 7"):
        export.upload(run_dir, f"{exports}/other", 7)
    assert [name.rpartition("/")[2] for name in files.ls(exports, detail=False)] == ["model"]
