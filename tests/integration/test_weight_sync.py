"""Weights from a real FSDP2 learner to a real vLLM engine through real Ray actors, and the probe;
hinted rollouts on the same parts.

One engine serves the whole module: its start dominates the time.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import pytest_asyncio

from actors.fleet import WorkerState
from actors.fleet_worker import oldest_version
from actors.reward_worker import UNSOLVED
from actors.rollout import RolloutRequest, Sampling
from actors.statistics import RolloutStatistics
from actors.turns import Turns
from actors.vllm_engine import MIN_BATCH_TOKENS
from cluster.config import Config, LossConfig, ObjectiveSection, Plugin
from cluster.errors import LearnerLostError, StageError
from cluster.types import Message, Task
from learners.records import ScoreRequest
from tests.engine_cases import (
    TASK,
    Parts,
    break_head,
    child,
    move_weights,
    probe_error,
    producer,
    request,
    rollout,
    running_parts,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def guided_config(tiny_config: Config, redis_url: str) -> Config:
    """Plain requests are what they are with `single_turn`."""
    guide = Plugin(use="tests.hint_rewards:RejectsAfter", settings={"word": "copy"})
    return tiny_config.model_copy(
        update={
            "rollout": tiny_config.rollout.model_copy(update={"program": guide}),
            "sync": tiny_config.sync.model_copy(update={"probe_bound": 1e-4}),
            "objective": ObjectiveSection(losses={"policy": LossConfig(use="guide")}),
        }
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def parts(
    guided_config: Config, tiny_policy_dir: Path, redis_url: str, local_ray: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Parts]:  # fmt: skip
    run_dir, prompts = tmp_path_factory.mktemp("run"), [[5, 6, 7, 8], [9, 10, 11]]
    async with running_parts(
        guided_config, "sync-test", tiny_policy_dir, redis_url, run_dir, prompts
    ) as parts:
        await parts.sync.sync(0)  # each test can be run alone
        yield parts


async def test_engine_and_learner_agree_before_and_after_a_sync(
    parts: Parts, record_property: Callable[[str, float], None]
) -> None:
    first = await parts.sync.sync(0)
    assert probe_error(first) <= 1e-4  # by the prompts: engines are proven before they serve
    for version in (1, 2):
        group = await rollout(parts, request(f"before-{version}"))
        parts.sync.probes.choose([group])
        await move_weights(parts, version)
        report = await parts.sync.sync(version)
        assert report.policy_version == version
        record_property("probe_error", probe_error(report))
        assert 0 < probe_error(report) <= 1e-4
        assert report.num_engines == 1


async def test_rollout_logprobs_are_the_learners_and_versions_are_stamped(parts: Parts) -> None:
    group = await rollout(parts, request("stamped"))
    version = parts.fleet.workers[0].policy_version
    for trajectory in group.trajectories:
        assert trajectory.version_spans[-1].end == len(trajectory.token_ids)
        assert trajectory.min_policy_version == version
        assert trajectory.loss_mask.all()
        tokens = np.concatenate([trajectory.context_tokens, trajectory.token_ids]).tolist()
        [learner_logprobs] = await parts.learner.score(
            [ScoreRequest(tokens, len(trajectory.context_tokens))]
        )
        assert np.abs(learner_logprobs - trajectory.rollout_logprobs).max() < 1e-4


async def test_a_lost_learner_starts_anew_and_goes_on_from_its_checkpoint(
    parts: Parts, tmp_path: Path
) -> None:
    """Kill -9 of the rank: the engines live on and agree with what it then holds."""
    parts.sync.probes.choose([await rollout(parts, request("before the loss"))])
    engine_pid, lost_pid = parts.fleet.workers[0].pid, parts.learner.pids[0]
    await parts.learner.begin_save(tmp_path / "checkpoint")
    await parts.learner.finish_save()
    await move_weights(parts, 99)
    os.kill(lost_pid, signal.SIGKILL)
    with pytest.raises(LearnerLostError, match="a rank was lost"):
        await parts.learner.optim_step()
    await parts.learner.restart()
    version = await parts.learner.load(tmp_path / "checkpoint")
    report = await parts.sync.sync(version)
    assert parts.learner.pids[0] != lost_pid
    assert parts.fleet.workers[0].pid == engine_pid
    assert probe_error(report) <= 1e-4


async def test_a_rollout_goes_on_from_the_beginning_of_a_solution(
    parts: Parts, guided_config: Config, redis_url: str, tmp_path: Path
) -> None:
    """The learner sees the beginning, and agrees on the log-probs of all that follows it."""
    task = msgspec.structs.replace(TASK, task_id="begun", solution="1 + 2 = 3", reference="3")
    asked = RolloutRequest("begun", task, 4, Sampling(8, 1.0, [1], 7), prefix_tokens=3)
    async with producer(parts, guided_config, redis_url, tmp_path, level=1) as (made, _):
        production = await made.produce(asked)
    assert production.prefix_tokens == 3
    group = await rollout(parts, asked)
    assert [t.arm for t in group.trajectories] == ["plain"] * 3 + ["guided"]
    [*plain, begun] = group.trajectories
    assert begun.loss_mask.tolist()[:4] == [False] * 3 + [True]
    assert begun.text.startswith("1 +")
    assert {t.context_tokens.tobytes() for t in plain} == {begun.context_tokens.tobytes()}
    tokens = [*begun.context_tokens.tolist(), *begun.token_ids.tolist()]
    [known] = await parts.learner.score([ScoreRequest(tokens, len(begun.context_tokens) + 3)])
    assert np.abs(known - begun.rollout_logprobs[3:]).max() < 1e-4
    assert begun.version_spans[-1].end == len(begun.token_ids)


HINTED = msgspec.structs.replace(TASK, task_id="hinted", hints=["copy 3", "2 + 2 = 5", "1 + 2 = 3"])


async def test_a_failed_task_is_sampled_with_hints_and_learned_without(
    parts: Parts, guided_config: Config, redis_url: str, tmp_path: Path
) -> None:
    asked = RolloutRequest("guided", HINTED, 4, Sampling(8, 1.0, [1], 5))
    plain = await rollout(parts, asked)
    async with producer(parts, guided_config, redis_url, tmp_path, level=3) as (made, buffer):
        production = await made.produce(asked)
    rejected, wrong, right = (production.hinted[level] for level in (1, 2, 3))
    assert production.plain.outcome == rejected.outcome == wrong.outcome == UNSOLVED
    assert (rejected.passed, wrong.passed) == ([None] * 4, [False] * 4)
    assert production.last is right
    assert right.outcome == "added"
    [header] = buffer.claim(9, owner="test", wait_s=1.0)
    [group] = buffer.fetch(["guided"])
    assert [t.reward for t in group.trajectories] == [1.0, 0.0, 1.0, 0.0]
    for trajectory in group.trajectories:
        assert trajectory.train_context_tokens is not None
        without = plain.trajectories[0].context_tokens.tolist()
        assert trajectory.train_context_tokens.tolist() == without
        assert len(trajectory.context_tokens) > len(without)
        version = parts.fleet.workers[0].policy_version
        assert {s.policy_version for s in trajectory.version_spans} == {version}
        tokens = [*trajectory.context_tokens.tolist(), *trajectory.token_ids.tolist()]
        [known] = await parts.learner.score([ScoreRequest(tokens, len(trajectory.context_tokens))])
        assert np.abs(known - trajectory.rollout_logprobs).max() < 1e-4
    await parts.learner.forward_backward([header])
    metrics = (await parts.learner.optim_step()).metrics
    assert metrics["guide/log_policy_step"] == 0.0
    assert abs(metrics["guide/log_engine_age"]) < 1e-4 < abs(metrics["guide/log_context_shift"])
    assert metrics["grad/norm"] > 0


async def test_wrong_and_overlong_hints_end_in_a_dropped_group_and_nothing_else(
    parts: Parts, guided_config: Config, redis_url: str, tmp_path: Path
) -> None:
    task = msgspec.structs.replace(HINTED, hints=["2 + 2 = 5", "9" * 500])
    asked = RolloutRequest("misled", task, 4, Sampling(8, 1.0, [1], 6))
    async with producer(parts, guided_config, redis_url, tmp_path, level=3) as (made, buffer):
        production = await made.produce(asked)
    assert production.last is production.hinted[1]
    assert production.last.outcome == UNSOLVED
    assert production.num_hint_errors == 1
    assert buffer.stats().ready == 0
    statistics = RolloutStatistics()
    statistics.add(production)
    metrics = statistics.drain()
    assert metrics["guide/guided_fraction"] == 1.0
    assert metrics["guide/solved_fraction"] == 0.0
    assert metrics["guide/hint_error_fraction"] == 0.5
    assert parts.fleet.workers[0].state is WorkerState.HEALTHY


async def test_a_trajectory_as_long_as_the_context_is_a_probe_like_any_other(
    parts: Parts, guided_config: Config
) -> None:
    long = await rollout(parts, RolloutRequest("to the end", TASK, 4, Sampling(200, 1.0, [], 3)))
    lengths = [len(t.context_tokens) + len(t.token_ids) for t in long.trajectories]
    assert max(lengths) == guided_config.policy.context_length
    parts.sync.probes.choose([long])
    await parts.sync.sync(parts.fleet.workers[0].policy_version)
    assert parts.fleet.workers[0].state is WorkerState.HEALTHY


async def test_requests_in_flight_survive_a_sync_and_report_both_versions(parts: Parts) -> None:
    asked = RolloutRequest("long", TASK, 4, Sampling(100, 1.0, [], 3))
    before = parts.fleet.workers[0].policy_version
    running = asyncio.create_task(rollout(parts, asked))
    await asyncio.sleep(0.1)
    await move_weights(parts, 11)
    assert oldest_version(parts.fleet.staying) == before, "what is drawn now is sampled by these"
    await parts.sync.sync(11)
    assert oldest_version(parts.fleet.staying) == 11
    group = await asyncio.wait_for(running, 60)
    versions = {span.policy_version for t in group.trajectories for span in t.version_spans}
    assert versions == {before, 11}
    assert all(t.version_spans[-1].end == len(t.token_ids) for t in group.trajectories)
    assert group.min_policy_version == before


async def test_engine_and_learner_take_turns(
    parts: Parts, guided_config: Config, redis_url: str, tmp_path: Path
) -> None:
    """On a CPU the engine gives no memory back, but sleeps and wakes as on a GPU."""
    [worker] = parts.fleet.workers
    version, pid = max(0, worker.policy_version), worker.pid
    await parts.sync.sync(version)
    Turns(parts.learner, parts.fleet, timeout_s=60, start_timeout_s=60)
    asked = request("by turns", max_new_tokens=24, seed=31)
    awake = await rollout(parts, asked)
    running = asyncio.create_task(rollout(parts, request("on its way", 100, 32)))
    await asyncio.sleep(0.1)
    async with producer(parts, guided_config, redis_url, tmp_path, level=2) as (made, buffer):
        await made.produce(RolloutRequest("for a turn", HINTED, 4, Sampling(8, 1.0, [1], 33)))
    headers = buffer.claim(9, owner="test", wait_s=1.0)
    [header] = [h for h in headers if h.group_id == "for a turn"]
    await parts.learner.forward_backward([header])
    assert worker.state is WorkerState.ASLEEP
    await asyncio.wait_for(running, 30)  # what runs is finished before an engine sleeps
    waiting = asyncio.create_task(rollout(parts, asked))
    past_the_fleet = asyncio.ensure_future(worker.handle.rollout.remote(asked))
    await asyncio.sleep(1)
    assert not waiting.done()
    assert not past_the_fleet.done(), "the engine itself sleeps"
    await parts.learner.optim_step()
    await parts.learner.rest()
    again = await asyncio.wait_for(waiting, 60)
    await asyncio.wait_for(past_the_fleet, 60)
    assert (worker.state, worker.pid) == (WorkerState.HEALTHY, pid)
    for first, second in zip(awake.trajectories, again.trajectories, strict=True):
        assert first.token_ids.tolist() == second.token_ids.tolist(), "the weights it had"
        assert second.min_policy_version == version
    await parts.learner.forward_backward([header])
    report = await parts.sync.sync(version)  # ends the learner's turn by itself
    assert (report.num_engines, worker.state) == (1, WorkerState.HEALTHY)
    assert probe_error(report) <= 1e-4


async def test_more_prompts_than_one_batch_holds(parts: Parts) -> None:
    """Seeded requests whose prompts would be split over two batches used to end the engine."""

    def long_request(i: int) -> RolloutRequest:
        message = Message(role="user", content=" + ".join(str(i + k) for k in range(20)))
        task = Task(task_id=f"t{i}", taskset="demo", messages=[message])
        return RolloutRequest(f"long-{i}", task, 4, Sampling(4, 1.0, [1], i))

    groups = await asyncio.gather(*[rollout(parts, long_request(i)) for i in range(60)])
    context_tokens = sum(len(g.trajectories[0].context_tokens) for g in groups)
    assert context_tokens > MIN_BATCH_TOKENS
    assert parts.fleet.workers[0].num_restarts == 0


async def test_a_dead_engine_is_replaced_and_its_group_produced(parts: Parts) -> None:
    worker = parts.fleet.workers[0]
    version = worker.policy_version
    asked = RolloutRequest("killed", TASK, 4, Sampling(100, 1.0, [], 3))
    running = asyncio.create_task(rollout(parts, asked))
    await asyncio.sleep(0.1)
    child(worker, "EngineCore").kill()
    group = await asyncio.wait_for(running, 120)
    assert worker.num_restarts == 1
    assert worker.state is WorkerState.HEALTHY
    assert group.min_policy_version == worker.policy_version == version


@pytest.mark.slow
async def test_an_actor_that_hangs_is_replaced_though_nobody_asks_it_for_anything(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.fleet_watch.PING_EVERY_S", 0.5)
    monkeypatch.setattr("actors.fleet_worker.PING_S", 1.0)
    worker = parts.fleet.workers[0]
    pid, num_restarts = worker.pid, worker.num_restarts
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 120
    while worker.num_restarts == num_restarts or worker.state is not WorkerState.HEALTHY:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)
    assert worker.pid != pid
    died = [fields for kind, fields in parts.events if kind == "worker_died"]
    assert died[-1]["cause"] == "gave no answer to 3 pings"
    await rollout(parts, request("after it hung"))


@pytest.mark.parametrize("is_ready", [True, False])
async def test_a_lost_actor_is_replaced_by_the_one_that_stands_by(
    parts: Parts, record_property: Callable[[str, float], None], is_ready: bool
) -> None:
    """Also while it is being prepared, as nobody else serves; to a controller that comes later it
    then stands by no more. Its engine comes from the fork server, and samples the same bits.
    """
    worker, actors = parts.fleet.workers[0], parts.fleet.actors
    asked = RolloutRequest("lost", TASK, 4, Sampling(24, 1.0, [], 3))
    before = await rollout(parts, asked)
    actors.end()
    actors.stand_by()
    standby, prepared = actors.standby, actors.prepared
    assert prepared is not None
    if is_ready:
        await asyncio.wrap_future(prepared)
    started = time.monotonic()
    os.kill(worker.pid, signal.SIGKILL)
    after = await asyncio.wait_for(rollout(parts, asked), 120)
    record_property("standby_s", time.monotonic() - started)
    assert worker.handle is standby
    assert worker.state is WorkerState.HEALTHY
    await asyncio.wait_for(asyncio.wrap_future(prepared), 5)
    assert not await standby.stands_by.remote()
    assert actors.standby not in (None, standby), "another one follows"
    for left, right in zip(before.trajectories, after.trajectories, strict=True):
        assert left.token_ids.tolist() == right.token_ids.tolist()
    assert child(worker, "forkserver").children(), "the engine is a copy of it"


async def test_a_sync_in_which_every_worker_dies_waits_for_a_replacement(
    parts: Parts, record_property: Callable[[str, float], None]
) -> None:
    """One that is stopped first: the weights are on their way to it when it dies."""
    worker = parts.fleet.workers[0]
    pid, handle, version = worker.pid, worker.handle, worker.policy_version + 1
    await move_weights(parts, 5)
    os.kill(pid, signal.SIGSTOP)
    syncing = asyncio.create_task(parts.sync.sync(version))
    await asyncio.sleep(2.0)
    assert worker.state is WorkerState.STALE, "it is to load them"
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    report = await asyncio.wait_for(syncing, 180)
    record_property("recovery_s", time.monotonic() - started)
    assert worker.handle is not handle
    assert (worker.state, worker.policy_version) == (WorkerState.HEALTHY, version)
    assert (report.policy_version, report.num_engines) == (version, 1)
    assert probe_error(await parts.sync.sync(version)) <= 1e-4


async def test_who_catches_up_is_not_measured_by_the_probes_of_the_next_sync(parts: Parts) -> None:
    worker = parts.fleet.workers[0]
    asked = RolloutRequest("probes", TASK, 4, Sampling(24, 1.0, [], 3))
    parts.sync.probes.choose([await rollout(parts, asked)])
    await parts.sync.catch_up(worker)
    assert worker.state is WorkerState.HEALTHY
    before = parts.sync.probes.sequences
    assert probe_error(await parts.sync.sync(worker.policy_version)) <= 1e-4
    assert parts.sync.probes.sequences is not before


async def test_the_learner_is_free_before_the_engines_hold_the_weights(parts: Parts) -> None:
    """And what it does meanwhile does not change what they get."""
    worker = parts.fleet.workers[0]
    version = worker.policy_version + 1
    await move_weights(parts, version)
    is_sent = asyncio.Event()
    syncing = asyncio.create_task(parts.sync.sync(version, is_sent))
    await asyncio.wait_for(is_sent.wait(), 60)
    assert not syncing.done()
    assert worker.policy_version == version - 1
    await move_weights(parts, version + 1)
    report = await asyncio.wait_for(syncing, 60)
    assert probe_error(report) <= 1e-4
    assert 0 < report.hold_s < report.total_s
    assert worker.policy_version == version


async def test_a_learner_lost_in_a_sync_leaves_the_probes_of_the_weights_that_are_published(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(path: Path) -> None:
        raise LearnerLostError("learn", f"in the midst of {path}")

    worker = parts.fleet.workers[0]
    version = worker.policy_version
    await parts.sync.sync(version)
    before = parts.sync.probes.sequences
    await move_weights(parts, version + 1)
    parts.sync.probes.choose([await rollout(parts, request("of the lost sync"))])
    with monkeypatch.context() as patch:
        patch.setattr(parts.learner, "export_weights", lost)
        with pytest.raises(LearnerLostError):
            await parts.sync.sync(version + 1)
    assert parts.sync.probes.sequences is before
    await parts.sync.catch_up(worker)
    assert (worker.state, worker.policy_version) == (WorkerState.HEALTHY, version)


async def test_the_probe_catches_a_stale_output_head(parts: Parts) -> None:
    """Without the repair vLLM keeps the old prepacked head on CPU: the engine must not serve, even
    where a step has moved weights by no more than Adam's at a learning rate of 1e-4.
    """
    worker = parts.fleet.workers[0]
    await worker.handle.__ray_call__.remote(break_head)
    await move_weights(parts, 12, scale=1e-4)
    with pytest.raises(StageError, match="no rollout engine holds policy version 12"):
        await parts.sync.sync(12)
    assert worker.state is WorkerState.QUARANTINED
    [(_, fields)] = [event for event in parts.events if event[0] == "engine_quarantined"]
    assert fields["probe_error"] > fields["bound"]
