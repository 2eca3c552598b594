"""What people see of a run survives what the run did not measure, and a disk that is full."""

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.observer import Observer
from actors.stages import Stages
from cluster import status
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.redis_client import connect, waited_s
from cluster.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "watched", "run: {}\n", exist_ok=False)


@pytest.fixture
def observer(run: RunDir, tiny_config: Config) -> Iterator[Observer]:
    watched = Observer(tiny_config, run, Stages(["learn"]))
    yield watched
    watched.close()


def test_a_run_is_resumed_only_where_it_has_begun_before(observer: Observer, run: RunDir) -> None:
    """However it is launched: a job goes on with what there is, and at first there is nothing."""
    run.append_event("waiting_for_redis")
    for _ in range(3):
        observer.begin()
    kinds = [event.kind for event in run.read_events()]
    assert kinds == ["waiting_for_redis", "run_started", "resumed", "resumed"]


def test_what_was_not_measured_leaves_the_status_readable(observer: Observer, run: RunDir) -> None:
    observer.log_step(0, {"eval/pass@1": 0.5, "policy/entropy": 1.0, "rollout/tokens_per_s": 9.0})
    nothing = ("eval/pass@1", "policy/entropy", "reward/mean", "rollout/tokens_per_s")
    observer.log_step(1, dict.fromkeys((*nothing, "buffer/depth"), math.nan))
    observer.publish(1, 1, [])
    state = status.read(run.path)
    assert state is not None
    assert (state.eval_history, state.entropy_history) == ([(0, 0.5)], [1.0])
    assert state.reward_history == []
    assert (state.tokens_per_s, state.buffer_depth) == (0.0, 0)
    [event] = [e for e in run.read_events() if e.kind == "eval_without_verdict"]
    assert event.fields == {"step": 1}


def test_a_full_disk_costs_what_is_shown_and_not_the_run(
    observer: Observer, run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    full = [run.events, run.metrics, run.path / f".{status.FILE_NAME}.{os.getpid()}"]
    for file in full:
        file.symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        observer.event("sync", policy_version=1)
        observer.log_step(1, {"reward/mean": 0.5})
        observer.publish(1, 1, [])
        observer.fail(RuntimeError("another reason"))
    [warning] = [r.getMessage() for r in caplog.records if "No space left" in r.getMessage()]
    assert "training goes on" in warning
    for file in full:
        file.unlink()
    observer.log_step(2, {"reward/mean": 0.75})
    observer.publish(2, 2, [])
    assert [row["reward/mean"] for row in run.read_metrics()] == [0.75]
    state = status.read(run.path)
    assert state is not None
    assert state.reward_history == [0.5, 0.75]


def test_a_redis_that_is_away_is_shown_with_the_time_that_is_left(
    observer: Observer, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.observer.AWAY_AFTER_S", 0.1)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        port = closed.getsockname()[1]

        def ask() -> None:
            with pytest.raises(ConfigError):
                connect(f"redis://127.0.0.1:{port}/0", retry_s=1.0)

        asking = threading.Thread(target=ask)
        asking.start()
        deadline = time.monotonic() + 5
        while waited_s() < 0.2 and time.monotonic() < deadline:
            time.sleep(0.02)
        observer.publish(1, 1, [])
        asking.join()
    state = status.read(run.path)
    assert state is not None
    assert state.phase_detail == "waiting for Redis, 0 s of 600 s"
    assert waited_s() == 0.0
    observer.publish(1, 1, [])
    state = status.read(run.path)
    assert state is not None
    assert state.phase_detail == ""
    assert [e.kind for e in run.read_events()] == ["redis_lost", "redis_back"]
