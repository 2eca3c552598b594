"""What several modules start: a Redis server and a buffer on it; a Ray that finds the verifiers of
`tests.reward_cases`.
"""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from cluster.embedded_redis import EmbeddedRedis
from cluster.redis_client import connect
from cluster.replay_buffer import ReplayBuffer
from tests.replay_checker import audit, make_buffer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: EmbeddedRedis) -> redis.Redis:
    return connect(server.url)


@pytest.fixture
def run_id() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def buffer(client: redis.Redis, run_id: str) -> Iterator[ReplayBuffer]:
    """A buffer of 100 groups; whatever a test did to it, the books must balance at the end."""
    buffer = make_buffer(client, run_id)
    yield buffer
    audit(client, run_id, buffer)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Of a Redis server for one test."""
    with EmbeddedRedis(tmp_path / "redis") as server:
        yield server.url


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.reward_cases import PLUGIN

    path = tmp_path_factory.mktemp("plugins")
    (path / "live_rewards.py").write_text(PLUGIN)
    return path


@pytest.fixture(scope="module")
def reward_cluster(plugins: Path) -> Iterator[None]:
    import ray

    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(plugins)])
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, namespace="hone",
        log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    yield
    ray.shutdown()
