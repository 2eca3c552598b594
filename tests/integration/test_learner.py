"""The learner on real process groups: equal to the reference, to itself split, and across ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.types import GroupHeader, StepResult
from learners.batch import MicroBatch, Row
from learners.credit import build_credit
from learners.model import PolicyModel
from learners.objectives import WeightedLosses
from learners.optimizer import learning_rate
from learners.packed_attention import NAME
from learners.packing import plan_groups
from tests.learner_cases import (
    CONTEXT_LENGTH,
    assert_same_weights,
    make_config,
    make_groups,
    make_policy,
    open_learner,
    run_ranks,
    train_step,
)
from tests.reference_grpo import ReferenceSettings, grpo_loss, sequence_logprobs

Recorder = Callable[[str, float], None]


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


def _run_rank(rank: int, world_size: int, policy_dir: Path, out: Path) -> None:
    with open_learner(make_config(), policy_dir, rank, world_size, out / "ranks") as learner:
        for step in range(3):
            result = train_step(learner, step, world_size)
            learner.export_weights(out / f"weights_{step}.safetensors")
            (out / f"metrics_{step}_{rank}.json").write_text(json.dumps(result.metrics))
        learner.save(out / "checkpoint")
        train_step(learner, 3, world_size)
        learner.export_weights(out / "weights_3.safetensors")


@pytest.fixture(scope="module")
def two_ranks(policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a two-rank run of four steps, with a checkpoint after the third."""
    out = tmp_path_factory.mktemp("two_ranks")
    run_ranks(2, _run_rank, 2, policy_dir, out)
    return out


def test_two_ranks_equal_one(
    policy_dir: Path, two_ranks: Path, tmp_path: Path, record_property: Recorder
) -> None:
    headers = [GroupHeader.of(group) for group in make_groups(0)[1:]]
    plan = plan_groups(headers[:1], 2, CONTEXT_LENGTH)
    assert any(not part for share in plan.microbatches for part in share), "one rank idles once"
    with open_learner(make_config(), policy_dir) as learner:
        for step in range(3):
            metrics = train_step(learner, step).metrics
            learner.export_weights(tmp_path / "weights.safetensors")
            difference = assert_same_weights(
                tmp_path / "weights.safetensors", two_ranks / f"weights_{step}.safetensors", 1e-5
            )
            record_property("max_abs_weight_difference", difference)
            for rank in range(2):
                theirs = json.loads((two_ranks / f"metrics_{step}_{rank}.json").read_text())
                assert theirs.keys() == metrics.keys()
                for name in metrics.keys() - {"learner/tokens_per_s", "learner/compute_fraction"}:
                    assert theirs[name] == pytest.approx(metrics[name], abs=1e-5, rel=1e-5), name


def test_one_rank_goes_on_from_a_checkpoint_of_two(
    policy_dir: Path, two_ranks: Path, tmp_path: Path
) -> None:
    with open_learner(make_config(), policy_dir) as learner:
        learner.load(two_ranks / "checkpoint")
        assert (learner.step, learner.policy_version) == (3, 3)
        train_step(learner, 3)
        learner.export_weights(tmp_path / "weights.safetensors")
    assert_same_weights(tmp_path / "weights.safetensors", two_ranks / "weights_3.safetensors", 1e-5)


def _go_on(rank: int, world_size: int, policy_dir: Path, start: Path, out: Path) -> None:
    with open_learner(make_config(), policy_dir, rank, world_size, out / "ranks") as learner:
        learner.load(start)
        assert (learner.step, learner.policy_version) == (3, 3)
        train_step(learner, 3, world_size)
        learner.export_weights(out / "weights.safetensors")


@pytest.mark.parametrize("num_ranks", [3, 4])
def test_more_ranks_go_on_from_a_checkpoint_of_two(
    policy_dir: Path, two_ranks: Path, tmp_path: Path, num_ranks: int
) -> None:
    start = two_ranks / "checkpoint"
    run_ranks(num_ranks, _go_on, num_ranks, policy_dir, start, tmp_path)
    assert_same_weights(tmp_path / "weights.safetensors", two_ranks / "weights_3.safetensors", 1e-5)


def test_microbatches_and_calls_do_not_change_a_step(policy_dir: Path, tmp_path: Path) -> None:
    results: list[StepResult] = []
    for budget in (CONTEXT_LENGTH, 4096):
        # AdamW's first step is about lr whatever the gradient: one of rounding errors counts fully.
        with open_learner(make_config(lr=3e-4), policy_dir) as learner:
            results.append(train_step(learner, 0, budget=budget))
            learner.export_weights(tmp_path / f"{budget}.safetensors")
    assert_same_weights(
        tmp_path / f"{CONTEXT_LENGTH}.safetensors", tmp_path / "4096.safetensors", 1e-5
    )
    for name in results[0].metrics.keys() - {"learner/tokens_per_s", "learner/compute_fraction"}:
        assert results[0].metrics[name] == pytest.approx(results[1].metrics[name], 1e-6, 1e-6), name


