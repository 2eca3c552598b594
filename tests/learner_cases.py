"""A tiny policy, groups of odd sizes and learners on them, for the tests of the learner.

Invariant: all is drawn from the step number, so every process and test sees the same groups.
"""

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from cluster.checkpoint_store import CheckpointStore
from cluster.config import Config
from cluster.config_file import dump, parse
from cluster.run_dir import RunDir
from cluster.types import (
    GroupHeader,
    RunState,
    StepResult,
    Task,
    Trajectory,
    TrajectoryGroup,
    TrajectoryStatus,
    VersionSpan,
)
from learners.learner import Learner
from learners.packing import plan_groups
from learners.policy_dir import prepare

CONTEXT_LENGTH = 36
RANKS_S = 240  # of processes that load torch on busy cores, and then train
VOCAB = 259  # odd sizes: shards of unequal length


def make_config(**learner: Any) -> Config:
    return parse(
        {
            "run": {"steps": 10},
            "policy": {
                "type": "tiny",
                "hidden_size": 33,
                "num_layers": 2,
                "num_heads": 1,
                "vocab_size": VOCAB,
                "context_length": CONTEXT_LENGTH,
            },
            "tasks": {"train": {"use": "unused"}},
            "rollout": {"max_new_tokens": 16},
            "rewards": {"verifiers": {"correct": {"use": "unused"}}},
            "learner": {"lr": 3e-3, "microbatch_tokens": CONTEXT_LENGTH, **learner},
            "resources": {"accelerator": "cpu"},
        },
        "test",
    )


def make_policy(root: Path) -> Path:
    """The directory of the tiny policy under `root`."""
    return prepare(make_config().policy, ["1 plus 2 is 3"] * 20, root / "cache", root / "tiny", 1)


def _trajectory(
    rng: np.random.Generator, group_id: str, index: int, num_tokens: int, reward: float | None
) -> Trajectory:
    num_context = int(rng.integers(2, 8))
    length = num_tokens - num_context
    loss_mask = rng.random(length) < 0.8
    loss_mask[0] = True
    is_guided = index % 2 == 1
    return Trajectory(
        trajectory_id=f"{group_id}-{index}",
        group_id=group_id,
        task_id=group_id,
        context_tokens=rng.integers(0, VOCAB, num_context + 3 * is_guided).astype(np.int32),
        train_context_tokens=(
            rng.integers(0, VOCAB, num_context).astype(np.int32) if is_guided else None
        ),
        token_ids=rng.integers(0, VOCAB, length).astype(np.int32),
        loss_mask=loss_mask,
        rollout_logprobs=rng.normal(-5.5, 0.3, length).astype(np.float32),
        version_spans=[VersionSpan(0, 0, length)],
        status=TrajectoryStatus.COMPLETED,
        temperature=float(rng.choice([0.7, 1.0])),
        reward=reward,
    )


def make_groups(step: int) -> list[TrajectoryGroup]:
    """Three groups, one reward abstained; of two ranks, the second group leaves one idle once."""
    rng = np.random.default_rng(step)
    shapes: list[list[tuple[int, float | None]]] = [
        [(20, 1.0), (13, 0.0), (17, 0.0), (9, None), (31, 1.0)],
        [(30, 0.0), (20, 1.0), (18, 0.5)],
        [(11, 1.0), (36, 0.0)],
    ]
    return [
        TrajectoryGroup(
            group_id=f"g{step}-{k}",
            task=Task(task_id=f"g{step}-{k}", taskset="test", messages=[]),
            trajectories=[
                _trajectory(rng, f"g{step}-{k}", i, num_tokens, reward)
                for i, (num_tokens, reward) in enumerate(shape)
            ],
        )
        for k, shape in enumerate(shapes)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(num_ranks: int, target: Callable[..., None], *args: Any) -> None:
    """`target(rank, *args)` in a process of its own for each rank; all must end well."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=target, args=(rank, *args)) for rank in range(num_ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(RANKS_S)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * num_ranks


@contextmanager
def open_learner(
    config: Config, policy_dir: Path, rank: int = 0, world_size: int = 1, port: int | None = None
) -> Iterator[Learner]:
    learner = Learner(
        config=config,
        policy_dir=policy_dir,
        rank=rank,
        world_size=world_size,
        master=f"127.0.0.1:{port or free_port()}",
        num_threads=1,
    )
    try:
        yield learner
    finally:
        learner.close()


def train_step(
    learner: Learner,
    step: int,
    world_size: int = 1,
    budget: int = CONTEXT_LENGTH,
    minibatches: int = 1,
) -> StepResult:
    """One step whose groups arrive in two portions."""
    groups = make_groups(step)
    for first, portion in ((0, groups[:1]), (1, groups[1:])):
        headers = [GroupHeader.of(group) for group in portion]
        plan = plan_groups(headers, world_size, budget, minibatches, first)
        learner.forward_backward(portion, plan)
    return learner.optim_step()


def make_run_with_checkpoints(root: Path, **learner: Any) -> RunDir:
    """A run with checkpoints of versions 1 and 2, and the learner's own exports of them beside it,
    `version_<n>.safetensors`.
    """
    config = make_config(**learner)
    run = RunDir.create(root, "demo", dump(config), exist_ok=False)
    prepare(config.policy, ["1 plus 2 is 3"] * 20, root / "cache", run.policy, 1)
    store = CheckpointStore(run.checkpoints, keep=5)
    with open_learner(config, run.policy) as learner:
        for step in (1, 2):
            train_step(learner, step)
            learner.save(store.begin(step))
            state = RunState(run_id="demo", step=step, policy_version=step, config_hash="")
            store.commit(step, state)
            learner.export_weights(root / f"version_{step}.safetensors")
    return run


def assert_same_weights(one: Path, other: Path, atol: float) -> float:
    """The largest difference, at most `atol`."""
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=atol)
    return max((left[name] - right[name]).abs().max().item() for name in left)
