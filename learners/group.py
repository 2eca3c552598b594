"""All ranks of the learner as one object: the driver's handle over one Ray actor per rank.

Invariant: trajectories never pass the driver; it plans from headers, and each rank fetches the
groups it needs from the replay buffer. All ranks hold their groups before any of them starts a
collective, so a group that cannot be read raises and moves nothing. After a `LearnerLostError` the
ranks are started anew and load a checkpoint. Called by the controller.
"""

import asyncio
import itertools
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError, RayTaskError

from cluster import log, traces
from cluster.config import Config, LearnerSection
from cluster.errors import HoneError, LearnerLostError
from cluster.redis_client import CALL_S, connect
from cluster.replay_buffer import ReplayBuffer
from cluster.run_dir import TokenColumns
from cluster.types import GroupHeader, StepResult, TrajectoryGroup
from learners.learner import Learner, ScoreRequest
from learners.packing import PackingPlan, plan_groups
from learners.warm_start import Example, WarmStartProgress

_WARM_START_CHUNK = 10  # steps between two reports of progress
_AT_ONCE = partial(asyncio.sleep, 0)


class LearnerRank:
    """Body of one Ray actor: a `Learner` and its way to the replay buffer."""

    def __init__(
        self,
        *,
        run_id: str,
        config: Config,
        policy_dir: Path,
        buffer_url: str,
        rank: int,
        num_threads: int,
        run_dir: str,
    ) -> None:
        log.setup(f"learner-{rank}", run_dir)
        self._config = config
        self._policy_dir = policy_dir
        self._rank = rank
        self._num_threads = num_threads
        self._buffer = ReplayBuffer(
            connect(buffer_url, retry_s=CALL_S),
            run_id,
            capacity_groups=config.buffer.capacity_groups,
            lease_s=config.buffer.lease_s,
            max_deliveries=config.buffer.max_deliveries,
        )
        self._groups: list[TrajectoryGroup] = []

    def address(self) -> str:
        """A free "host:port" on this rank's node, for the ranks to meet at."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{host}:{probe.getsockname()[1]}"

    def start(self, master: str) -> int:
        """Join the other ranks and load the policy; returns the process id."""
        self._learner = Learner(
            config=self._config,
            policy_dir=self._policy_dir,
            rank=self._rank,
            world_size=self._config.learner.world_size,
            master=master,
            num_threads=self._num_threads,
        )
        return os.getpid()

    def fetch(self, plan: PackingPlan) -> None:
        """Get the groups of this rank's share of `plan`."""
        group_ids = plan.group_ids(self._rank)
        self._groups = self._buffer.fetch(group_ids) if group_ids else []

    def forward_backward(self, plan: PackingPlan) -> None:
        with traces.span("gradients", *plan.group_ids(self._rank)):
            self._learner.forward_backward(self._groups, plan)
        self._groups = []

    def optim_step(self) -> StepResult:
        result = self._learner.optim_step()
        log.set_progress(step=result.step, policy_version=result.policy_version)
        return result

    def give_memory_back(self) -> None:
        """What torch keeps of a GPU for its next step; others may want it until then."""
        torch.cuda.empty_cache()

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        return self._learner.score(requests)

    def inspect(self, chosen: Sequence[tuple[TrajectoryGroup, int]]) -> list[TokenColumns]:
        return self._learner.view(chosen)

    def begin_warm_start(self, examples: Sequence[Example]) -> None:
        self._warm_start = self._learner.warm_start(examples)

    def advance_warm_start(self, num_steps: int) -> WarmStartProgress | None:
        """Up to `num_steps` further steps; None when there were none left."""
        chunk = list(islice(self._warm_start, num_steps))
        return chunk[-1] if chunk else None

    def export_weights(self, path: Path) -> None:
        self._learner.export_weights(path)

    def open_broadcast(self, timeout_s: float) -> tuple[str, int]:
        is_alone = sum(node["Alive"] for node in ray.nodes()) == 1
        host = "127.0.0.1" if is_alone else ray.util.get_node_ip_address()
        return self._learner.sender.open(host, timeout_s)

    def join_broadcast(self, size: int) -> dict[str, Any]:
        return self._learner.sender.join(size)

    def broadcast(self) -> None:
        self._learner.sender.send()

    def share_weights(self, should_share: bool) -> dict[str, Any] | None:
        return self._learner.share.open() if should_share else self._learner.share.close()

    def begin_save(self, directory: Path) -> None:
        self._learner.begin_save(directory)

    def is_saved(self) -> bool:
        return self._learner.saver.is_done()

    def finish_save(self) -> None:
        self._learner.saver.finish()

    def load(self, directory: Path) -> int:
        self._learner.load(directory)
        step, policy_version = self._learner.step, self._learner.policy_version
        log.set_progress(step=step, policy_version=policy_version)
        return policy_version


