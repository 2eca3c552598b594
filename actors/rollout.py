"""What a rollout program sees of an engine, and how its segments become trajectories.

Invariant: a trajectory's loss mask is true exactly on the tokens that the policy wrote and on given
ones that it is to learn. Called by programs (P2) and by the rollout worker; imports no vllm, so
programs can be tested and checked anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from actors.prefix_length import PrefixRule
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
    """One group to produce. A `seed` differs per group, so resumed runs repeat themselves.

    `hint_level` 0 asks for plain rollouts; 1, 2, ... for ones with an ever stronger hint.
    `prefix_tokens` is what a program that begins rollouts for the policy begins them with; 0 in
    evaluations.
    """

    group_id: str
    task: Task
    num_trajectories: int
    sampling: Sampling
    hint_level: int = 0
    prefix_tokens: int = 0


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
    """Extension point P2: how a task becomes a group of trajectories. It shares an event loop with
    the engine: what blocks belongs into a thread, or the actor is taken for one that hangs.
    """

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


@runtime_checkable
class Prefixing(Protocol):
    """A program in which `num_prefixed` rollouts of a group go on from a beginning that is given,
    as long as `prefix_rule` says; with `learns_prefix` that is learned, too.
    """

    prefix_rule: PrefixRule
    num_prefixed: int
    learns_prefix: bool


@runtime_checkable
class ChecksTasks(Protocol):
    """A program that can be wrong for the tasks of a run."""

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
    """Join segments into one flat record; version spans are shifted to trajectory positions. Raises
    `ValueError` when another segment than the first is a given one.
    """
    if any(segment.author is Author.GIVEN for segment in segments[1:]):
        raise ValueError("only the first segment of a trajectory may be a given one")
    spans: list[VersionSpan] = []
    start = 0
    for segment in segments:
        spans += [
            VersionSpan(span.policy_version, span.start + start, span.end + start)
            for span in segment.version_spans
        ]
        start += len(segment.token_ids)
    learned = (Author.POLICY, Author.GIVEN)
    learnable = [np.full(len(s.token_ids), s.author in learned) for s in segments]
    return Trajectory(
        trajectory_id=f"{request.group_id}/{index}",
        group_id=request.group_id,
        task_id=request.task.task_id,
        context_tokens=context,
        token_ids=np.concatenate([s.token_ids for s in segments]),
        loss_mask=np.concatenate(learnable),
        rollout_logprobs=np.concatenate([s.logprobs for s in segments]),
        version_spans=spans,
        status=status,
        text=text,
        temperature=request.sampling.temperature,
        num_given=len(segments[0].token_ids) if segments[0].author is Author.GIVEN else 0,
    )
