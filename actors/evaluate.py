"""Held-out evaluation of a policy, by the engines and verifiers that train it.

Invariant: evaluation tasks are never trained on, sampled with fixed seeds, and scored by the
rubric's first verifier; an abstained verdict, or a task whose rollout failed, is left out and not
counted as a failure. Called by the controller and by `actors.standalone_eval` (`hone eval`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from actors.estimates import Estimate, TaskSamples, majority, pass_at_k
from actors.fleet import RolloutFleet
from actors.reward_worker import GroupSummary
from actors.rollout import RolloutRequest, Sampling
from cluster import wire
from cluster.config import EvalSection
from cluster.errors import StageError
from cluster.types import Task, TrajectoryGroup
from rewards.answers import extract_answer, last_line, normalise

Score = Callable[[Any], Awaitable[tuple[GroupSummary, bytes]]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalResult:
    """Estimates over `num_tasks` tasks of `num_samples` samples each, less those that abstained."""

    pass_at_1: Estimate
    pass_at_k: Estimate
    maj_at_k: Estimate
    num_tasks: int
    num_samples: int
    num_abstained: int

    @classmethod
    def of(cls, tasks: list[TaskSamples], num_samples: int, num_abstained: int) -> "EvalResult":
        """A task without any verdict is left out; one with a few counts with those."""
        scored = [task for task in tasks if task.passed]
        return cls(
            pass_at_1=Estimate.over_tasks([pass_at_k(task, 1) for task in scored]),
            pass_at_k=Estimate.over_tasks([pass_at_k(task, len(task.passed)) for task in scored]),
            maj_at_k=Estimate.over_tasks([majority(task) for task in scored]),
            num_tasks=len(scored),
            num_samples=num_samples,
            num_abstained=num_abstained,
        )


async def evaluate(
    fleet: RolloutFleet,
    score: Score,
    tasks: list[Task],
    config: EvalSection,
    sampling: Sampling,
    policy_version: int,
    num_parallel: int,
    on_task: Callable[[], None] = lambda: None,
) -> EvalResult:
    """Sample `eval.samples_per_task` completions of the first `eval.tasks` tasks and score them;
    at most `num_parallel` tasks are under way at once, so that none times out in a queue;
    `on_task` is called after each task.
    """
    free = asyncio.Semaphore(num_parallel)

    async def samples_of(index: int, task: Task) -> TaskSamples:
        request = RolloutRequest(
            group_id=f"eval-{policy_version}-{index}",
            task=task,
            num_trajectories=config.samples_per_task,
            sampling=Sampling(
                sampling.max_new_tokens, config.temperature, sampling.stop_token_ids, seed=index
            ),
        )
        try:
            async with free:
                summary, encoded = await score(await fleet.rollout(request))
        except StageError as error:
            logger.warning("%s is left out: %s", request.group_id, error)
            return TaskSamples([], [])
        finally:
            on_task()
        group = wire.decode(encoded, TrajectoryGroup)
        kept = [
            (passed, _answer(trajectory.text))
            for passed, trajectory in zip(summary.passed, group.trajectories, strict=True)
            if passed is not None
        ]
        return TaskSamples([passed for passed, _ in kept], [answer for _, answer in kept])

    chosen = tasks[: config.tasks]
    scored = await asyncio.gather(*[samples_of(i, task) for i, task in enumerate(chosen)])
    num_asked = len(chosen) * config.samples_per_task
    num_abstained = num_asked - sum(len(task.passed) for task in scored)
    return EvalResult.of(scored, config.samples_per_task, num_abstained)


def _answer(text: str) -> str:
    """What samples are compared by for the majority vote."""
    return normalise(extract_answer(text, require_boxed=False) or last_line(text))
