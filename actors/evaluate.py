"""Held-out evaluation: pass@1 and pass@k of the current policy, by the same engines and verifiers.

Invariant: evaluation tasks are never trained on, sampled with fixed seeds, and scored by the
rubric's first verifier; an abstained verdict, or a task whose rollout failed, is left out and not
counted as a failure. Called by the controller and `hone eval`.
"""

import asyncio
import logging
from dataclasses import dataclass
from statistics import fmean

from actors.fleet import RolloutFleet
from actors.reward_pool import RewardPool
from actors.rollout import RolloutRequest, Sampling
from cluster.config import EvalSection
from cluster.errors import StageError
from cluster.types import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalResult:
    """pass@1 is the mean over samples, pass@k the share of tasks with a pass among k samples."""

    pass_at_1: float
    pass_at_k: float
    num_tasks: int
    num_abstained: int


async def evaluate(
    fleet: RolloutFleet,
    rewards: RewardPool,
    tasks: list[Task],
    config: EvalSection,
    sampling: Sampling,
    policy_version: int,
) -> EvalResult:
    """Sample `eval.samples_per_task` completions of `eval.tasks` tasks and score them."""

    async def passes(index: int, task: Task) -> list[bool | None]:
        request = RolloutRequest(
            group_id=f"eval-{policy_version}-{index}",
            task=task,
            num_trajectories=config.samples_per_task,
            sampling=Sampling(
                sampling.max_new_tokens, config.temperature, sampling.stop_token_ids, seed=index
            ),
        )
        try:
            summary, _ = await rewards.score(await fleet.rollout(request))
        except StageError as error:
            logger.warning("%s is left out: %s", request.group_id, error)
            return [None] * config.samples_per_task
        return summary.passed

    chosen = tasks[: config.tasks]
    groups = await asyncio.gather(*[passes(i, task) for i, task in enumerate(chosen)])
    known = [[p for p in group if p is not None] for group in groups]
    scored = [group for group in known if group]
    return EvalResult(
        pass_at_1=fmean(fmean(group) for group in scored) if scored else float("nan"),
        pass_at_k=fmean(any(group) for group in scored) if scored else float("nan"),
        num_tasks=len(scored),
        num_abstained=sum(len(g) - len(k) for g, k in zip(groups, known, strict=True)),
    )
