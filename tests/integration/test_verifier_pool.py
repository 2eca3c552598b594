"""Verifiers with actors of their own: bounds, queues, deaths, environments, live changes."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import ray

from actors.placement import Placement
from actors.reward_admin import RewardAdmin
from actors.reward_buffered import BufferedGroups
from actors.reward_pool import RewardPool
from actors.reward_set import RewardHome
from actors.verifier_pools import VerifierPools
from cluster import config_file, wire
from cluster.config import Config
from cluster.control import ControlClient
from cluster.embedded_redis import EmbeddedRedis
from cluster.errors import StageError
from cluster.run_dir import RunDir
from cluster.types import Message, Task, TrajectoryGroup, VersionSpan
from rewards.self_check import group_of

PLUGIN = """
import asyncio
import os
from pathlib import Path
from cluster.types import Verdict

class Equals:
    def __init__(self, slow_s=0.0):
        self.slow_s = slow_s
    async def score(self, group, io):
        await asyncio.sleep(self.slow_s)
        if "poison" in group.group_id:
            os._exit(9)
        if "once" in group.group_id:
            flag = Path(__file__).parent / group.group_id
            if not flag.exists():
                flag.touch()
                os.kill(os.getpid(), 9)  # what the kernel does to a process that is out of memory
        gold = group.task.reference
        return [Verdict(score=float(t.text == gold)) for t in group.trajectories]
"""
ISOLATED = """
import judgement
from cluster.types import Verdict

class Judged:
    async def score(self, group, io):
        gold = group.task.reference
        return [
            Verdict(score=float(judgement.judge(t.text, gold)), evidence=judgement.VERSION)
            for t in group.trajectories
        ]
"""
LIBRARY = "VERSION = {version!r}\ndef judge(text, gold): return text == gold\n"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where plug-ins live: one for all, and two environments with their own `judgement`."""
    root = tmp_path_factory.mktemp("plugins")
    for name in ("common", "first", "second"):
        (root / name).mkdir()
    (root / "common" / "pooled_rewards.py").write_text(PLUGIN)
    for name in ("first", "second"):
        (root / name / "judged_rewards.py").write_text(ISOLATED)
        (root / name / "judgement.py").write_text(LIBRARY.format(version=name))
    return {name: root / name for name in ("common", "first", "second")}


@pytest.fixture(scope="module", autouse=True)
def cluster(places: dict[str, Path]):
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(places["common"])])
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, namespace="hone",
        log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    yield
    ray.shutdown()


def group(name: str) -> TrajectoryGroup:
    task = Task(task_id="t", taskset="x", reference="7",
                messages=[Message(role="user", content="?")])  # fmt: skip
    made = group_of(task, ["7", "8"])
    trajectories = [
        msgspec.structs.replace(
            t, group_id=name, version_spans=[VersionSpan(0, 0, 1)], token_ids=np.zeros(1, np.int32)
        )
        for t in made.trajectories
    ]
    return msgspec.structs.replace(made, group_id=name, trajectories=trajectories)


def config_of(name: str, url: str, verifiers: dict[str, Any]) -> Config:
    return config_file.parse(
        {
            "run": {"name": name},
            "policy": {"type": "tiny"},
            "tasks": {"train": {"use": "file"}},
            "rewards": {"verifiers": verifiers},
            "buffer": {"url": url},
            "rollout": {"timeout_s": 30},
        },
        "test",
    )


def isolated(place: Path) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    variables = {"PYTHONPATH": os.pathsep.join([str(root), str(place)])}
    pool = {"workers": 1, "runtime_env": {"env_vars": variables}}
    return {"use": "judged_rewards:Judged", "pool": pool}


@asynccontextmanager
async def pool_of(tmp_path: Path, idle_s: float = 30.0, **fields: Any) -> AsyncIterator[Any]:
    """A pool of `Equals` alone, and a way to ask it."""
    verifier = {"use": "pooled_rewards:Equals", **fields}
    config = config_of("alone", "redis://nobody:1", {"equals": verifier})
    pools = VerifierPools(
        Placement.of(config), config.rewards.verifiers, f"pools/{tmp_path.name}", str(tmp_path),
        idle_s=idle_s,
    )  # fmt: skip
    try:
        yield pools, (await pools.start())["equals"].elsewhere().verifier
    finally:
        pools.kill()


