"""A reward worker while Redis is away: it starts, and no group waits longer than a call may."""

import asyncio
import time
from pathlib import Path

import pytest

from actors.reward_worker import RewardWorker
from cluster import wire
from cluster.config import BufferSection, VerifierConfig
from cluster.errors import BufferUnavailableError
from tests.reward_cases import live_group

NUM_GROUPS = 32
AWAY = "redis://127.0.0.1:1/0"  # nobody listens there


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RewardWorker:
    monkeypatch.setattr("actors.reward_worker.CALL_S", 1.0)
    monkeypatch.setattr("cluster.log.setup", lambda *_: None)
    verifiers = {"even": VerifierConfig(use="benchmarks.trl_peer:ends_even")}
    return RewardWorker(0, "", verifiers, {}, "run", AWAY, BufferSection(), str(tmp_path))


async def test_adds_wait_for_redis_side_by_side(worker: RewardWorker) -> None:
    groups = [wire.encode(live_group(i)) for i in range(NUM_GROUPS)]
    started = time.monotonic()
    answers = await asyncio.gather(
        *[worker.score_and_add(group, False, 5.0, 0) for group in groups], return_exceptions=True
    )
    assert {type(answer) for answer in answers} == {BufferUnavailableError}
    assert time.monotonic() - started < 4.0
