"""Changes of rewards during a real training run at full speed: what they cost the learner.

Invariant: the run is the quickstart's with a smaller policy, a process of its own and real engines;
every figure is read from its files or its buffer. The reward of a trajectory names its version (see
`benchmarks.swap_rewards`), so a verdict of another version than its label is found.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.proofs import END_S, ROOT, end
from benchmarks.swap_rewards import is_right
from cluster import reward_state
from cluster.control import ControlClient
from cluster.embedded_redis import EmbeddedRedis, url_in
from cluster.errors import StageError
from cluster.group_log import Fate, GroupLog
from cluster.ledger import Ledger
from cluster.reconcile import Reconciliation, reconcile
from cluster.redis_client import connect
from cluster.replay_reader import BufferReader
from cluster.reward_state import RUBRIC, RewardState
from cluster.run_dir import Event, RunDir
from cluster.types import TrajectoryGroup

VERIFIERS = "benchmarks.swap_rewards"
SMALL = [
    "policy.hidden_size=64", "policy.num_layers=2", "policy.num_heads=2", "warm_start.steps=20",
    "warm_start.examples=640", "tasks.train.settings.size=1000",
    "rollout.groups_per_step=4", "rollout.group_size=4", "eval.tasks=8", "eval.every=100000",
    "tasks.skip_uniform=false", "run.steps=100000", "rollout.max_policy_age=1",
    f"rewards.verifiers.correct={{use: '{VERIFIERS}:Bonus', settings: {{bonus: 0}}}}",
]  # fmt: skip
START_S = 400.0
STEP_S = 60.0
ASK_S = 120.0
POLL_S = 0.05
FIRST_STEPS = 6  # before the first change
STEPS_BETWEEN = 2
SAMPLE = 512  # groups: more than the buffer holds between two checkpoints
TOO_OLD = "too_old"  # dropped by the age bound, whatever scores them
# Dies when it is built, on gold, as a worker that is to go live (also after the shadow), and in it.
CRASHES = (
    ("DiesBuilt", "swap"), ("DiesOnGold", "swap"), ("DiesInWorkers", "swap"),
    ("DiesInWorkers", "promote"), ("DiesLive", "shadow"),
)  # fmt: skip


class LiveSwaps(NamedTuple):
    """`extra_waits_s`: the learner's wait in each step with a cut-over, beyond the median of steps
    without one. `num_scored` groups have verdicts in the run's book of groups; `num_scored_twice`
    of them have others there as well, or came to the buffer again. `num_unmoved` candidates died,
    one in each phase, and the live version stayed. `num_mixed` of the `num_seen` stored groups hold
    a reward or a stamp of another version than their label. `dropped` are the groups that failed on
    their way, by reason; `faults` are the audit's.
    """

    actions: Counter[str]
    num_unmoved: int
    num_trained: int
    num_twice: int
    num_scored: int
    num_scored_twice: int
    num_seen: int
    num_mixed: int
    dropped: dict[str, int]
    faults: list[str]
    cutovers_s: list[float]
    extra_waits_s: list[float]


def measure(num_changes: int, limit_s: float) -> LiveSwaps:
    """Run, change and read; stops changing after `limit_s`."""
    with tempfile.TemporaryDirectory(prefix="hone-swaps-") as place:
        run = RunDir(Path(place) / "runs" / "demo")
        output = Path(place) / "train.log"
        with output.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", "from serve.cli import main; main()", "train",
                 str(ROOT / "deploy/configs/quickstart.yaml"), "--run", run.name, *SMALL],
                cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        steps = Steps(run, lambda: process.poll() is None)
        try:
            steps.wait(FIRST_STEPS, START_S)
            changes = Changes(run, url_in(run.redis), steps.wait)
            changes.crash(Path(place) / "mark")
            changes.carry_out(num_changes, limit_s)
        except Exception as error:
            raise RuntimeError(f"{error}: {output.read_text()[-500:]}") from error
        finally:
            _interrupt(process)
            steps.stop()
        with EmbeddedRedis(run.redis) as server:
            buffer = BufferReader(connect(server.url), run.name)
            audit, num_duplicates = reconcile(run, buffer), buffer.stats().duplicates
        return _figures(run, steps.arrivals, changes, audit, num_duplicates)


class Steps:
    """Notes when rows of `metrics.jsonl` appear, from a thread of its own."""

    def __init__(self, run: RunDir, is_alive: Callable[[], bool]) -> None:
        self.arrivals: list[float] = []
        self._path = run.metrics
        self._is_alive = is_alive
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def wait(self, count: int, timeout_s: float = STEP_S) -> None:
        """Until `count` more steps are done."""
        wanted = len(self.arrivals) + count
        deadline = time.monotonic() + timeout_s
        while len(self.arrivals) < wanted:
            if time.monotonic() > deadline or not self._is_alive():
                raise RuntimeError(f"the run made {len(self.arrivals)} steps, not {wanted}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        while not self._is_over.wait(POLL_S):
            count = self._path.read_bytes().count(b"\n") if self._path.exists() else 0
            self.arrivals.extend([time.time()] * (count - len(self.arrivals)))


class Changes:
    """Changes of one run, with a look at its stored groups after each. `wait(count)` lets that many
    steps pass.
    """

    def __init__(self, run: RunDir, url: str, wait: Callable[[int], None]) -> None:
        self.seen: dict[str, bool] = {}  # group -> whether it is mixed
        self.num_unmoved = 0
        self._run = run
        self._client = ControlClient(run)
        self._buffer = BufferReader(connect(url), run.name)
        self._wait = wait
        self._num_versions = 0

    def crash(self, mark: Path) -> None:
        """A candidate for each of `CRASHES`; `mark` begins the names of files to make."""
        for use, command in CRASHES:
            before = self._ask("list")["state"]["active"]
            settings = {"mark": f"{mark}-{command}"} if use == "DiesInWorkers" else {}
            is_gone = self._dies(command, self._verifiers(use, **settings))
            self._wait(1)
            self._look()
            self.num_unmoved += is_gone and self._ask("list")["state"]["active"] == before

    def _dies(self, command: str, verifiers: dict[str, Any]) -> bool:
        """Whether the candidate is refused, or is gone from the shadow."""
        if command == "swap":
            return self._is_refused("swap", verifiers=verifiers)
        self._ask("shadow", verifiers=verifiers)
        if command == "shadow":
            return self._is_shadow_gone()
        is_refused = self._is_refused("promote")
        self._ask("shadow", stop=True)
        return is_refused

    def _is_refused(self, command: str, **arguments: Any) -> bool:
        try:
            self._ask(command, **arguments)
        except StageError:
            return True
        return False

    def carry_out(self, num_changes: int, limit_s: float) -> None:
        """Swap to a new version, roll back, and promote another from the shadow, in turn."""
        started = time.monotonic()
        for i in range(num_changes):
            if time.monotonic() - started > limit_s:
                return
            match i % 3:
                case 0:
                    self._ask("swap", verifiers=self._verifiers())
                case 1:
                    self._ask("rollback")
                case _:
                    self._ask("shadow", verifiers=self._verifiers())
                    self._wait(1)
                    self._ask("promote")
            self._wait(STEPS_BETWEEN)
            self._look()

    def _ask(self, command: str, **arguments: Any) -> Any:
        return self._client.ask(f"rewards.{command}", arguments, ASK_S)

    def _verifiers(self, use: str = "Bonus", **settings: Any) -> dict[str, Any]:
        """A rubric that no other version has."""
        self._num_versions += 1
        settings |= {"bonus": float(self._num_versions)}
        return {"correct": {"use": f"{VERIFIERS}:{use}", "settings": settings}}

    def _is_shadow_gone(self) -> bool:
        deadline = time.monotonic() + STEP_S
        while time.monotonic() < deadline:
            self._wait(1)
            if not self._ask("list")["shadow"]:
                return True
        return False

    def _look(self) -> None:
        groups = self._buffer.sample(SAMPLE)
        state = reward_state.load(self._run.path)
        assert state is not None
        for group in groups:
            self.seen[group.group_id] = self.seen.get(group.group_id, False) | is_mixed(
                group, state
            )


def is_mixed(group: TrajectoryGroup, state: RewardState) -> bool:
    """Whether a reward or a stamp is not that of the version which the group is labelled with."""
    version = state.get(group.reward_versions[RUBRIC])
    if version is None:
        return True
    [(name, verifier)] = version.verifiers.items()
    bonus = verifier["settings"].get("bonus", 0.0)
    gold = group.task.reference
    return any(
        t.reward not in (None, is_right(t.text, gold) + bonus)
        or [v.reward_version for v in t.verdicts] != [version.signals[name]]
        for t in group.trajectories
    )


def _interrupt(process: "subprocess.Popen[bytes]") -> None:
    """Ctrl-C for the run, and an end for whatever is left of it."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    end(process)


