"""Pools of verifiers as the config states them: bounds, shares, runtime environments, versions."""

from typing import Any

import pytest

from actors.placement import Placement
from actors.verifier_pools import longest_call_s, worker_options
from cluster import config_file
from cluster.config import Config, VerifierConfig
from cluster.errors import ConfigError
from rewards.rubric import Rubric
from rewards.versions import reward_version


def config_of(**pool: Any) -> Config:
    values = {
        "policy": {"type": "tiny"},
        "tasks": {"train": {"use": "file"}},
        "rewards": {"verifiers": {"m": {"use": "math", "pool": pool}}},
        "resources": {"accelerator": "cpu"},
    }
    return config_file.parse(values, "test")


def verifier(**pool: Any) -> VerifierConfig:
    return config_of(**pool).rewards.verifiers["m"]


@pytest.mark.parametrize(
    ("workers", "words"), [("4..2", "bounds must be in order"), ("0", "pattern"), ("x", "pattern")]
)
def test_impossible_bounds_are_refused(workers: str, words: str):
    with pytest.raises(ConfigError, match=words):
        config_of(workers=workers)


@pytest.mark.parametrize(("workers", "bounds"), [(2, (2, 2)), ("1..4", (1, 4))])
def test_workers_are_a_number_or_bounds(workers: int | str, bounds: tuple[int, int]):
    pool = verifier(workers=workers).pool
    assert pool is not None
    assert pool.bounds == bounds


def test_a_version_changes_with_the_runtime_environment_and_not_with_the_size():
    def version(**pool: Any) -> str:
        return reward_version("m", verifier(**pool))

    assert version(workers=1) == version(workers="2..4")
    assert version(workers=1) != version(runtime_env={"pip": ["sympy==1.13"]})


def test_a_change_of_size_is_another_rubric_so_that_a_swap_can_make_it():
    sizes = [Rubric({"m": verifier(workers=n)}).version for n in (1, 2)]
    assert sizes[0] != sizes[1]


def test_workers_get_their_shares_and_the_environment_over_the_runs():
    config = config_of(
        workers="1..3", cpus=1, gpus=0.5, memory_gib=2, max_in_flight=4,
        runtime_env={"pip": ["x"], "env_vars": {"A": "b"}},
    )  # fmt: skip
    placement, pool = Placement.of(config), config.rewards.verifiers["m"].pool
    assert pool is not None
    options = worker_options(placement, pool)
    assert (options["num_cpus"], options["num_gpus"], options["memory"]) == (1, 0.5, 2 << 30)
    assert options["runtime_env"]["pip"] == ["x"]
    assert options["runtime_env"]["env_vars"]["A"] == "b"
    assert "RAY_USAGE_STATS_ENABLED" in options["runtime_env"]["env_vars"]
    alone = Placement.of(config_of())
    assert placement.total_cpus == alone.total_cpus + 3
    assert placement.total_gpus == alone.total_gpus + 2  # three halves


def test_a_call_may_take_as_long_as_queue_and_retries():
    config = config_of()
    assert longest_call_s(VerifierConfig(use="math", timeout_s=5.0), config) == 5.0
    assert longest_call_s(verifier(), config) > 3 * config.rollout.timeout_s


def test_a_golden_pair_of_another_form_names_the_knob():
    wrong = VerifierConfig(use="math", golden=[{"completion": "x", "points": 1}])
    with pytest.raises(ConfigError, match=r"rewards\.verifiers\.m\.golden"):
        Rubric({"m": wrong})
