"""Steps that teach the critic alone: neither the policy nor its losses have a part in them."""

import math
from pathlib import Path
from typing import Any

import pytest

from cluster.config import LossConfig
from tests.learner_cases import (
    assert_same_weights,
    make_critic_config,
    make_policy,
    open_learner,
    train_step,
)


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


def test_it_moves_the_critic_alone(policy_dir: Path, tmp_path: Path) -> None:
    config = make_critic_config(
        {"lr": 1e-2, "pretrain_steps": 2}, {"whitening": False}, warmup_steps=2
    )
    with open_learner(config, policy_dir) as learner:
        results = []
        for step in range(4):
            learner.export_weights(tmp_path / f"{step}.safetensors")
            results.append(train_step(learner, 0))
        learner.export_weights(tmp_path / "4.safetensors")
    assert_same_weights(tmp_path / "0.safetensors", tmp_path / "2.safetensors", 0)
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "2.safetensors", tmp_path / "3.safetensors", 0)
    assert [result.policy_version for result in results] == [1, 2, 3, 4]
    losses = [result.metrics["value/loss"] for result in results]
    assert losses[2] < losses[1] < losses[0]
    rate = config.learner.lr
    assert [r.metrics.get("lr") for r in results] == [None, None, rate / 2, rate]
    assert ["loss/total" in r.metrics for r in results] == [False, False, True, True]


def test_it_does_not_mind_a_policy_without_a_finite_gradient(policy_dir: Path) -> None:
    with open_learner(make_critic_config({"lr": 1e-2, "pretrain_steps": 2}), policy_dir) as learner:
        learner._policy.causal_lm.get_input_embeddings().weight.data.to_local()[0] = math.nan
        results = [train_step(learner, 0) for _ in range(3)]
    assert [result.metrics["grad/skipped"] for result in results] == [0.0, 0.0, 1.0]
    assert [result.policy_version for result in results] == [1, 2, 2]
    losses = [result.metrics["value/loss"] for result in results]
    assert losses[2] < losses[1] < losses[0]


def test_it_skips_a_step_of_the_critic_that_is_not_finite(policy_dir: Path) -> None:
    with open_learner(make_critic_config({"pretrain_steps": 2}), policy_dir) as learner:
        assert learner._critic is not None
        head: Any = learner._critic.module.head
        head.weight.data.to_local()[0] = math.nan
        result = train_step(learner, 0)
    assert result.metrics["grad/skipped"] == 1.0
    assert result.policy_version == 0


@pytest.mark.parametrize("minibatches", [1, 2])
def test_it_gives_losses_an_anchor_and_nothing_else(policy_dir: Path, minibatches: int) -> None:
    bonus = {"target": 9.0, "step": 0.01, "maximum": 0.1}  # nats; ln 259 is the most there is
    losses = {
        "siren": LossConfig(use="siren"),
        "bonus": LossConfig(use="adaptive_entropy", settings=bonus),
    }
    config = make_critic_config({"pretrain_steps": 2}, losses=losses, minibatches=minibatches)
    with open_learner(config, policy_dir) as learner:
        train_step(learner, 0, minibatches=minibatches)
        [anchor] = learner._losses.state()["siren"].tolist()
        assert anchor > 0
        train_step(learner, 1, minibatches=minibatches)
        assert learner._losses.state()["bonus"].tolist() == [0.0]
        metrics = train_step(learner, 2, minibatches=minibatches).metrics
        assert learner._losses.state()["bonus"].tolist() == pytest.approx([0.01 * minibatches])
    assert metrics["siren/anchor"] == anchor
