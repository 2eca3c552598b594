"""Credit: the group-normalised advantage and what leaves the group."""

import numpy as np
import pytest

from cluster.config import Plugin
from cluster.errors import ConfigError
from cluster.types import Task, Trajectory, TrajectoryGroup, TrajectoryStatus, VersionSpan
from learners.credit import GroupNormalized, build_credit


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


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        (GroupNormalized(), [1.499997, -0.499999, -0.499999, -0.499999]),
        (GroupNormalized(epsilon=1e-4), [1.4997, -0.4999, -0.4999, -0.4999]),
        (GroupNormalized(normalize_std=False), [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_published_values(credit: GroupNormalized, expected: list[float]) -> None:
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
