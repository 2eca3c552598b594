"""Every method against its slow reference in float64, and across ranks, splits and resumption."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cluster.config import Config, CriticSection, LossConfig, ObjectiveSection, Plugin
from learners.batch import MicroBatch, Row
from learners.credit import build_credit
from learners.guidance import annotate
from learners.logprobs import TokenOutputs
from learners.model import PolicyModel
from learners.objectives import OBJECTIVES, WeightedLosses
from learners.packed_attention import NAME
from tests import reference_losses as reference
from tests.group_cases import with_given
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

ANCHOR, BETA = 2.0, 0.7
COMPARED = {"grad", "loss", "policy", "ratio", "siren", "value", "guide"}  # metrics


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


CASES: dict[str, tuple[str, dict[str, Any], Callable[[list[reference.Scored]], Tensor]]] = {
    "gspo": (
        "gspo",
        {"clip_low": 0.2, "clip_high": 0.3, "ratio_to": "rollout"},
        reference.gspo,
    ),
    "cispo": ("cispo", {"cap": 2.0}, reference.cispo),
    "gmpo": ("gmpo", {}, reference.gmpo),
    "sapo": ("sapo", {}, reference.sapo),
    "guide": ("guide", {}, reference.guide),
    "guide_apart": ("guide", {"factors": "apart"}, reference.guide_apart),
    "clipped": ("policy_gradient", {"dual_clip": 3.0}, reference.clipped),
    "truncated": (
        "policy_gradient",
        {"ratio_to": "proximal", "correction": {"action": "truncate", "high": 2.0}},
        reference.truncated,
    ),
    "second_moment": (
        "policy_gradient",
        {"token_filter": {"use": "second_moment", "settings": {"bound": 0.2}}},
        lambda rows: reference.second_moment(rows, 0.2),
    ),
    "entropy_bonus": (
        "entropy_bonus",
        {"coefficient": 0.1},
        lambda rows: reference.entropy_bonus(rows, 0.1),
    ),
    "adaptive_entropy": (
        "adaptive_entropy",
        {"target": 9.0, "step": 0.01, "maximum": 0.1},
        lambda rows: reference.entropy_bonus(rows, 0.01),
    ),
    "entropy_advantage": ("entropy_advantage", {}, reference.entropy_advantage),
    "kl": (
        "kl",
        {"estimator": "k3", "coefficient": 1.0},
        lambda rows: reference.kl(rows, "k3"),
    ),
    "kl_in_reward": (
        "kl",
        {"estimator": "k1_reward", "coefficient": 1.0},
        lambda rows: reference.kl(rows, "k1_reward"),
    ),
    "luffy": ("guide", {"gamma": 0.1}, reference.luffy),
    "luffy_apart": ("guide", {"gamma": 0.1, "factors": "apart"}, reference.luffy_apart),
    "forking": (
        "policy_gradient",
        {"token_filter": {"use": "forking_tokens"}},
        reference.forking_grpo,
    ),
    "siren": (
        "siren",
        {"anchor": ANCHOR, "beta": BETA, "nucleus_mass": 0.7},
        lambda rows: reference.siren_penalty(rows, ANCHOR, BETA, 0.7),
    ),
}


def _split_loss(
    losses: WeightedLosses, policy: PolicyModel, rows: list[Row]
) -> tuple[Tensor, Tensor]:
    """(loss, reported loss) of an update in three micro-batches, one of them empty."""
    parts = (rows[:3], rows[3:], [])
    packs = [annotate(policy, part, MicroBatch.pack(part)) for part in parts]
    packs = [replace(pack, ref_logprobs=pack.rollout_logprobs - 0.3) for pack in packs]
    outputs: list[TokenOutputs] = [policy(pack, losses.nucleus) for pack in packs]
    tables: dict[str, list[Tensor]] = {}
    for pack, output in zip(packs, outputs, strict=True):
        for name, table in losses.survey(pack, output).items():
            tables.setdefault(name, []).append(table)
    losses.begin({name: torch.cat(parts) for name, parts in tables.items()})
    counts = {
        "tokens": float(sum(pack.num_loss_tokens for pack in packs)),
        "sequences": float(sum(pack.num_sequences for pack in packs)),
    }
    total = reported = torch.zeros((), dtype=torch.float64)
    for pack, output in zip(packs, outputs, strict=True):
        found = losses.sums(pack, output, counts)  # type: ignore[arg-type]
        total, reported = total + found.total, reported + found.losses["total"]
    return total, reported


def test_every_loss_that_one_update_can_show_has_a_reference() -> None:
    """KL-Cov is 0 in the first update of a step."""
    assert {use for use, _, _ in CASES.values()} == OBJECTIVES.keys() - {"kl_cov"}


@pytest.mark.parametrize("attention", ["sdpa", NAME])
@pytest.mark.parametrize("case", list(CASES))
def test_values_and_gradients_equal_the_reference_in_float64(
    policy_dir: Path, case: str, attention: str
) -> None:
    use, settings, slow = CASES[case]
    causal_lm = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64)
    parameters, groups = list(causal_lm.parameters()), make_groups(0)
    if case.startswith("luffy"):
        groups = with_given(groups)
    expected = slow(reference.scored(causal_lm, groups))
    gradients = torch.autograd.grad(expected, parameters)

    section = ObjectiveSection(losses={"loss": LossConfig(use=use, settings=settings)})
    credit = build_credit(section.credit)
    rows = [
        Row.of(trajectory, advantages)
        for group in groups
        for trajectory, advantages in zip(group.trajectories, credit.assign(group), strict=True)
        if advantages is not None
    ]
    causal_lm.set_attn_implementation(attention)
    loss, reported = _split_loss(WeightedLosses(section), PolicyModel(causal_lm), rows)
    assert reported.item() == pytest.approx(expected.item(), abs=1e-6)
    assert expected.item() != pytest.approx(0.0, abs=1e-5), "the case must have something to show"
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_given_tokens_shift_no_hinted_log_prob(policy_dir: Path) -> None:
    """Of a hinted row that begins with given tokens, and of the row after it."""
    policy = PolicyModel(AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64))
    hinted = [
        Row.of(trajectory, np.zeros(len(trajectory.token_ids), np.float32))
        for group in make_groups(0)
        for trajectory in group.trajectories
        if trajectory.train_context_tokens is not None
    ][:2]
    assert len(hinted) == 2
    begun = [replace(hinted[0], num_given=2), hinted[1]]
    known, found = (
        annotate(policy, rows, MicroBatch.pack(rows)).sampled_logprobs for rows in (hinted, begun)
    )
    assert known is not None
    assert found is not None
    given = MicroBatch.pack(begun).is_given
    assert int(given.sum()) > 0
    torch.testing.assert_close(found, known.masked_fill(given, 0.0))


def _config(losses: dict[str, LossConfig], credit: str = "grpo", **learner: Any) -> Config:
    """AdamW makes a whole step of a gradient near its epsilon, rounding error included: the rate is
    such that weights can be compared to 1e-5; gradients are compared by their norm.
    """
    section = ObjectiveSection(credit=Plugin(use=credit), losses=losses)
    return make_config(lr=1e-4, **learner).model_copy(update={"objective": section})


def _loss(use: str, **settings: Any) -> LossConfig:
    return LossConfig(use=use, settings=settings)


METHODS: dict[str, Config] = {
    "siren": _config(
        {
            "policy": _loss("policy_gradient"),
            "siren": LossConfig(use="siren", settings={"beta": 1.0}, weight=2.0),
        }
    ),
    "reinforce_pp": _config({"policy": _loss("policy_gradient")}, credit="reinforce_pp"),
    "decoupled": _config(
        {
            "policy": _loss("policy_gradient", ratio_to="proximal", correction={"high": 2.0}),
            "cov": _loss("kl_cov", fraction=0.1),
        },
        minibatches=2,
    ),
    "interpolated": _config(
        {
            "policy": _loss("policy_gradient", ratio_to="interpolated", correction={"high": 2.0}),
            "bonus": _loss("entropy_bonus", coefficient=0.1),
        },
        minibatches=2,
    ),
    "epochs": _config(
        {
            "policy": _loss("policy_gradient", ratio_to="proximal"),
            "siren": LossConfig(use="siren", settings={"beta": 1.0}),
        },
        minibatches=2,
        epochs=2,
    ),
    "kl": _config({"policy": _loss("gspo"), "kl": _loss("kl", coefficient=0.5)}),
    "guide": _config(
        {
            "policy": _loss("guide", factors="apart", aggregation="token_mean"),
            "bonus": _loss("adaptive_entropy", target=9.0, step=0.01, maximum=0.1),
        }
    ),
    "guide_truncated": _config({"policy": _loss("guide", shaping="truncate")}),
    "filtered": _config(
        {"policy": _loss("policy_gradient", token_filter={"use": "forking_tokens"})}
    ),
    "lora": _config(
        {"policy": _loss("policy_gradient"), "kl": _loss("kl", coefficient=0.5)},
        lora={"rank": 3, "alpha": 6},
    ),
    "ppo": _config({"policy": _loss("policy_gradient")}, credit="gae", minibatches=2).model_copy(
        update={"critic": CriticSection(lr=1e-3, epochs=2)}
    ),
}


def _run_method(name: str, policy_dir: Path, out: Path, rank: int = 0, world_size: int = 1) -> None:
    """Three steps with a checkpoint after the second; weights and metrics of each step."""
    config = METHODS[name]
    with open_learner(config, policy_dir, rank, world_size, out / f"{name}_ranks") as learner:
        for step in range(3):
            if step == 2:
                learner.save(out / f"{name}_checkpoint")
            result = train_step(learner, step, world_size, minibatches=config.learner.minibatches)
            learner.export_weights(out / f"{name}_{step}.safetensors")
            (out / f"{name}_{step}_{rank}.json").write_text(json.dumps(result.metrics))


def _run_rank(rank: int, policy_dir: Path, out: Path) -> None:
    for name in METHODS:
        _run_method(name, policy_dir, out, rank, 2)


@pytest.fixture(scope="module")
def two_ranks(policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two_ranks")
    run_ranks(2, _run_rank, policy_dir, out)
    return out


@pytest.mark.parametrize("name", list(METHODS))
def test_two_ranks_equal_one(name: str, policy_dir: Path, two_ranks: Path, tmp_path: Path) -> None:
    _run_method(name, policy_dir, tmp_path)
    for step in range(3):
        file = f"{name}_{step}.safetensors"
        assert_same_weights(tmp_path / file, two_ranks / file, 1e-5)
        ours = json.loads((tmp_path / f"{name}_{step}_0.json").read_text())
        assert ours["grad/skipped"] == 0.0
        assert ours["grad/norm"] > 0
        for rank in range(2):
            theirs = json.loads((two_ranks / f"{name}_{step}_{rank}.json").read_text())
            assert theirs.keys() == ours.keys()
            for key in ours.keys() - {"learner/tokens_per_s", "learner/compute_fraction"}:
                # Of 98 tokens one may lie on the edge, where a rounding error decides.
                one = 1.01 / 98 if "clip_fraction" in key else 0.0
                assert theirs[key] == pytest.approx(ours[key], abs=2e-5 + one, rel=2e-5), key


@pytest.mark.parametrize("name", ["siren", "kl", "guide", "lora", "ppo"])
def test_one_rank_goes_on_from_a_checkpoint_of_two(
    name: str, policy_dir: Path, two_ranks: Path, tmp_path: Path
) -> None:
    """SIREN's anchor, the reference policy, the adaptive coefficient and the critic come with the
    weights.
    """
    with open_learner(METHODS[name], policy_dir) as learner:
        learner.load(two_ranks / f"{name}_checkpoint")
        result = train_step(learner, 2, minibatches=METHODS[name].learner.minibatches)
        learner.export_weights(tmp_path / "weights.safetensors")
    assert_same_weights(tmp_path / "weights.safetensors", two_ranks / f"{name}_2.safetensors", 1e-5)
    theirs = json.loads((two_ranks / f"{name}_2_0.json").read_text())
    kept = {"siren/anchor", "policy/reference_kl", "policy/entropy_coefficient", "value/loss"}
    for key in kept & set(theirs):
        assert result.metrics[key] == pytest.approx(theirs[key], rel=1e-5)
        assert result.metrics[key] != 0.0


@pytest.mark.parametrize("name", ["siren", "guide", "filtered", "lora", "ppo", "epochs"])
def test_microbatches_do_not_change_an_update(name: str, policy_dir: Path, tmp_path: Path) -> None:
    found: list[dict[str, float]] = []
    for budget in (CONTEXT_LENGTH, 4096):
        with open_learner(METHODS[name], policy_dir) as learner:
            for step in range(2):
                minibatches = METHODS[name].learner.minibatches
                result = train_step(learner, step, budget=budget, minibatches=minibatches)
                found.append(result.metrics)
            learner.export_weights(tmp_path / f"{budget}.safetensors")
    for small, large in zip(found[:2], found[2:], strict=True):  # weights forget a gradient's scale
        assert small["grad/norm"] > 0
        for key in small:
            if key.partition("/")[0] in COMPARED:
                assert large[key] == pytest.approx(small[key], rel=1e-3, abs=1e-5), key
    assert_same_weights(
        tmp_path / f"{CONTEXT_LENGTH}.safetensors", tmp_path / "4096.safetensors", 1e-5
    )


@pytest.mark.parametrize("ratio_to", ["rollout", "proximal", "interpolated"])
def test_only_a_loss_that_reads_the_proximal_policy_costs_a_pass(
    ratio_to: str, policy_dir: Path
) -> None:
    """The mismatch is then that of the first update, whose learner is the proximal policy."""
    config = _config({"policy": _loss("policy_gradient", ratio_to=ratio_to)}, minibatches=2)
    passes: list[bool] = []
    with open_learner(config, policy_dir) as learner:
        module = learner._policy  # pyright: ignore[reportPrivateUsage]
        module.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        for step in range(2):
            metrics = train_step(learner, step, minibatches=2).metrics
    num_gradients = sum(passes)
    assert len(passes) - num_gradients == (num_gradients if ratio_to == "proximal" else 0)
    assert 0 < metrics["ratio/mismatch_abs_mean"] <= metrics["ratio/mismatch_abs_max"]


def test_the_whole_first_step_anchors_siren_whatever_its_minibatches(policy_dir: Path) -> None:
    anchors: list[float] = []
    for minibatches in (1, 2):
        config = _config(METHODS["siren"].objective.losses, minibatches=minibatches)
        with open_learner(config, policy_dir) as learner:
            metrics = train_step(learner, 0, minibatches=minibatches).metrics
        anchors.append(metrics["siren/anchor"])
    assert anchors[1] == pytest.approx(anchors[0], rel=1e-5)


def test_factors_of_hinted_tokens_are_means_over_them_with_and_without_a_survey(
    policy_dir: Path,
) -> None:
    causal_lm = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64)
    rows = [row for row in reference.scored(causal_lm, make_groups(0)) if row.is_guided]
    with torch.no_grad():
        shift = torch.cat([row.logprobs - row.hinted for row in rows]).mean().item()
        engine = torch.cat([row.hinted - row.rollout for row in rows]).mean().item()
    for shaping in ("ratio", "truncate"):
        config = _config({"policy": _loss("guide", shaping=shaping)})
        with open_learner(config, policy_dir) as learner:
            metrics = train_step(learner, 0).metrics
        assert ("guide/gamma" in metrics) == (shaping == "ratio")
        assert metrics["guide/log_policy_step"] == 0.0
        assert metrics["guide/log_context_shift"] == pytest.approx(shift, abs=1e-5)
        assert metrics["guide/log_engine_age"] == pytest.approx(engine, abs=1e-5)


def test_the_first_update_anchors_siren_and_reports_it(policy_dir: Path) -> None:
    causal_lm = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64)
    rows = reference.scored(causal_lm, make_groups(0))

    def peak_entropy(rows: list[reference.Scored]) -> float:
        return math.sqrt(reference.siren_penalty(rows, 0.0, 1.0, 0.8).item())

    with open_learner(METHODS["siren"], policy_dir) as learner:
        first, second = (train_step(learner, step).metrics for step in range(2))
    plain = [row for row in rows if not row.is_guided]
    assert first["siren/anchor"] == pytest.approx(peak_entropy(plain), rel=1e-5)
    assert first["siren/peak_entropy"] == pytest.approx(peak_entropy(rows), rel=1e-5)
    assert second["siren/anchor"] == first["siren/anchor"]
    gap = second["siren/peak_entropy"] - second["siren/anchor"]
    assert second["loss/siren"] == pytest.approx(gap**2, rel=1e-5)
    assert 0 < second["siren/peak_fraction"] <= 0.25
    assert 0 < second["policy/nucleus_entropy"] < second["policy/entropy"]
