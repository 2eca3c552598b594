"""The Ray actors behind a fleet: how they are made, and the one that stands by.

Invariant: an actor is handed out once; the one that stands by belongs to no worker before, and is
handed out only when it is prepared: until then a new one is sooner up. None is handed out where
engines have places on several nodes: it would move a worker to another one. Owned by
`actors.fleet`.
"""

import os
from concurrent.futures import Future
from typing import Any

import ray

from actors.fleet_worker import Worker
from actors.placement import Placement
from actors.rollout_worker import RolloutWorker

MAX_CALLS = 4096  # concurrent calls of one worker's event loop


class RolloutActors:
    """Actors `hone/<run>/rollout/...`, in the places of the run."""

    def __init__(self, run_id: str, placement: Placement, run_dir: str) -> None:
        self._run_id = run_id
        self._placement = placement
        self._run_dir = run_dir
        self._num_standbys = 0
        self.standby: Any = None
        self.prepared: Future[None] | None = None  # fails where its node has no room for it

    def make(self, worker: Worker) -> Any:
        """A new one for `worker`."""
        options = self._placement.rollout_options(worker.index, worker.place)
        return self._make(f"{worker.index}", worker.num_restarts, options)

    def replacement(self, worker: Worker) -> Any:
        """The one that stands by, if it is prepared; a new one otherwise. What is handed out, or
        could not be prepared, is followed by another that stands by.
        """
        standby, prepared = self.standby, self.prepared
        if prepared is None or not prepared.done() or self._num_nodes() > 1:
            return self.make(worker)
        self.standby = self.prepared = None
        self.stand_by()
        if prepared.exception() is None:
            return standby
        ray.kill(standby)
        return self.make(worker)

    def stand_by(self) -> None:
        """Prepare an actor for the place of the next worker that is lost. For CPU engines of one
        node only: a GPU that waits for that is dear.
        """
        if self._placement.is_gpu or self.standby is not None or self._num_nodes() > 1:
            return
        options = self._placement.rollout_options() | {"num_cpus": 0}
        self.standby = self._make("standby", self._num_standbys, options)
        self._num_standbys += 1
        self.prepared = self.standby.prepare.remote().future()

    def _num_nodes(self) -> int:
        """Nodes on which engines have reserved places, those of added ones included."""
        gang = self._placement.gang
        nodes = gang.nodes() if gang is not None else {}
        return len({node for role in nodes if role != "learner" for node in nodes[role]})

    def end(self) -> None:
        """Nobody is replaced any more."""
        if self.standby is not None:
            ray.kill(self.standby)
        self.standby = self.prepared = None

    def _make(self, name: str, generation: int, options: dict[str, Any]) -> Any:
        """The process id tells it from what the last controller may have left."""
        named = ray.remote(RolloutWorker).options(
            name=f"hone/{self._run_id}/rollout/{name}/{os.getpid()}.{generation}",
            max_concurrency=MAX_CALLS,
            **options,
        )
        return named.remote(self._placement.config.rollout.program, self._run_dir)
