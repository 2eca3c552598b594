"""Who of the fleet gets a group, takes part in a sync, and is repaired, and that it is once.

The handles stand for those of Ray.
"""

import asyncio
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from actors.fleet import MAX_CROWD, MAX_HANGS, MAX_RESTARTS, RolloutFleet
from actors.fleet_worker import Worker, WorkerState
from actors.placement import Placement
from actors.rollout import RolloutRequest, Sampling
from cluster.config import Config
from cluster.errors import ActorLostError, DeadlineError, StageError
from cluster.types import Task

NUM_WORKERS = 2
REQUEST = RolloutRequest("g", Task(task_id="t", taskset="x", messages=[]), 4, Sampling(8, 1.0, []))


class Group:
    """A reference to a group, complete when `is_made`; as one of Ray's it may be awaited again."""

    def __init__(self) -> None:
        self.is_made = asyncio.Event()

    def __await__(self) -> Generator[Any, None, Any]:
        return self.is_made.wait().__await__()


class Handle:
    """Of an actor that makes one group."""

    def __init__(self) -> None:
        self.group = Group()
        self.rollout = self

    def remote(self, _request: RolloutRequest) -> Group:
        return self.group


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def fleet(tiny_config: Config, tmp_path: Path, events: list[str]) -> RolloutFleet:
    """Two workers that are said to serve; none has an actor."""
    rollout = tiny_config.rollout.model_copy(update={"workers": NUM_WORKERS})
    config = tiny_config.model_copy(update={"rollout": rollout})

    def note(kind: str, **_fields: Any) -> None:
        events.append(kind)

    fleet = RolloutFleet("demo", Placement.of(config), tmp_path, str(tmp_path), note)
    for worker in fleet.workers:
        worker.state = WorkerState.HEALTHY
    return fleet


async def test_a_worker_in_repair_is_in_no_sync_and_is_not_repaired_twice(
    fleet: RolloutFleet, events: list[str]
) -> None:
    worker, other = fleet.workers
    worker.repair = repair = asyncio.create_task(asyncio.sleep(60))
    worker.state = WorkerState.STALE  # it waits for the sync that runs, to catch up
    assert fleet.serving == [other]
    worker.state = WorkerState.HEALTHY  # and died as soon as it served
    fleet.bury(worker, worker.handle)
    assert worker.state is WorkerState.DEAD
    assert worker.repair is repair
    assert events == ["worker_died"]
    fleet.bury(worker, worker.handle)
    assert events == ["worker_died"]
    repair.cancel()


async def test_who_wants_a_group_waits_for_engines_that_sleep(fleet: RolloutFleet) -> None:
    for worker in fleet.workers:
        worker.state = WorkerState.ASLEEP
    assert fleet.serving == []
    waiting = asyncio.create_task(fleet._pick())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    fleet.workers[1].state = WorkerState.HEALTHY
    await fleet.notify()
    assert await asyncio.wait_for(waiting, 1) is fleet.workers[1]


