"""The critic: equal to its slow reference, whole in a checkpoint.

That it is the same on two ranks, in any micro-batches and after a checkpoint of two ranks, the
method `ppo` of `test_learner_methods` shows.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.config import WarmStartSection
from cluster.errors import ConfigError
from cluster.types import TrajectoryGroup
from learners.batch import MicroBatch, Row
from learners.gae import GeneralizedAdvantage
from learners.learner import Learner
from learners.model import PolicyModel, ValueModel
from learners.packed_attention import NAME
from learners.value_loss import ClippedValue
from tests import reference_critic as reference
from tests.learner_cases import (
    assert_same_weights,
    make_critic_config,
    make_groups,
    make_policy,
    open_learner,
    train_step,
)

GAMMA, LAMBDAS, CLIP = 0.98, (0.9, 0.95), 0.2


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


def _rows(groups: list[TrajectoryGroup], credit: GeneralizedAdvantage) -> list[Row]:
    return [
        Row.of(trajectory, rewards)
        for group in groups
        for trajectory, rewards in zip(group.trajectories, credit.assign(group), strict=True)
        if rewards is not None
    ]


def _valued(
    learner: Learner, policy_dir: Path, groups: list[TrajectoryGroup]
) -> list[reference.Valued]:
    """The reference on `groups` with the critic as it is, and the defaults of `gae`."""
    assert learner._critic is not None
    critic: Any = learner._critic.module
    decoder = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64).base_model
    with torch.no_grad():
        for theirs, ours in zip(decoder.parameters(), critic.decoder.parameters(), strict=True):
            theirs.copy_(ours.full_tensor())
        weight, bias = (p.full_tensor().double() for p in critic.head.parameters())
    head = weight[0], bias[0]
    return reference.valued(decoder, head, head, groups, 1.0, (0.95, 1.0))


@pytest.mark.parametrize("attention", ["sdpa", NAME])
def test_values_and_gradients_equal_the_reference_in_float64(
    policy_dir: Path, attention: str
) -> None:
    causal_lm = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64)
    critic = ValueModel(PolicyModel(causal_lm))
    causal_lm.set_attn_implementation(attention)
    torch.manual_seed(0)
    torch.nn.init.normal_(critic.head.weight, std=0.3)
    heads = [(critic.head.weight.detach()[0].clone(), critic.head.bias.detach()[0].clone())]
    credit = GeneralizedAdvantage(GAMMA, *LAMBDAS)
    groups = make_groups(0)
    rows = _rows(groups, credit)
    packs = [MicroBatch.pack(part) for part in (rows[:3], rows[3:], [])]
    with torch.no_grad():
        packs = [credit.estimate(replace(pack, values=critic(pack))) for pack in packs]
        critic.head.weight += 0.3 * torch.randn_like(critic.head.weight)
    now = critic.head.weight[0], critic.head.bias[0]
    causal_lm.set_attn_implementation("sdpa")
    slow = reference.valued(critic.decoder, now, heads[0], groups, GAMMA, LAMBDAS)
    causal_lm.set_attn_implementation(attention)
    advantages = torch.cat([pack.advantages for pack in packs]).tolist()
    expected_advantages = [a for row in slow for a in row.advantages]
    assert advantages == pytest.approx(expected_advantages, abs=1e-6, rel=1e-6)

    expected = reference.value_loss(slow, CLIP)
    loss = torch.zeros((), dtype=torch.float64)
    num_clipped = 0
    for pack in packs:
        term = ClippedValue(CLIP).loss(pack, critic(pack))
        loss = loss + term.total / sum(int((~pack.is_guided).sum()) for pack in packs)
        num_clipped += int(term.metrics["value/clip_fraction"].total)
    assert num_clipped > 0, "the case must have something to show"
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    parameters = list(critic.parameters())
    theirs = torch.autograd.grad(expected, parameters)
    for ours, other in zip(torch.autograd.grad(loss, parameters), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)
        assert ours.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_are_summed_in_float32_whatever_the_decoder(
    policy_dir: Path, dtype: torch.dtype
) -> None:
    causal_lm = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=dtype)
    critic = ValueModel(PolicyModel(causal_lm))
    torch.manual_seed(0)
    torch.nn.init.normal_(critic.head.weight, std=0.3)
    rows = MicroBatch.pack(_rows(make_groups(0), GeneralizedAdvantage()))
    with torch.no_grad():
        values, hidden = critic(rows), critic.hidden(rows)
        expected = hidden.double() @ critic.head.weight[0].double() + critic.head.bias.double()
    assert values.dtype == torch.float32
    assert hidden.dtype == dtype
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    assert (values != values.to(torch.bfloat16)).any(), "the case must have something to show"


def test_a_step_reports_the_reference_value_loss(policy_dir: Path) -> None:
    """The head starts at 0; a second step explains returns with what the first one learned."""
    causal_lm = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64)
    width = causal_lm.config.hidden_size
    zeros = torch.zeros(width, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    rows = reference.valued(causal_lm.base_model, zeros, zeros, make_groups(0), 1.0, (0.95, 1.0))
    with open_learner(make_critic_config({"lr": 1e-2}), policy_dir) as learner:
        metrics = train_step(learner, 0).metrics
        assert any(row.is_guided for row in rows), "the case must have something to leave out"
        assert metrics["value/loss"] == pytest.approx(reference.value_loss(rows, 0.5).item())
        assert metrics["value/explained_variance"] == pytest.approx(0.0, abs=1e-6)
        returns = [r for row in rows if not row.is_guided for r in row.returns]
        assert metrics["value/return_mean"] == pytest.approx(sum(returns) / len(returns))
        for _ in range(6):
            metrics = train_step(learner, 0).metrics
    assert metrics["value/explained_variance"] > 0.5
    assert metrics["value/loss"] < 0.5 * reference.value_loss(rows, 0.5).item()
    by_sequence = {"use": "value", "settings": {"aggregation": "seq_mean_token_mean"}}
    with open_learner(make_critic_config({"lr": 1e-2, "loss": by_sequence}), policy_dir) as learner:
        metrics = train_step(learner, 0).metrics
    means = [reference.value_loss([row], 0.5).item() for row in rows if not row.is_guided]
    assert metrics["value/loss"] == pytest.approx(sum(means) / len(means))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_explained_variance_is_that_of_the_reference_over_the_whole_step(
    policy_dir: Path, minibatches: int
) -> None:
    config = make_critic_config({"lr": 1e-2}, minibatches=minibatches)
    with open_learner(config, policy_dir) as learner:
        train_step(learner, 0, minibatches=minibatches)
        expected = reference.explained_variance(_valued(learner, policy_dir, make_groups(1)))
        metrics = train_step(learner, 1, minibatches=minibatches).metrics
    assert metrics["value/explained_variance"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3, "the case must have something to show"


def test_an_epoch_is_a_step_on_the_same_returns(policy_dir: Path) -> None:
    """Without clipping, and with targets that hold no value, three epochs are three steps."""
    settings = {"lr": 1e-2, "loss": {"use": "value", "settings": {"clip": None}}}
    heads: list[torch.Tensor] = []
    for epochs, num_steps in ((3, 1), (1, 3), (1, 1)):
        config = make_critic_config({**settings, "epochs": epochs, "pretrain_steps": 3})
        with open_learner(config, policy_dir) as learner:
            first, *_ = [train_step(learner, 0).metrics for _ in range(num_steps)]
            assert learner._critic is not None
            heads.append(learner._critic.module.head.weight.full_tensor().detach())
            assert not learner._critic._again
        assert first["value/explained_variance"] == pytest.approx(0.0, abs=1e-6), "of new rollouts"
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-5, atol=1e-6)
    assert (heads[0] - heads[2]).abs().max() > 1e-3, "the case must have something to show"


def test_advantages_on_view_are_made_with_the_critic_as_it_is(policy_dir: Path) -> None:
    group = make_groups(0)[0]
    with open_learner(make_critic_config({"lr": 1e-2}), policy_dir) as learner:
        train_step(learner, 0)
        views = learner.view([(group, index) for index in range(len(group.trajectories))])
        slow = iter(_valued(learner, policy_dir, [group]))
    for trajectory, view in zip(group.trajectories, views, strict=True):
        expected = np.zeros(len(trajectory.token_ids))
        if trajectory.reward is not None:
            row = next(slow)
            expected[trajectory.loss_mask] = row.advantages
            assert max(map(abs, row.before)) > 1e-3, "the case must have something to show"
        assert view.advantages == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_checkpoint_repeats_the_next_step_exactly(policy_dir: Path, tmp_path: Path) -> None:
    config = make_critic_config({"lr": 1e-2}, {"kl_coefficient": 0.01, "bootstrap_truncated": True})
    with open_learner(config, policy_dir) as learner:
        train_step(learner, 0)
        learner.save(tmp_path / "checkpoint")
        first = [train_step(learner, step).metrics for step in (1, 2)]
        learner.export_weights(tmp_path / "first.safetensors")
        learner.load(tmp_path / "checkpoint")
        second = [train_step(learner, step).metrics for step in (1, 2)]
        learner.export_weights(tmp_path / "second.safetensors")
    assert_same_weights(tmp_path / "first.safetensors", tmp_path / "second.safetensors", 0)
    for ours, theirs in zip(first, second, strict=True):
        for name in ours.keys() - {"learner/tokens_per_s", "learner/compute_fraction"}:
            assert ours[name] == theirs[name], name


def test_a_non_finite_step_leaves_the_critic_alone(policy_dir: Path) -> None:
    with open_learner(make_critic_config({"lr": 1e-2}), policy_dir) as learner:
        before = train_step(learner, 0).metrics["value/loss"]
        learner._policy.causal_lm.get_input_embeddings().weight.data.to_local()[0] = math.nan
        skipped = train_step(learner, 0)
        assert skipped.metrics["grad/skipped"] == 1.0
        again = train_step(learner, 0).metrics["value/loss"]
        assert again == skipped.metrics["value/loss"] < before


def test_the_critic_starts_from_the_warm_policy(policy_dir: Path) -> None:
    section = WarmStartSection(steps=2, batch_size=2, lr=1e-2)
    config = make_critic_config({}).model_copy(update={"warm_start": section})
    with open_learner(config, policy_dir) as learner:
        list(learner.warm_start([([1, 2], [3, 4]), ([5], [6, 7, 8])]))
        critic = learner._critic
        assert critic is not None
        pairs = zip(
            critic.module.decoder.parameters(), learner._policy.decoder.parameters(), strict=True
        )
        for ours, theirs in pairs:
            assert ours is not theirs
            assert torch.equal(ours.full_tensor(), theirs.full_tensor())


def test_credit_without_its_critic_is_refused(policy_dir: Path) -> None:
    config = make_critic_config({}).model_copy(update={"critic": None})
    with pytest.raises(ConfigError, match="critic: objective"), open_learner(config, policy_dir):
        pass


def test_offloading_changes_nothing(policy_dir: Path, tmp_path: Path) -> None:
    """Policy, reference and critic in host memory with their optimizers, also over a checkpoint."""
    for offload in ([], ["policy", "reference", "critic"]):
        config = make_critic_config({"lr": 1e-2}, {"kl_coefficient": 0.1}, save_memory=offload)
        with open_learner(config, policy_dir) as learner:
            train_step(learner, 0)
            learner.save(tmp_path / f"checkpoint{len(offload)}")
            learner.load(tmp_path / f"checkpoint{len(offload)}")
            metrics = train_step(learner, 1).metrics
            learner.export_weights(tmp_path / f"{len(offload)}.safetensors")
        assert metrics["value/loss"] > 0
    assert_same_weights(tmp_path / "0.safetensors", tmp_path / "3.safetensors", 0)
