"""Several real vLLM engines beside a real FSDP2 learner: groups have the same bits on each, weights
reach all in one gloo broadcast; an engine is added, removed, and killed in the middle of one.

Two engines serve the whole module: their start dominates the time. The tests build on each other.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
from ray import cloudpickle
from safetensors import safe_open

from actors.fleet import WorkerState
from actors.fleet_worker import Worker
from actors.rollout import RolloutRequest, Sampling
from actors.weight_sharing import WeightSharing
from cluster.config import Config
from learners.records import ScoreRequest
from tests.engine_cases import (
    TASK,
    Parts,
    move_weights,
    probe_error,
    request,
    rollout,
    running_parts,
)

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import test modules
pytestmark = pytest.mark.asyncio(loop_scope="module")
TIMEOUT_S = 40.0
AGREES = 1e-5  # nats a token
SEQUENCES = [np.arange(5, 45, dtype=np.int32), np.array([9, 10, 11, 30, 7], dtype=np.int32)]


@pytest.fixture(scope="module")
def broadcast_config(tiny_config: Config) -> Config:
    sync = {"transport": "broadcast", "probe_bound": 1e-4, "timeout_s": TIMEOUT_S}
    return tiny_config.model_copy(
        update={
            "rollout": tiny_config.rollout.model_copy(update={"workers": 2}),
            "sync": tiny_config.sync.model_copy(update=sync),
        }
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def parts(
    broadcast_config: Config, tiny_policy_dir: Path, redis_url: str, local_ray: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Parts]:  # fmt: skip
    run_dir, prompts = tmp_path_factory.mktemp("run"), [each.tolist() for each in SEQUENCES]
    async with running_parts(
        broadcast_config, "broadcast-test", tiny_policy_dir, redis_url, run_dir, prompts
    ) as parts:
        for rank in parts.learner.ranks:
            await rank.__ray_call__.remote(_use_small_buckets)
        yield parts


def _use_small_buckets(rank: Any) -> None:
    """Many of them, and less than the largest tensor has."""
    rank._learner.sender.bucket_bytes = 10_000


def failures(parts: Parts) -> list[dict[str, Any]]:
    return [fields for kind, fields in parts.events if kind == "broadcast_failed"]


async def scores(worker: Worker) -> np.ndarray:
    return np.concatenate(await worker.handle.score.remote(SEQUENCES))


async def test_engines_after_a_broadcast_equal_engines_after_the_file(
    parts: Parts, record_property: Callable[[str, float], None]
) -> None:
    first = await parts.sync.sync(0)
    assert first.num_without_file == first.num_engines == 2
    before = [await scores(worker) for worker in parts.fleet.workers]
    await move_weights(parts, 1)
    report = await parts.sync.sync(1)
    assert report.num_without_file == report.num_engines == 2
    record_property("probe_error_after_broadcast", probe_error(report))
    assert probe_error(report) <= AGREES
    assert 0 < report.pause_s <= report.total_s
    assert failures(parts) == []

    requests = [ScoreRequest(each.tolist(), num_context=1) for each in SEQUENCES]
    expected = np.concatenate(await parts.learner.score(requests))
    for worker, old in zip(parts.fleet.workers, before, strict=True):
        by_broadcast = await scores(worker)
        await parts.sync.catch_up(worker)  # as a replaced engine does: by the file
        by_file = await scores(worker)
        assert np.abs(by_broadcast - old).mean() > 1e-2
        assert np.abs(by_broadcast - expected).mean() <= AGREES
        assert by_file.tobytes() == by_broadcast.tobytes()
        assert (worker.state, worker.policy_version) == (WorkerState.HEALTHY, 1)

    assert parts.sync._published is not None
    with safe_open(parts.sync._published[0], framework="pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names  # tied: the engines made theirs of the embedding


async def test_equal_seeds_give_equal_completions(parts: Parts) -> None:
    first, second = [await rollout(parts, request("same", seed=7)) for _ in range(2)]
    other = await rollout(parts, request("other", seed=8))
    tokens = [[t.token_ids.tolist() for t in g.trajectories] for g in (first, second, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len({tuple(t) for t in tokens[0]}) > 1


async def test_a_group_sampled_again_has_the_same_bits_alone_and_in_a_crowd(parts: Parts) -> None:
    """What a resumed or re-issued rollout relies on: neighbours and prefix cache change nothing."""
    asked = request("again", max_new_tokens=24, seed=11)
    alone = await rollout(parts, asked)
    for size in (1, 5, 12):
        crowd = [rollout(parts, request(f"other-{size}-{i}", 30, 100 + i)) for i in range(size)]
        again, *_ = await asyncio.gather(rollout(parts, asked), *crowd)
        for first, second in zip(alone.trajectories, again.trajectories, strict=True):
            assert first.token_ids.tolist() == second.token_ids.tolist()
            assert first.rollout_logprobs.tobytes() == second.rollout_logprobs.tobytes()


async def test_a_worker_is_added_proven_and_removed_while_groups_are_sampled(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves what the others serve, is in the next broadcast, and the groups that it gives back
    are sampled elsewhere.
    """
    first, second = parts.fleet.workers
    await parts.sync.sync(2)
    added = await parts.fleet.add("rollout")
    assert (added.name, added.state) == ("rollout/2", WorkerState.HEALTHY)
    assert added.policy_version == first.policy_version == 2
    asked = request("on each", max_new_tokens=24, seed=21)
    same = await asyncio.gather(*[rollout(parts, asked) for _ in parts.fleet.workers])
    tokens = [[t.token_ids.tolist() for t in group.trajectories] for group in same]
    assert tokens[0] == tokens[1] == tokens[2]
    await move_weights(parts, 9)
    report = await parts.sync.sync(3)
    assert report.num_without_file == report.num_engines == 3
    assert probe_error(report) <= AGREES

    monkeypatch.setattr("actors.fleet.DRAIN_S", 0.05)
    long = [RolloutRequest(f"long-{i}", TASK, 4, Sampling(100, 1.0, [], i)) for i in range(6)]
    running = [asyncio.create_task(rollout(parts, each)) for each in long]
    await asyncio.sleep(0.1)
    assert [worker.num_running for worker in parts.fleet.workers] == [2, 2, 2]
    process = psutil.Process(added.pid)
    removed = await parts.fleet.remove()
    assert removed is added
    assert parts.fleet.workers == [first, second]
    groups = await asyncio.wait_for(asyncio.gather(*running), 60)
    assert [group.group_id for group in groups] == [each.group_id for each in long]
    psutil.wait_procs([process], timeout=20)
    assert not process.is_running()
    assert (first.state, first.num_restarts) == (WorkerState.HEALTHY, 0)
    kinds = [kind for kind, _ in parts.events]
    assert "worker_died" not in kinds
    report = await parts.sync.sync(4)
    assert report.num_without_file == report.num_engines == 2
    assert failures(parts) == []


