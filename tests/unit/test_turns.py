"""Whose GPU it is: in the learner's turn no engine is awake and none loads, whatever happened."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.fleet import RolloutFleet
from actors.fleet_worker import Worker, WorkerState
from actors.placement import Placement
from actors.turns import Turns
from cluster.config import Config
from cluster.errors import ActorLostError

LONG_S = 60.0


class Engine:
    """The handle of an actor that takes `load_s` to load and `sleep_s` to fall asleep."""

    def __init__(self, load_s: float = 0.0, sleep_s: float = 0.0) -> None:
        self.is_killed = asyncio.Event()
        self.start = SimpleNamespace(remote=lambda *_: self._take(load_s))
        self.sleep = SimpleNamespace(remote=lambda: self._take(sleep_s))
        self.wake = SimpleNamespace(remote=lambda: self._take(0.0))

    async def _take(self, duration_s: float) -> int:
        try:
            async with asyncio.timeout(duration_s):
                await self.is_killed.wait()
        except TimeoutError:
            return 1
        raise ActorLostError("rollout", "killed")


class Engines:
    """In place of `RolloutActors`: each new actor loads in `load_s`."""

    def __init__(self, load_s: float) -> None:
        self.load_s = load_s

    def make(self, _worker: Worker) -> Engine:
        return Engine(self.load_s)

    def replacement(self, worker: Worker, is_last: bool) -> Engine:
        return self.make(worker)

    def stand_by_again(self) -> None: ...


class Learner:
    async def call(self, _method: str) -> None: ...


@pytest.fixture
def causes() -> list[str]:
    """Why workers died."""
    return []


@pytest.fixture
def fleet(
    tiny_config: Config, tmp_path: Path, causes: list[str], monkeypatch: pytest.MonkeyPatch
) -> RolloutFleet:
    """Two workers that serve."""

    def note(kind: str, **fields: Any) -> None:
        if kind == "worker_died":
            causes.append(fields["cause"])

    def kill(engine: Engine) -> None:
        engine.is_killed.set()

    async def serve(worker: Worker) -> None:
        worker.state = WorkerState.HEALTHY

    monkeypatch.setattr("ray.kill", kill)
    rollout = tiny_config.rollout.model_copy(update={"workers": 2})
    config = tiny_config.model_copy(update={"rollout": rollout})
    fleet = RolloutFleet("demo", Placement.of(config), tmp_path, str(tmp_path), note)
    fleet.catch_up = serve
    for worker in fleet.workers:
        worker.state, worker.handle = WorkerState.HEALTHY, Engine()
    return fleet


def turns(fleet: RolloutFleet, timeout_s: float, start_timeout_s: float) -> Turns:
    return Turns(cast(Any, Learner()), fleet, timeout_s, start_timeout_s)


async def lose(fleet: RolloutFleet, worker: Worker, load_s: float) -> None:
    """Its replacement takes `load_s` to load."""
    fleet.actors = cast(Any, Engines(load_s))
    fleet.bury(worker, worker.handle)
    await asyncio.sleep(0.05)
    assert worker.state is WorkerState.STARTING


async def test_an_engine_that_loads_is_waited_for_as_long_as_one_may_load(
    fleet: RolloutFleet, causes: list[str]
) -> None:
    await lose(fleet, fleet.workers[1], load_s=0.5)
    await turns(fleet, 0.1, 10).to_learner()
    assert [worker.state for worker in fleet.workers] == [WorkerState.ASLEEP] * 2
    assert causes == ["died"]


async def test_an_engine_that_loads_for_too_long_is_ended_and_loads_after_the_turn(
    fleet: RolloutFleet, causes: list[str]
) -> None:
    other, slow = fleet.workers
    await lose(fleet, slow, load_s=LONG_S)
    loading = slow.handle
    by_turns = turns(fleet, 0.1, 0.2)
    await asyncio.wait_for(by_turns.to_learner(), 5)
    assert loading.is_killed.is_set()
    assert causes == ["died", "did not load in time"]
    fleet.actors = cast(Any, Engines(load_s=0.0))
    await asyncio.sleep(0.2)
    assert (other.state, slow.state) == (WorkerState.ASLEEP, WorkerState.DEAD)
    assert slow.is_in_repair
    assert slow.repair is not None
    await by_turns.to_engines()
    await asyncio.wait_for(slow.repair, 5)
    assert [worker.state for worker in fleet.workers] == [WorkerState.HEALTHY] * 2


@pytest.mark.parametrize(("sleep_s", "is_ended"), [(0.0, False), (LONG_S, True)])
async def test_a_worker_that_is_leaving_sleeps_like_any_other(
    fleet: RolloutFleet, causes: list[str], sleep_s: float, is_ended: bool
) -> None:
    """It still has groups in hand; one that does not fall asleep is ended, and not replaced."""
    leaving = fleet.workers[1]
    leaving.handle, leaving.is_leaving = Engine(sleep_s=sleep_s), True
    await asyncio.wait_for(turns(fleet, 0.2, 0.2).to_learner(), 5)
    assert [worker.state for worker in fleet.workers] == [WorkerState.ASLEEP] * 2
    assert leaving.handle.is_killed.is_set() is is_ended
    assert causes == []
    assert leaving.repair is None
