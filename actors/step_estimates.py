"""Monte-Carlo step values: how often the policy gets to a right answer from the end of each step.

Invariant: a prefix is continued from the trajectory's own tokens, never from text tokenized anew,
and within the tokens that the trajectory had left; equal prefixes of a group are estimated once. A
value is known only when at least one continuation has a reward (Math-Shepherd, arXiv 2312.08935,
with its soft labels). Used by `actors.process_training`.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import msgspec
import numpy as np

from actors.rollout import Completion, RolloutRequest, Sampling, build_trajectory
from cluster.types import Author, Segment, Task, Trajectory, TrajectoryGroup
from rewards.rubric import Rubric
from rewards.steps import split_steps, token_ends


class Engine(Protocol):
    """What samples from the policy; `actors.vllm_engine.VllmEngine` is one."""

    async def generate(
        self, context: np.ndarray, n: int, sampling: Sampling
    ) -> list[Completion]: ...


class StepValues(msgspec.Struct, frozen=True, kw_only=True):
    """One trace: `values[i]` is the share of the full reward reached from the end of step i, None
    where it is unknown.
    """

    task: Task
    steps: list[str]
    values: list[float | None]


class StepEstimator:
    """Continues every step prefix `num_completions` times and has the rubric score the results."""

    def __init__(
        self,
        engine: Engine,
        decode: Callable[[list[int]], str],
        rubric: Rubric,
        sampling: Sampling,
        separator: re.Pattern[str],
        num_completions: int,
    ) -> None:
        self._engine = engine
        self._decode = decode
        self._rubric = rubric
        self._sampling = sampling
        self._separator = separator
        self._num_completions = num_completions

    async def estimate(self, group: TrajectoryGroup) -> list[StepValues]:
        """Values of all steps of a scored group; traces whose tokens and text differ are left out.

        The last step's value is the trajectory's own reward.
        """
        traces: list[tuple[Trajectory, list[str], list[int]]] = []
        for trajectory in group.trajectories:
            steps = split_steps(trajectory.text, self._separator)
            if ends := token_ends(self._decode, trajectory.token_ids, steps):
                traces.append((trajectory, steps, ends))
        prefixes = {
            t.token_ids[:end].tobytes(): (t, t.token_ids[:end])
            for t, _, ends in traces
            for end in ends[:-1]
        }
        values = await asyncio.gather(
            *(self._value(group, t, prefix, i) for i, (t, prefix) in enumerate(prefixes.values()))
        )
        known = dict(zip(prefixes, values, strict=True))
        return [
            StepValues(
                task=group.task,
                steps=steps,
                values=[known[t.token_ids[:end].tobytes()] for end in ends[:-1]]
                + [self._share(t.reward)],
            )
            for t, steps, ends in traces
        ]

    async def _value(
        self, group: TrajectoryGroup, start: Trajectory, prefix: np.ndarray, index: int
    ) -> float | None:
        left = self._sampling.max_new_tokens - len(prefix)
        if left < 1:
            return self._share(start.reward)
        sampling = replace(self._sampling, max_new_tokens=left)
        context = np.concatenate([start.context_tokens, prefix])
        completions = await self._engine.generate(context, self._num_completions, sampling)
        request = RolloutRequest(
            f"{group.group_id}+{index}", group.task, self._num_completions, sampling
        )
        zeros = np.zeros(len(prefix), dtype=np.float32)
        forced = Segment(token_ids=prefix, logprobs=zeros, author=Author.FORCED)
        continued = TrajectoryGroup(
            group_id=request.group_id,
            task=group.task,
            trajectories=[
                build_trajectory(
                    request,
                    i,
                    start.context_tokens,
                    [forced, completion.segment],
                    completion.status,
                    self._decode([*prefix.tolist(), *completion.segment.token_ids.tolist()]),
                )
                for i, completion in enumerate(completions)
            ],
        )
        scored = await self._rubric.score(continued)
        shares = [
            share for t in scored.trajectories if (share := self._share(t.reward)) is not None
        ]
        return float(np.mean(shares)) if shares else None

    def _share(self, reward: float | None) -> float | None:
        return None if reward is None else float(np.clip(reward / self._rubric.full_reward, 0, 1))
