"""A tiny policy and learners on the groups of `tests.group_cases`, for the tests of the learner."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from cluster.checkpoint_store import CheckpointStore
from cluster.config import Config, CriticSection, LossConfig, Plugin
from cluster.config_file import dump, parse
from cluster.run_dir import RunDir
from cluster.run_state import RunState
from cluster.types import GroupHeader, StepResult
from learners.learner import Learner
from learners.packing import plan_groups
from learners.policy_dir import prepare
from tests.group_cases import VOCAB, make_groups

CONTEXT_LENGTH = 36
RANKS_S = 240  # of processes that load torch on busy cores, and then train


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


def make_critic_config(
    critic: dict[str, Any],
    credit: dict[str, Any] | None = None,
    losses: dict[str, LossConfig] | None = None,
    **learner: Any,
) -> Config:
    """With the credit `gae` of settings `credit`."""
    config = make_config(**learner)
    objective = {
        "credit": Plugin(use="gae", settings=credit or {}),
        "losses": losses or config.objective.losses,
    }
    return config.model_copy(
        update={
            "objective": config.objective.model_copy(update=objective),
            "critic": CriticSection(**critic),
        }
    )


def make_policy(root: Path) -> Path:
    """The directory of the tiny policy under `root`."""
    return prepare(make_config().policy, ["1 plus 2 is 3"] * 20, root / "cache", root / "tiny", 1)


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
    config: Config,
    policy_dir: Path,
    rank: int = 0,
    world_size: int = 1,
    meeting: Path | None = None,
) -> Iterator[Learner]:
    """Several ranks meet in the file `meeting`, new for each time."""
    learner = Learner(
        config=config,
        policy_dir=policy_dir,
        rank=rank,
        world_size=world_size,
        num_threads=1,
        store=None if meeting is None else FileStore(str(meeting), world_size),
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
