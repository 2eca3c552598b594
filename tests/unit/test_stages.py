"""Waits are measured, named and bounded."""

import asyncio

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.stages import Stages, within
from cluster.errors import ActorLostError, DeadlineError, InputLostError, StageError


async def test_waits_and_busy_time_add_up() -> None:
    stages = Stages(["learn", "rollout"])
    stages.drain()
    with stages.wait("learn", "scored groups"):
        [learn, _] = stages.statuses()
        assert learn.waiting_for == "scored groups"
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.1)
    waited_s, busy = stages.drain()["learn"]
    assert waited_s == pytest.approx(0.1, abs=0.03)
    assert busy == pytest.approx(0.5, abs=0.15)


async def test_a_parallel_stage_is_busy_until_its_last_use_ends() -> None:
    stages = Stages(["rollout"])

    async def use(seconds: float) -> None:
        with stages.busy("rollout"):
            await asyncio.sleep(seconds)

    uses = [asyncio.create_task(use(0.02)), asyncio.create_task(use(0.06))]
    await asyncio.sleep(0.04)
    assert stages.statuses()[0].waiting_for == ""
    await asyncio.gather(*uses)
    assert stages.statuses()[0].waiting_for == "work"


async def test_a_deadline_names_what_and_which_knob() -> None:
    with pytest.raises(DeadlineError, match=r"sync: waited 0 s for an engine \(sync.timeout_s\)"):
        await within(
            asyncio.sleep(5), stage="sync", what="an engine", deadline_s=0.05, knob="sync.timeout_s"
        )


LOST = [
    ActorDiedError(), ActorUnavailableError("no route", None), ActorUnschedulableError("no node"),
    NodeDiedError("gone"), ObjectLostError("00ff", None, ""), OutOfMemoryError("killed"),
    WorkerCrashedError(),
]  # fmt: skip


async def failing(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
async def test_whatever_ray_says_of_a_lost_actor_is_one_error(error: RayError) -> None:
    with pytest.raises(ActorLostError, match=r"^score: a worker to score: ."):
        await within(
            failing(error), stage="score", what="a worker to score", deadline_s=5, knob="a knob"
        )


async def test_a_timeout_that_an_actor_raised_is_not_ours() -> None:
    error = RayTaskError("score", "trace", TimeoutError("its own"), ip="127.0.0.1")
    error = error.as_instanceof_cause()
    assert isinstance(error, TimeoutError)
    with pytest.raises(StageError, match="a worker to score: its own") as raised:
        await within(
            failing(error), stage="score", what="a worker to score", deadline_s=5, knob="a knob"
        )
    assert not isinstance(raised.value, DeadlineError | ActorLostError)


async def test_an_argument_that_was_lost_is_not_the_fault_of_who_got_it() -> None:
    lost = ObjectLostError("00ff", None, "")
    error = RayTaskError("score", "trace", lost, ip="127.0.0.1").as_instanceof_cause()
    with pytest.raises(InputLostError, match=r"a worker to score: .*00ff have been lost"):
        await within(
            failing(error), stage="score", what="a worker to score", deadline_s=5, knob="a knob"
        )
