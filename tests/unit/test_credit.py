"""Credit: the group-normalised advantage and what leaves the group."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Plugin
from cluster.errors import ConfigError
from cluster.types import (
    Task,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
    Verdict,
    VersionSpan,
)
from learners.credit import (
    BatchNormalized,
    Credit,
    GroupNormalized,
    LeaveOneOut,
    build_credit,
    whitening_of,
)
from learners.process_credit import ProcessNormalized


def _group(rewards: list[float | None], length: int = 3) -> TrajectoryGroup:
    trajectories = [
        Trajectory(
            trajectory_id=f"t{i}",
            group_id="g",
            task_id="task",
            context_tokens=np.array([1, 2], dtype=np.int32),
            token_ids=np.arange(length, dtype=np.int32),
            loss_mask=np.ones(length, dtype=bool),
            rollout_logprobs=np.zeros(length, dtype=np.float32),
            version_spans=[VersionSpan(0, 0, length)],
            status=TrajectoryStatus.COMPLETED,
            reward=reward,
        )
        for i, reward in enumerate(rewards)
    ]
    task = Task(task_id="task", taskset="test", messages=[])
    return TrajectoryGroup(group_id="g", task=task, trajectories=trajectories)


def _first(advantages: list[np.ndarray | None]) -> list[float | None]:
    return [None if a is None else float(a[0]) for a in advantages]


# TV-C1
@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        (GroupNormalized(), [1.499997, -0.499999, -0.499999, -0.499999]),
        (GroupNormalized(epsilon=1e-4), [1.4997, -0.4999, -0.4999, -0.4999]),
        (GroupNormalized(normalize_std=False), [0.75, -0.25, -0.25, -0.25]),
        (LeaveOneOut(), [1.0, -1 / 3, -1 / 3, -1 / 3]),
        (BatchNormalized(), [0.75, -0.25, -0.25, -0.25]),
        (BatchNormalized(baseline="none"), [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_published_values(credit: Credit, expected: list[float]) -> None:
    advantages = credit.assign(_group([1.0, 0.0, 0.0, 0.0]))
    assert _first(advantages) == pytest.approx(expected, abs=2e-6)
    for advantage in advantages:
        assert advantage is not None
        assert advantage.dtype == np.float32
        assert advantage.shape == (3,)
        assert (advantage == advantage[0]).all()


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [0.0, 0.0], [0.7], [0.1 + 0.2, 0.3]])
def test_groups_without_contrast_give_zero_or_almost(rewards: list[float | None]) -> None:
    advantages = _first(GroupNormalized().assign(_group(rewards)))
    assert advantages == pytest.approx([0.0] * len(rewards), abs=1e-9)


def test_an_abstained_reward_leaves_the_group() -> None:
    with_abstained = _first(GroupNormalized().assign(_group([1.0, None, 0.0, 0.0, 0.0])))
    without = _first(GroupNormalized().assign(_group([1.0, 0.0, 0.0, 0.0])))
    assert with_abstained[1] is None
    assert [a for a in with_abstained if a is not None] == without
    assert _first(GroupNormalized().assign(_group([None, 1.0]))) == [None, 0.0]
    assert _first(GroupNormalized().assign(_group([None, None]))) == [None, None]


def test_settings_come_from_the_config() -> None:
    credit = build_credit(Plugin(use="grpo", settings={"normalize_std": False}))
    assert _first(credit.assign(_group([1.0, 0.0]))) == [0.5, -0.5]
    with pytest.raises(ConfigError, match=r"objective\.credit.*normalise_std.*normalize_std"):
        build_credit(Plugin(use="grpo", settings={"normalise_std": False}))


@pytest.mark.parametrize("credit", [GroupNormalized(), LeaveOneOut(), BatchNormalized()])
def test_singletons_and_abstained_groups_are_defined_for_every_credit(credit: Credit) -> None:
    assert _first(credit.assign(_group([None, None]))) == [None, None]
    assert _first(credit.assign(_group([None, 0.7]))) == [None, 0.0]
    assert _first(credit.assign(_group([0.7, 0.7]))) == [0.0, 0.0]


REWARDS = st.lists(st.none() | st.floats(-2, 2, width=32), min_size=1, max_size=12)


@given(rewards=REWARDS)
@pytest.mark.parametrize("credit", [GroupNormalized(), LeaveOneOut(), BatchNormalized()])
def test_advantages_of_a_group_have_zero_mean(credit: Credit, rewards: list[float | None]) -> None:
    advantages = _first(credit.assign(_group(rewards)))
    assert [a is None for a in advantages] == [r is None for r in rewards]
    known = [a for a in advantages if a is not None]
    assert sum(known) == pytest.approx(0.0, abs=1e-4)


def test_truncated_completions_can_be_left_out() -> None:
    group = _group([1.0, 0.0, 0.0])
    cut = msgspec.structs.replace(group.trajectories[2], status=TrajectoryStatus.TRUNCATED)
    group = msgspec.structs.replace(group, trajectories=[*group.trajectories[:2], cut])
    credit = GroupNormalized(normalize_std=False, drop_truncated=True)
    assert _first(credit.assign(group)) == [0.5, -0.5, None]


def test_only_batch_normalisation_declares_whitening() -> None:
    assert whitening_of(GroupNormalized()) == "none"
    assert whitening_of(BatchNormalized(whitening="sequences")) == "sequences"
    with pytest.raises(ConfigError, match="whitening must be one of"):
        build_credit(Plugin(use="reinforce_pp", settings={"whitening": "rows"}))


def _scored(group: TrajectoryGroup, steps: list[list[tuple[int, float]]]) -> TrajectoryGroup:
    trajectories = [
        msgspec.structs.replace(
            trajectory, verdicts=[Verdict(name="prm", score=1.0 if row else None, step_scores=row)]
        )
        for trajectory, row in zip(group.trajectories, steps, strict=True)
    ]
    return msgspec.structs.replace(group, trajectories=trajectories)


def test_process_scores_credit_the_tokens_before_them() -> None:
    group = _scored(_group([1.0, 0.0, 0.0], length=4), [[(2, 1.0), (4, 0.0)], [(4, 0.0)], []])
    first, second, third = ProcessNormalized("prm", epsilon=0.0).assign(group)
    high, low = 2 / 3 / 3**-0.5, -1 / 3 / 3**-0.5
    assert first is not None
    assert second is not None
    assert first.tolist() == pytest.approx([high + low, high + low, low, low])
    assert second.tolist() == pytest.approx([low] * 4)
    assert third is None, "an abstained process verifier gives no credit"


def test_steps_that_were_given_are_compared_with_nothing() -> None:
    """A trajectory begun with two right steps credits its siblings like one without them."""
    group = _group([1.0, 0.0, 0.0], length=4)
    mask = np.array([False, False, True, True])
    begun = msgspec.structs.replace(group.trajectories[2], loss_mask=mask)
    given = msgspec.structs.replace(group, trajectories=[*group.trajectories[:2], begun])
    ours = [[(2, 1.0), (4, 0.0)], [(2, 0.0), (4, 0.0)]]
    credit = ProcessNormalized("prm", epsilon=0.0)
    expected = credit.assign(_scored(group, [*ours, [(4, 1.0)]]))
    found = credit.assign(_scored(given, [*ours, [(1, 1.0), (2, 1.0), (4, 1.0)]]))
    for one, other in zip(expected, found, strict=True):
        assert one is not None
        assert other is not None
        assert one.tolist() == pytest.approx(other.tolist())


def test_who_is_left_out_does_not_shape_the_process_credit_of_the_others() -> None:
    """Scores 1, .9 and 0, the last of a trajectory without reward: the others are high and low."""
    group = _scored(_group([1.0, 1.0, None]), [[(4, 1.0)], [(4, 0.9)], [(4, 0.0)]])
    first, second, third = ProcessNormalized("prm", outcome_weight=1.0, epsilon=0.0).assign(group)
    assert first is not None
    assert second is not None
    assert third is None
    assert (first[0], second[0]) == pytest.approx((2**-0.5, -(2**-0.5)))
