"""The pools of a rubric version, and how its reward workers reach them.

Invariant: a version's pools are started before and ended after its reward workers, so that no
worker builds a verifier that lives elsewhere. Owned by `actors.reward_set` and
`actors.reward_candidate`.
"""

import asyncio
import logging
import time
from typing import Any

import msgspec
import ray
from ray.exceptions import RayTaskError

from actors.placement import Placement
from actors.stages import within
from actors.verifier_pool import MAX_TRIES, PoolStatus, VerifierPool, call_s
from actors.verifier_worker import SignalFacts
from cluster import wire
from cluster.config import Config, PoolConfig, VerifierConfig
from cluster.errors import HoneError
from cluster.types import TrajectoryGroup, Verdict
from rewards.base import VerifierIO
from rewards.rubric import Elsewhere

MAX_CALLS = 4096  # concurrent calls of a pool's event loop
IDLE_S = 30.0
STATUS_S = 10.0
HANG_S = 120.0
logger = logging.getLogger(__name__)


class PooledSignal(msgspec.Struct, frozen=True):
    """A running pool and what its workers found their verifier to be."""

    pool: Any  # a Ray actor handle
    facts: SignalFacts

    def elsewhere(self) -> Elsewhere:
        return Elsewhere(self.facts.version, PooledVerifier(self))


class PooledVerifier:
    """Asks the pool, without a time limit of its own: the pool's workers keep it."""

    def __init__(self, signal: PooledSignal) -> None:
        self.example = signal.facts.example
        self.golden = signal.facts.golden
        self.gold_score = signal.facts.gold_score
        self._pool = signal.pool

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        try:
            return await self._pool.score.remote([ray.put(wire.encode(group))])
        except RayTaskError as error:
            if isinstance(error.cause, HoneError):
                raise error.cause from None
            raise


class VerifierPools:
    """One pool for each verifier that asks for one. A rubric on trial has one worker in each."""

    def __init__(
        self,
        placement: Placement,
        verifiers: dict[str, VerifierConfig],
        prefix: str,
        run_dir: str,
        policy_dir: str = "",
        is_trial: bool = False,
        idle_s: float = IDLE_S,
    ) -> None:
        config = placement.config
        self._start_s = config.resources.start_timeout_s
        self._pools: dict[str, Any] = {}
        self._silent: dict[str, float] = {}  # pools that gave no answer, since when
        for name, verifier in verifiers.items():
            pool = verifier.pool
            if pool is None:
                continue
            if is_trial:
                pool = pool.model_copy(update={"workers": "1"})
                verifier = verifier.model_copy(update={"pool": pool})
            options = placement.reward_options() | {
                "name": f"{prefix}/{name}",
                "max_concurrency": MAX_CALLS,
                "max_restarts": -1,
                "max_task_retries": 3,
            }
            self._pools[name] = (
                ray.remote(VerifierPool)
                .options(**options)
                .remote(
                    name, verifier, worker_options(placement, pool), run_dir,
                    policy_dir, config.rollout.timeout_s, self._start_s, idle_s,
                )
            )  # fmt: skip

    async def start(self) -> dict[str, PooledSignal]:
        """Wait for the first workers of every pool. Raises `StageError`."""
        facts = await asyncio.gather(*(self._started(name) for name in self._pools))
        pools = self._pools.items()
        return {name: PooledSignal(pool, f) for (name, pool), f in zip(pools, facts, strict=True)}

    async def _started(self, name: str) -> SignalFacts:
        return await within(
            self._pools[name].start.remote(),
            stage=f"rewards.verifiers.{name}",
            what="its pool to start",
            deadline_s=2 * self._start_s,
            knob=f"resources.start_timeout_s, rewards.verifiers.{name}.pool",
        )

    async def statuses(self) -> dict[str, PoolStatus]:
        """A moment of each pool that answers. Ray starts one anew that has said nothing for
        `HANG_S`, and asks it again what it was asked.
        """
        names = list(self._pools)
        answers = await asyncio.gather(
            *(asyncio.wait_for(self._pools[name].status.remote(), STATUS_S) for name in names),
            return_exceptions=True,
        )
        found = {n: a for n, a in zip(names, answers, strict=True) if isinstance(a, PoolStatus)}
        now = time.monotonic()
        self._silent = {n: self._silent.get(n, now) for n in names if n not in found}
        for name, since in list(self._silent.items()):
            if now - since > HANG_S:
                logger.warning("the pool of rewards.verifiers.%s hangs: started anew", name)
                ray.kill(self._pools[name], no_restart=False)
                del self._silent[name]
        return found

    def kill(self) -> None:
        for pool in self._pools.values():
            ray.kill(pool)


def longest_call_s(verifier: VerifierConfig, config: Config) -> float:
    """The longest that a group may wait for a verifier; in a pool, queue and retries included."""
    if verifier.pool is None:
        return verifier.timeout_s
    return MAX_TRIES * (config.rollout.timeout_s + call_s(verifier))


def worker_options(placement: Placement, pool: PoolConfig) -> dict[str, Any]:
    """Ray's options for one worker: its shares, and its runtime environment over the run's.

    Reward workers keep away from GPU nodes; a worker with a share of a GPU cannot.
    """
    common = placement.reward_options()
    variables = common["runtime_env"]["env_vars"] | pool.runtime_env.get("env_vars", {})
    return {
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
        "memory": int(pool.memory_gib * 2**30) or None,
        "scheduling_strategy": common["scheduling_strategy"],
        "label_selector": None if pool.gpus else common["label_selector"],
        "runtime_env": pool.runtime_env | {"env_vars": variables},
        "max_concurrency": 2 * pool.max_in_flight + 2,
        "max_restarts": 0,  # the pool replaces it, and tries its groups elsewhere meanwhile
    }
