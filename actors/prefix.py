"""The rollout program `prefix`: some rollouts of every group go on from a solution's beginning.

Invariant: the beginning is in what the learner sees, and is learned only where `learn` asks
for that; a request without prefix tokens, which is what evaluations send, gives plain rollouts.
G2RPO-A: arXiv 2508.13023; LUFFY: arXiv 2504.14945.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from actors.prefix_length import PrefixRule
from actors.programs import SingleTurn
from actors.rollout import RolloutIO, RolloutRequest, build_trajectory
from cluster.errors import ConfigError
from cluster.types import GUIDED, Author, Segment, Task, TrajectoryGroup, TrajectoryStatus


class SolutionPrefix:
    """Of each group, `samples` rollouts continue the first tokens of `task.solution` and the others
    are plain; all are compared as one group.

    `tokens` is how many in the first steps. With `adapt` every third step multiplies them by the
    mean accuracy of the two steps before it over its own, up to `max_tokens`: worse than before
    gets a longer beginning (`actors.prefix_length`). At least one token of the solution is left to
    write, and room for `rollout.max_new_tokens`. A task without a solution has plain rollouts only.

    With `learn` the given tokens are learned, too, as if they had been certain to come; as many as
    the solution has, or more, are the whole trajectory.
    """

    def __init__(
        self,
        tokens: int,
        samples: int = 1,
        adapt: bool = True,
        max_tokens: int = 3072,
        learn: bool = False,
    ) -> None:
        if samples < 1:
            raise ConfigError(f"samples must be at least 1, got {samples}")
        self.prefix_rule = PrefixRule(tokens, max_tokens, adapt)
        self.num_prefixed = samples
        self.learns_prefix = learn
        self._plain = SingleTurn()

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise `ConfigError` when no task has a solution."""
        if not any(task.solution.strip() for task in tasks):
            raise ConfigError(
                "rollout.program: prefix needs tasks with a worked solution (column `solution` of "
                f"a file); none of the {len(tasks)} in tasks.train has that"
            )

    async def run(self, request: RolloutRequest, io: RolloutIO) -> TrajectoryGroup:
        """Plain rollouts first, then those with a beginning."""
        context = io.render(request.task.messages)
        given, is_whole = self._given(request, io, len(context))
        if len(given) == 0:
            return await self._plain.run(request, io)
        beginning = Segment(
            token_ids=given,
            logprobs=np.zeros(len(given), dtype=np.float32),
            author=Author.GIVEN if self.learns_prefix else Author.FORCED,
        )
        num_plain = request.num_trajectories - self.num_prefixed
        running = self._plain.run(replace(request, num_trajectories=num_plain), io)
        if is_whole:
            plain = await running
            begun = [([beginning], TrajectoryStatus.COMPLETED)] * self.num_prefixed
        else:
            seen = np.concatenate([context, given])
            plain, ends = await asyncio.gather(running, io.generate(seen, self.num_prefixed))
            begun = [([beginning, end.segment], end.status) for end in ends]
        prefixed = [
            build_trajectory(
                request,
                num_plain + i,
                context,
                segments,
                status,
                io.decode(np.concatenate([segment.token_ids for segment in segments])),
            )
            for i, (segments, status) in enumerate(begun)
        ]
        return msgspec.structs.replace(
            plain,
            prefix_tokens=request.prefix_tokens,
            trajectories=[
                *plain.trajectories,
                *(msgspec.structs.replace(t, arm=GUIDED) for t in prefixed),
            ],
        )

    def _given(
        self, request: RolloutRequest, io: RolloutIO, num_context: int
    ) -> tuple[np.ndarray, bool]:
        """Tokens [l] that the completion begins with, and whether they are all of it."""
        solution = io.encode(request.task.solution)
        whole = np.append(solution, request.sampling.stop_token_ids[:1]).astype(np.int32)
        is_asked = self.learns_prefix and request.prefix_tokens >= len(solution) > 0
        if is_asked and num_context + len(whole) <= io.context_length:
            return whole, True
        room = io.context_length - request.sampling.max_new_tokens - num_context
        length = min(request.prefix_tokens, len(solution) - 1, room)
        return solution[: max(0, length)], False
