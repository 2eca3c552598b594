"""All ranks of the learner as one object: the driver's handle over one Ray actor per rank.

Invariant: trajectories never pass the driver; it plans from headers, and each rank fetches the
groups it needs from the replay buffer. All ranks hold their groups before any of them starts a
collective, so a group that cannot be read raises and moves nothing. After a `LearnerLostError` the
ranks are started anew and load a checkpoint. Called by the controller.
"""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from cluster.config import Config, LearnerSection
from cluster.errors import HoneError, LearnerLostError
from cluster.run_dir import TokenColumns
from cluster.types import GroupHeader, StepResult, TrajectoryGroup
from learners.packing import plan_groups
from learners.rank import LearnerRank
from learners.records import Example, ScoreRequest, WarmStartProgress

_WARM_START_CHUNK = 10  # steps between two reports of progress
_AT_ONCE = partial(asyncio.sleep, 0)
_generation = itertools.count()  # of ranks: no two have one name


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

        def make_ranks() -> list[Any]:
            suffix = f"{os.getpid()}.{next(_generation)}"
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
            hosts = self.ranks[:1] if len(self.ranks) > 1 else []
            [meeting] = await self._gather("open_port", hosts, ()) or [None]
            self.pids = await self.call("start", meeting)
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

    async def check(self) -> None:
        """Of idle ranks: raises `LearnerLostError` when one is gone or hangs."""
        await self.call("__ray_ready__")

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
