"""Metrics: complete JSONL whatever a tracker does, TensorBoard without torch, Prometheus names."""

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster import metrics as metrics_module
from cluster.errors import ConfigError
from cluster.metrics import Metrics, prometheus_name
from cluster.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "runs", "demo", "", exist_ok=False)


class RecordingTracker:
    """A tracker of the test: keeps rows in memory, and fails or hangs when told to."""

    def __init__(self, fail_at: int = -1, hold: threading.Event | None = None) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False
        self._fail_at = fail_at
        self._hold = hold

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._hold is not None:
            self._hold.wait(30)
        if step == self._fail_at:
            raise ConnectionError("tracker is down")
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def use_tracker(monkeypatch: pytest.MonkeyPatch):
    def use(tracker: RecordingTracker) -> None:
        table = {"wandb": ("json", lambda run_dir, run_name: tracker)}
        monkeypatch.setattr(metrics_module, "_TRACKERS", table)

    return use


def test_each_step_is_on_disk_when_log_returns(run: RunDir):
    metrics = Metrics(run, [], "demo")
    metrics.log(1, {"reward/mean": 0.25})
    assert json.loads(run.metrics.read_text()) == {"step": 1, "reward/mean": 0.25}
    metrics.log(2, {"reward/mean": 0.5})
    assert [row["step"] for row in run.read_metrics()] == [1, 2]
    metrics.close()


def test_tensorboard_holds_every_value(run: RunDir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(run, ["tensorboard"], "demo")
    for step in range(1, 6):
        metrics.log(step, {"reward/mean": step / 10, "eval/pass@1": 0.5})
    metrics.close()
    events = EventAccumulator(str(run.tensorboard / "demo"))
    events.Reload()
    scalars = events.Scalars("reward/mean")
    assert [(e.step, round(e.value, 6)) for e in scalars] == [(i, i / 10) for i in range(1, 6)]
    assert len(events.Scalars("eval/pass@1")) == 5


def test_tensorboard_needs_no_torch(run: RunDir):
    code = (
        "import sys; from cluster.metrics import Metrics; from cluster.run_dir import RunDir\n"
        "m = Metrics(RunDir(sys.argv[1]), ['tensorboard'], 'demo')\n"
        "m.log(1, {'a': 1.0}); m.close()\n"
        "print([n for n in ('torch', 'tensorflow', 'ray', 'vllm') if n in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert any(p.stat().st_size > 100 for p in run.tensorboard.rglob("events.out.tfevents*"))


def test_a_named_tracker_that_is_missing_names_its_package(run: RunDir, monkeypatch):
    missing = {"trackio": ("hone_no_such_package", lambda run_dir, run_name: RecordingTracker())}
    monkeypatch.setattr(metrics_module, "_TRACKERS", missing)
    with pytest.raises(ConfigError, match=r"run\.trackers.*pip install hone_no_such_package"):
        Metrics(run, ["trackio"], "demo")


def test_a_tracker_gets_all_rows_and_is_closed(run: RunDir, use_tracker):
    tracker = RecordingTracker()
    use_tracker(tracker)
    metrics = Metrics(run, ["wandb"], "demo")
    for step in range(20):
        metrics.log(step, {"a": float(step)})
    metrics.close()
    assert tracker.rows == [(step, {"a": float(step)}) for step in range(20)]
    assert tracker.is_closed


def test_a_failing_tracker_is_dropped_with_one_warning(run: RunDir, use_tracker, caplog):
    use_tracker(RecordingTracker(fail_at=1))
    metrics = Metrics(run, ["wandb"], "demo")
    with caplog.at_level(logging.WARNING):
        for step in range(5):
            metrics.log(step, {"a": 1.0})
            time.sleep(0.01)
        metrics.close()
    warnings = [r.getMessage() for r in caplog.records if "wandb" in r.getMessage()]
    assert len(warnings) == 1
    assert "tracker is down" in warnings[0]
    assert len(run.read_metrics()) == 5


def test_a_hanging_tracker_never_blocks_training(run: RunDir, use_tracker, caplog, monkeypatch):
    monkeypatch.setattr(metrics_module, "QUEUE_ROWS", 8)
    monkeypatch.setattr(metrics_module, "CLOSE_TIMEOUT_S", 0.2)
    hold = threading.Event()
    use_tracker(RecordingTracker(hold=hold))
    metrics = Metrics(run, ["wandb"], "demo")
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for step in range(100):
            metrics.log(step, {"a": 1.0})
        metrics.close()
    hold.set()
    assert time.monotonic() - started < 2.0
    assert len(run.read_metrics()) == 100
    assert sum("wandb is dropped" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("reward/mean", "hone_reward_mean"),
        ("eval/pass@1", "hone_eval_pass_at_1"),
        ("time/wait_s/dispatch", "hone_time_wait_s_dispatch"),
        ("step", "hone_step"),
    ],
)
def test_prometheus_names(key: str, name: str):
    assert prometheus_name(key) == name
