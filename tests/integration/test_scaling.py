"""`hone scale` through the real door and a real fleet, as far as that goes without an engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from actors.door import Door
from actors.fleet import RolloutFleet
from actors.fleet_worker import WorkerState
from actors.placement import Placement
from actors.scaling import FleetScaling
from cluster import config_file
from cluster.config import Config
from cluster.control import ControlClient, ControlServer
from cluster.errors import StageError
from cluster.redis_client import connect
from cluster.run_dir import RunDir
from serve.scale_cli import scale

pytestmark = pytest.mark.asyncio


class House:
    """A run whose workers have started, but hold no engine."""

    def __init__(self, config: Config, run: RunDir, url: str) -> None:
        self.run = run
        self.events: list[tuple[str, dict[str, Any]]] = []
        placement = Placement.of(config)
        self.fleet = RolloutFleet(run.name, placement, run.policy, str(run.path), self.event)
        self.fleet.is_started = True
        for worker in self.fleet.workers:
            worker.state = WorkerState.HEALTHY
        self.door = Door(ControlServer(connect(url), run.name), self.event)
        scaling = FleetScaling(run.name, self.fleet, placement, self.door, self.event)
        self.door.serve("fleet", scaling.carry_out, refusal="scale_refused")

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    async def ask(self, wanted: object, deadline_s: float = 20.0) -> Any:
        client = ControlClient(self.run)
        asked = {"rollout_workers": wanted}
        return await asyncio.to_thread(client.ask, "fleet.scale", asked, deadline_s)

    @property
    def states(self) -> dict[str, str]:
        return {status.name: status.state for status in self.fleet.statuses()}


@asynccontextmanager
async def house(
    tmp_path: Path, config: Config, url: str, name: str, **resources: object
) -> AsyncIterator[House]:
    config = config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"workers": 3}),
            "buffer": config.buffer.model_copy(update={"url": url}),
            "resources": config.resources.model_copy(update=resources),
        }
    )
    run = RunDir.create(tmp_path / "runs", name, config_file.dump(config), exist_ok=False)
    home = House(config, run, url)
    await home.door.open()
    try:
        yield home
    finally:
        await home.door.close()


@pytest_asyncio.fixture
async def home(tmp_path: Path, tiny_config: Config, redis_url: str) -> AsyncIterator[House]:
    async with house(tmp_path, tiny_config, redis_url, "scaled") as home:
        yield home


async def test_who_leaves_is_missed_least_and_finishes_what_it_has(home: House) -> None:
    busy, idle, broken = home.fleet.workers
    busy.num_running, idle.num_running = 2, 1
    broken.state = WorkerState.QUARANTINED
    asking = asyncio.create_task(home.ask(1))
    for _ in range(200):
        if idle.is_leaving:
            break
        await asyncio.sleep(0.02)
    assert home.states["rollout/1"] == "leaving"
    assert home.fleet.serving == [busy]
    home.fleet.bury(idle, idle.handle)  # whoever leaves and dies is not replaced
    assert idle.repair is None
    await asyncio.sleep(0.1)
    assert not asking.done()
    idle.num_running = 0
    await home.fleet.notify()
    assert await asking == {"before": 3, "after": 1, "workers": ["rollout/0"]}
    assert home.states == {"rollout/0": "healthy"}
    [(kind, fields)] = home.events
    assert kind == "fleet_scaled"
    assert fields == {"before": 3, "after": 1, "wanted": 1, "workers": "rollout/0"}


async def test_who_does_not_finish_in_time_is_ended(
    home: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.fleet.DRAIN_S", 0.1)
    for worker in home.fleet.workers:
        worker.num_running = 1
    assert (await home.ask(2))["workers"] == ["rollout/0", "rollout/1"]


@pytest.mark.parametrize("wanted", [0, -1, True, "2", None])
async def test_at_least_one_worker_stays(home: House, wanted: object) -> None:
    with pytest.raises(StageError, match="--rollout-workers must be a number from 1"):
        await home.ask(wanted)
    assert len(home.fleet.workers) == 3
    assert [kind for kind, _ in home.events] == ["scale_refused"]


async def test_a_fleet_that_still_loads_is_left_alone(home: House) -> None:
    home.fleet.is_started = False
    with pytest.raises(StageError, match="still loads its first engines"):
        await home.ask(1)
    assert len(home.fleet.workers) == 3


async def test_engines_that_share_a_gpu_with_a_rank_cannot_be_more_than_those(
    tmp_path: Path, tiny_config: Config, redis_url: str
) -> None:
    colocated = {"layout": "colocated", "engine_gpu_share": 0.4}
    async with house(tmp_path, tiny_config, redis_url, "colocated", **colocated) as home:
        with pytest.raises(StageError, match=r"at most 3 with resources\.layout colocated"):
            await home.ask(4)
        assert (await home.ask(2))["after"] == 2


async def test_the_command_says_what_came_of_it(
    home: House, capsys: pytest.CaptureFixture[str]
) -> None:
    await asyncio.to_thread(scale, str(home.run.path), 2, 20.0)
    assert capsys.readouterr().out == "rollout workers: 3 -> 2\n  rollout/0\n  rollout/1\n"
