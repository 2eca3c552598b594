"""A run without engines, for the tests that change its rewards: its pool, its door and its client.

Invariant: actors, Redis and door are real; only rollouts are made up. Verifiers are written to disk
as a user's are, by the fixture `plugins`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
from ray.util import list_named_actors

from actors.placement import Placement
from actors.reward_admin import RewardAdmin
from actors.reward_buffered import BufferedGroups
from actors.reward_pool import RewardPool
from actors.reward_set import RewardHome
from actors.reward_worker import GroupSummary
from cluster import config_file, wire
from cluster.control import ControlClient
from cluster.redis_client import connect
from cluster.replay_buffer import ReplayBuffer
from cluster.run_dir import RunDir
from cluster.types import Message, Task, TrajectoryGroup, VersionSpan
from rewards.self_check import group_of

PLUGIN = """
import asyncio
import os
import sys
from pathlib import Path
from cluster.types import Verdict

HERE = Path(__file__).parent

class Answer:
    def __init__(self, bonus=0.0):
        self.bonus = bonus
    async def score(self, group, io):
        gold = group.task.reference
        return [Verdict(score=float(t.text == gold) + self.bonus) for t in group.trajectories]

class Wrong(Answer):
    async def score(self, group, io):
        return [Verdict(score=0.0) for t in group.trajectories]

class Outage(Answer):
    async def score(self, group, io):
        if (HERE / "down").exists():
            return [Verdict(score=None, error="down") for t in group.trajectories]
        return await super().score(group, io)

class HalfOutage(Outage):
    async def score(self, group, io):
        verdicts = await Answer.score(self, group, io)
        if not (HERE / "down").exists():
            return verdicts
        return [v if v.score else Verdict(score=None, error="down") for v in verdicts]

class Flat(Answer):
    async def score(self, group, io):
        if group.group_id.startswith("live"):
            return [Verdict(score=1.0) for t in group.trajectories]
        return await super().score(group, io)

class Gated(Answer):
    async def score(self, group, io):
        while (HERE / "gate").exists():
            await asyncio.sleep(0.1)
        return await super().score(group, io)

class DiesBuilt(Answer):
    def __init__(self, bonus=0.0):
        os._exit(9)

class DiesOnGold(Answer):
    async def score(self, group, io):
        os._exit(9)

class DiesLive(Answer):
    async def score(self, group, io):
        if group.group_id.startswith("live"):
            os._exit(9)
        return await super().score(group, io)

class DiesInWorkers(Answer):
    def __init__(self, bonus=0.0):
        super().__init__(bonus)
        count = HERE / "started"
        count.write_text(count.read_text() + "x" if count.exists() else "x")
        if count.stat().st_size > 1:
            os._exit(9)
"""


class House:
    """A run without engines: its pool, its door and its client."""

    def __init__(self, run: RunDir, pool: RewardPool, admin: RewardAdmin, buffer: ReplayBuffer):
        self.run = run
        self.pool = pool
        self.admin = admin
        self.buffer = buffer
        self.events: list[tuple[str, dict[str, object]]] = []
        self.num_groups = 0

    def event(self, kind: str, **fields: object) -> None:
        self.events.append((kind, fields))

    async def ask(self, command: str, **arguments: object):
        client = await asyncio.to_thread(ControlClient, self.run)
        return await asyncio.to_thread(client.ask, f"rewards.{command}", arguments, 90.0)

    async def score(self) -> GroupSummary:
        self.num_groups += 1
        group = live_group(self.num_groups)
        return await self.pool.score_and_add(wire.encode(group))


def live_group(number: int) -> TrajectoryGroup:
    group = group_of(task(number), [str(number), "no", "never", str(number)])
    trajectories = [
        msgspec.structs.replace(
            t, group_id=f"live-{number}", version_spans=[VersionSpan(0, 0, 1)],
            token_ids=np.zeros(1, np.int32),
        )
        for t in group.trajectories
    ]  # fmt: skip
    return msgspec.structs.replace(group, group_id=f"live-{number}", trajectories=trajectories)


def task(number: int) -> Task:
    message = Message(role="user", content=f"Say {number}.")
    return Task(task_id=f"t{number}", taskset="x", messages=[message], reference=str(number))


@asynccontextmanager
async def house(
    tmp_path: Path, url: str, name: str = "demo", **fields: object
) -> AsyncIterator[House]:
    config = config_file.parse(
        {
            "run": {"name": name},
            "policy": {"type": "tiny"},
            "tasks": {"train": {"use": "file"}},
            "rewards": {"verifiers": {"answer": {"use": "live_rewards:Answer", **fields}}},
            "buffer": {"url": url, "capacity_groups": 100000},
        },
        "test",
    )
    run = RunDir.create(tmp_path / "runs", name, config_file.dump(config), exist_ok=True)
    holder: list[House] = []
    pool = RewardPool(
        RewardHome(
            run, Placement.of(config), url, lambda kind, **fields: holder[0].event(kind, **fields)
        )
    )
    buffered = BufferedGroups.of(config, name, url)
    buffer = ReplayBuffer(
        connect(url), name, capacity_groups=1024, lease_s=60.0, max_deliveries=3
    )  # fmt: skip
    admin = RewardAdmin(pool, buffered)
    holder.append(House(run, pool, admin, buffer))
    await admin.start([task(i) for i in range(100, 108)])
    try:
        yield holder[0]
    finally:
        await admin.stop()
        pool.stop()


def verifiers(use: str = "Answer", **settings: object) -> dict[str, object]:
    return {"answer": {"use": f"live_rewards:{use}", "settings": settings}}


def count_actors() -> int:
    return len([a for a in list_named_actors(all_namespaces=True) if "/reward/" in a["name"]])
