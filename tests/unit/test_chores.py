"""Chores beside the requests: one that fails stops no other, and is told once."""

import logging
from types import SimpleNamespace

import pytest

from serve import chores
from serve.chores import Chores


async def test_a_failing_chore_stops_no_other_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(chores, "time", SimpleNamespace(monotonic=lambda: now[0]))
    caplog.set_level(logging.WARNING, logger=chores.__name__)
    done: list[str] = []
    reason = ["disk full"]

    async def fails() -> None:
        done.append("fails")
        if reason:
            raise ValueError(reason[0])  # nothing that a chore is known to raise

    async def works() -> None:
        done.append("works")

    duties = Chores()
    for _ in range(6):
        await duties.run("follow", fails)
        await duties.run("guard", works)
        now[0] += chores.MAX_PAUSE_S
    assert (done.count("fails"), done.count("works")) == (6, 6)
    assert duties.problem == "disk full (tried 6)"
    assert [record.getMessage() for record in caplog.records] == ["follow: disk full"]

    await duties.run("follow", fails)
    now[0] += 0.1
    await duties.run("follow", fails)  # in its pause
    assert done.count("fails") == 7

    reason.clear()
    now[0] += chores.MAX_PAUSE_S
    await duties.run("follow", fails)
    assert duties.problem == ""
