"""A real learner whose disk is slow or refuses: the save fails, the learner is kept, a later save
holds; the last one of a run has no later one.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from actors.checkpointing import Checkpointing
from actors.placement import Placement
from actors.supervisor import Supervisor
from cluster.checkpoint_store import CheckpointStore
from cluster.config import Config
from cluster.errors import StageError
from cluster.redis_client import connect
from cluster.run_state import RunState
from learners.group import LearnerGroup
from tests.replay_checker import claim, fill, make_buffer

FSYNC_S = 3.0
STATE = RunState(run_id="slow", step=1, policy_version=0, config_hash="h")


def _slow_disk(_rank: Any, seconds: float) -> None:
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        fsync(descriptor)

    os.fsync = slow


@pytest_asyncio.fixture
async def learner(
    tiny_config: Config, tiny_policy_dir: Path, redis_url: str, local_ray: None, tmp_path: Path
) -> AsyncIterator[LearnerGroup]:
    learner = await LearnerGroup.start(
        run_id="saves", config=tiny_config, policy_dir=tiny_policy_dir, buffer_url=redis_url,
        run_dir=str(tmp_path), actor_options=Placement.of(tiny_config).learner_options(),
    )  # fmt: skip
    yield learner
    learner.shutdown()


@pytest.mark.timeout(200)
async def test_a_slow_save_has_failed_and_the_learner_is_not_lost(
    learner: LearnerGroup, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = make_buffer(connect(redis_url), "slow-save")
    fill(buffer, "a")
    buffer.consume(claim(buffer), step=1)
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    events: list[tuple[str, dict[str, Any]]] = []

    def note(kind: str, **fields: Any) -> None:
        events.append((kind, fields))

    saves = Checkpointing(store, buffer, Supervisor(), note)
    pids = learner.pids
    [rank] = learner.ranks
    await rank.__ray_call__.remote(_slow_disk, FSYNC_S)
    monkeypatch.setattr("actors.checkpointing.SAVE_S", 0.2)
    await saves.begin(learner, STATE)
    await saves.settle(learner, should_wait=True)
    await saves.begin(learner, STATE)
    assert [kind for kind, _ in events] == ["checkpoint_failed"] * 2
    assert "not written in" in events[0][1]["reason"]
    assert "still being written" in events[1][1]["reason"]
    assert (store.steps(), buffer.places()) == ([], {"a": "consumed"})
    for _ in range(300):
        if await learner.is_saved():
            break
        await asyncio.sleep(0.1)
    monkeypatch.setattr("actors.checkpointing.SAVE_S", 60.0)
    await saves.begin(learner, STATE)
    await saves.settle(learner, should_wait=True)
    assert events[-1][0] == "checkpoint"
    assert (store.steps(), buffer.places()) == ([1], {})
    assert learner.pids == pids


@pytest.mark.timeout(200)
async def test_a_slow_publication_has_failed_and_holds_nobody_up(
    learner: LearnerGroup, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    reasons: list[str] = []

    def note(kind: str, **fields: Any) -> None:
        reasons.append(f"{kind}: {fields.get('reason', '')}")

    saves = Checkpointing(store, make_buffer(connect(redis_url), "slow"), Supervisor(), note)
    monkeypatch.setattr("actors.checkpointing.DROP_S", 0.2)
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", os.fsync)  # put back at the end
        _slow_disk(None, FSYNC_S)  # of this process, which publishes
        await saves.begin(learner, STATE)
        while saves._commit is None:
            await saves.settle(learner)
            await asyncio.sleep(0.05)
        started = time.monotonic()
        await saves.drop()  # the learner is lost meanwhile
        assert time.monotonic() - started < FSYNC_S
        await saves.begin(learner, STATE)
    assert len(reasons) == 1
    assert "being published" in reasons[0]
    assert saves._late is not None
    await asyncio.wait([saves._late], timeout=60.0)
    await saves.begin(learner, STATE)
    await saves.settle(learner, should_wait=True)
    assert store.steps() == [1]


@pytest.mark.timeout(200)
async def test_the_last_save_has_a_second_try_and_then_ends_the_run(
    learner: LearnerGroup, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.checkpointing.LAST_PAUSE_S", 0.1)
    buffer = make_buffer(connect(redis_url), "last-save")
    fill(buffer, "a", "b")
    for step, group_id in enumerate(claim(buffer), start=1):
        buffer.consume([group_id], step=step)
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    in_the_way = [store.begin(1).parents[1] / f"step_{step:06d}" for step in (1, 2)]
    for path in in_the_way:
        path.touch()  # a file where the checkpoint is to go: publishing it is refused
    events: list[str] = []

    def note(kind: str, **_fields: Any) -> None:
        events.append(kind)
        if len(events) == 1:
            in_the_way[0].unlink()  # after the first refusal there is room

    saves = Checkpointing(store, buffer, Supervisor(), note)
    await saves.finish(learner, STATE)
    assert events == ["checkpoint_failed", "checkpoint"]
    assert (store.steps(), buffer.places()) == ([1], {"b": "consumed"})
    last = msgspec.structs.replace(STATE, step=2)
    with pytest.raises(StageError, match=r"step 2, the last one, could not be saved: .* --resume"):
        await saves.finish(learner, last)
    assert events[2:] == ["checkpoint_failed"] * 2
    assert (store.steps(), buffer.places()) == ([1], {"b": "consumed"})
    in_the_way[1].unlink()
    await saves.finish(learner, last)
    assert (store.steps(), buffer.places()) == ([1, 2], {})


@pytest.mark.timeout(200)
async def test_the_second_try_of_the_last_save_waits_for_the_first_that_was_given_up(
    learner: LearnerGroup, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    events: list[str] = []

    def note(kind: str, **_fields: Any) -> None:
        events.append(kind)
        monkeypatch.setattr("actors.checkpointing.SAVE_S", 60.0)  # of the second try

    [rank] = learner.ranks
    await rank.__ray_call__.remote(_slow_disk, FSYNC_S)
    monkeypatch.setattr("actors.checkpointing.LAST_PAUSE_S", 0.1)
    monkeypatch.setattr("actors.checkpointing.SAVE_S", 0.2)
    saves = Checkpointing(store, make_buffer(connect(redis_url), "given-up"), Supervisor(), note)
    await saves.finish(learner, STATE)
    assert events == ["checkpoint_failed", "checkpoint"]
    assert store.steps() == [1]
