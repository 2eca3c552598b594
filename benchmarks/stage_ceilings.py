"""How fast rollout and learner are alone: each in a process of its own, with the threads that a run
gives it, while the other stands still.

`generate` keeps one rollout worker as full as a run does and keeps its groups; `learn` trains a
learner on these. Neither waits for a queue, an actor or a weight sync, so the slower of the two
bounds what a run can reach. By hand: `python -m benchmarks.stage_ceilings generate|learn FOLDER
CONFIG [key=value ...]` with a pretrained policy.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import msgspec

from actors.curriculum import Curriculum
from actors.placement import Placement
from actors.rollout import Sampling
from actors.rollout_worker import RolloutWorker
from benchmarks.proofs import ROOT, run_timed
from benchmarks.trl_peer import ends_even
from cluster import config_file, wire
from cluster.config import Config, PretrainedPolicy
from cluster.errors import StageError
from cluster.types import GroupHeader, TrajectoryGroup
from rewards.tasksets import load_tasks

NUM_STEPS = 12  # of generation, after the first groups: many ends come in bursts
TIMEOUT_S = 900.0
GROUPS = "groups.msgpack"


class Ceilings(NamedTuple):
    """Seconds of one step's samples."""

    generate_s: float
    learn_s: float

    @property
    def bound_s(self) -> float:
        """Of a step in which both run side by side and nothing else takes time."""
        return max(self)


def measure(folder: Path, config: Path, changes: Sequence[str]) -> Ceilings:
    """Both stages, one after the other."""
    seconds: list[float] = []
    for stage in ("generate", "learn"):
        command = [sys.executable, "-m", "benchmarks.stage_ceilings", stage]
        run = run_timed([*command, folder, config, *changes], ROOT, TIMEOUT_S)
        lines = [line for line in run.output.splitlines() if line.startswith('{"step_s"')]
        if run.code != 0 or not lines:
            raise StageError(stage, f"exit code {run.code}: {run.output[-2000:]}")
        seconds.append(float(json.loads(lines[-1])["step_s"]))
    return Ceilings(*seconds)


async def generate(config: Config, policy_dir: Path, folder: Path) -> float:
    """Seconds per step of a worker with as many groups under way as the run's slots allow."""
    from learners.tokenizer import load_tokenizer

    stop = load_tokenizer(policy_dir).eos_token_id
    assert isinstance(stop, int)
    sampling = Sampling(config.rollout.max_new_tokens, config.rollout.temperature, [stop])
    tasks = load_tasks(config.tasks, "train")
    curriculum = Curriculum(tasks, config.run.seed, sampling, config.rollout.group_size)
    worker = RolloutWorker(config.rollout.program, str(folder))
    await worker.start(0, Placement.of(config).engine_settings(policy_dir))
    num_first, per_step = config.max_groups_in_flight, config.rollout.groups_per_step
    groups: list[bytes] = []
    ends: list[float] = []
    try:
        running = {asyncio.create_task(worker.rollout(curriculum.next())) for _ in range(num_first)}
        while len(groups) < num_first + NUM_STEPS * per_step:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            ends += [time.monotonic()] * len(done)
            groups += [task.result() for task in done]
            running |= {asyncio.create_task(worker.rollout(curriculum.next())) for _ in done}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    finally:
        await worker.stop()
    (folder / GROUPS).write_bytes(msgspec.msgpack.encode(groups))
    return (ends[-1] - ends[num_first - 1]) / (len(ends) - num_first) * per_step


def learn(config: Config, policy_dir: Path, folder: Path) -> float:
    """Mean seconds of a step on the groups that `generate` kept; the first step warms up."""
    from learners.learner import Learner
    from learners.packing import plan_groups

    kept = msgspec.msgpack.decode((folder / GROUPS).read_bytes(), type=list[bytes])
    groups = [_rewarded(wire.decode(data, TrajectoryGroup)) for data in kept]
    learner = Learner(config=config, policy_dir=policy_dir, rank=0, world_size=1, num_threads=1)
    size = config.rollout.groups_per_step
    seconds: list[float] = []
    for first in range(0, len(groups) - size + 1, size):
        part = groups[first : first + size]
        started = time.perf_counter()
        headers = [GroupHeader.of(group) for group in part]
        plan = plan_groups(headers, 1, config.learner.microbatch_tokens)
        learner.forward_backward(part, plan)
        learner.optim_step()
        seconds.append(time.perf_counter() - started)
    learner.close()
    return fmean(seconds[1:])


def _rewarded(group: TrajectoryGroup) -> TrajectoryGroup:
    scored = [
        msgspec.structs.replace(trajectory, reward=ends_even("", trajectory.text, ""))
        for trajectory in group.trajectories
    ]
    return msgspec.structs.replace(group, trajectories=scored)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 3 or arguments[0] not in ("generate", "learn"):
        print(__doc__, file=sys.stderr)
        return 2
    stage, place, source, *changes = arguments
    config = config_file.load(source, changes)
    if not isinstance(config.policy, PretrainedPolicy):
        print("policy.type must be pretrained", file=sys.stderr)
        return 2
    placement, policy_dir = Placement.of(config), Path(config.policy.model)
    # Before torch and vllm are imported: they read the threads they may use only once.
    options = placement.rollout_options() if stage == "generate" else placement.learner_options()
    os.environ.update(options["runtime_env"]["env_vars"])
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    if stage == "generate":
        step_s = asyncio.run(generate(config, policy_dir, folder))
    else:
        step_s = learn(config, policy_dir, folder)
    print(json.dumps({"step_s": step_s, "stage": stage}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
