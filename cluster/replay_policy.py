"""In which order the groups that wait are learned: `buffer.policy`, a plug-in with one number.

Invariant: a policy says who goes first, never who is left out: `actors.intake` keeps seats for the
groups that the step would make too old, so under every policy each group is used or dropped with a
reason, and long rollouts as often as short ones. The number is written when a group is scored, and
the buffer sorts by it. Called by reward workers, `actors.gathering` and `hone check`.
"""

import math
from statistics import pstdev
from typing import Protocol

from pydantic import ValidationError

from cluster import plugins
from cluster.config import BufferSection, Config, Plugin
from cluster.errors import ConfigError
from cluster.types import TrajectoryGroup

MIN_SPREAD = 2.0**-20  # of equal rewards: such a group comes last
_KNOB = "buffer.policy"


class ReplayPolicy(Protocol):
    """Higher priority first, equal ones first come first served."""

    def priority(self, group: TrajectoryGroup) -> float:
        """Of a scored group; finite. It is not asked again when the weights move on, so what
        decays must decay alike for all groups.
        """
        ...


class Fifo:
    """First come, first served."""

    def priority(self, group: TrajectoryGroup) -> float:
        return 0.0


class Freshest:
    """By the oldest policy version that sampled the group, newest first."""

    def priority(self, group: TrajectoryGroup) -> float:
        return float(group.min_policy_version)


class Prioritised:
    """By spread * 2^(-age / halflife): the standard deviation of the known rewards, which is the
    root mean square of |reward - mean|, the advantage before normalisation (priority by the size of
    the learning signal: arXiv 1511.05952), and age in policy versions.

    Kept as log2 spread + version / halflife, which orders groups alike whatever the version of the
    learner. With halflife 1 a spread of 0.5 at version 3 goes before one of 0.4 at version 3, and
    both before one of 0.5 at version 2.
    """

    def __init__(self, halflife: float = 1.0) -> None:
        if not halflife > 0:
            raise ValueError(f"settings.halflife must be above 0 policy versions, got {halflife}")
        self._halflife = halflife

    def priority(self, group: TrajectoryGroup) -> float:
        known = [reward for reward in group.rewards if reward is not None]
        spread = max(MIN_SPREAD, pstdev(known) if known else 0.0)
        return math.log2(spread) + group.min_policy_version / self._halflife


POLICIES = {
    "fifo": f"{__name__}:Fifo",
    "freshest": f"{__name__}:Freshest",
    "prioritised": f"{__name__}:Prioritised",
}


def build_policy(buffer: BufferSection) -> ReplayPolicy:
    """The policy of a run. Raises `ConfigError` naming the key."""
    try:
        plugin = Plugin.model_validate(buffer.policy)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (_KNOB, *first["loc"])))
        raise ConfigError(f"{key}: {first['msg']} (known here: use, settings)") from None
    return plugins.build(plugin.use, plugin.settings, POLICIES, _KNOB)


def policy_of(config: Config) -> ReplayPolicy:
    """As `build_policy`; refuses an order of its own where the mode has one: that of the draws."""
    policy = build_policy(config.buffer)
    if not isinstance(policy, Fifo) and config.rollout.max_policy_age == 0:
        raise ConfigError(
            f"{_KNOB}: must be fifo with rollout.max_policy_age 0, where a step takes its groups "
            f"in the order they were drawn; got {config.buffer.policy.get('use')!r}"
        )
    return policy
