"""Monte-Carlo step values: how often the policy gets to a right answer from the end of each step.

Invariant: a prefix is continued from the trajectory's own tokens, never from text tokenized anew,
and within the tokens that the trajectory had left; equal prefixes of a group are estimated once,
from their continuations and from every trajectory of the group that begins with them, which are
samples of the same policy from the same place. A value is known only when one of these has a reward
(Math-Shepherd, arXiv 2312.08935, with its soft labels). A continuation is a trace of its own: its
outcome is an estimate from one sample, unbiased if noisy, for each step that it added. Used by
`actors.process_training`.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
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
    """Continues every step prefix `num_completions` times and has the rubric score the results;
    with 0 the group's own outcomes are all there is.
    """

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
        """Values of all steps of a scored group, then of the continuations; traces whose tokens and
        text differ are left out.

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
        continued = await asyncio.gather(
            *(self._go_on(group, t, prefix, i) for i, (t, prefix) in enumerate(prefixes.values()))
        )
        known: dict[bytes, float | None] = {}
        added: list[StepValues] = []
        for (_, prefix), going_on in zip(prefixes.values(), continued, strict=True):
            key = prefix.tobytes()
            own = [t for t in group.trajectories if t.token_ids.tobytes().startswith(key)]
            known[key] = self._mean([*own, *going_on])
            added += [self._added(group.task, prefix, trajectory) for trajectory in going_on]
        return [
            StepValues(
                task=group.task,
                steps=steps,
                values=[known[t.token_ids[:end].tobytes()] for end in ends[:-1]]
                + [self._share(t.reward)],
            )
            for t, steps, ends in traces
        ] + [trace for trace in added if any(value is not None for value in trace.values)]

    async def _go_on(
        self, group: TrajectoryGroup, start: Trajectory, prefix: np.ndarray, index: int
    ) -> list[Trajectory]:
        """Scored completions of a prefix, which they begin with; none where no token is left."""
        left = self._sampling.max_new_tokens - len(prefix)
        if left < 1 or self._num_completions == 0:
            return []
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
        return (await self._rubric.score(continued)).trajectories

    def _mean(self, trajectories: list[Trajectory]) -> float | None:
        shares = [self._share(t.reward) for t in trajectories]
        known = [share for share in shares if share is not None]
        return float(np.mean(known)) if known else None

    def _added(self, task: Task, prefix: np.ndarray, trajectory: Trajectory) -> StepValues:
        """A continuation: its outcome is the value of the steps that end behind the prefix."""
        steps = split_steps(trajectory.text, self._separator)
        num_before = len(self._decode(prefix.tolist()))
        outcome = self._share(trajectory.reward)
        ends = accumulate(len(step) for step in steps)
        return StepValues(
            task=task, steps=steps, values=[outcome if end > num_before else None for end in ends]
        )

    def _share(self, reward: float | None) -> float | None:
        return None if reward is None else float(np.clip(reward / self._rubric.full_reward, 0, 1))
