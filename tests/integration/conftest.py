"""A Redis server for each module of tests of the replay buffer, and a buffer on it."""

import uuid
from collections.abc import Iterator

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
