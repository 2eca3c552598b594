"""The mechanisms that SIREN is compared with, on published values."""

import dataclasses
import math

import pytest
import torch

from learners.entropy import (
    AdaptiveEntropyBonus,
    CovarianceKL,
    EntropyBonus,
    EntropyShapedGradient,
)
from learners.surrogates import PolicyGradient
from learners.token_filters import ClipCovariance, ForkingTokens, SecondMoment
from tests.loss_cases import gradient, outputs_of, rows_of

ADVANTAGES, LOGPROBS = [2.0, -1.0, 0.0, -1.0], [-0.1, -2.0, -1.0, -0.5]


def test_bonus() -> None:
    outputs = outputs_of([0.0, 0.0], entropy=[0.5, 1.5])
    term = EntropyBonus(0.01).loss(rows_of([[0.0, 0.0]]), outputs)
    term.total.backward()
    assert term.total.item() == pytest.approx(-0.02)
    assert gradient(outputs.entropy) == pytest.approx([-0.01, -0.01])


# TV-E3
def test_adaptive_coefficient() -> None:
    bonus, paid = AdaptiveEntropyBonus(target=0.2, step=1e-4), []
    for entropy in (0.25, 0.15, 0.1, 0.3):
        outputs = outputs_of([0.0], entropy=[entropy])
        rows = rows_of([[0.0]])
        paid.append(bonus.begin(bonus.survey(rows, outputs))["policy/entropy_coefficient"])
        assert bonus.loss(rows, outputs).total.item() == pytest.approx(-paid[-1] * entropy)
    assert paid == pytest.approx([0.0, 1e-4, 2e-4, 0.0])
    assert bonus.state() == pytest.approx([1e-4])


# TV-E2
def test_forking_tokens_of_the_whole_update() -> None:
    entropy = [i / 10 for i in range(1, 11)]
    rows = rows_of([[-1.0] * 4, [-1.0] * 6])
    outputs = outputs_of([0.0] * 10, entropy=entropy)
    whole = PolicyGradient(token_filter={"use": "forking_tokens", "settings": {"fraction": 0.2}})
    table = whole.survey(rows, outputs)
    assert table is not None
    assert whole.begin(table)["policy/forking_threshold"] == pytest.approx(0.82)
    term = whole.loss(rows, outputs)
    term.total.backward()
    assert term.total.item() == pytest.approx(2.0), "the divisor stays 10 tokens"
    assert gradient(outputs.logprobs) == pytest.approx([0.0] * 8 + [1.0] * 2)
    edge = ForkingTokens(0.7)  # 10 * (1 - .7) is 3.0000000000000004, and so beyond the fourth token
    values = [0.0] * 3 + [0.1] + [1000.0] * 7
    eleven, spread = rows_of([[0.0] * 11]), outputs_of([0.0] * 11, entropy=values)
    edge.begin(edge.survey(eleven, spread))
    assert edge.keeps(eleven, spread, torch.zeros(11, dtype=torch.bool)).sum() == 8


# TV-E1
@pytest.mark.parametrize("split", [False, True])
def test_kl_cov(split: bool) -> None:
    objective = CovarianceKL(coefficient=1.0, fraction=0.25)
    parts = [slice(0, 4)] if not split else [slice(0, 1), slice(1, 4)]
    packs = []
    for part in parts:
        logprobs = LOGPROBS[part]
        proximal = torch.tensor([value - 0.1 for value in logprobs], dtype=torch.float64)
        rows = dataclasses.replace(rows_of([ADVANTAGES[part]]), proximal_logprobs=proximal)
        packs.append((rows, outputs_of(logprobs)))
    table = torch.cat([objective.survey(rows, outputs) for rows, outputs in packs])
    objective.begin(table)
    assert objective._covariance(table).tolist() == pytest.approx([1.6, 1.1, 0.0, -0.4])
    total = sum(objective.loss(rows, outputs).total.item() for rows, outputs in packs)
    assert total / 4 == pytest.approx(0.025)


# TV-E1
def test_clip_cov_drops_one_eligible_token_and_another_of_other_rollouts() -> None:
    """With ratio e^.1 everywhere, dropping token 0 gives .552585 and token 1 -.276293."""
    objective = PolicyGradient(
        0.5, 0.5, token_filter={"use": "clip_cov", "settings": {"fraction": 0.25}}
    )
    rollout = rows_of([ADVANTAGES], [[value - 0.1 for value in LOGPROBS]])
    seen = set()
    for number in range(20):
        rows = dataclasses.replace(rollout, labels=rollout.labels + number)
        outputs = outputs_of(LOGPROBS)
        table = objective.survey(rows, outputs)
        assert table is not None
        objective.begin(table)
        seen.add(round(objective.loss(rows, outputs).total.item() / 4, 5))
    assert seen == {0.55259, -0.27629}


def test_clip_cov_without_eligible_tokens_drops_none() -> None:
    clip = ClipCovariance()
    rows, outputs = rows_of([[1.0, -1.0]]), outputs_of([-1.0, -1.0])
    clip.begin(clip.survey(rows, outputs))
    assert clip.keeps(rows, outputs, torch.zeros(2, dtype=torch.bool)).all()
    clip.begin(clip.survey(rows_of([]), outputs_of([])))
    assert not math.isnan(clip._last_draw)


# TV-E4
@pytest.mark.parametrize(
    ("advantage", "entropy", "kappa", "shaped"),
    [(1.0, 2.0, 2.0, 1.5), (1.0, 2.0, 1.0, 1.8), (-1.0, 0.5, 2.0, -0.8)],
)
def test_entropy_shapes_the_advantage(
    advantage: float, entropy: float, kappa: float, shaped: float
) -> None:
    outputs = outputs_of([0.0], entropy=[entropy])
    objective = EntropyShapedGradient(kappa=kappa)
    term = objective.loss(rows_of([[advantage]]), outputs)
    term.total.backward()
    assert gradient(outputs.logprobs) == pytest.approx([-shaped])
    assert outputs.entropy.grad is None


# TV-D7
def test_second_moment_leaves_out_the_outlier() -> None:
    filters = SecondMoment(), SecondMoment(bound=0.6)
    rows, outputs = rows_of([[1.0] * 4], [[-0.1, 0.2, -1.5, 0.05]]), outputs_of([0.0] * 4)
    moments = [f.begin(f.survey(rows, outputs))["ratio/second_moment"] for f in filters]
    assert moments == pytest.approx([0.0175, 0.575625])
    is_clipped = torch.zeros(4, dtype=torch.bool)
    assert filters[0].keeps(rows, outputs, is_clipped).tolist() == [True, True, False, True]
    assert filters[1].keeps(rows, outputs, is_clipped).all()