async def test_weights_through_shared_memory_equal_the_learners(parts: Parts) -> None:
    """On CPUs the memory is the host's; what differs on a GPU is `learners.shared_buffer` alone."""
    version = parts.fleet.workers[0].policy_version
    await move_weights(parts, 5)
    sharing = WeightSharing(parts.sync._config, parts.learner, parts.sync._on_event)
    pauses = await sharing.send(parts.fleet.workers, version)
    assert all(isinstance(pause, float) and pause > 0 for pause in pauses)
    requests = [ScoreRequest(each.tolist(), num_context=1) for each in SEQUENCES]
    expected = np.concatenate(await parts.learner.score(requests))
    for worker in parts.fleet.workers:
        assert np.abs(await scores(worker) - expected).mean() <= AGREES
        assert (worker.num_restarts, worker.policy_version) == (0, version)


async def test_an_engine_killed_amid_a_broadcast_costs_a_sync_by_file_and_no_more(
    parts: Parts,
) -> None:
    survivor, victim = parts.fleet.workers
    await victim.handle.__ray_call__.remote(_arm)
    await move_weights(parts, 2)
    started = time.monotonic()
    report = await asyncio.wait_for(parts.sync.sync(5), 2 * TIMEOUT_S)
    assert time.monotonic() - started < TIMEOUT_S
    [failure] = failures(parts)
    assert failure["policy_version"] == 5
    assert failure["cause"]
    assert (report.num_engines, report.num_without_file) == (1, 0)
    assert (survivor.state, survivor.policy_version) == (WorkerState.HEALTHY, 5)
    assert survivor.num_restarts == 0
    assert probe_error(report) <= AGREES
    assert victim.is_in_repair

    await move_weights(parts, 3)
    report = await parts.sync.sync(6)
    assert report.num_without_file == report.num_engines >= 1
    assert probe_error(report) <= AGREES
    assert len(failures(parts)) == 1


@pytest.mark.slow
async def test_the_replaced_engine_is_in_the_next_group(parts: Parts) -> None:
    _, replaced = parts.fleet.workers
    assert replaced.repair is not None
    await asyncio.wait_for(asyncio.shield(replaced.repair), 200)
    assert (replaced.num_restarts, replaced.policy_version) == (1, 6)
    await move_weights(parts, 4)
    report = await parts.sync.sync(7)
    assert report.num_without_file == report.num_engines == 2
    assert probe_error(report) <= AGREES
    assert len(failures(parts)) == 1


def _arm(worker: Any) -> None:
    engine = worker._engine._engine
    loop = engine.output_handler.get_loop()
    fault = engine.collective_rpc(_die_at_the_third_bucket)
    worker.fault = asyncio.run_coroutine_threadsafe(fault, loop)


def _die_at_the_third_bucket(_worker: Any) -> None:
    from learners.transfer_group import TransferGroup

    receive = TransferGroup.receive
    num_received = 0

    def receive_or_die(group: Any, bucket: Any) -> None:
        nonlocal num_received
        num_received += 1
        if num_received == 3:
            os._exit(1)
        receive(group, bucket)

    TransferGroup.receive = receive_or_die  # type: ignore[method-assign]
