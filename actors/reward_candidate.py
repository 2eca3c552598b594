"""A rubric on trial: one actor that checks itself and scores beside the live one.

Invariant: whatever a candidate does (raise, hang, die), the run does not notice: its calls are
awaited by nobody who trains, and its failures are counted in its report. Owned by
`actors.reward_admin`; `actors.reward_pool` offers it live groups.
"""

import asyncio
import logging
from collections import deque
from statistics import quantiles
from typing import Any

import msgspec
import ray

from actors.reward_set import RewardHome, health_check
from actors.reward_worker import GroupSummary, RubricFacts
from actors.stages import within
from cluster.config import VerifierConfig
from cluster.errors import DeadlineError, HoneError
from cluster.types import Task

PREVIEW_TIMEOUT_S = 120.0
MAX_IN_FLIGHT = 4  # live groups beyond these are skipped and counted
MAX_FAILURES_IN_A_ROW = 3
MAX_LATENCIES = 1000  # the newest, for the percentiles
log = logging.getLogger(__name__)


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """How a candidate's verdicts compare with those of the live rubric on the same groups."""

    num_groups: int = 0
    num_skipped: int = 0  # groups that came while it was busy
    num_failed: int = 0  # groups that it could not score
    num_timeouts: int = 0  # of these: not within their deadline
    num_trajectories: int = 0  # both rubrics gave a reward
    num_disagree: int = 0  # of these: one rubric says passed, the other does not
    num_abstained: int = 0  # of the candidate
    num_abstained_live: int = 0
    mean_reward: float = 0.0
    mean_reward_live: float = 0.0
    mean_difference: float = 0.0  # mean |candidate - live|
    latency_p50_s: float = 0.0
    latency_p95_s: float = 0.0
    last_error: str = ""


class Tally:
    """Adds up pairs of summaries of the same group."""

    def __init__(self) -> None:
        self._num_pairs = 0
        self._sums = {"live": 0.0, "mine": 0.0, "difference": 0.0}
        self._latencies: deque[float] = deque(maxlen=MAX_LATENCIES)
        self._counts = {"groups": 0, "disagree": 0, "abstained": 0, "abstained_live": 0}
        self.num_skipped = 0
        self.num_failed = 0
        self.num_timeouts = 0
        self.last_error = ""

    @property
    def num_groups(self) -> int:
        return self._counts["groups"]

    def add(
        self, live: list[float | None], full_live: float, mine: list[float | None], full: float,
        latency_s: float,
    ) -> None:  # fmt: skip
        """Rewards of one group by both rubrics; passed is at least half of the full reward."""
        self._counts["groups"] += 1
        self._latencies.append(latency_s)
        for old, new in zip(live, mine, strict=True):
            self._counts["abstained"] += new is None
            self._counts["abstained_live"] += old is None
            if old is not None and new is not None:
                self._num_pairs += 1
                self._sums["live"] += old
                self._sums["mine"] += new
                self._sums["difference"] += abs(new - old)
                self._counts["disagree"] += (old >= full_live / 2) != (new >= full / 2)

    def result(self) -> Comparison:
        num_pairs, latencies = max(1, self._num_pairs), self._latencies or [0.0]
        cuts = (
            quantiles(latencies, n=20, method="inclusive") if len(latencies) > 1 else [*latencies]
        )
        return Comparison(
            num_groups=self.num_groups,
            num_skipped=self.num_skipped,
            num_failed=self.num_failed,
            num_timeouts=self.num_timeouts,
            num_trajectories=self._num_pairs,
            num_disagree=self._counts["disagree"],
            num_abstained=self._counts["abstained"],
            num_abstained_live=self._counts["abstained_live"],
            mean_reward=self._sums["mine"] / num_pairs,
            mean_reward_live=self._sums["live"] / num_pairs,
            mean_difference=self._sums["difference"] / num_pairs,
            latency_p50_s=cuts[len(cuts) // 2],
            latency_p95_s=cuts[-1],
            last_error=self.last_error,
        )


class Candidate:
    """One actor with a rubric that is not live."""

    def __init__(self, home: RewardHome, verifiers: dict[str, VerifierConfig]) -> None:
        self.verifiers = verifiers
        self.facts = RubricFacts(pid=0, hash="", signals={}, full_reward=0.0)
        self.tally = Tally()
        self.is_lost = False
        self._full_live = 0.0
        self._start_s = home.placement.config.resources.start_timeout_s
        self._home = home
        self._pools = home.pools("", verifiers)
        self._worker: Any = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures = 0

    async def start(self) -> RubricFacts:
        """Build the rubric in the new process. Raises `StageError` with what it said."""
        self._worker = self._home.worker(0, "", self.verifiers, await self._pools.start())
        self.facts = await self._ask("facts", self._start_s, "resources.start_timeout_s")
        return self.facts

    async def self_check(self, tasks: list[Task]) -> list[str]:
        """Refuses with `StageError` when a gold answer is not paid in full; returns warnings."""
        return await health_check(self._worker, tasks, True)

    async def preview(self, group: Any) -> GroupSummary:
        return await self._ask("preview", PREVIEW_TIMEOUT_S, "rewards.verifiers.*.timeout_s", group)

    def follow(self, full_live: float) -> None:
        """Take live groups from now on; `full_live` is the full reward of the live rubric."""
        self._full_live = full_live

    def offer(self, group: Any, live: GroupSummary) -> None:
        """Score a live group on the side, unless too many are under way. Never waits or raises."""
        if self.is_lost:
            return
        if len(self._tasks) >= MAX_IN_FLIGHT:
            self.tally.num_skipped += 1
            return
        task = asyncio.create_task(self._compare(group, live))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(self, group: Any, live: GroupSummary) -> None:
        try:
            mine = await self.preview(group)
        except HoneError as error:
            self._failures += 1
            self.tally.num_failed += 1
            self.tally.num_timeouts += isinstance(error, DeadlineError)
            self.tally.last_error = str(error)[:400]
            self.is_lost = self._failures >= MAX_FAILURES_IN_A_ROW
            return
        self._failures = 0
        self.tally.add(
            live.rewards, self._full_live, mine.rewards, self.facts.full_reward, mine.max_latency_s
        )

    async def _ask(self, method: str, deadline_s: float, knob: str, *arguments: Any) -> Any:
        return await within(
            getattr(self._worker, method).remote(*arguments),
            stage="candidate",
            what=f"the candidate to {method}",
            deadline_s=deadline_s,
            knob=knob,
        )

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._worker is not None:
            ray.kill(self._worker)
        self._pools.kill()
