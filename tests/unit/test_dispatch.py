"""No group is without its fate, also when the run ends while its producer waits."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from actors.dispatch import Dispatch
from actors.producer import Production
from actors.reward_worker import summarize
from actors.stages import Stages
from actors.staleness import StalenessPolicy
from actors.statistics import RolloutStatistics
from actors.supervisor import Supervisor
from cluster.config import Config
from cluster.types import TrajectoryGroup, Verdict
from tests.reward_cases import live_group


def unscored(number: int) -> TrajectoryGroup:
    group = live_group(number)
    judged = [
        msgspec.structs.replace(t, verdicts=[Verdict(score=None, name="judge")])
        for t in group.trajectories
    ]
    return msgspec.structs.replace(group, trajectories=judged)


async def test_a_group_without_a_verdict_is_dropped_though_its_pause_is_cut_short(
    tiny_config: Config,
) -> None:
    dropped: list[tuple[list[str], str]] = []

    async def drop(group_ids: list[str], reason: str, _detail: str) -> None:
        dropped.append((group_ids, reason))

    books = cast(Any, SimpleNamespace(note_scored=lambda summary: None))
    stages = Stages(["dispatch", "rollout", "score"])
    supervisor = Supervisor()
    for _ in range(100):
        supervisor.group_unscored()  # pauses are long by now
    dispatch = Dispatch(
        tiny_config, books, stages, StalenessPolicy(1), supervisor, RolloutStatistics(), drop
    )
    production = Production(summarize(unscored(7), "unscored"))

    async def produce(_request: object) -> Production:
        return production

    curriculum = SimpleNamespace(is_held=lambda group_id: False, note_passes=lambda passes: None)
    parts, producer = SimpleNamespace(curriculum=curriculum), SimpleNamespace(produce=produce)
    request = SimpleNamespace(group_id="live-7")
    waiting = asyncio.create_task(
        dispatch._produce(cast(Any, parts), cast(Any, producer), cast(Any, request))
    )
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert not dropped
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert dropped == [(["live-7"], "unscored")]
