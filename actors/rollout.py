"""What a rollout program sees of an engine, and how its segments become trajectories.

Invariant: a trajectory's loss mask is true exactly on the tokens the policy wrote. Called by
programs (P2) and by the rollout worker; imports no vllm, so programs can be tested and checked
anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from cluster.types import (
    Author,
    Message,
    Segment,
    Task,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
    VersionSpan,
)


@dataclass(frozen=True)
class Sampling:
    """How to sample. `seed` makes completions reproducible for equal weights."""

    max_new_tokens: int
    temperature: float
    stop_token_ids: list[int]
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled continuation and how it ended."""

    segment: Segment
    status: TrajectoryStatus


@dataclass(frozen=True)
class RolloutRequest:
    """One group to produce. `seed` differs per group, so resumed runs repeat themselves.

    `hint_level` 0 asks for plain rollouts; 1, 2, ... for ones with an ever stronger hint.
    """

    group_id: str
    task: Task
    num_trajectories: int
    sampling: Sampling
    hint_level: int = 0


class RolloutIO(Protocol):
    """The engine as a program sees it."""

    sampling: Sampling
    context_length: int  # context and completion together, in tokens

    def render(self, messages: list[Message]) -> np.ndarray:
        """Chat messages to context tokens [C] int32, ending where the policy starts to write."""
        ...

    def decode(self, token_ids: np.ndarray) -> str:
        """Tokens [L] to text, special tokens left out."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Text to tokens [L] int32, as the policy would write it, without an end of sequence."""
        ...

    async def generate(self, context: np.ndarray, n: int) -> list[Completion]:
        """`n` continuations of `context` [C]."""
        ...


class RolloutProgram(Protocol):
    """Extension point P2: how a task becomes a group of trajectories."""

    async def run(self, request: RolloutRequest, io: RolloutIO) -> TrajectoryGroup: ...


@runtime_checkable
class Guiding(Protocol):
    """A program that also tries tasks with hints, when all plain rollouts of one failed.

    May also have `strips_hint = False`: training sees the context that was sampled from.
    """

    merge: Literal["replace", "fill_wrong"]

    def num_levels(self, task: Task) -> int:
        """Hint levels of `task`: it is asked for 1 .. this until a rollout passes."""
        ...

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `ConfigError` when these tasks have nothing to make hints of."""
        ...


def build_trajectory(
    request: RolloutRequest,
    index: int,
    context: np.ndarray,
    segments: list[Segment],
    status: TrajectoryStatus,
    text: str,
) -> Trajectory:
    """Join segments into one flat record; version spans are shifted to trajectory positions."""
    spans: list[VersionSpan] = []
    start = 0
    for segment in segments:
        spans += [
            VersionSpan(span.policy_version, span.start + start, span.end + start)
            for span in segment.version_spans
        ]
        start += len(segment.token_ids)
    authored = [np.full(len(s.token_ids), s.author is Author.POLICY) for s in segments]
    return Trajectory(
        trajectory_id=f"{request.group_id}/{index}",
        group_id=request.group_id,
        task_id=request.task.task_id,
        context_tokens=context,
        token_ids=np.concatenate([s.token_ids for s in segments]),
        loss_mask=np.concatenate(authored),
        rollout_logprobs=np.concatenate([s.logprobs for s in segments]),
        version_spans=spans,
        status=status,
        text=text,
        temperature=request.sampling.temperature,
    )
