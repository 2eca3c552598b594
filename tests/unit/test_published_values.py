"""Worked numbers of the sources that belong to no single module: TV-A2, B1, C9, D2, G2, and of D5
what is logged (the weights of its sequence are in `test_surrogates`).
"""

import asyncio

import numpy as np
import pytest

from actors.staleness import StalenessPolicy
from cluster.config import LossConfig, ObjectiveSection
from cluster.types import (
    Task,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
    VersionSpan,
)
from learners.batch import MicroBatch, Row
from learners.credit import GroupNormalized
from learners.mismatch import WEIGHT, WEIGHT_SQUARE
from learners.objectives import WeightedLosses
from learners.segments import sequence_quantiles
from rewards.text_rules import LengthVerifier
from tests.loss_cases import outputs_of, rows_of


def _group(rewards: list[float], lengths: list[int] | None = None) -> TrajectoryGroup:
    trajectories = [
        Trajectory(
            trajectory_id=f"t{i}",
            group_id="g",
            task_id="task",
            context_tokens=np.zeros(1, dtype=np.int32),
            token_ids=np.zeros(length, dtype=np.int32),
            loss_mask=np.ones(length, dtype=bool),
            rollout_logprobs=np.zeros(length, dtype=np.float32),
            version_spans=[VersionSpan(0, 0, length)],
            status=TrajectoryStatus.COMPLETED,
            reward=reward,
        )
        for i, (reward, length) in enumerate(
            zip(rewards, lengths or [1] * len(rewards), strict=True)
        )
    ]
    task = Task(task_id="task", taskset="test", messages=[])
    return TrajectoryGroup(group_id="g", task=task, trajectories=trajectories)


@pytest.mark.parametrize(
    ("entropies", "threshold"),
    [
        ([0.1, 0.9, 0.3, 0.7, 0.2], 0.74),
        ([0.4, 0.6, 0.0, 0.2], 0.48),
        ([0.0, 0.0, 0.0, 0.0, 0.5, 0.0], 0.0),
    ],
)
def test_peak_thresholds(entropies: list[float], threshold: float) -> None:
    """TV-A2."""
    rows = rows_of([[0.0] * len(entropies)])
    values = outputs_of(entropies).logprobs
    assert sequence_quantiles(values, rows, 0.8).tolist() == pytest.approx([threshold])


def test_a_masked_token_never_enters_the_quantile() -> None:
    """TV-A2, the leak: a sixth token of entropy 5 that the policy did not write."""
    row = Row(
        context=np.zeros(1, dtype=np.int32),
        completion=np.arange(6, dtype=np.int32),
        loss_mask=np.array([True] * 5 + [False]),
        rollout_logprobs=np.zeros(6, dtype=np.float32),
        advantages=np.zeros(6, dtype=np.float32),
    )
    rows = MicroBatch.pack([row])
    assert rows.labels.tolist() == [0, 1, 2, 3, 4], "entropies are computed of these alone"
    assert rows.sequence_loss_tokens.tolist() == [5]


@pytest.mark.parametrize(
    ("num_right", "num_wrong", "right", "wrong"),
    [
        (2, 2, 0.866024, -0.866024),
        (2, 6, 1.620182, -0.540060),
        (2, 14, 2.561730, -0.365961),
    ],
)
def test_advantages_of_a_guided_group(
    num_right: int, num_wrong: int, right: float, wrong: float
) -> None:
    """TV-B1: the guided group alone, a mixed group, and one that plain rows were added to."""
    advantages = GroupNormalized().assign(_group([1.0] * num_right + [0.0] * num_wrong))
    firsts = [float(a[0]) for a in advantages if a is not None]
    assert firsts == pytest.approx([right] * num_right + [wrong] * num_wrong, abs=2e-6)


async def test_overlong_punishment_of_20480_tokens() -> None:
    """TV-C9, shifted by 1: 0, -.5 and -1."""
    verifier = LengthVerifier(max_tokens=20480, soft_tokens=4096)
    group = _group([0.0] * 3, [16384, 18432, 20480])
    verdicts = await verifier.score(group, None)  # type: ignore[arg-type]
    assert [v.score for v in verdicts] == [1.0, 0.5, 0.0]


async def test_slots_left_for_new_groups() -> None:
    """TV-D2: 512 groups a step, age 4, version 10, 7000 accepted and 300 running leave 380."""
    groups_per_step, max_policy_age, version = 512, 4, 10
    slots = StalenessPolicy((max_policy_age + 1) * groups_per_step)
    for _ in range(7000 + 300 - version * groups_per_step):
        await slots.admit()
    for _ in range(380):
        await asyncio.wait_for(slots.admit(), 1.0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(slots.admit(), 0.01)


@pytest.mark.parametrize("proximal", [None, [0.0] * 3])
def test_mismatch_of_proximal_policy_and_rollout(proximal: list[float] | None) -> None:
    """TV-D5: log-ratios .1, -.2, .05 have a k3 estimate of .008391 and an effective sample size of
    .984536, also when the learner has moved on from the proximal policy.
    """
    losses = WeightedLosses(ObjectiveSection())
    rows = rows_of([[0.0] * 3], [[-0.1, 0.2, -0.05]], proximal=proximal)
    found = losses.sums(rows, outputs_of([0.0 if proximal is None else 7.0] * 3))
    assert found.means[WEIGHT].count == 3
    sums = {name: mean.total.item() for name, mean in found.means.items()}
    assert sums["ratio/mismatch_kl"] / 3 == pytest.approx(0.008391, abs=1e-6)
    assert sums["ratio/mismatch_abs_mean"] / 3 == pytest.approx(0.35 / 3)
    assert found.largest_gap.item() == pytest.approx(0.2)
    weights, squares = sums[WEIGHT], sums[WEIGHT_SQUARE]
    assert weights**2 / 3 / squares == pytest.approx(0.984536, abs=1e-6)


def test_the_denominator_is_global() -> None:
    """TV-G2: losses 1, 2, 3 on one rank and 8 on another are 3.5; the mean of means would be 5."""
    section = ObjectiveSection(losses={"policy": LossConfig(use="policy_gradient")})
    counts = {"tokens": 4.0, "sequences": 2.0}
    contributions = [
        WeightedLosses(section)
        .sums(rows_of([[-a for a in values]]), outputs_of([0.0] * len(values)), counts)  # type: ignore[arg-type]
        .total.item()
        for values in ([1.0, 2.0, 3.0], [8.0])
    ]
    assert [2 * part for part in contributions] == pytest.approx([3.0, 4.0]), "times two ranks"
    assert sum(contributions) == pytest.approx(3.5)
