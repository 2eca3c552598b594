"""What is read of a run whose judge fails, and the rule that decides what the judge is asked."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.judge_injections import Asked, row
from benchmarks.outage_figures import Phase, figures
from benchmarks.outage_rewards import BareAnswer
from benchmarks.relay import Relay
from cluster.group_log import Fate, GroupLine
from cluster.run_dir import JsonLines, RunDir
from cluster.types import Task
from rewards.isolation import IsolatedPool
from rewards.rubric import GroupIO
from rewards.self_check import group_of


def write(run: RunDir, during: float | None, back_at: float) -> RunDir:
    run.path.mkdir(parents=True)
    groups, events = JsonLines(run.path / "groups.jsonl"), JsonLines(run.events)
    for at, score in ((90.0, 0.4), (110.0, 0.3), (150.0, during), (back_at, 0.7)):
        groups.append(
            GroupLine(
                group_id=f"g{at}",
                fate=Fate.SAMPLED,
                time=at,
                signals={"correct": [1.0, None], "judged": [1.0, score]},
            )
        )
    groups.append(GroupLine(group_id="g150.0", fate=Fate.DROPPED, time=151.0, reason="too_old"))
    for step, at in ((0, 80.0), (1, 95.0), (2, 155.0), (3, 199.0)):
        events.append({"time": at, "kind": "sync", "policy_version": step})
        run.append_metrics(step, {"reward/judged/abstain_fraction": 0.5 if step == 2 else 0.0})
    events.append({"time": 220.0, "kind": "run_finished", "outcome": "interrupted"})
    return run


def test_an_outage_is_read_from_the_files_of_the_run(tmp_path: Path):
    found = figures(write(RunDir(tmp_path / "run"), None, 170.0), 100.0, 160.0, 20.0, 130)
    assert found.num_steps == 1
    assert (found.before, found.during) == (Phase(1, 1), Phase(1, 0))
    assert found.after == Phase(1, 1)
    assert (found.abstained, found.back_s) == (0.5, 10.0)
    assert (found.exit_code, found.outcome) == (130, "interrupted")


def test_a_score_in_the_outage_is_seen_and_so_is_a_judge_that_stays_away(tmp_path: Path):
    found = figures(write(RunDir(tmp_path / "run"), 0.0, 140.0), 100.0, 160.0, 20.0, 1)
    assert found.during == Phase(2, 2)
    assert found.back_s is None


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("5", 1.0),
        ("5\n", 1.0),
        ("<think>\n\n</think>\n\n5", 1.0),
        ("6", 0.0),
        ("", 0.0),
        ("+\n=\n", 0.0),
        ("2 + 3 = 5\n5", None),
    ],
)
async def test_a_bare_answer_is_decided_and_a_worked_one_is_not(text: str, score: float | None):
    task = Task(task_id="t", taskset="x", messages=[], reference="5")
    async with asyncio.timeout(5) as clock:
        io = GroupIO(IsolatedPool(), 5, clock, "")
        [verdict] = await BareAnswer().score(group_of(task, [text]), io)
    assert verdict.score == score


@pytest.mark.parametrize(
    ("found", "verdict", "words"),
    [
        (Asked(0.9, 0.2, [0.2, 0.3], [0.3, 0.2]), "holds", "2 of 2 scored; gain by injections"),
        (Asked(None, 0.2, [None, 0.1], [0.2, 0.2]), "holds", "none right, 0.20 wrong"),
        (Asked(0.9, 0.2, [0.2, 0.9], [0.3, 0.2]), "falls short", "most +0.70"),
        (Asked(0.9, 0.2, [0.3, 0.3], [0.3, 0.0]), "falls short", "mean +0.10"),
        (Asked(0.9, 0.2, [None, None], [0.2, 0.2]), "falls short", "0 of 2 scored"),
        (Asked(0.9, None, [0.2, 0.3], [0.3, 0.2]), "falls short", "injections none"),
    ],
)
def test_an_injection_that_earns_more_than_harmless_words_is_seen(
    found: Asked, verdict: str, words: str
):
    shown = row([found])
    assert shown.verdict == verdict
    assert words in shown.measured


async def test_a_relay_refuses_and_cuts_while_it_is_shut():
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    relay = Relay(server.sockets[0].getsockname()[1])
    async with asyncio.timeout(10):
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            relay.shut()
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", relay.port)
            writer.close()
            relay.open()
        relay.shut()
    server.close()
