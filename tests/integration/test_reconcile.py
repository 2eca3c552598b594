"""The audit of a run: a sound one has no fault, and every kind of loss or double use is named."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from cluster.checkpoint_store import CheckpointStore
from cluster.embedded_redis import EmbeddedRedis
from cluster.group_log import Fate, GroupLine, GroupLog
from cluster.ledger import Ledger
from cluster.reconcile import reconcile
from cluster.redis_client import connect
from cluster.replay_buffer import ReplayBuffer
from cluster.run_dir import RunDir
from cluster.run_state import RunState
from cluster.types import StepRecord
from serve import cli, replay_queries
from tests.replay_checker import claim, fill, make_buffer

CONFIG = (Path(__file__).parents[2] / "deploy" / "configs" / "quickstart.yaml").read_text()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "runs", "demo", CONFIG, exist_ok=False)


@pytest.fixture
def buffer(run: RunDir) -> Iterator[ReplayBuffer]:
    """Two steps of two groups each, one checkpoint after the first; one group waits, one was
    dropped.
    """
    with EmbeddedRedis(run.redis) as server:
        buffer = make_buffer(connect(server.url), run.name)
        groups, ledger = GroupLog(run), Ledger(run.ledger)
        fill(buffer, "a", "b", "c", "d", "waits")
        for group_id in ("a", "b", "c", "d", "waits", "uniform"):
            groups.append(
                GroupLine(
                    group_id=group_id, fate=Fate.SAMPLED, rewards=[1.0, None], policy_version=0,
                    signals={"correct": [1.0, None]}, reward_versions={"correct": "v1"},
                    arms=["plain", "guided"],
                )
            )  # fmt: skip
        groups.dropped("uniform", "uniform")
        claim(buffer, 4)
        for step, group_ids in ((1, ["a", "b"]), (2, ["c", "d"])):
            buffer.consume(group_ids, step=step)
            ledger.commit(record(step, group_ids))
        store = CheckpointStore(run.checkpoints, keep=3)
        store.begin(1)
        store.commit(1, RunState(run_id=run.name, step=1, policy_version=1, config_hash="h"))
        buffer.acknowledge(1)
        yield buffer


def record(step: int, group_ids: list[str]) -> StepRecord:
    return StepRecord(
        step=step, policy_version=step, group_ids=group_ids, policy_versions=[0] * len(group_ids),
        reward_versions={"correct": ["v1"]}, num_loss_tokens=7,
    )  # fmt: skip


def test_a_sound_run_has_no_fault(run: RunDir, buffer: ReplayBuffer) -> None:
    result = reconcile(run, buffer)
    assert result.faults == []
    assert (result.num_sampled, result.num_used, result.num_waiting) == (6, 4, 1)
    assert result.dropped == {"uniform": 1}
    assert (result.steps, result.policy_version) == (2, 2)


def use_twice(run: RunDir, _buffer: ReplayBuffer) -> None:
    Ledger(run.ledger).commit(record(3, ["a"]))


def use_an_unknown_one(run: RunDir, _buffer: ReplayBuffer) -> None:
    Ledger(run.ledger).commit(record(3, ["stranger"]))


def lose_one(run: RunDir, buffer: ReplayBuffer) -> None:
    buffer.drop("waits", "said only to the buffer")


def lose_one_in_redis(run: RunDir, buffer: ReplayBuffer) -> None:
    buffer._client.zpopmin(buffer._keys.ready)


def drop_without_a_reason(run: RunDir, _buffer: ReplayBuffer) -> None:
    GroupLog(run).dropped("nobody-knows-why", "")


def use_one_that_waits(run: RunDir, _buffer: ReplayBuffer) -> None:
    Ledger(run.ledger).commit(record(3, ["waits"]))


def forget_a_step(run: RunDir, _buffer: ReplayBuffer) -> None:
    Ledger(run.ledger).truncate_after(1)


def save_other_weights(run: RunDir, _buffer: ReplayBuffer) -> None:
    store = CheckpointStore(run.checkpoints, keep=3)
    store.begin(2)
    store.commit(2, RunState(run_id=run.name, step=2, policy_version=1, config_hash="h"))


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (use_twice, "1 groups used by two steps: a"),
        (use_an_unknown_one, "used, but never sampled: stranger"),
        (lose_one, "not used, not waiting, not dropped: waits"),
        (lose_one_in_redis, "1 groups were added to the buffer and are nowhere"),
        (drop_without_a_reason, "dropped without a reason: nobody-knows-why"),
        (use_one_that_waits, "used, but waiting in the buffer: waits"),
        (forget_a_step, r"consumed, but in no step \(a resume takes them back\): c, d"),
        (save_other_weights, "step_000002 holds policy version 1, the ledger says 2"),
    ],
)
def test_every_kind_of_loss_or_double_use_is_named(
    run: RunDir, buffer: ReplayBuffer, harm: Callable[..., None], fault: str
) -> None:
    harm(run, buffer)
    faults = reconcile(run, buffer).faults
    assert any(re.search(fault, line) for line in faults), faults


def hone(capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, *arguments: str) -> str:
    patch.setattr(sys, "argv", ["hone", "replay", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert not ended.value.code, shown.err
    return shown.out


def test_the_command_line_tells_what_moved_a_step_and_what_became_of_a_group(
    run: RunDir, buffer: ReplayBuffer, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    place = str(run.path)
    assert "sound" in hone(capsys, monkeypatch, "stats", place)
    shown = hone(capsys, monkeypatch, "why", place, "--step", "2")
    assert "step 2 made policy version 2 from 2 groups, 7 loss tokens" in shown
    assert "c  sampled by version 0 (age 1)" in shown
    assert "correct (v1): 1 abstained" in shown
    assert "arms: plain guided" in shown
    assert "ready     waits" in hone(capsys, monkeypatch, "show", place)
    assert "dropped uniform" in hone(capsys, monkeypatch, "show", place, "uniform")
    skipped = msgspec.structs.replace(record(3, []), policy_version=2, skipped=["uniform", "x"])
    Ledger(run.ledger).commit(skipped)
    shown = hone(capsys, monkeypatch, "why", place, "--step", "3")
    assert shown == "step 3 was skipped (its gradient was not finite); dropped: uniform, x\n"
    assert replay_queries.why(run, 3).is_skipped
    assert not replay_queries.why(run, 2).is_skipped
    monkeypatch.setattr(sys, "argv", ["hone", "replay", "why", place, "--step", "9"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--step 9: not in the ledger of demo (steps 1 to 3)" in capsys.readouterr().err


def test_the_buffer_of_a_run_that_has_ended_can_be_read(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedRedis(run.redis) as server:
        fill(make_buffer(connect(server.url), run.name), "left")
    assert "ready     left" in hone(capsys, monkeypatch, "show", str(run.path))
