"""Reserved places on a real Ray: all or nothing, bounded, cancellable, given back."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import ray
from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
from ray.experimental import internal_kv
from ray.util import placement_group_table

from actors import bring_up
from actors.capacity import KUBERAY_START, growth, growth_seen_by_head
from actors.gang import Gang
from actors.placement import BundleRequest
from cluster.config import Config
from cluster.errors import DeadlineError
from cluster.run_dir import RunDir

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("local_ray")]


def cpus(role: str, count: int, amount: float = 1, **labels: str) -> BundleRequest:
    return BundleRequest(role, count, {"CPU": amount}, labels, "PACK", f"{role}.count")


def reserved() -> list[str]:
    """Names of the groups that hold or ask for room."""
    tables = placement_group_table().values()
    return sorted(t["name"] for t in tables if t["state"] != "REMOVED")


def ignore(_line: str) -> None: ...


class Unseen:
    """An observer that writes nothing."""

    def phase(self, *_: Any) -> None: ...

    def event(self, *_: Any, **_fields: Any) -> None: ...


async def until(done: Callable[[], bool]) -> None:
    for _ in range(200):
        if done():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("did not happen in 10 s")


async def test_actors_go_where_they_were_promised_room() -> None:
    gang = await Gang.reserve("a", [cpus("learner", 2), cpus("rollout", 2)], 20, ignore)
    assert reserved() == ["hone/a/learner", "hone/a/rollout"]
    assert [len(nodes) for nodes in gang.nodes().values()] == [2, 2]

    class Tiny:
        def bundle(self) -> str:
            return str(ray.get_runtime_context().get_placement_group_id())

    actor = ray.remote(Tiny).options(num_cpus=1, scheduling_strategy=gang.strategy("rollout", 1))
    group_id = await actor.remote().bundle.remote()
    assert placement_group_table()[group_id]["name"] == "hone/a/rollout"
    gang.release()
    await until(lambda: not reserved())


async def test_what_never_fits_fails_in_time_names_it_and_holds_nothing() -> None:
    lines: list[str] = []
    with pytest.raises(DeadlineError) as caught:
        await Gang.reserve("b", [cpus("learner", 1), cpus("rollout", 1, 99)], 2, lines.append)
    assert "rollout needs 1 x 99 CPU; 0 fit on 1 matching node" in str(caught.value)
    assert "resources.start_timeout_s" in str(caught.value)
    assert lines[-1] == str(caught.value.reason).split("; waited")[0]
    await until(lambda: not reserved())


async def test_what_fits_only_without_its_own_other_half_gives_way_to_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.gang.HOLD_S", (0.0, 0.0))
    lines: list[str] = []
    halves = [cpus("learner", 6), cpus("rollout", 6)]
    waiting = asyncio.create_task(Gang.reserve("k", halves, 4, lines.append))
    await until(lambda: bool(lines))
    for _ in range(20):
        assert reserved() == ["hone/k/learner", "hone/k/rollout"]
        await asyncio.sleep(0.1)
    with pytest.raises(DeadlineError, match="needs 6 x 1 CPU; 2 fit"):
        await waiting
    await until(lambda: not reserved())


async def test_a_wait_for_a_busy_cluster_ends_when_it_is_free_or_cancelled() -> None:
    first = await Gang.reserve("c", [cpus("learner", 6)], 20, ignore)
    lines: list[str] = []
    waiting = asyncio.create_task(Gang.reserve("d", [cpus("learner", 4)], 30, lines.append))
    cancelled = asyncio.create_task(Gang.reserve("e", [cpus("learner", 8)], 30, ignore))
    await until(lambda: len(reserved()) == 3 and bool(lines))
    assert lines == ["resources: learner waits for 4 x 1 CPU"]
    cancelled.cancel()
    await asyncio.wait([cancelled])
    await until(lambda: "hone/e/learner" not in reserved())
    assert not waiting.done()
    first.release()
    second = await asyncio.wait_for(waiting, 20)
    second.release()
    await until(lambda: not reserved())


async def test_two_runs_that_wait_for_all_of_a_cluster_get_it_one_after_the_other() -> None:
    """Neither keeps its learners' half for ever while it waits for the half of the other."""
    holder = await Gang.reserve("h", [cpus("learner", 8)], 20, ignore)
    halves = [cpus("learner", 4), cpus("rollout", 4)]
    lines: list[str] = []
    waiting = {
        asyncio.create_task(Gang.reserve(name, halves, 150, lines.append)) for name in ("i", "j")
    }
    await until(lambda: len(reserved()) == 3)
    holder.release()
    while waiting:
        done, waiting = await asyncio.wait(
            waiting, timeout=120, return_when=asyncio.FIRST_COMPLETED
        )
        assert done, reserved()
        for gang in done:
            assert [len(nodes) for nodes in gang.result().nodes().values()] == [4, 4]
            gang.result().release()
    assert len(set(lines)) <= 2, "a line about each role, the same however often it was asked for"
    await until(lambda: not reserved())


