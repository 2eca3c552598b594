"""From a config to running parts: tasks, policy directory, learner group, engines, reward workers.

Invariant: when `bring_up` returns, every part is alive and idle; when it raises, the error names the stage. The
slow parts start side by side: engines load while the learner warms the policy up. Called by the controller.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray

from actors.curriculum import Curriculum
from actors.fleet import EventSink, RolloutFleet
from actors.placement import Placement
from actors.reward_pool import RewardPool
from actors.rollout import Sampling
from actors.stages import within
from actors.weight_sync import WeightSync
from cluster.config import Config
from cluster.errors import StageError
from cluster.run_dir import RunDir
from cluster.types import Task
from learners.group import LearnerGroup
from rewards.tasksets import load_tasks

CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hone"
ENGINE_START_S = 45.0  # on two CPU cores; shown to the user as an estimate
Phase = Callable[[str, str, float], None]  # phase, detail, expected seconds


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    learner: LearnerGroup
    fleet: RolloutFleet
    rewards: RewardPool
    sync: WeightSync
    curriculum: Curriculum
    sampling: Sampling
    eval_tasks: list[Task]
    warm_start: dict[str, float]

    async def stop(self) -> None:
        """End engines and actors; safe to call once at any time."""
        await self.fleet.stop()
        await self.learner.shutdown()
        self.sync.close()


async def bring_up(
    config: Config,
    run: RunDir,
    buffer_url: str,
    is_resumed: bool,
    on_event: EventSink,
    on_phase: Phase,
) -> Parts:
    """Start all parts of `run`. The policy is warm-started unless the run is resumed."""
    placement = Placement.of(config)
    on_phase("starting", "reading tasks", 5.0)
    train_tasks = await asyncio.to_thread(load_tasks, config.tasks, "train")
    eval_tasks = await asyncio.to_thread(load_tasks, config.tasks, "eval")
    on_phase("starting", "preparing the policy", 10.0)
    policy_dir, stop_ids = await _prepare(config, train_tasks, run, placement)
    sampling = Sampling(config.rollout.max_new_tokens, config.rollout.temperature, stop_ids)

    num_workers = config.rollout.workers
    on_phase("starting", f"loading {num_workers} vLLM engine(s) and the learner", ENGINE_START_S)
    fleet = RolloutFleet(run.name, placement, policy_dir, str(run.path), on_event)
    rewards = RewardPool(run.name, placement, buffer_url, str(run.path))

    async def start_learner() -> tuple[LearnerGroup, dict[str, float]]:
        learner = await LearnerGroup.start(
            run_id=run.name,
            config=config,
            policy_dir=policy_dir,
            buffer_url=buffer_url,
            actor_options=placement.learner_options(),
        )
        if config.warm_start is None or is_resumed:
            return learner, {}
        on_phase("warm_start", "supervised warm start, engines loading", ENGINE_START_S)
        examples = train_tasks[: config.warm_start.examples]
        return learner, await learner.warm_start(examples)

    (learner, warm_metrics), _, _ = await asyncio.gather(
        start_learner(), fleet.start(), rewards.start()
    )
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else run.path
    weights_dir = shared / f"hone-{run.name}-{os.getpid()}"
    return Parts(
        learner=learner,
        fleet=fleet,
        rewards=rewards,
        sync=WeightSync(config.sync, learner, fleet, weights_dir, on_event),
        curriculum=Curriculum(train_tasks, config.run.seed, sampling, config.rollout.group_size),
        sampling=sampling,
        eval_tasks=eval_tasks,
        warm_start=warm_metrics,
    )


async def _prepare(
    config: Config, tasks: list[Task], run: RunDir, placement: Placement
) -> tuple[Path, list[int]]:
    """The policy directory and the ids that end a completion, made in a process of its own."""
    options = placement.reward_options() | {"max_restarts": 0}
    prepare = ray.remote(_prepare_policy).options(
        num_cpus=0, runtime_env=options["runtime_env"], max_retries=0
    )
    return await within(
        prepare.remote(config, tasks, run.policy),
        stage="policy",
        what="the policy directory",
        deadline_s=config.resources.start_timeout_s,
        knob="resources.start_timeout_s",
    )


def _prepare_policy(config: Config, tasks: list[Task], out_dir: Path) -> tuple[Path, list[int]]:
    from learners.policy_dir import prepare
    from learners.tokenizer import load_tokenizer

    texts = [m.content for t in tasks for m in t.messages] + [t.solution or t.reference for t in tasks]
    policy_dir = prepare(config.policy, texts, CACHE_DIR, out_dir, config.run.seed)
    eos = load_tokenizer(policy_dir).eos_token_id
    if not isinstance(eos, int):
        raise StageError("policy", f"the tokenizer in {policy_dir} names no end-of-sequence token")
    return policy_dir, [eos]
