"""Built-in rollout programs (P2): how a task becomes a group of trajectories.

Invariant: a program only talks to the policy through `RolloutIO`, so it runs on any engine.
Selected by `rollout.program.use`, run inside a rollout worker.
"""

import time

from actors.prefix_length import PrefixLength
from actors.rollout import Guiding, Prefixing, RolloutIO, RolloutRequest, build_trajectory
from cluster import plugins
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.types import TrajectoryGroup

PROGRAMS = {
    "single_turn": "actors.programs:SingleTurn",
    "guide": "actors.guide:Guide",
    "prefix": "actors.prefix:SolutionPrefix",
}


def prefix_length(config: Config) -> PrefixLength | None:
    """What a program that begins rollouts for the policy starts with; None for another one. Raises
    `ConfigError` where it leaves no plain rollout.
    """
    program = config.rollout.program
    built = plugins.build(program.use, program.settings, PROGRAMS, "rollout.program")
    if not isinstance(built, Prefixing):
        return None
    if built.num_prefixed >= config.rollout.group_size:
        raise ConfigError(
            f"rollout.program.settings.samples: must be below rollout.group_size "
            f"({config.rollout.group_size}), got {built.num_prefixed}"
        )
    return PrefixLength(built.prefix_rule)


def needs_guided_loss(config: Config) -> bool:
    """Whether training does not see the hints that the configured program gives, or learns what was
    given as if the policy had written it.
    """
    program = config.rollout.program
    built = plugins.build(program.use, program.settings, PROGRAMS, "rollout.program")
    if isinstance(built, Prefixing):
        return built.learns_prefix
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