async def test_a_crowd_that_no_group_comes_back_from_is_an_error_that_names_the_knob(
    fleet: RolloutFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.fleet.PING_S", 0.0)
    rollout = fleet._config.rollout.model_copy(update={"timeout_s": 0.5})
    fleet._config = fleet._config.model_copy(update={"rollout": rollout})
    first, other = fleet.workers
    first.num_running = other.num_running = fleet._max_groups
    with pytest.raises(DeadlineError, match=r"all crowded \(rollout.timeout_s\)"):
        await fleet._pick()
    waiting = asyncio.create_task(fleet._pick())
    for _ in range(4):  # others come back, and others again take the room
        await asyncio.sleep(0.2)
        await fleet.notify()
    assert not waiting.done()
    await asyncio.sleep(0.05)
    first.state = other.state = WorkerState.STALE
    await asyncio.sleep(0.7)
    assert not waiting.done(), "in a sync no group comes back"
    first.state = other.state = WorkerState.HEALTHY
    other.num_running -= 1
    await fleet.notify()
    assert await asyncio.wait_for(waiting, 1) is other


async def test_the_few_that_are_left_do_not_get_all_groups(
    fleet: RolloutFleet, tiny_config: Config
) -> None:
    left, dead = fleet.workers
    dead.state = WorkerState.DEAD
    most = MAX_CROWD * -(-tiny_config.max_groups_in_flight // NUM_WORKERS)
    picked = [await asyncio.wait_for(fleet._pick(), 1) for _ in range(most)]
    assert picked == [left] * most
    waiting = asyncio.create_task(fleet._pick())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    left.num_running -= 1
    await fleet.notify()
    assert await asyncio.wait_for(waiting, 1) is left
    assert left.num_running == most


async def test_nobody_is_replaced_while_the_learner_works(fleet: RolloutFleet) -> None:
    """And who wants a group meanwhile is not told that replacing takes too long."""
    resources = fleet._config.resources.model_copy(update={"start_timeout_s": 0.05})
    sync = fleet._config.sync.model_copy(update={"timeout_s": 0.05})
    fleet._config = fleet._config.model_copy(update={"resources": resources, "sync": sync})
    fleet.may_load.clear()
    for worker in fleet.workers:
        fleet.bury(worker, worker.handle, "did not sleep")
    waiting = asyncio.create_task(fleet._pick())
    await asyncio.sleep(0.3)
    assert {worker.state for worker in fleet.workers} == {WorkerState.DEAD}  # not STARTING
    assert fleet.has_hope
    assert not waiting.done()
    for worker in fleet.workers:
        assert worker.repair is not None
        worker.repair.cancel()
        worker.repair = repair = asyncio.create_task(asyncio.sleep(60))
    fleet.may_load.set()
    with pytest.raises(DeadlineError, match=r"resources\.start_timeout_s"):
        await asyncio.wait_for(waiting, 1)
    repair.cancel()


@pytest.mark.parametrize("state", [WorkerState.DEAD, WorkerState.STARTING, WorkerState.STALE])
async def test_who_wants_a_group_outwaits_a_try_to_replace_the_last_worker(
    fleet: RolloutFleet, state: WorkerState
) -> None:
    """A dead one is in repair, the others may be new or in a sync."""
    resources = fleet._config.resources.model_copy(update={"start_timeout_s": 0.1})
    fleet._config = fleet._config.model_copy(update={"resources": resources})
    worker, retired = fleet.workers
    worker.state, retired.state = state, WorkerState.DEAD
    if state is WorkerState.DEAD:
        worker.repair = asyncio.create_task(asyncio.sleep(0.3))
    waiting = asyncio.create_task(fleet._pick())
    await asyncio.sleep(0.2)
    assert not waiting.done()
    worker.state = WorkerState.HEALTHY
    await fleet.notify()
    assert await asyncio.wait_for(waiting, 1) is worker


async def test_nobody_waits_for_workers_that_are_all_retired(
    fleet: RolloutFleet, events: list[str]
) -> None:
    for worker in fleet.workers:
        worker.num_in_vain = MAX_RESTARTS
        fleet.bury(worker, None)
    with pytest.raises(StageError, match="no rollout worker is left"):
        await asyncio.wait_for(fleet._pick(), 1)
    assert events == ["worker_died"] * NUM_WORKERS + ["worker_retired"] * NUM_WORKERS


async def test_a_worker_that_a_sync_holds_up_is_not_the_one_that_hangs(
    fleet: RolloutFleet, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still until the sync gives another one up; its group has all its time after that,
    and no more.
    """
    rollout = fleet._config.rollout.model_copy(update={"timeout_s": 0.2})
    fleet._config = fleet._config.model_copy(update={"rollout": rollout})
    fleet.may_load.clear()  # nobody is replaced here
    monkeypatch.setattr("ray.kill", lambda _handle: None)
    held, hangs = fleet.workers
    for worker in fleet.workers:
        worker.handle = Handle()
    rollouts = [asyncio.create_task(fleet.rollout(REQUEST)) for _ in fleet.workers]
    await asyncio.sleep(0.05)
    held.state = hangs.state = WorkerState.STALE
    await asyncio.sleep(0.5)
    assert events == []
    held.state = hangs.state = WorkerState.HEALTHY
    await fleet.notify()
    await asyncio.sleep(0.1)
    held.handle.group.is_made.set()
    assert await asyncio.wait_for(rollouts[0], 1) is held.handle.group
    await asyncio.sleep(0.3)
    assert events == ["worker_died"]
    assert hangs.state is WorkerState.DEAD
    assert await asyncio.wait_for(rollouts[1], 1) is held.handle.group, "made again elsewhere"
    assert hangs.repair is not None
    hangs.repair.cancel()


async def test_a_group_that_holds_up_two_workers_is_given_up(
    fleet: RolloutFleet, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = fleet._config.rollout.model_copy(update={"timeout_s": 0.05})
    fleet._config = fleet._config.model_copy(update={"rollout": rollout})
    fleet.may_load.clear()  # nobody is replaced here
    monkeypatch.setattr("ray.kill", lambda _handle: None)
    for worker in fleet.workers:
        worker.handle = Handle()
    with pytest.raises(DeadlineError, match=r"rollout\.timeout_s"):
        await asyncio.wait_for(fleet.rollout(REQUEST), 5)
    assert events == ["worker_died"] * MAX_HANGS
    for worker in fleet.workers:
        assert worker.repair is not None
        worker.repair.cancel()


@pytest.mark.parametrize("num_losses", [1, 2])
async def test_an_engine_that_is_lost_while_a_run_starts_is_started_once_more(
    num_losses: int, fleet: RolloutFleet, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []

    async def launch(worker: Worker) -> None:
        launched.append(worker.index)
        if launched.count(0) <= num_losses and worker.index == 0:
            raise ActorLostError("rollout", "killed")

    monkeypatch.setattr(fleet.actors, "take_over", lambda: None)
    monkeypatch.setattr(fleet, "_launch", launch)
    if num_losses == 1:
        await fleet.start()
        await fleet.stop()
    else:
        with pytest.raises(ActorLostError):
            await fleet.start()
    assert sorted(launched) == [0, 0, 1]
    assert events == ["worker_died"]


async def test_an_error_of_ray_costs_a_try_and_not_the_worker(
    fleet: RolloutFleet, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        start = property(lambda self: self)

        async def remote(self, *_arguments: object) -> int:
            return 7

    num_tries = 0

    def make(_worker: Worker) -> Engine:
        nonlocal num_tries
        num_tries += 1
        if num_tries == 1:
            raise ValueError("the name is still taken")
        return Engine()

    monkeypatch.setattr(fleet.actors, "make", make)
    worker = fleet.workers[0]
    fleet.bury(worker, None)
    assert worker.repair is not None
    await asyncio.wait_for(worker.repair, 5)
    assert (num_tries, worker.pid, worker.state) == (2, 7, WorkerState.STALE)
    assert events == ["worker_died", "worker_restarted"]


async def test_one_stands_by_again_when_no_engine_starts_any_more(
    fleet: RolloutFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its imports would be in their way; whether a replacement came of it or not."""
    num_times = 0

    def stand_by_again() -> None:
        nonlocal num_times
        num_times += 1

    monkeypatch.setattr(fleet.actors, "stand_by_again", stand_by_again)
    fleet.may_load.clear()
    first, other = fleet.workers
    for worker in fleet.workers:
        fleet.bury(worker, None)
    await asyncio.sleep(0.05)
    await fleet._dismiss(other)  # as its place is given up
    await asyncio.sleep(0.05)
    assert first.repair is not None
    assert num_times == 0
    first.repair.cancel()
    await asyncio.sleep(0.05)
    assert num_times == 1
    first.state, first.num_in_vain = WorkerState.HEALTHY, MAX_RESTARTS
    fleet.bury(first, None)
    await asyncio.sleep(0.05)
    assert num_times == 2, "a worker that is retired was not the last one"
