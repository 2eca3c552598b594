"""Built-in rollout programs (P2): how a task becomes a group of trajectories.

Invariant: a program only talks to the policy through `RolloutIO`, so it runs on any engine.
Selected by `rollout.program.use`, run inside a rollout worker.
"""

import time

from actors.rollout import Guiding, RolloutIO, RolloutRequest, build_trajectory
from cluster import plugins
from cluster.config import Config
from cluster.types import TrajectoryGroup

PROGRAMS = {"single_turn": "actors.programs:SingleTurn", "guide": "actors.guide:Guide"}


def strips_hints(config: Config) -> bool:
    """Whether training does not see the hints that the configured program gives."""
    program = config.rollout.program
    built = plugins.build(program.use, program.settings, PROGRAMS, "rollout.program")
    return isinstance(built, Guiding) and getattr(built, "strips_hint", True)


class SingleTurn:
    """One prompt, `num_trajectories` independent completions that share the prompt's cache."""

    async def run(self, request: RolloutRequest, io: RolloutIO) -> TrajectoryGroup:
        context = io.render(request.task.messages)
        completions = await io.generate(context, request.num_trajectories)
        trajectories = [
            build_trajectory(
                request, i, context, [c.segment], c.status, io.decode(c.segment.token_ids)
            )
            for i, c in enumerate(completions)
        ]
        return TrajectoryGroup(
            group_id=request.group_id,
            task=request.task,
            trajectories=trajectories,
            created_at=time.time(),
        )
