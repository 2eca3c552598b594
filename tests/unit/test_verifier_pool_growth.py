"""A pool whose only worker dies, and whose next one does not start: who waits is not forgotten.

The actors stand for those of Ray.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from actors.verifier_pool import VerifierPool, _Member
from actors.verifier_worker import SignalFacts
from cluster.config import PoolConfig, VerifierConfig
from cluster.errors import ActorLostError
from cluster.types import Verdict

VERDICTS = [Verdict(score=1.0)]


class Call:
    def __init__(self, answer: Callable[..., Awaitable[Any]]) -> None:
        self.remote = answer


class Actor:
    def __init__(self, *, starts: bool = True, scores: bool = True) -> None:
        self._starts, self._scores = starts, scores
        self.facts, self.score = Call(self._tell), Call(self._judge)

    async def _tell(self) -> SignalFacts:
        if not self._starts:
            raise ActorLostError("score", "died")
        return SignalFacts(pid=7, version="1", example="", golden=[], gold_score=1.0)

    async def _judge(self, _group: object) -> list[Verdict]:
        if not self._scores:
            raise ActorLostError("score", "died")
        return VERDICTS


async def test_a_pool_whose_worker_does_not_start_again_tries_once_more_though_nobody_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.verifier_pool.RETRY_START_S", 0.2)
    monkeypatch.setattr("cluster.log.setup", lambda _role, _run_dir: None)
    monkeypatch.setattr("ray.kill", lambda _actor: None)
    config = VerifierConfig(use="task", pool=PoolConfig(workers="1", max_in_flight=1))
    pool = VerifierPool("m", config, {}, str(tmp_path), "", queue_s=3, start_s=5, idle_s=60)
    actors = iter([Actor(scores=False), Actor(starts=False), Actor()])

    def create() -> _Member:
        member = _Member(next(actors))
        pool._members.append(member)
        return member

    monkeypatch.setattr(pool, "_create", create)
    await pool.start()
    assert await pool.score([b""]) == VERDICTS
    assert (await pool.status()).num_died == 1
