"""One, two and four ranks give the same update, with odd batch sizes and idle ranks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.config import Config, LossConfig, ObjectiveSection
from cluster.types import GroupHeader, StepResult
from learners.learner import Learner
from learners.packing import plan_groups
from tests.learner_cases import (
    CONTEXT_LENGTH,
    assert_same_weights,
    make_config,
    make_groups,
    make_policy,
    open_learner,
    run_ranks,
)

NUM_STEPS = 2
SEVERAL = 4, 2  # numbers of ranks that are compared with a lone one


def _config() -> Config:
    """Two losses with different denominators, one of which needs a survey of the whole update."""
    losses = {
        "policy": LossConfig(use="policy_gradient"),
        "siren": LossConfig(use="siren", settings={"beta": 1.0}, weight=2.0),
    }
    return make_config(lr=3e-4).model_copy(update={"objective": ObjectiveSection(losses=losses)})


def _step(learner: Learner, step: int, world_size: int) -> StepResult:
    """Groups of five, three and two sequences arrive one by one: the last leaves ranks idle."""
    for number, group in enumerate(make_groups(step)):
        headers = [GroupHeader.of(group)]
        plan = plan_groups(headers, world_size, CONTEXT_LENGTH, num_before=number)
        learner.forward_backward([group], plan)
    return learner.optim_step()


def _run(policy_dir: Path, out: Path, rank: int, world_size: int) -> None:
    meeting = out / f"{world_size}_ranks"
    with open_learner(_config(), policy_dir, rank, world_size, meeting) as learner:
        for step in range(NUM_STEPS):
            result = _step(learner, step, world_size)
            learner.export_weights(out / f"{world_size}_{step}.safetensors")
            (out / f"{world_size}_{step}_{rank}.json").write_text(json.dumps(result.metrics))


def _run_rank(rank: int, policy_dir: Path, out: Path) -> None:
    for world_size in SEVERAL:
        if rank < world_size:
            _run(policy_dir, out, rank, world_size)


def test_one_two_and_four_ranks_give_the_same_update(
    tmp_path: Path, record_property: Callable[[str, float], None]
) -> None:
    policy_dir = make_policy(tmp_path / "policy")
    last = [GroupHeader.of(group) for group in make_groups(0)][-1:]
    shares = plan_groups(last, 4, CONTEXT_LENGTH).microbatches
    assert sum(not any(share) for share in shares) == 2, "two of four ranks have an empty pack"

    run_ranks(4, _run_rank, policy_dir, tmp_path)
    _run(policy_dir, tmp_path, 0, 1)

    for step in range(NUM_STEPS):
        ours = json.loads((tmp_path / f"1_{step}_0.json").read_text())
        assert ours["grad/norm"] > 0
        for world_size in SEVERAL:
            difference = assert_same_weights(
                tmp_path / f"1_{step}.safetensors",
                tmp_path / f"{world_size}_{step}.safetensors",
                1e-5,
            )
            record_property("max_abs_weight_difference", difference)
            for rank in range(world_size):
                theirs = json.loads((tmp_path / f"{world_size}_{step}_{rank}.json").read_text())
                for key in ours.keys() - {"learner/tokens_per_s", "learner/compute_fraction"}:
                    assert theirs[key] == pytest.approx(ours[key], abs=2e-5, rel=2e-5), key
