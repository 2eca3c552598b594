"""Which actor takes the place of a lost worker: the one that stands by, or a new one."""

import asyncio
import os
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from actors import engine_imports
from actors.fleet_worker import Worker
from actors.gang import Gang
from actors.placement import Placement
from actors.rollout_actors import ANSWER_S, RolloutActors
from cluster.config import Config

PREPARE_S = 120.0
OWNED_S = 5.0  # until Ray has ended what a dead actor owned


@pytest.mark.usefixtures("local_ray")
async def test_who_is_not_prepared_is_not_handed_out_beside_others(
    tiny_config: Config, tmp_path: Path
) -> None:
    actors = RolloutActors("demo", Placement.of(tiny_config), str(tmp_path))
    worker = Worker(0, None)
    actors.stand_by()
    first, prepared = actors.standby, actors.prepared
    assert prepared is not None
    new = actors.replacement(worker, is_last=False)
    assert new is not first, "its imports may take as long as others want the cores"
    assert actors.standby is actors.prepared is None, "the new one has them to itself"
    with pytest.raises(RayActorError):
        await asyncio.wait_for(asyncio.wrap_future(prepared), PREPARE_S)
    ray.kill(new)
    actors.stand_by_again()
    second, prepared = actors.standby, actors.prepared
    assert second not in (None, first), "another one follows"
    assert prepared is not None
    ray.kill(second)  # as one that leaves, because its node has no memory to spare
    with pytest.raises(RayActorError):
        await asyncio.wait_for(asyncio.wrap_future(prepared), PREPARE_S)
    worker.num_restarts += 1
    ray.kill(actors.replacement(worker, is_last=True))
    actors.stand_by_again()
    assert actors.standby not in (None, second), "another one follows"
    actors.end()
    actors.stand_by_again()
    assert actors.standby is actors.prepared is None


@pytest.mark.usefixtures("local_ray")
def test_what_a_controller_left_is_asked_all_at_once(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are stopped, and one has ended since it was listed."""
    left = RolloutActors("left", Placement.of(tiny_config), str(tmp_path))
    stopped: list[psutil.Process] = []
    for generation in range(3):
        actor = left._make("standby", generation, {"num_cpus": 0})
        pid: Any = ray.get(
            actor.__ray_call__.remote(lambda _worker: os.getpid()), timeout=PREPARE_S
        )
        stopped.append(psutil.Process(pid))
        stopped[-1].suspend()
    names = ray.util.list_named_actors()
    ended = [f"hone/left/rollout/standby/{number}.0" for number in range(2)]
    monkeypatch.setattr("ray.util.list_named_actors", lambda: [*names, *ended])
    heir = RolloutActors("left", Placement.of(tiny_config), str(tmp_path))
    started = time.monotonic()
    heir.take_over()
    assert time.monotonic() - started < 2 * ANSWER_S
    assert heir.standby is None
    _, alive = psutil.wait_procs(stopped, timeout=20)
    assert alive == []


class Owner:
    """Has one that stands by and one handed out, as a controller has."""

    def __init__(self, config: Config, run_dir: str) -> None:
        self._actors = RolloutActors("heir", Placement.of(config), run_dir)

    def stand_by(self) -> Any:
        self._actors.stand_by()
        return self._actors.standby

    def prepared(self) -> Any:
        assert self._actors.prepared is not None
        self._actors.prepared.result(PREPARE_S)
        return self._actors.standby

    def hand_out(self) -> Any:
        self._actors.replacement(Worker(0, None), is_last=True)
        self._actors.stand_by_again()
        return self._actors.standby


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("is_ready", [True, False])
def test_a_stand_by_outlives_its_controller_and_those_handed_out_do_not(
    tiny_config: Config, tmp_path: Path, is_ready: bool
) -> None:
    placement = Placement.of(tiny_config)
    owner: Any = ray.remote(Owner).options(num_cpus=0).remote(tiny_config, str(tmp_path))
    handed_out = ray.get(owner.stand_by.remote(), timeout=PREPARE_S)
    left = ray.get(owner.hand_out.remote(), timeout=PREPARE_S)
    if is_ready:
        assert ray.get(owner.prepared.remote(), timeout=PREPARE_S) == left
    ray.get(handed_out.__ray_call__.remote(_as_if_started), timeout=PREPARE_S)
    ray.kill(owner)
    time.sleep(OWNED_S)

    other = RolloutActors("another run", placement, str(tmp_path))
    other.take_over()
    assert other.standby is None
    heir = RolloutActors("heir", placement, str(tmp_path))
    heir.take_over()
    assert heir.standby == left
    with pytest.raises(RayActorError):
        ray.get(handed_out.stands_by.remote(), timeout=PREPARE_S)
    assert heir.prepared is not None
    heir.prepared.result(PREPARE_S)
    assert heir.replacement(Worker(0, None), is_last=True) == left
    ray.kill(left)


def _as_if_started(worker: Any) -> None:
    worker._is_worker = True


class PlacesOn(Gang):
    """Reserves nothing; its places are on these nodes."""

    def __init__(self, nodes: dict[str, list[str]]) -> None:
        super().__init__()
        self.places = nodes

    def nodes(self) -> dict[str, list[str]]:
        return self.places

    def strategy(self, role: str, index: int = -1) -> Any:
        return "DEFAULT"


@pytest.mark.usefixtures("local_ray")
def test_no_worker_moves_to_another_node(tiny_config: Config, tmp_path: Path) -> None:
    gang = PlacesOn({"learner": ["a"], "rollout": ["b", "c"]})
    placement = replace(Placement.of(tiny_config), gang=gang)
    actors = RolloutActors("spread", placement, str(tmp_path))
    actors.stand_by()
    assert actors.standby is None
    gang.places["rollout"] = ["b", "b"]
    actors.stand_by()
    standby, actors.prepared = actors.standby, Future()
    assert standby is not None
    actors.prepared.set_result(None)
    gang.places["rollout/1"] = ["c"]  # of a worker that was added
    new = actors.replacement(Worker(0, None), is_last=True)
    assert new is not standby
    del gang.places["rollout/1"]
    assert actors.replacement(Worker(1, None), is_last=False) is standby
    for handle in (new, standby):
        ray.kill(handle)
    actors.end()


def test_only_where_there_is_memory_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_imports, "ROOM_BYTES", 0)
    assert engine_imports.has_room()
    monkeypatch.setattr(engine_imports, "ROOM_BYTES", 2**60)
    assert not engine_imports.has_room()
