"""Changes of rewards during a real training run at full speed: what they cost the learner.

Invariant: the run is the quickstart's with a smaller policy, a process of its own and real engines;
every figure is read from its files. `measure(20)` makes 20 changes, swaps and rollbacks in turn.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from cluster.control import ControlClient
from cluster.embedded_redis import url_in
from cluster.redis_client import connect
from cluster.replay_reader import BufferReader
from cluster.run_dir import RunDir
from cluster.types import TrajectoryGroup

ROOT = Path(__file__).parents[1]
SMALL = [
    "policy.hidden_size=64", "policy.num_layers=2", "policy.num_heads=2", "warm_start.steps=20",
    "warm_start.examples=640", "tasks.train.settings.size=1000",
    "rollout.groups_per_step=4", "rollout.group_size=4", "eval.tasks=8", "eval.every=100000",
    "tasks.skip_uniform=false", "run.steps=100000", "rollout.max_policy_age=1",
]  # fmt: skip
START_S = 240.0
STEP_S = 60.0


class LiveSwaps(NamedTuple):
    """`extra_wait_s` is the learner's wait in a step with a cut-over, beyond the median of steps
    without one: the median and the largest over all changes. Groups are trained on `num_twice`;
    `num_mixed` of the `num_seen` stored ones carry verdicts of another version than their own.
    """

    num_changes: int
    num_trained: int
    num_twice: int
    num_seen: int
    num_mixed: int
    num_lost: int
    cutover_s: float
    median_extra_wait_s: float
    max_extra_wait_s: float


def measure(num_changes: int, limit_s: float) -> LiveSwaps:
    """Run, change and read; stops changing after `limit_s`."""
    with tempfile.TemporaryDirectory(prefix="hone-swaps-") as place:
        process = subprocess.Popen(
            [sys.executable, "-c", "from serve.cli import main; main()", "train",
             str(ROOT / "deploy/configs/quickstart.yaml"), "--run", "demo", *SMALL],
            cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        run = Path(place) / "runs" / "demo"
        seen: dict[str, bool] = {}
        try:
            arrivals, num_lost = _change(process, run, num_changes, limit_s, seen)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(90)
        return _read(run, arrivals, seen, num_lost)


def _change(
    process: "subprocess.Popen[bytes]",
    run: Path,
    num_changes: int,
    limit_s: float,
    seen: dict[str, bool],
) -> tuple[list[float], int]:
    """Carry out the changes and look at stored groups after each.

    Returns the times at which rows of `metrics.jsonl` appeared, and the groups unaccounted for.
    """
    arrivals: list[float] = []

    def watch(until_rows: int, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        while len(arrivals) < until_rows:
            count = len(_lines(run / "metrics.jsonl"))
            arrivals.extend([time.time()] * (count - len(arrivals)))
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"the run made {len(arrivals)} steps only")
            time.sleep(0.02)

    watch(6, START_S)
    home = RunDir(run)
    client = ControlClient(home)
    buffer = BufferReader(connect(url_in(home.redis)), "demo")
    started = time.monotonic()
    for i in range(num_changes):
        if time.monotonic() - started > limit_s:
            break
        request: tuple[str, dict[str, Any]] = ("rewards.rollback", {})
        if i % 2 == 0:
            verifier = {"use": "task", "settings": {"extract": "last_line"}, "weight": 1 + i / 100}
            request = ("rewards.swap", {"verifiers": {"correct": verifier}})
        client.ask(*request, 60.0)
        seen.update({g.group_id: _is_mixed(g) for g in buffer.sample(64)})
        watch(len(arrivals) + 3, STEP_S)
    return arrivals, buffer.stats().num_unaccounted


def _is_mixed(group: TrajectoryGroup) -> bool:
    stamps = [(v.name, v.reward_version) for t in group.trajectories for v in t.verdicts]
    return any(group.reward_versions.get(name) != version for name, version in stamps)


def _read(
    run: Path, arrivals: list[float], seen: dict[str, bool], num_lost: int
) -> LiveSwaps:  # fmt: skip
    events = [e for e in _lines(run / "events.jsonl") if e["kind"] == "reward_swapped"]
    rows = _lines(run / "metrics.jsonl")[: len(arrivals)]
    waits = [row.get("time/wait_s/learn", 0.0) for row in rows]
    hit = {next((i for i, at in enumerate(arrivals) if at > e["time"]), -1) for e in events} - {-1}
    calm = statistics.median(w for i, w in enumerate(waits) if i > 2 and i not in hit)
    extra = [waits[i] - calm for i in sorted(hit)]
    ledger = _lines(run / "ledger.jsonl")
    used = Counter(group for row in ledger for group in row["group_ids"])
    return LiveSwaps(
        num_changes=len(events),
        num_trained=len(used),
        num_twice=sum(count > 1 for count in used.values()),
        num_seen=len(seen),
        num_mixed=sum(seen.values()),
        num_lost=num_lost,
        cutover_s=max(e["cutover_ms"] for e in events) / 1000,
        median_extra_wait_s=statistics.median(extra),
        max_extra_wait_s=max(extra),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
