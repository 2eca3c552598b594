"""Evaluation without a run: engines of their own on a policy directory, scored in this process.

Invariant: nothing that was started here outlives `run`. Called by `hone eval`.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.evaluate import EvalResult, evaluate
from actors.fleet import RolloutFleet
from actors.fleet_worker import Worker, WorkerState
from actors.placement import Placement
from actors.reward_worker import GroupSummary, summarize
from actors.rollout import Sampling
from actors.train import ray_session
from cluster import wire
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.run_dir import RunDir
from cluster.types import Task, TrajectoryGroup
from rewards.rubric import Rubric

log = logging.getLogger(__name__)


def run(
    config: Config,
    policy_dir: Path,
    tasks: list[Task],
    *,
    scratch: RunDir,
    address: str,
    on_task: Callable[[], None],
) -> EvalResult:
    """Evaluate the Hugging Face directory `policy_dir` on `tasks`; logs go to `scratch`.

    Raises `ConfigError` for a directory without a usable tokenizer, `StageError` when an engine
    cannot be started.
    """
    from learners.tokenizer import load_tokenizer

    stop = load_tokenizer(policy_dir).eos_token_id
    if not isinstance(stop, int):
        raise ConfigError(f"{policy_dir}: its tokenizer names no end-of-sequence token")
    sampling = Sampling(config.rollout.max_new_tokens, config.eval.temperature, [stop])
    with ray_session(config, scratch, address):
        return asyncio.run(_evaluate(config, policy_dir, tasks, sampling, scratch, on_task))


async def _evaluate(
    config: Config,
    policy_dir: Path,
    tasks: list[Task],
    sampling: Sampling,
    scratch: RunDir,
    on_task: Callable[[], None],
) -> EvalResult:
    rubric = Rubric(config.rewards.verifiers, str(policy_dir))

    async def score(reference: Any) -> tuple[GroupSummary, bytes]:
        group = await rubric.score(wire.decode(await reference, TrajectoryGroup))
        return summarize(group, "evaluated"), wire.encode(group)

    def note(kind: str, **fields: object) -> None:
        log.info("%s %s", kind, fields)

    fleet = RolloutFleet(scratch.name, Placement.of(config), policy_dir, str(scratch.path), note)
    try:
        await fleet.start()
        await _serve_as_loaded(fleet)
        return await evaluate(
            fleet, score, tasks, config.eval, sampling, 0, config.max_groups_in_flight, on_task
        )
    finally:
        await fleet.stop()
        await rubric.close()


async def _serve_as_loaded(fleet: RolloutFleet) -> None:
    """Let engines serve the weights that they loaded, as version 0: no learner will follow."""

    async def serve(worker: Worker) -> None:
        worker.state, worker.policy_version = WorkerState.HEALTHY, 0
        await fleet.notify()

    fleet.catch_up = serve
    for worker in fleet.serving:
        await serve(worker)
