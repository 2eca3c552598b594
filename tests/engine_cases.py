"""A learner, engines and their weight sync as a run has them, for tests that start them once a
module, and what such tests ask of them.

Invariant: all of it is real (FSDP2, vLLM, Ray, Redis), and stopped when the block ends.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray import cloudpickle

from actors.fleet import RolloutFleet
from actors.fleet_worker import Worker
from actors.placement import Placement
from actors.producer import Producer
from actors.reward_pool import RewardPool
from actors.reward_set import RewardHome
from actors.rollout import RolloutRequest, Sampling
from actors.stages import Stages
from actors.weight_sync import SyncReport, WeightSync
from cluster import wire
from cluster.config import Config, VerifierConfig
from cluster.redis_client import connect
from cluster.replay_buffer import ReplayBuffer
from cluster.reward_state import RubricVersion
from cluster.run_dir import RunDir
from cluster.types import Message, Task, TrajectoryGroup
from learners.group import LearnerGroup
from rewards.rubric import Rubric

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors need not import it
TASK = Task(task_id="t", taskset="demo", messages=[Message(role="user", content="1 + 2 =")])


@dataclass(frozen=True)
class Parts:
    """What is started; `events` are those of fleet and sync, as (kind, fields)."""

    learner: LearnerGroup
    fleet: RolloutFleet
    sync: WeightSync
    events: list[tuple[str, dict[str, Any]]]


@asynccontextmanager
async def running_parts(
    config: Config,
    name: str,
    policy_dir: Path,
    redis_url: str,
    run_dir: Path,
    prompts: list[list[int]],
) -> AsyncIterator[Parts]:
    """Engines probe `prompts` until groups are there to be chosen from."""
    placement = Placement.of(config)
    events: list[tuple[str, dict[str, Any]]] = []

    def on_event(kind: str, **fields: Any) -> None:
        events.append((kind, fields))

    fleet = RolloutFleet(name, placement, policy_dir, str(run_dir), on_event)
    fleet._max_groups = 100  # engines are crowded here more than a run would
    learner, _ = await asyncio.gather(
        LearnerGroup.start(
            run_id=name, config=config, policy_dir=policy_dir, buffer_url=redis_url,
            run_dir=str(run_dir), actor_options=placement.learner_options(),
        ),
        fleet.start(),
    )  # fmt: skip
    sync = WeightSync(
        config.sync,
        learner,
        fleet,
        run_dir / "weights",
        on_event,
        context_length=config.policy.context_length,
        prompts=prompts,
    )
    try:
        yield Parts(learner, fleet, sync, events)
    finally:
        await fleet.stop()
        learner.shutdown()


def request(group_id: str, max_new_tokens: int = 8, seed: int = 1) -> RolloutRequest:
    return RolloutRequest(group_id, TASK, 4, Sampling(max_new_tokens, 1.0, [1], seed))


async def rollout(parts: Parts, asked: RolloutRequest) -> TrajectoryGroup:
    return wire.decode(await (await parts.fleet.rollout(asked)), TrajectoryGroup)


def probe_error(report: SyncReport) -> float:
    """Of a sync in which an engine was probed."""
    assert report.probe_error is not None
    return report.probe_error


def child(worker: Worker, word: str) -> psutil.Process:
    """The process below the actor of `worker` with `word` in its command line."""
    children = psutil.Process(worker.pid).children(recursive=True)
    [found] = [each for each in children if word in " ".join(each.cmdline())]
    return found


async def move_weights(parts: Parts, seed: int, scale: float = 0.05) -> None:
    """Change the learner's weights for real, by noise of `scale`."""
    for rank in parts.learner.ranks:
        await rank.__ray_call__.remote(_perturb, seed, scale)


def _perturb(rank: Any, seed: int, scale: float) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rank._learner._policy.parameters():
            local = parameter.to_local()
            local.add_(torch.randn(local.shape, generator=generator) * scale)


@asynccontextmanager
async def producer(parts: Parts, config: Config, url: str, path: Path, level: int):
    """Producer and buffer of a run whose verifier passes hints of `level`."""
    verifiers = {
        "right": VerifierConfig(use="tests.hint_rewards:PassesAtLevel", settings={"level": level})
    }
    rubric = Rubric(verifiers)
    version = RubricVersion(
        ordinal=1, hash=rubric.version, signals=rubric.versions, created_at=0.0,
        verifiers={name: v.model_dump() for name, v in verifiers.items()},
    )  # fmt: skip
    await rubric.close()
    run = RunDir.create(path, "sync-test", "", exist_ok=True)
    home = RewardHome(run, Placement.of(config), url, lambda kind, **fields: None)
    pool = RewardPool(home)
    pool.cut_over(await pool.prepare(version, []))
    buffer = ReplayBuffer(
        connect(url), "sync-test", capacity_groups=64, lease_s=60.0, max_deliveries=3
    )
    yield (
        Producer(config.rollout.program, parts.fleet, pool, Stages(["rollout", "score"])),
        buffer,
    )
    pool.stop()


def break_head(worker: Any) -> None:
    """Sent to a rollout worker: from now on its engine leaves out the repair of its output head."""
    engine = worker._engine._engine
    loop = engine.output_handler.get_loop()
    worker.fault = asyncio.run_coroutine_threadsafe(engine.collective_rpc(_no_repair), loop)


def _no_repair(_worker: Any) -> None:
    from actors import weight_transfer

    weight_transfer.refresh_prepacked_head = lambda model: None