@dataclass
class LearnerGroup:
    """Handle over the ranks `hone/<run_id>/learner/<i>`; waits end after `learner.timeout_s`."""

    make_ranks: Callable[[], list[Any]]  # Ray actor handles
    settings: LearnerSection
    ranks: list[Any] = field(default_factory=list[Any])
    pids: list[int] = field(default_factory=list[int])
    num_planned: int = 0  # groups of the step so far
    # Awaited before gradients are made and when none are for a while; see `actors.turns`.
    take_gpus: Callable[[], Awaitable[None]] = _AT_ONCE
    rest: Callable[[], Awaitable[None]] = _AT_ONCE

    @classmethod
    async def start(
        cls,
        *,
        run_id: str,
        config: Config,
        policy_dir: Path,
        buffer_url: str,
        run_dir: str,
        actor_options: dict[str, Any],
    ) -> "LearnerGroup":
        """One actor per rank with `actor_options` (num_cpus, num_gpus, ...); loads the policy."""
        num_threads = max(1, int(actor_options.get("num_cpus", 1)))
        generation = itertools.count()

        def make_ranks() -> list[Any]:
            suffix = f"{os.getpid()}.{next(generation)}"
            return [
                ray.remote(LearnerRank)
                .options(**actor_options, name=f"hone/{run_id}/learner/{rank}/{suffix}")
                .remote(
                    run_id=run_id,
                    config=config,
                    policy_dir=policy_dir,
                    buffer_url=buffer_url,
                    rank=rank,
                    num_threads=num_threads,
                    run_dir=run_dir,
                )
                for rank in range(config.learner.world_size)
            ]

        group = cls(make_ranks, config.learner)
        await group.restart()
        return group

    async def restart(self) -> None:
        """End what is left of the ranks and start new ones; they hold the policy as it was before
        the run, until `load`.
        """
        self.shutdown()
        self.ranks, self.pids, self.num_planned = self.make_ranks(), [], 0
        try:
            [master] = await self._gather("address", self.ranks[:1], ())
            self.pids = await self.call("start", master)
        except BaseException:
            self.shutdown()
            raise

    async def forward_backward(self, headers: Sequence[GroupHeader]) -> None:
        """Add the gradients of these groups; if one is lost, raises `WireError` and adds none."""
        limits = self.settings.microbatch_tokens, self.settings.minibatches
        plan = ray.put(plan_groups(headers, len(self.ranks), *limits, self.num_planned))
        await self.call("fetch", plan)
        await self.take_gpus()
        await self.call("forward_backward", plan)
        self.num_planned += len(headers)

    async def optim_step(self) -> StepResult:
        self.num_planned = 0
        return (await self.call("optim_step"))[0]

    async def warm_start(self, examples: Sequence[Example]) -> AsyncIterator[WarmStartProgress]:
        """Run the supervised stage, reporting every few steps."""
        await self.call("begin_warm_start", ray.put(list(examples)))
        while progress := (await self.call("advance_warm_start", _WARM_START_CHUNK))[0]:
            yield progress

    async def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        """Log-probs float32 [L] of each request's tokens after its context, at temperature 1."""
        return (await self.call("score", list(requests)))[0]

    async def inspect(self, chosen: Sequence[tuple[TrajectoryGroup, int]]) -> list[TokenColumns]:
        """Token by token, the trajectory of each (group, index), for people to look at."""
        return (await self.call("inspect", list(chosen)))[0] if chosen else []

    async def export_weights(self, path: Path) -> None:
        await self.call("export_weights", path)

    async def open_broadcast(self, timeout_s: float) -> tuple[str, int]:
        """Host and port at which rank 0 waits for a group; loopback on a cluster of one node."""
        return (await self._gather("open_broadcast", self.ranks[:1], (timeout_s,)))[0]

    async def join_broadcast(self, size: int) -> dict[str, Any]:
        """Let rank 0 meet the others of a group of `size`; the update that each has to be sent."""
        return (await self._gather("join_broadcast", self.ranks[:1], (size,)))[0]

    async def broadcast(self) -> None:
        """Send the weights to the group; a `StageError` when it broke off."""
        await self.call("broadcast")

    async def begin_save(self, directory: Path) -> None:
        """Start a checkpoint of the present state; returns when its tensors are copied."""
        await self.call("begin_save", directory)

    async def is_saved(self) -> bool:
        return all(await self.call("is_saved"))

    async def finish_save(self) -> None:
        """Wait for the files; raises `StageError` of stage "checkpoint" when one failed."""
        await self.call("finish_save")

    async def load(self, directory: Path) -> int:
        """Returns the policy version of the loaded weights."""
        self.num_planned = 0
        return (await self.call("load", directory))[0]

    async def call(self, method: str, *args: Any) -> list[Any]:
        """`method` of `LearnerRank` on every rank; the results in rank order."""
        return await self._gather(method, self.ranks, args)

    def shutdown(self) -> None:
        """End all ranks at once; what was not saved is lost."""
        for rank in self.ranks:
            ray.kill(rank)

    async def _gather(self, method: str, ranks: list[Any], args: tuple[Any, ...]) -> list[Any]:
        calls = [getattr(rank, method).remote(*args) for rank in ranks]
        try:
            return await asyncio.wait_for(asyncio.gather(*calls), self.settings.timeout_s)
        except RayTaskError as error:  # before TimeoutError, which it may also be
            cause = error.cause
            if isinstance(cause, HoneError):
                raise cause from error
            raise LearnerLostError("learn", f"{method}: {type(cause).__name__}: {cause}") from error
        except RayError as error:
            raise LearnerLostError("learn", f"a rank was lost in {method}: {error}") from error
        except TimeoutError as error:
            raise LearnerLostError(
                "learn",
                f"{method} must end within {self.settings.timeout_s:g} s on all {len(ranks)} ranks "
                "(learner.timeout_s)",
            ) from error
