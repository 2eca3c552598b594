"""What is shared is taken back however a sync ends; a learner that is lost is not asked again."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.fleet_worker import Worker
from actors.weight_sharing import WeightSharing
from cluster.config import Config
from cluster.errors import LearnerLostError, StageError


class Ranks:
    """A learner group of one rank that notes what it is asked."""

    def __init__(self, failure: StageError | None = None) -> None:
        self.calls: list[bool] = []
        self._failure = failure

    async def call(self, _method: str, should_share: bool) -> list[dict[str, Any]]:
        self.calls.append(should_share)
        if should_share and self._failure is not None:
            raise self._failure
        return [{"manifest": [], "device": "gpu", "handle": []}]


def sharing(config: Config, ranks: Ranks, events: list[str]) -> WeightSharing:
    def note(kind: str, **_fields: Any) -> None:
        events.append(kind)

    return WeightSharing(config.sync, cast(Any, ranks), note)


def engine(load_s: float) -> Worker:
    """One that takes `load_s` to load weights, which is its pause."""

    async def load(_update: object, _policy_version: int) -> float:
        await asyncio.sleep(load_s)
        return load_s

    return Worker(0, SimpleNamespace(load_weights=SimpleNamespace(remote=load)))


async def test_what_was_shared_is_taken_back(tiny_config: Config) -> None:
    ranks, events = Ranks(), list[str]()
    assert await sharing(tiny_config, ranks, events).send([engine(0.01)], 1) == [0.01]
    assert ranks.calls == [True, False]
    assert events == []


async def test_a_copy_without_room_is_the_result_of_each_engine(tiny_config: Config) -> None:
    failure = StageError("sync", "no room")
    ranks, events = Ranks(failure), list[str]()
    results = await sharing(tiny_config, ranks, events).send([engine(0), engine(0)], 1)
    assert results == [failure] * 2
    assert ranks.calls == [True, False]
    assert events == ["sharing_failed"]


async def test_a_learner_that_is_lost_is_not_asked_again(tiny_config: Config) -> None:
    ranks = Ranks(LearnerLostError("learner", "hangs"))
    with pytest.raises(LearnerLostError):
        await sharing(tiny_config, ranks, []).send([engine(0)], 1)
    assert ranks.calls == [True]


async def test_a_sync_that_is_cancelled_takes_back_what_it_shared(tiny_config: Config) -> None:
    ranks = Ranks()
    sending = asyncio.create_task(sharing(tiny_config, ranks, []).send([engine(60)], 1))
    await asyncio.sleep(0.05)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert ranks.calls == [True, False]
