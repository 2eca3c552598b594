"""LoRA: only adapters learn, and what leaves the learner is the policy with them merged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster.config import LossConfig, ObjectiveSection, WarmStartSection
from cluster.errors import ConfigError
from learners.batch import MicroBatch, Row
from learners.lora import Lora
from learners.model import load_policy
from learners.records import ScoreRequest
from serve import export
from tests.learner_cases import (
    VOCAB,
    assert_same_weights,
    make_config,
    make_policy,
    make_run_with_checkpoints,
    open_learner,
    train_step,
)

RANK = 3
LORA = {"rank": RANK, "alpha": 6}


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


def _row() -> Row:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 12).astype(np.int32)
    return Row.plain(tokens[:3], tokens[3:])


def test_gradients_are_in_the_adapters_alone(policy_dir: Path) -> None:
    lora = Lora.of(make_config(lora=LORA))
    policy = load_policy(policy_dir, activation_checkpointing=True, lora=lora)
    plain = load_policy(policy_dir, activation_checkpointing=False)
    pack = MicroBatch.pack([_row()])
    logprobs = policy(pack).logprobs
    torch.testing.assert_close(logprobs, plain(pack).logprobs, rtol=0, atol=0)
    logprobs.sum().backward()
    learning = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert learning == {name for name, _ in policy.named_parameters() if ".lora_" in name}
    assert len(learning) == 2 * 2 * 7  # A and B, two layers, four projections and three of the MLP


def test_an_update_adds_low_rank_matrices_and_is_exported_merged(
    policy_dir: Path, tmp_path: Path
) -> None:
    tokens = np.random.default_rng(1).integers(0, VOCAB, 30).tolist()
    with open_learner(make_config(lora=LORA), policy_dir) as learner:
        learner.export_weights(tmp_path / "before.safetensors")
        for step in range(3):
            train_step(learner, step)
        learner.export_weights(tmp_path / "after.safetensors")
        learner.export_hf(tmp_path / "hf")
        [scores] = learner.score([ScoreRequest(tokens, 1)])
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("before", "after"))
    begun = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32)
    for name, parameter in begun.named_parameters():
        assert torch.equal(before[name], parameter), name
    assert before.keys() == after.keys()
    for name, weight in before.items():
        added = after[name].double() - weight.double()
        if name.endswith("_proj.weight"):
            sizes = torch.linalg.svdvals(added)
            assert sizes[0] > 0
            assert sizes[RANK] < 1e-3 * sizes[0], f"{name}: more than rank {RANK}"
        else:
            assert not added.any(), name
    causal_lm = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        logprobs = causal_lm(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = [logprobs[place - 1, tokens[place]].item() for place in range(1, len(tokens))]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_reference_without_adapters_is_that_of_a_copy(policy_dir: Path) -> None:
    """A run with a warm start keeps a copy, which here was never moved."""
    losses = {
        "policy": LossConfig(use="policy_gradient"),
        "kl": LossConfig(use="kl", settings={"coefficient": 0.5}),
    }
    kept: list[dict[str, float]] = []
    for section in (None, WarmStartSection()):
        config = make_config(lora=LORA).model_copy(
            update={"objective": ObjectiveSection(losses=losses), "warm_start": section}
        )
        with open_learner(config, policy_dir) as learner:
            for step in range(3):
                metrics = train_step(learner, step).metrics
            kept.append(metrics)
    own, copied = kept
    assert own["policy/reference_kl"] > 0
    for key in own.keys() - {"learner/tokens_per_s", "learner/compute_fraction"}:
        assert own[key] == pytest.approx(copied[key], rel=1e-6, abs=1e-9), key


def test_a_checkpoint_holds_the_adapters_and_hone_exports_it_merged(tmp_path: Path) -> None:
    run_dir = make_run_with_checkpoints(tmp_path / "runs", lora=LORA)
    for version in (1, 2):
        dest = export.write(run_dir, tmp_path / f"model{version}", version)
        expected = run_dir.path.parent / f"version_{version}.safetensors"
        assert_same_weights(dest / "model.safetensors", expected, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rnk": 8}, r"learner\.lora\.rnk: unknown setting"),
        ({"rank": 0}, r"learner\.lora: rank and alpha must be at least 1"),
        ({"targets": ["no_such_layer"]}, r"learner\.lora\.targets: "),
        ({"targets": ["embed_tokens"]}, r"learner\.lora\.targets: must name linear layers"),
    ],
)
def test_wrong_settings_name_the_knob(policy_dir: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy(policy_dir, False, lora=Lora.of(make_config(lora=settings)))
