"""`hone export`: a checkpoint becomes a model directory with exactly the trained weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster.checkpoint_store import CheckpointStore
from cluster.config_file import dump
from cluster.errors import ConfigError, StageError
from cluster.run_dir import RunDir
from cluster.types import RunState
from learners.policy_dir import prepare
from serve import export
from tests.learner_cases import assert_same_weights, make_config, open_learner, train_step


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with checkpoints of versions 1 and 2, and the learner's own exports beside it."""
    root = tmp_path_factory.mktemp("runs")
    config = make_config()
    run = RunDir.create(root, "demo", dump(config), exist_ok=False)
    prepare(config.policy, ["1 plus 2 is 3"] * 20, root / "cache", run.policy, 1)
    store = CheckpointStore(run.checkpoints, keep=5)
    with open_learner(config, run.policy) as learner:
        for step in (1, 2):
            train_step(learner, step)
            learner.save(store.begin(step))
            state = RunState(run_id="demo", step=step, policy_version=step, config_hash="")
            store.commit(step, state)
            learner.export_weights(root / f"version_{step}.safetensors")
    return run


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