@pytest.mark.timeout(120)
async def test_a_pool_grows_with_its_queue_keeps_its_bounds_and_shrinks(tmp_path: Path):
    pool = {"workers": "1..3", "max_in_flight": 2}
    async with pool_of(tmp_path, 2.0, pool=pool, settings={"slow_s": 0.5}) as (pools, equals):
        groups = [group(f"g{i}") for i in range(24)]
        scored = asyncio.gather(*(equals.score(g, None) for g in groups))
        for _ in range(200):
            busy = (await pools.statuses())["equals"]
            if busy.waiting:
                break
            await asyncio.sleep(0.05)
        assert busy.waiting > 0
        assert busy.in_flight <= 6
        for verdicts in await scored:
            assert [v.score for v in verdicts] == [1.0, 0.0]
        status = (await pools.statuses())["equals"]
        assert 2 <= status.most_workers <= 3
        assert status.most_in_flight == 2
        for _ in range(100):
            if len((await pools.statuses())["equals"].pids) == 1:
                break
            await asyncio.sleep(0.1)
        assert len((await pools.statuses())["equals"].pids) == 1


@pytest.mark.timeout(120)
async def test_a_killed_worker_costs_a_retry_and_a_poisonous_group_only_itself(tmp_path: Path):
    pool = {"workers": "2", "max_in_flight": 1}
    async with pool_of(tmp_path, pool=pool) as (pools, equals):
        once = asyncio.gather(*(equals.score(group(n), None) for n in ("once", "a", "b")))
        for verdicts in await once:
            assert [v.score for v in verdicts] == [1.0, 0.0]
        status = (await pools.statuses())["equals"]
        assert (status.num_died, status.num_retried) == (1, 1)
        with pytest.raises(StageError, match="the workers of 3 tries died"):
            await equals.score(group("poison"), None)
        assert [v.score for v in await equals.score(group("c"), None)] == [1.0, 0.0]


@pytest.mark.timeout(200)
async def test_pools_in_a_live_rubric_have_their_own_imports_and_are_swapped(
    tmp_path: Path, places: dict[str, Path]
):
    with EmbeddedRedis(tmp_path / "redis") as server:
        config = config_of("demo", server.url, {"a": isolated(places["first"])})
        run = RunDir.create(tmp_path / "runs", "demo", config_file.dump(config), exist_ok=True)
        events: list[str] = []
        home = RewardHome(
            run, Placement.of(config), server.url, lambda kind, **fields: events.append(kind)
        )
        pool = RewardPool(home)
        tasks = [group("tasks").task]
        admin = RewardAdmin(pool, BufferedGroups.of(config, "demo", server.url))
        await admin.start(tasks)
        client = ControlClient(run)

        async def swap(verifiers: dict[str, Any]) -> Any:
            return await asyncio.to_thread(
                client.ask, "rewards.swap", {"verifiers": verifiers}, 90.0
            )

        async def evidence() -> tuple[str, str]:
            _, encoded = await pool.score(wire.encode(group("g")))
            scored = wire.decode(encoded, TrajectoryGroup)
            assert scored.rewards == [1.0, 0.0]
            verdicts = [t.verdicts[0] for t in scored.trajectories]
            assert {v.reward_version for v in verdicts} == {scored.reward_versions["a"]}
            return verdicts[0].evidence, scored.reward_versions["a"]

        try:
            seen, before = await evidence()
            assert seen == "first"
            wrong = {"completion": "8", "score": 1.0, "reference": "7"}
            with pytest.raises(StageError, match="must score 1, got 0"):
                await swap({"a": {**isolated(places["first"]), "golden": [wrong]}})
            assert await evidence() == (seen, before)
            await swap({"a": isolated(places["second"])})
            seen, after = await evidence()
            assert seen == "second"
            assert after != before
            await asyncio.sleep(2.5)
            assert {s.name for s in pool.statuses()} == {"reward/0", "reward/a/0"}
        finally:
            await admin.stop()
            pool.stop()


@pytest.mark.timeout(120)
async def test_a_pool_that_hangs_is_started_anew_and_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("actors.verifier_pools.HANG_S", 3.0)
    monkeypatch.setattr("actors.verifier_pools.STATUS_S", 1.0)
    async with pool_of(tmp_path, pool={"workers": "1"}) as (pools, equals):
        processes = psutil.Process().children(recursive=True)
        [pool] = [p for p in processes if p.cmdline() and "VerifierPool" in p.cmdline()[0]]
        pool.suspend()
        scored = asyncio.create_task(equals.score(group("a"), None))
        for _ in range(60):
            if await pools.statuses():
                break
            await asyncio.sleep(0.5)
        assert [v.score for v in await asyncio.wait_for(scored, 30.0)] == [1.0, 0.0]
        assert not pool.is_running()
