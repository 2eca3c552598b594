"""A run that stands still says at which stage, and leaves the stacks of its processes."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.observer import Observer
from actors.stages import Stages
from cluster import log, stacks
from cluster.config import Config
from cluster.run_dir import RunDir

HUNG = """
import sys, time
from cluster import log
log.setup("rollout-0", sys.argv[1])
def stuck_in_a_tool():
    print("ready", flush=True)
    time.sleep(60)
stuck_in_a_tool()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "stalls", "{}", exist_ok=False)


def test_a_stall_names_the_stage_and_dumps_what_every_process_does(
    run: RunDir, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.observer.STALL_AFTER_S", 0.2)
    worker = subprocess.Popen(
        [sys.executable, "-c", HUNG, str(run.path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    log.setup("controller", run)
    stages = Stages(["dispatch", "rollout", "score", "learn", "sync", "eval"])
    observer = Observer(tiny_config, run, stages)

    async def wait_for_groups() -> None:
        with stages.busy("rollout"), stages.wait("learn", "scored groups"):
            waiting = asyncio.create_task(asyncio.sleep(30))
            await asyncio.sleep(0.4)
            observer.publish(3, 3, [])
            observer.publish(3, 3, [])
            waiting.cancel()

    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        observer.phase("training", "", 0.0)
        asyncio.run(wait_for_groups())
        [stall] = [event for event in run.read_events() if event.kind == "stalled"]
        assert stall.fields["stage"] == "rollout"
        assert stall.fields["waiting_for"] == "scored groups"
        folder = Path(str(stall.fields["stacks"]))
        deadline = time.monotonic() + 10
        [theirs] = folder.glob(f"rollout-0.*.{worker.pid}.txt")
        while "stuck_in_a_tool" not in theirs.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "stuck_in_a_tool" in theirs.read_text()
        [mine] = folder.glob(f"controller.*.{os.getpid()}.txt")
        assert "test_watchdog.py" in mine.read_text()
        [tasks] = folder.glob("tasks-*.log")
        assert "wait_for_groups" in tasks.read_text()
        assert worker.poll() is None, "asking for stacks must not end a process"
    finally:
        worker.kill()
        worker.wait()
        observer.close()


def test_a_process_that_inherited_a_process_id_is_left_alone(run: RunDir) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        log.setup("controller", run)
        [mine] = (run.logs / "stacks").glob("*.txt")
        stale = mine.with_name(mine.name.replace(str(os.getpid()), str(stranger.pid)))
        stale.touch()
        assert stacks.dump(run) == [mine]
        time.sleep(0.2)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
