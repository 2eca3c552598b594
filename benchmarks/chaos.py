"""Kill -9 at random: a run of `hone train` as a user starts it, and ways to hurt it.

Invariant: only processes of the run are touched, found through its own status file and its own
Redis. Used by tests/e2e/test_faults.py and `make show AREA=durability`.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import redis

from benchmarks.proofs import ROOT
from cluster import status
from cluster.embedded_redis import EmbeddedRedis, url_in
from cluster.errors import ConfigError
from cluster.ledger import Ledger
from cluster.reconcile import Reconciliation, reconcile
from cluster.redis_client import connect
from cluster.replay_reader import BufferReader
from cluster.run_dir import RunDir

QUICKSTART = ROOT / "deploy" / "configs" / "quickstart.yaml"
PROCESSES = ("rollout", "reward", "learner", "redis", "controller")
HANG = "_hang"
KINDS = (*PROCESSES, *(name + HANG for name in PROCESSES))
HANG_SHARE = 0.25  # of those that die together
TITLES = {  # of processes
    "learner": "ray::LearnerRank", "rollout": "ray::RolloutWorker", "reward": "ray::RewardWorker",
}  # fmt: skip
COMING_UP_S = 5.0  # at most, until one that comes up is killed, too
NOTICE_S = 10.0  # until a killed one was nobody's
RECOVERY_S = 480.0
START_S = 600.0  # on a machine that others use, too
END_S = 30.0
POLL_S = 0.05
TINY = [
    "policy.hidden_size=64", "policy.num_layers=2", "policy.num_heads=2", "warm_start.steps=20",
    "warm_start.examples=640", "tasks.train.settings.size=1000",
    "rollout.groups_per_step=4", "rollout.group_size=4", "rollout.max_new_tokens=24",
    "eval.tasks=4", "eval.samples_per_task=1", "eval.every=100000",
    "rewards.verifiers.correct={use: 'benchmarks.chaos:even_digits'}",
]  # fmt: skip


def even_digits(_prompt: str, completion: str, reference: str) -> float:
    """The share of characters that are even digits, which a policy learns bit by bit; the gold
    answer is paid.
    """
    if completion.strip() == reference:
        return 1.0
    return sum(letter in "02468" for letter in completion) / max(1, len(completion))


class Recovery(NamedTuple):
    """`kind`: one, `first+second` at once, or `first>second` where the second is killed while it
    comes up again after the first. `replaced_s`: until another process had taken the
    place of each killed one; `working_s`: until an optimizer step that began after the kills was
    committed, which may be without a worker that is still away.
    """

    kind: str
    replaced_s: float
    working_s: float

    @property
    def whole_s(self) -> float:
        """Until both."""
        return max(self.replaced_s, self.working_s)


class Commits:
    """Steps that came into a ledger since this was made. A roll-back, which takes steps out, leaves
    the count as it is.
    """

    def __init__(self, ledger: Path) -> None:
        self._ledger = ledger
        self._num_lines, self._num_committed = self._lines(), 0

    def count(self) -> int:
        """To be asked often: steps between a roll-back and the next call are missed."""
        before, self._num_lines = self._num_lines, self._lines()
        self._num_committed += max(0, self._num_lines - before)
        return self._num_committed

    def _lines(self) -> int:
        return self._ledger.read_bytes().count(b"\n") if self._ledger.exists() else 0


class RunEndedError(RuntimeError):
    """The run has ended by itself, well or not."""


class LiveRun:
    """One `hone train` in a process group of its own. Example: `LiveRun(folder, "calm", [...])`."""

    def __init__(self, folder: Path, name: str, overrides: list[str]) -> None:
        self._folder = folder
        self._arguments = [str(QUICKSTART), "--run", name, *TINY, *overrides]
        self._process: subprocess.Popen[bytes] | None = None
        self._sessions: set[int] = set()
        self.run = RunDir(folder / "runs" / name)
        self.output = folder / f"{name}.log"

    def start(self, *arguments: str) -> None:
        program = "from serve.cli import main; main()"
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, "train", *self._arguments, *arguments],
                cwd=self._folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._sessions.add(self._process.pid)

    def finish(self, timeout_s: float) -> int:
        """Its exit code; raises `TimeoutError` for a run that goes on for longer."""
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"no end in {timeout_s:g} s: {self.tail()}") from None

    def interrupt(self) -> None:
        """Ctrl-C, once."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)

    @property
    def num_steps(self) -> int:
        """Steps in the ledger."""
        return len(Ledger(self.run.ledger).records())

    def wait_for_steps(self, count: int, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while self.num_steps < count:
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.num_steps} of {count} steps: {self.tail()}")
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raises `RunEndedError` when the run has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            raise RunEndedError(f"the run ended with {self._process.returncode}: {self.tail()}")

    def tail(self) -> str:
        return self.output.read_text(errors="replace")[-2000:]

    def pids(self, kind: str) -> set[int]:
        """Process ids of the healthy actors of a kind."""
        kind = kind.removesuffix(HANG)
        if kind == "redis":
            return self._redis_pids()
        state = status.read(self.run.path)
        actors = state.actors if state else []
        return {a.pid for a in actors if a.name.split("/")[0] == kind and _is_up(a)}

    def _victim(self, kind: str) -> int:
        """A living process of a kind, as soon as there is one."""
        deadline = time.monotonic() + RECOVERY_S
        while not (pids := {pid for pid in self.pids(kind) if _is_alive(pid)}):
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {kind} to kill: {self.tail()}")
            time.sleep(POLL_S)
        return random.choice(sorted(pids))

    def hurt(self, *kinds: str, then: str = "") -> Recovery:
        """Kill -9 one process of each kind at once, or stop it for good (`rollout_hang`), and wait
        until the run works again; a process of kind `then` is killed while it comes up, and another
        one, until the run has missed one.
        """
        pids = {kind: self._victim(kind) for kind in kinds}
        known = self.pids(then) if then == "rollout" else self._titled(then)
        num_deaths = self._num_deaths()
        for kind, pid in pids.items():
            os.kill(pid, signal.SIGSTOP if kind.endswith(HANG) else signal.SIGKILL)
        started = time.monotonic()
        while then and self._num_deaths() < num_deaths + 2:
            self.check()
            if time.monotonic() - started > RECOVERY_S:
                raise TimeoutError(f"no {then} that came up was missed: {self.tail()}")
            known |= self._kill_newcomer(then, known)
            self._wait_for_deaths(num_deaths + 2)
        commits = Commits(self.run.ledger)
        replaced_s = working_s = 0.0
        while not (replaced_s and working_s):
            self.check()
            now_s = time.monotonic() - started
            if now_s > RECOVERY_S:
                raise TimeoutError(f"no recovery from a killed {kinds}: {self.tail()}")
            if not replaced_s and all(map(self._is_replaced, pids, pids.values())):
                replaced_s = now_s
            if not working_s and commits.count() >= 2:
                working_s = now_s  # the first may have begun before the kill
            time.sleep(POLL_S)
        return Recovery("+".join(kinds) + (f">{then}" if then else ""), replaced_s, working_s)

    def _titled(self, kind: str) -> set[int]:
        """All its processes, those that are coming up included."""
        found: set[int] = set()
        for pid in self.processes() if kind else []:
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_text().startswith(TITLES[kind]):
                    found.add(pid)
        return found

    def _kill_newcomer(self, kind: str, known: set[int]) -> set[int]:
        """Who was killed; of rollout workers all that are there: the one that stood by may be
        coming up, and the newcomer be the next to stand by, which nobody would miss.
        """
        deadline = time.monotonic() + RECOVERY_S
        while not (new := self._titled(kind) - known):
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no new {kind} to kill: {self.tail()}")
            time.sleep(POLL_S)
        time.sleep(random.uniform(0.0, COMING_UP_S))
        killed = self._titled(kind) if kind == "rollout" else {max(new)}
        for pid in killed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return killed

    def _wait_for_deaths(self, count: int) -> None:
        ends_at = time.monotonic() + NOTICE_S
        while self._num_deaths() < count and time.monotonic() < ends_at:
            time.sleep(POLL_S)

    def _num_deaths(self) -> int:
        """That the run has noticed."""
        return [event.kind for event in self.run.read_events()].count("worker_died")

    def _is_replaced(self, kind: str, pid: int) -> bool:
        return any(other != pid and _is_alive(other) for other in self.pids(kind))

    def fill_disk(self) -> None:
        """Let the disk refuse the learner's next checkpoint, but not its smaller files, until the
        run has said so.
        """
        largest = max(path.stat().st_size for path in self.run.weights.glob("policy_*"))
        pids = {pid for pid in self.pids("learner") if _is_alive(pid)}
        limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
        for pid, (_, hard) in limits.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest + largest // 2, hard))
        deadline = time.monotonic() + RECOVERY_S
        while "checkpoint_failed" not in [event.kind for event in self.run.read_events()]:
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no save was refused: {self.tail()}")
            time.sleep(POLL_S)
        for pid, limit in limits.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)

    def kill_everything(self) -> None:
        """Kill -9 the launcher and every process that it or another of them has started."""
        deadline = time.monotonic() + END_S
        while (pids := [*self._redis_pids(), *self.processes()]) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)
        if self._process is not None:
            self._process.wait(END_S)

    def processes(self) -> list[int]:
        """All living processes of the run but Redis, orphans included, by their session."""
        found: list[int] = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[3]) in self._sessions and fields[0] != "Z":
                    found.append(int(path.parent.name))
        return found

    def leftovers(self, patience_s: float = 20.0) -> list[int]:
        """Processes that are still there a while after the run has ended."""
        deadline = time.monotonic() + patience_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return left

    def reconcile(self) -> Reconciliation:
        """The audit of the ended run, its buffer opened from disk."""
        with EmbeddedRedis(self.run.redis) as server:
            return reconcile(self.run, BufferReader(connect(server.url), self.run.buffer_id))

    def mean_reward(self, first: int, last: int) -> float:
        rows = [r for r in self.run.read_metrics() if first <= r["step"] <= last]
        values = [r["reward/mean"] for r in rows if "reward/mean" in r]
        return sum(values) / len(values)

    def _redis_pids(self) -> set[int]:
        try:
            client = redis.Redis.from_url(url_in(self.run.redis), socket_timeout=1.0)
            facts: Mapping[str, Any] = client.info("server")
            client.close()
        except (redis.RedisError, ConfigError):
            return set()
        return {int(facts["process_id"])}


def two_kinds() -> tuple[str, str]:
    """At random, of different processes."""
    first, second = (
        name + HANG * (random.random() < HANG_SHARE) for name in random.sample(PROCESSES, 2)
    )
    return first, second


def _is_up(actor: status.ActorStatus) -> bool:
    return actor.pid > 0 and actor.state in ("healthy", "stale")


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
