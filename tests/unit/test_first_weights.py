"""`hone serve` beside a run that starts: it waits while the run reports, and says why when not."""

import os
import threading
import time
from pathlib import Path

import pytest

from cluster import published, status
from cluster.errors import ConfigError
from cluster.run_dir import RunDir
from cluster.status import RunStatus
from serve import first_weights


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path / "runs", "demo", "{}", exist_ok=False)
    run.share_weights()
    return run


def report(run: RunDir, phase: str, detail: str = "", age_s: float = 0.0) -> None:
    at = time.time() - age_s
    status.write(run.path, RunStatus(run="demo", phase=phase, phase_detail=detail, updated_at=at))


def test_it_waits_for_the_first_version_and_tells_each_phase_once(run: RunDir) -> None:
    told: list[str] = []
    report(run, "starting", "loading 1 vLLM engine(s)")
    waiting = threading.Thread(target=first_weights.wait_for, args=(run, told.append))
    waiting.start()
    time.sleep(0.5)
    for step in (10, 20):
        report(run, "warm_start", f"step {step} of 200, loss 1.0")
        time.sleep(0.4)
    published.announce(run.weights, 0, run.weights / "policy_00000000.safetensors")
    waiting.join(5)
    assert not waiting.is_alive()
    assert [line.split(";")[0] for line in told] == [
        "demo is starting: loading 1 vLLM engine(s)", "demo is warm_start",
    ]  # fmt: skip


def test_it_waits_for_a_run_that_has_not_reported_yet(run: RunDir) -> None:
    told: list[str] = []
    waiting = threading.Thread(target=first_weights.wait_for, args=(run, told.append))
    waiting.start()
    time.sleep(0.4)
    assert waiting.is_alive()
    published.announce(run.weights, 0, run.weights / "policy_00000000.safetensors")
    waiting.join(5)
    assert not waiting.is_alive()
    assert told == ["demo is starting; waiting for its first weights"]


@pytest.mark.parametrize(("phase", "age_s"), [("finished", 0.0), ("training", 1e4), (None, 1e4)])
def test_a_run_that_will_publish_nothing_is_named(
    run: RunDir, phase: str | None, age_s: float
) -> None:
    os.utime(run.config, (time.time() - age_s,) * 2)
    if phase is not None:
        report(run, phase, age_s=age_s)
    with pytest.raises(ConfigError, match="published no weights and no checkpoint"):
        first_weights.wait_for(run, print)
