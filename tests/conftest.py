"""Fixtures shared by all kinds of tests: a tiny config, a real Redis, a real local Ray."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.placement import QUIET_ENV
from cluster import config_file, ray_token
from cluster.config import Config

os.environ.update(QUIET_ENV)  # before torch reads it

# Ray reads its token once in a process: one for all tests, and none of the user's.
os.environ[ray_token.MODE] = "token"
os.environ[ray_token.TOKEN] = secrets.token_hex(32)

TINY = {
    "policy": {"type": "tiny", "hidden_size": 64, "num_layers": 2, "num_heads": 2,
               "context_length": 128},
    "tasks": {
        "train": {
            "use": "reasoning_gym",
            "settings": {
                "dataset": "chain_sum",
                "size": 64,
                "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            },
        }
    },
    "rollout": {"group_size": 4, "groups_per_step": 4, "max_new_tokens": 8, "max_policy_age": 0,
                "kv_cache_gib": 0.25},
    "rewards": {"verifiers": {"correct": {"use": "task"}}},
    "buffer": {"capacity_groups": 64},
    "learner": {"microbatch_tokens": 512, "lr": 1e-3},
    "resources": {"accelerator": "cpu"},
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """A whole config for a policy of some 60 thousand parameters."""
    return config_file.parse(TINY, "tests/conftest.py")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from cluster.embedded_redis import EmbeddedRedis

    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture(scope="session")
def tiny_policy_dir(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from learners.policy_dir import prepare

    root = tmp_path_factory.mktemp("policy")
    texts = [f"{a} + {b} = {a + b}" for a in range(10) for b in range(10)]
    return prepare(tiny_config.policy, texts, root / "cache", root / "tiny")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of this test module alone. Tests may inject faults into engine processes."""
    import ray

    from actors.placement import QUIET_ENV

    os.environ.update(QUIET_ENV)
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # lets a test send a fault as a function
    ray.init(
        address="local", num_cpus=8, include_dashboard=False, log_to_driver=False,
        namespace="hone", runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},
    )  # fmt: skip
    yield
    ray.shutdown(wait_for_processes=True)
