"""From a config to running parts: tasks, policy directory, learner group, engines, reward workers.

Invariant: when `bring_up` returns, every part is alive and idle; when it raises, the error names
the stage. The slow parts start side by side: engines load while the learner warms the policy up. A
run that goes on has its policy, so that only its rewards wait for the tasks. Called by the
controller.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any

import ray

from actors import devices, prepared_policy, programs
from actors.capacity import away_from_gpus, cluster_nodes
from actors.curriculum import Curriculum
from actors.fleet import RolloutFleet
from actors.gang import Gang
from actors.observer import Observer
from actors.placement import Placement
from actors.reward_admin import RewardAdmin
from actors.reward_buffered import BufferedGroups
from actors.reward_pool import RewardPool
from actors.reward_set import RewardHome
from actors.rollout import Sampling
from actors.scaling import FleetScaling
from actors.turns import Turns
from actors.weight_sync import WeightSync
from cluster.config import Config
from cluster.errors import ActorLostError, ConfigError, LearnerLostError, StartLostError
from cluster.run_dir import RunDir
from cluster.status import ActorStatus
from cluster.types import Task
from learners.group import LearnerGroup
from rewards.tasksets import load_splits

ENGINE_START_S = 45.0  # on two CPU cores; shown to the user as an estimate


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    placement: Placement
    learner: LearnerGroup
    fleet: RolloutFleet
    rewards: RewardPool
    admin: RewardAdmin
    buffered: BufferedGroups
    sync: WeightSync
    curriculum: Curriculum
    sampling: Sampling
    eval_tasks: list[Task]
    warm_start: dict[str, float]

    def statuses(self, policy_version: int) -> list[ActorStatus]:
        """Of all actors; the learner holds `policy_version`."""
        learners = [
            ActorStatus(
                name=f"learner/{rank}", state="healthy", policy_version=policy_version, pid=pid
            )
            for rank, pid in enumerate(self.learner.pids)
        ]
        return self.fleet.statuses() + self.rewards.statuses() + learners

    async def stop(self) -> None:
        """End engines and actors; safe to call once at any time."""
        await self.admin.stop()
        self.rewards.stop()
        await self.fleet.stop()
        self.learner.shutdown()
        self.sync.close()
        _release(self.placement)


async def bring_up(
    config: Config,
    run: RunDir,
    buffer_url: str,
    has_checkpoint: bool,
    observer: Observer,
) -> Parts:
    """Start all parts of `run`. The policy is warm-started unless a checkpoint holds it trained.
    Raises `StartLostError` when a part is lost meanwhile that the checkpoint can do without.
    """
    placement = await _reserve(config, run, observer)
    try:
        return await _start_parts(config, run, buffer_url, has_checkpoint, observer, placement)
    except BaseException as error:
        _release(placement)
        if has_checkpoint and isinstance(error, LearnerLostError | ActorLostError):
            raise StartLostError(error.stage, error.reason) from error
        raise


async def _reserve(config: Config, run: RunDir, observer: Observer) -> Placement:
    """Places for all actors of the run, or an error that says what is missing."""
    placement = Placement.of(config, ray.cluster_resources().get("GPU", 0.0))
    if problems := devices.problems(placement):
        raise ConfigError("\n".join(problems))

    told: set[str] = set()

    def report(wanted: str) -> None:
        observer.phase("starting", f"waiting for {wanted}", config.resources.start_timeout_s)
        if wanted not in told:
            observer.event("waiting_for_resources", wanted=wanted)
            told.add(wanted)

    observer.phase("starting", "reserving places on the cluster", 1.0)
    gang = await Gang.reserve(
        run.buffer_id, placement.requests(), config.resources.start_timeout_s, report
    )
    selector = away_from_gpus(cluster_nodes()) if placement.is_gpu else {}
    placed = {role: len(set(nodes)) for role, nodes in gang.nodes().items()}
    observer.event("resources_reserved", **{f"{role}_nodes": n for role, n in placed.items()})
    return replace(placement, gang=gang, reward_selector=selector)


def _release(placement: Placement) -> None:
    if placement.gang is not None:
        placement.gang.release()


async def _start_parts(
    config: Config,
    run: RunDir,
    buffer_url: str,
    has_checkpoint: bool,
    observer: Observer,
    placement: Placement,
) -> Parts:
    reading = asyncio.create_task(asyncio.to_thread(load_splits, config.tasks))
    policy = prepared_policy.known(run) if has_checkpoint else None
    if policy is None:
        observer.phase("starting", "reading tasks", 5.0)
        train_tasks, _ = await reading
        observer.phase("starting", "preparing the policy", 10.0)
        policy = await prepared_policy.make(config, train_tasks, run, has_checkpoint)
    num_workers = config.rollout.workers
    loading = f"loading {num_workers} vLLM engine(s) and the learner"
    observer.phase("starting", loading, ENGINE_START_S)
    fleet = RolloutFleet(run.buffer_id, placement, policy.directory, str(run.path), observer.event)
    rewards = RewardPool(
        RewardHome(run, placement, buffer_url, observer.event, str(policy.directory))
    )
    buffered = await asyncio.to_thread(BufferedGroups.of, config, run.buffer_id, buffer_url)
    admin = await asyncio.to_thread(RewardAdmin, rewards, buffered)
    scaling = FleetScaling(run.buffer_id, fleet, placement, admin.door, observer.event)
    admin.door.serve("fleet", scaling.carry_out, refusal="scale_refused")

    async def start_rewards() -> None:
        await admin.start((await reading)[0])

    async def load_learner() -> LearnerGroup:
        return await LearnerGroup.start(
            run_id=run.buffer_id,
            config=config,
            policy_dir=policy.directory,
            buffer_url=buffer_url,
            run_dir=str(run.path),
            actor_options=placement.learner_options(),
        )

    async def start_learner() -> tuple[LearnerGroup, dict[str, float]]:
        try:
            learner = await load_learner()
        except LearnerLostError as error:
            if not has_checkpoint:
                raise
            observer.event("worker_died", actor="learner", cause=error.reason[:300])
            learner = await load_learner()
        metrics: dict[str, float] = {}
        if policy.examples:
            observer.phase("warm_start", "supervised, while engines load", 0.0)
            started = time.monotonic()
            async for progress in learner.warm_start(policy.examples):
                expected_s = (time.monotonic() - started) * progress.steps / progress.step
                observer.progress(
                    f"step {progress.step} of {progress.steps}, loss {progress.loss:.3f}",
                    max(expected_s, ENGINE_START_S),
                )
                metrics = {"warm_start/loss": progress.loss}
            observer.phase("starting", "waiting for the engines", 0.0)
        return learner, metrics

    learning = asyncio.create_task(start_learner())
    begun: list[asyncio.Task[Any]] = [
        learning, asyncio.create_task(fleet.start()), asyncio.create_task(start_rewards()),
    ]  # fmt: skip
    try:
        await asyncio.gather(*begun)
    except BaseException:
        for part in begun:  # or it takes the end of its actors for a loss
            part.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
        raise
    learner, warm_metrics = learning.result()
    train_tasks, eval_tasks = reading.result()
    sampling = Sampling(
        config.rollout.max_new_tokens, config.rollout.temperature, [policy.stop_token_id]
    )
    if placement.is_alternating:
        Turns(learner, fleet, config.rollout.timeout_s, config.resources.start_timeout_s)
    fleet.actors.stand_by()
    return Parts(
        placement=placement,
        learner=learner,
        fleet=fleet,
        rewards=rewards,
        admin=admin,
        buffered=buffered,
        sync=WeightSync(
            config.sync,
            learner,
            fleet,
            run.weights,
            observer.event,
            context_length=config.policy.context_length,
            prompts=policy.prompts,
        ),
        curriculum=Curriculum(
            train_tasks,
            config.run.seed,
            sampling,
            config.rollout.group_size,
            programs.prefix_length(config),
            # On GPUs a batch changes the numbers, and seeded requests are drawn for one by one.
            is_seeded=not placement.is_gpu,
        ),
        sampling=sampling,
        eval_tasks=eval_tasks,
        warm_start=warm_metrics,
    )
