"""The body of one Ray actor: a `Learner`, and its way to the replay buffer.

Invariant: importing this needs no torch, and a driver, which makes actors of it, has none: a
controller starts in a second, also in place of one that died. A rank imports it in `start`. Made by
`learners.group`.
"""

import os
import socket
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster import log, traces
from cluster.config import Config
from cluster.redis_client import CALL_S, connect
from cluster.replay_buffer import ReplayBuffer
from cluster.run_dir import TokenColumns
from cluster.types import StepResult, TrajectoryGroup
from learners.packing import PackingPlan
from learners.records import Example, ScoreRequest, WarmStartProgress


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

    def open_port(self) -> tuple[str, int]:
        """Host and port of this rank's node, taken, at which the ranks will meet."""
        self._listener = socket.create_server((_own_host(), 0))
        return self._listener.getsockname()

    def start(self, meeting: tuple[str, int] | None) -> int:
        """Join the other ranks and load the policy; returns the process id."""
        from learners.learner import Learner
        from learners.rendezvous import find_store, store_of

        timeout_s = self._config.learner.timeout_s
        store = None
        if meeting is not None:
            is_host = self._rank == 0
            store = (
                store_of(self._listener, timeout_s) if is_host else find_store(*meeting, timeout_s)
            )
        self._learner = Learner(
            config=self._config,
            policy_dir=self._policy_dir,
            rank=self._rank,
            world_size=self._config.learner.world_size,
            num_threads=self._num_threads,
            store=store,
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
        import torch

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
        return self._learner.sender.open(_own_host(), timeout_s)

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


def _own_host() -> str:
    """By which the other actors reach this node; loopback on a cluster of one."""
    is_alone = sum(node["Alive"] for node in ray.nodes()) == 1
    return "127.0.0.1" if is_alone else ray.util.get_node_ip_address()