def scored(run: RunDir) -> Counter[str]:
    """How often each group has verdicts in the book of groups."""
    return Counter(line.group_id for line in GroupLog(run).read() if line.fate is Fate.SAMPLED)


def _figures(
    run: RunDir,
    arrivals: Sequence[float],
    changes: Changes,
    audit: Reconciliation,
    num_duplicates: int,
) -> LiveSwaps:
    events = [event for event in run.read_events() if event.kind == "reward_swapped"]
    used = Counter(g for record in Ledger(run.ledger).records() for g in record.group_ids)
    times = scored(run)
    return LiveSwaps(
        actions=Counter(str(event.fields["action"]) for event in events),
        num_unmoved=changes.num_unmoved,
        num_trained=len(used),
        num_twice=sum(count > 1 for count in used.values()),
        num_scored=len(times),
        num_scored_twice=sum(count > 1 for count in times.values()) + num_duplicates,
        num_seen=len(changes.seen),
        num_mixed=sum(changes.seen.values()),
        dropped={why: count for why, count in audit.dropped.items() if why != TOO_OLD},
        faults=audit.faults,
        cutovers_s=[float(str(event.fields["cutover_ms"])) / 1000 for event in events],
        extra_waits_s=_extra_waits_s(run.read_metrics(), arrivals, events),
    )


def _extra_waits_s(
    rows: list[dict[str, float]], arrivals: Sequence[float], events: Sequence[Event]
) -> list[float]:
    """The wait of each step that was under way at a cut-over, beyond the median of the others;
    empty when there is nothing to compare.
    """
    waits = [row.get("time/wait_s/learn", 0.0) for row in rows[: len(arrivals)]]
    steps = [next((i for i, at in enumerate(arrivals) if at > e.time), -1) for e in events]
    hit = sorted(set(steps) - {-1})
    calm = [wait for i, wait in enumerate(waits) if i >= FIRST_STEPS // 2 and i not in hit]
    if not calm:
        return []
    return [waits[i] - statistics.median(calm) for i in hit if i < len(waits)]
