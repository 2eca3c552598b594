"""The step scorer protocol: what gives each step of a completion a score.

Invariant: a scorer answers with one `StepScores` per completion, in order; what it could not score
carries an error and no scores. Implemented by `rewards.arithmetic_steps`, `rewards.step_models`,
`rewards.step_likelihood` and by users' plug-ins; called by `rewards.process_reward` only.
"""

from typing import Protocol

import msgspec

from cluster.types import Task


class StepScores(msgspec.Struct, frozen=True, kw_only=True):
    """One score in 0..1 for each step: how likely the work is right up to there."""

    scores: list[float] = []
    error: str = ""


class StepScorer(Protocol):
    """Scores all completions of a task in one batch. It must not block the event loop.

    Example, a scorer that believes every step:

        class Trusting:
            async def score(self, task: Task, completions: list[list[str]]) -> list[StepScores]:
                return [StepScores(scores=[1.0] * len(steps)) for steps in completions]
    """

    async def score(self, task: Task, completions: list[list[str]]) -> list[StepScores]:
        """One `StepScores` per completion; the steps of a completion, joined, are its text."""
        ...
