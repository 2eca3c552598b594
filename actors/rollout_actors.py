"""The Ray actors behind a fleet: how they are made, and the one that stands by.

Invariant: an actor is handed out once; the one that stands by belongs to no worker before. While it
is being prepared it is handed out only where nobody else serves: the learner then waits, and leaves
it the cores; beside others a new one is sooner up. None is handed out where engines have places on
several nodes: it would move a worker to another one. On a Ray of one's own, which ends with its
launcher, it outlives a controller that dies. Owned by `actors.fleet`.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from actors.fleet_worker import Worker
from actors.placement import Placement
from actors.rollout_worker import RolloutWorker
from cluster.run_dir import RunDir

MAX_CALLS = 4096  # concurrent calls of one worker's event loop
ANSWER_S = 2.0  # for all that another controller has left


class RolloutActors:
    """Actors `hone/<run>/rollout/...`, in the places of the run."""

    def __init__(
        self,
        run_id: str,
        placement: Placement,
        run_dir: str,
        on_event: Callable[..., None] | None = None,
    ) -> None:
        self._run_id = run_id
        self._placement = placement
        self._run_dir = run_dir
        self._on_event = on_event
        self._num_standbys = 0
        self._is_own_ray = not RunDir(run_dir).is_shared
        self._keeps_standby = False
        self.standby: Any = None
        self.prepared: Future[None] | None = None  # fails where its node has no room for it

    def make(self, worker: Worker) -> Any:
        """A new one for `worker`."""
        options = self._placement.rollout_options(worker.index, worker.place)
        return self._make(f"{worker.index}", worker.num_restarts, options)

    def replacement(self, worker: Worker, is_last: bool) -> Any:
        """The one that stands by, if it is prepared or, where `worker` was the last that served,
        still being; otherwise a new one, and it ends. Either way `stand_by_again` has another one
        follow.
        """
        standby, prepared = self.standby, self.prepared
        if standby is None or self._num_nodes() > 1:
            return self.make(worker)
        self.standby = self.prepared = None
        assert prepared is not None
        is_sooner = prepared.exception() is None if prepared.done() else is_last
        if is_sooner:
            return standby
        ray.kill(standby)
        return self.make(worker)

    def stand_by(self) -> None:
        """Prepare an actor for the place of the next worker that is lost, once and, by
        `stand_by_again`, until `end`. For CPU engines of one node only: a GPU that waits for that
        is dear.
        """
        self._keeps_standby = True
        self.stand_by_again()

    def stand_by_again(self) -> None:
        """When no engine starts, beside which it would import."""
        is_due = self._keeps_standby and self.standby is None
        if self._placement.is_gpu or not is_due or self._num_nodes() > 1:
            return
        options = self._placement.rollout_options() | {"num_cpus": 0}
        if self._is_own_ray:  # a reserved place would go with the controller
            options |= {"lifetime": "detached", "scheduling_strategy": "DEFAULT"}
        self.standby = self._make("standby", self._num_standbys, options)
        self._num_standbys += 1
        if self._on_event is not None:
            self._on_event("standby_started")
        self._prepare()

    def _prepare(self, is_under_way: bool = False) -> None:
        """`standby`; one that another controller has asked before goes on."""
        prepared: Future[None] = self.standby.prepare.remote(is_under_way).future()
        prepared.add_done_callback(self._note_prepared)
        self.prepared = prepared

    def _note_prepared(self, prepared: Future[None]) -> None:
        """In a thread of Ray."""
        if self._on_event is not None:
            is_ready = not prepared.cancelled() and prepared.exception() is None
            self._on_event("standby_ready" if is_ready else "standby_ended")

    def take_over(self) -> None:
        """From a controller that died: the one that stands by, be it prepared or not yet. Those
        that it had handed out end, and who has not answered in `ANSWER_S`.
        """
        asked: dict[ray.ObjectRef[bool], Any] = {}
        for name in ray.util.list_named_actors():
            if name.startswith(self._name("standby")):
                with suppress(ValueError):  # it has ended since it was listed
                    actor: Any = ray.get_actor(name)
                    asked[actor.stands_by.remote()] = actor
        answers: list[ray.ObjectRef[bool]] = []
        if asked:
            answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
        for answer, actor in asked.items():
            if self.standby is None and answer in answers and _is_true(answer):
                self.standby = actor
                self._prepare(is_under_way=True)
            else:
                ray.kill(actor)

    def _name(self, name: str) -> str:
        return f"hone/{self._run_id}/rollout/{name}/"

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
        self._keeps_standby = False

    def _make(self, name: str, generation: int, options: dict[str, Any]) -> Any:
        """The process id tells it from what the last controller may have left."""
        named = ray.remote(RolloutWorker).options(
            name=f"{self._name(name)}{os.getpid()}.{generation}",
            max_concurrency=MAX_CALLS,
            **options,
        )
        return named.remote(self._placement.config.rollout.program, self._run_dir)


def _is_true(answer: Any) -> bool:
    """An answer that has come, or the news that its actor is dead."""
    try:
        return bool(ray.get(answer, timeout=ANSWER_S))
    except RayError:
        return False
