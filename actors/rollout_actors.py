"""The Ray actors behind a fleet: how they are made, and the one that stands by.

Invariant: an actor is handed out once; the one that stands by belongs to no worker before. Owned by
`actors.fleet`.
"""

import os
from typing import Any

import psutil
import ray

from actors.fleet_worker import Worker
from actors.placement import Placement
from actors.rollout_worker import RolloutWorker

MAX_CALLS = 4096  # concurrent calls of one worker's event loop
ROOM_BYTES = 4 * 2**30  # of free memory, so that a stand-by crowds nobody out


class RolloutActors:
    """Actors `hone/<run>/rollout/...`, in the places of the run."""

    def __init__(self, run_id: str, placement: Placement, run_dir: str) -> None:
        self._run_id = run_id
        self._placement = placement
        self._run_dir = run_dir
        self._num_standbys = 0
        self.standby: Any = None

    def make(self, worker: Worker) -> Any:
        """A new one for `worker`."""
        options = self._placement.rollout_options(worker.index, worker.place)
        return self._make(f"{worker.index}", worker.num_restarts, options)

    def replacement(self, worker: Worker) -> Any:
        """The one that stands by, which another one follows; a new one where none does."""
        standby, self.standby = self.standby, None
        if standby is None:
            return self.make(worker)
        self.stand_by()
        return standby

    def stand_by(self) -> None:
        """Prepare an actor for the place of the next worker that is lost, where there is memory to
        spare. For CPU engines only: a GPU that waits for that is dear.
        """
        has_room = psutil.virtual_memory().available > ROOM_BYTES
        if self._placement.is_gpu or self.standby is not None or not has_room:
            return
        options = self._placement.rollout_options() | {"num_cpus": 0}
        self.standby = self._make("standby", self._num_standbys, options)
        self._num_standbys += 1
        self.standby.prepare.remote()

    def end(self) -> None:
        """Nobody is replaced any more."""
        if self.standby is not None:
            ray.kill(self.standby)
        self.standby = None

    def _make(self, name: str, generation: int, options: dict[str, Any]) -> Any:
        """The process id tells it from what the last controller may have left."""
        named = ray.remote(RolloutWorker).options(
            name=f"hone/{self._run_id}/rollout/{name}/{os.getpid()}.{generation}",
            max_concurrency=MAX_CALLS,
            **options,
        )
        return named.remote(self._placement.config.rollout.program, self._run_dir)
