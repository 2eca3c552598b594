"""Who of the rollout actors is given up: what is known to be gone at once, what is silent later.

The handles stand for those of Ray.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors import fleet_watch, fleet_worker
from actors.fleet_worker import Worker
from cluster.errors import StageError


class Handle:
    def __init__(self, answer: Callable[[], Awaitable[None]]) -> None:
        self.ping = self
        self.remote = answer


async def well() -> None:
    return


async def gone() -> None:
    raise StageError("rollout", "the vLLM engine process is gone")


async def silent() -> None:
    await asyncio.sleep(60)


async def test_what_is_gone_is_given_up_at_once_and_what_is_silent_after_three_pings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet_watch, "PING_EVERY_S", 0.0)
    monkeypatch.setattr(fleet_worker, "PING_S", 0.02)
    workers = [Worker(i, Handle(answer)) for i, answer in enumerate((well, gone, silent))]
    buried: list[tuple[int, str]] = []
    num_rounds, is_enough = 0, asyncio.Event()

    def serving() -> list[Worker]:
        """Those that are left; it fails when it is asked for the first time."""
        nonlocal num_rounds
        num_rounds += 1
        if num_rounds == 1:
            raise RuntimeError("one round that fails ends nothing")
        return [worker for worker in workers if worker.index not in dict(buried)]

    def bury(worker: Worker, handle: Any, cause: str) -> None:
        assert handle is worker.handle
        buried.append((worker.index, cause))
        if len(buried) == 2:
            is_enough.set()

    watching = asyncio.create_task(fleet_watch.watch(serving, bury))
    await asyncio.wait_for(is_enough.wait(), 30)
    watching.cancel()
    assert [index for index, _ in buried] == [1, 2]
    assert "the vLLM engine process is gone" in buried[0][1]
    assert buried[1][1] == "gave no answer to 3 pings"