def test_two_epochs_are_two_updates_on_the_same_groups(policy_dir: Path, tmp_path: Path) -> None:
    """Ratios to the rollout policy see no difference; the version counts steps."""
    metrics: list[dict[str, float]] = []
    for epochs in (1, 2):
        with open_learner(make_config(lr=3e-4, epochs=epochs), policy_dir) as learner:
            steps = [train_step(learner, 0) for _ in range(2 // epochs)]
            assert learner.policy_version == learner.step == 2 // epochs
            metrics.append(steps[-1].metrics)
            learner.export_weights(tmp_path / f"{epochs}.safetensors")
    assert metrics[0]["learner/num_loss_tokens"] == metrics[1]["learner/num_loss_tokens"]
    assert_same_weights(tmp_path / "1.safetensors", tmp_path / "2.safetensors", 1e-5)


def test_recomputed_activations_change_no_gradient(policy_dir: Path, tmp_path: Path) -> None:
    norms: list[float] = []
    for name, savings in (("kept", []), ("recomputed", ["activations"])):
        with open_learner(make_config(save_memory=savings), policy_dir) as learner:
            assert learner._policy.causal_lm.is_gradient_checkpointing is bool(savings)
            steps = [train_step(learner, step) for step in range(2)]
            norms += [step.metrics["grad/norm"] for step in steps]
            learner.export_weights(tmp_path / name)
    assert norms[:2] == norms[2:]
    assert_same_weights(tmp_path / "kept", tmp_path / "recomputed", 0.0)


def test_a_step_reports_the_reference_loss_and_gradient(policy_dir: Path) -> None:
    causal_lm = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64)
    loss = grpo_loss(causal_lm, make_groups(0), ReferenceSettings())
    gradients = torch.autograd.grad(loss, list(causal_lm.parameters()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    with open_learner(make_config(), policy_dir) as learner:
        result = train_step(learner, 0)
    assert (result.step, result.policy_version) == (1, 1)
    assert result.metrics["loss/total"] == pytest.approx(loss.item(), abs=1e-6)
    assert result.metrics["loss/policy"] == result.metrics["loss/total"]
    assert result.metrics["grad/norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert result.metrics["grad/skipped"] == 0.0
    known = [t for g in make_groups(0) for t in g.trajectories if t.reward is not None]
    assert result.metrics["learner/num_loss_tokens"] == sum(t.num_loss_tokens for t in known)
    gaps = torch.cat(
        [
            (sequence_logprobs(causal_lm, t) - torch.from_numpy(t.rollout_logprobs))[t.loss_mask]
            for t in known
            if t.train_context_tokens is None  # of the others the loss asks for no hinted log-probs
        ]
    )
    weights = gaps.exp()
    ess = weights.mean() ** 2 / weights.square().mean()
    assert result.metrics["ratio/mismatch_ess"] == pytest.approx(ess.item(), abs=1e-5)
    assert result.metrics["ratio/mismatch_abs_max"] == pytest.approx(
        gaps.abs().max().item(), abs=1e-5
    )
    assert result.metrics["ratio/mismatch_abs_mean"] == pytest.approx(
        gaps.abs().mean().item(), abs=1e-5
    )
    assert result.metrics["ratio/mismatch_kl"] == pytest.approx(
        (gaps.exp() - 1 - gaps).mean().item(), abs=1e-5
    )


@pytest.mark.parametrize("attention", ["sdpa", NAME])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"aggregation": "seq_mean_token_mean", "dual_clip": 1.5},
        {"aggregation": "constant", "constant": 16, "clip_low": 0.1},
    ],
)
def test_value_and_gradients_equal_the_reference_in_float64(
    policy_dir: Path,
    attention: str,
    settings: dict[str, Any],
    record_property: Recorder,
) -> None:
    causal_lm = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64)
    groups = make_groups(0)
    reference = grpo_loss(causal_lm, groups, ReferenceSettings(**settings))
    parameters = list(causal_lm.parameters())
    expected = torch.autograd.grad(reference, parameters)

    config = make_config().objective.model_copy(
        update={
            "losses": {
                "policy": make_config()
                .objective.losses["policy"]
                .model_copy(update={"settings": settings})
            }
        }
    )
    losses, credit = WeightedLosses(config), build_credit(config.credit)
    rows = [
        Row.of(trajectory, advantages)
        for group in groups
        for trajectory, advantages in zip(group.trajectories, credit.assign(group), strict=True)
        if advantages is not None
    ]
    causal_lm.set_attn_implementation(attention)
    policy = PolicyModel(causal_lm)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in (rows[:3], rows[3:], []):
        pack = MicroBatch.pack(part)
        total = total + losses.sums(pack, policy(pack)).total
        count += (
            pack.num_loss_tokens if losses.common_denominator == "tokens" else pack.num_sequences
        )
    loss = total / count
    ours = [loss, *torch.autograd.grad(loss, parameters)]
    theirs = [reference, *expected]
    error = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    record_property("max_abs_error", error)
    assert error <= 1e-6


def test_a_step_with_a_non_finite_value_is_skipped(policy_dir: Path, tmp_path: Path) -> None:
    with open_learner(make_config(), policy_dir) as learner:
        learner.export_weights(tmp_path / "before.safetensors")
        groups = make_groups(0)
        groups[0].trajectories[0].rollout_logprobs[0] = np.nan
        headers = [GroupHeader.of(group) for group in groups]
        learner.forward_backward(groups, plan_groups(headers, 1, 4096))
        result = learner.optim_step()
        learner.export_weights(tmp_path / "after.safetensors")
        assert result.metrics["grad/skipped"] == 1.0
        assert (result.step, result.policy_version) == (1, 0)
        assert_same_weights(tmp_path / "before.safetensors", tmp_path / "after.safetensors", 0)
        following = train_step(learner, 1)
        assert following.metrics["grad/skipped"] == 0.0
        assert (following.step, following.policy_version) == (2, 1)


def test_learning_rate_schedules() -> None:
    def rates(schedule: Literal["constant", "cosine"]) -> list[float]:
        return [
            learning_rate(step, peak=1.0, schedule=schedule, warmup_steps=2, total_steps=5)
            for step in range(6)
        ]

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1]
    assert rates("cosine") == pytest.approx([0.5, 1, 1, 0.55, 0.1, 0.1])