async def test_a_gang_is_extended_by_what_fits_and_keeps_what_it_has() -> None:
    gang = await Gang.reserve("g", [cpus("learner", 4), cpus("rollout", 2)], 20, ignore)
    await gang.extend("g", cpus("rollout/1", 1), 20, ignore)
    with pytest.raises(DeadlineError, match=r"rollout/2 waits for 1 x 2 CPU; waited 1 s .*count"):
        await gang.extend("g", cpus("rollout/2", 1, 2), 1, ignore)
    whole = ["hone/g/learner", "hone/g/rollout", "hone/g/rollout/1"]
    await until(lambda: reserved() == whole)
    gang.give_back("rollout/1")
    gang.give_back("rollout/1")
    await until(lambda: reserved() == ["hone/g/learner", "hone/g/rollout"])
    await gang.extend("g", cpus("rollout/3", 1, 2), 20, ignore)
    successor = asyncio.create_task(Gang.reserve("g", [cpus("rollout", 4)], 30, ignore))
    await until(lambda: reserved() == ["hone/g/learner", "hone/g/rollout"])
    (await successor).release()
    gang.release()
    await until(lambda: not reserved())


async def test_two_runs_of_one_name_leave_each_other_their_places(
    tiny_config: Config, tmp_path: Path
) -> None:
    """And a controller that follows one that died takes back what is its run's own."""
    runs = [RunDir.create(tmp_path / place, "same", "", exist_ok=False) for place in "ab"]
    for run in runs:
        run.own_buffer()

    async def reserve(run: RunDir) -> Gang:
        gang = (await bring_up._reserve(tiny_config, run, cast(Any, Unseen()))).gang
        assert gang is not None
        return gang

    held = [await reserve(run) for run in runs]
    roles = ("learner", "rollout")
    both = sorted(f"hone/{run.buffer_id}/{role}" for run in runs for role in roles)
    assert len(set(both)) == 4
    assert reserved() == both
    held.append(await reserve(runs[0]))
    await until(lambda: reserved() == both)
    for gang in held:
        gang.release()
    await until(lambda: not reserved())


async def test_how_far_an_autoscaler_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by one that reports to Ray; KubeRay's does not, but is known to be there."""
    assert growth() is None
    monkeypatch.setenv(KUBERAY_START, "ray start --head  --no-monitor  --block")
    assert growth_seen_by_head() == {}
    group = NodeGroupConfig(resources={"CPU": 8, "GPU": 4}, max_count=3, name="gpu")
    place = {"namespace": GCS_AUTOSCALER_STATE_NAMESPACE}
    told = ClusterConfig(node_group_configs=[group]).SerializeToString()
    internal_kv._internal_kv_put(GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, told, **place)
    try:
        assert growth() == {"CPU": 24.0, "GPU": 12.0}
    finally:
        internal_kv._internal_kv_del(GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, **place)


async def test_labels_are_asked_of_ray() -> None:
    with pytest.raises(DeadlineError, match="on pool=nowhere; no node has these labels"):
        await Gang.reserve("f", [cpus("learner", 1, pool="nowhere")], 1, ignore)
