"""Groups of odd sizes, for the tests of the learner and of credits.

Invariant: all is drawn from the step number, so every process and test sees the same groups.
"""

import msgspec
import numpy as np

from cluster.types import Task, Trajectory, TrajectoryGroup, TrajectoryStatus, VersionSpan

VOCAB = 259  # odd sizes: shards of unequal length


def _trajectory(
    rng: np.random.Generator, group_id: str, index: int, num_tokens: int, reward: float | None
) -> Trajectory:
    num_context = int(rng.integers(2, 8))
    length = num_tokens - num_context
    loss_mask = rng.random(length) < 0.8
    loss_mask[0] = True
    is_guided = index % 2 == 1
    return Trajectory(
        trajectory_id=f"{group_id}-{index}",
        group_id=group_id,
        task_id=group_id,
        context_tokens=rng.integers(0, VOCAB, num_context + 3 * is_guided).astype(np.int32),
        train_context_tokens=(
            rng.integers(0, VOCAB, num_context).astype(np.int32) if is_guided else None
        ),
        token_ids=rng.integers(0, VOCAB, length).astype(np.int32),
        loss_mask=loss_mask,
        rollout_logprobs=rng.normal(-5.5, 0.3, length).astype(np.float32),
        version_spans=[VersionSpan(0, 0, length)],
        status=TrajectoryStatus.COMPLETED,
        temperature=float(rng.choice([0.7, 1.0])),
        reward=reward,
    )


def with_given(groups: list[TrajectoryGroup]) -> list[TrajectoryGroup]:
    """The first trajectory of each group is given as a whole, the third to its fourth token."""

    def given(trajectory: Trajectory, num_given: int) -> Trajectory:
        logprobs = trajectory.rollout_logprobs.copy()
        logprobs[:num_given] = 0.0
        length = len(logprobs)
        spans = [VersionSpan(0, num_given, length)] if num_given < length else []
        return msgspec.structs.replace(
            trajectory, rollout_logprobs=logprobs, version_spans=spans, num_given=num_given
        )

    return [
        msgspec.structs.replace(
            group,
            trajectories=[
                given(t, {0: len(t.token_ids), 2: 4}[i]) if i in (0, 2) else t
                for i, t in enumerate(group.trajectories)
            ],
        )
        for group in groups
    ]


def make_groups(step: int) -> list[TrajectoryGroup]:
    """Three groups, one reward abstained; of two ranks, the second group leaves one idle once."""
    rng = np.random.default_rng(step)
    shapes: list[list[tuple[int, float | None]]] = [
        [(20, 1.0), (13, 0.0), (17, 0.0), (9, None), (31, 1.0)],
        [(30, 0.0), (20, 1.0), (18, 0.5)],
        [(11, 1.0), (36, 0.0)],
    ]
    return [
        TrajectoryGroup(
            group_id=f"g{step}-{k}",
            task=Task(task_id=f"g{step}-{k}", taskset="test", messages=[]),
            trajectories=[
                _trajectory(rng, f"g{step}-{k}", i, num_tokens, reward)
                for i, (num_tokens, reward) in enumerate(shape)
            ],
        )
        for k, shape in enumerate(shapes)
    ]
