"""What a person sees of a run: phase, metrics, events, samples, status file, watchdog.

Invariant: watching never changes the run: nothing here is awaited by the loop for longer than a
file write, a file that cannot be written (a full disk) costs its line and one warning, and a
tracker that fails is dropped by `cluster.metrics`. Owned by the controller.
"""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from actors.live_gauges import LiveGauges
from actors.stages import Stages
from cluster import log, redis_client, stacks, status, traces
from cluster.config import Config
from cluster.errors import StartLostError
from cluster.metrics import Metrics
from cluster.run_dir import RunDir, Sample, TokenColumns
from cluster.status import ActorStatus, RunStatus
from cluster.types import TrajectoryGroup

HISTORY = 120
STALL_AFTER_S = 60.0
AWAY_AFTER_S = 2.0  # Redis, until it is shown
logger = logging.getLogger(__name__)


class Observer:
    """Collects what happens and writes it into the run directory."""

    def __init__(self, config: Config, run: RunDir, stages: Stages) -> None:
        self._config = config
        self._run = run
        self._stages = stages
        self._metrics = Metrics(run, list(config.run.trackers), run.name)
        self._started_at = time.time()
        self._phase = ("starting", "", 0.0, time.time())
        self._rewards: deque[float] = deque(maxlen=HISTORY)
        self._entropies: deque[float] = deque(maxlen=HISTORY)
        self._evals: list[tuple[int, float]] = []
        self._last: dict[str, float] = {}
        self._recent: deque[str] = deque(maxlen=6)
        self._drops: Counter[str] = Counter()
        self._is_stalled = False
        self._is_unwritable = False
        self._is_redis_away = False
        self._error = ""
        self._gauges = LiveGauges(config, run.name)

    def begin(self) -> None:
        """A controller takes the run up: `run_started`, or `resumed` where one did before it."""
        has_begun = any(event.kind == "run_started" for event in self._run.read_events())
        self.event("resumed" if has_begun else "run_started", run=self._run.name)

    def phase(self, name: str, detail: str, expected_s: float) -> None:
        """The run enters a phase that should take `expected_s` (0 = unknown)."""
        self._phase = (name, detail, expected_s, time.time())

    def progress(self, detail: str, expected_s: float) -> None:
        """News of the current phase; `expected_s` counts from its start, as before."""
        self._phase = (self._phase[0], detail, expected_s, self._phase[3])

    def event(self, kind: str, **fields: str | int | float) -> None:
        with self._sparing_the_run():
            self._run.append_event(kind, **fields)
        words = " ".join(f"{key}={value}" for key, value in fields.items())
        self._recent.append(f"{kind} {words}".strip())
        logger.info("%s %s", kind, words)

    def count_drop(self, reason: str) -> None:
        self._drops[reason] += 1

    def fail(self, error: Exception) -> None:
        """The run ends with `error`; it is in the status, the events and the log. But not with one
        after which the launcher starts all parts anew.
        """
        if isinstance(error, StartLostError):
            return
        self._error = str(error)
        self.phase("failed", "", 0.0)
        self.event("run_failed", error=self._error)

    def drain_stages(self) -> dict[str, float]:
        """Metrics of what each stage waited and worked since the last call."""
        metrics: dict[str, float] = {}
        for stage, (waited_s, busy_fraction) in self._stages.drain().items():
            metrics[f"time/wait_s/{stage}"] = waited_s
            metrics[f"{'learner' if stage == 'learn' else stage}/busy_fraction"] = busy_fraction
        return metrics

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """One row of `metrics.jsonl`, with all drops so far."""
        log.set_progress(step=step, policy_version=int(metrics.get("policy_version", 0)))
        row = dict(metrics)
        row["buffer/dropped"] = float(sum(self._drops.values()))
        for reason, count in self._drops.items():
            row[f"buffer/dropped/{reason}"] = float(count)
        with self._sparing_the_run():
            self._metrics.log(step, row)
        self._last = known = {key: value for key, value in row.items() if math.isfinite(value)}
        if "reward/mean" in known:
            self._rewards.append(known["reward/mean"])
        if "policy/entropy" in known:
            self._entropies.append(known["policy/entropy"])
        if "eval/pass@1" in known:
            self._evals.append((step, known["eval/pass@1"]))
            self._recent.append(f"held-out pass@1 {known['eval/pass@1']:.3f} at step {step}")
        elif "eval/pass@1" in row:
            self.event("eval_without_verdict", step=step)

    def choose(self, groups: list[TrajectoryGroup]) -> list[tuple[TrajectoryGroup, int]]:
        """The best and the worst trajectories of these groups, as (group, index)."""
        known = [
            (group, index)
            for group in groups
            for index, trajectory in enumerate(group.trajectories)
            if trajectory.reward is not None
        ]
        ranked = sorted(known, key=lambda pair: pair[0].rewards[pair[1]] or 0.0)
        count = self._config.run.samples_per_step
        low = ranked[: count // 2]
        return ranked[len(low) :][::-1][: count - len(low)] + low

    def samples(
        self, step: int, chosen: list[tuple[TrajectoryGroup, int]], tokens: list[TokenColumns]
    ) -> None:
        """Keep trajectories as a person would read them, and their tokens with what the learner
        thought of each.
        """
        with self._sparing_the_run():
            for (group, index), columns in zip(chosen, tokens, strict=True):
                trajectory = group.trajectories[index]
                self._run.append_sample(
                    Sample(
                        step=step,
                        group_id=group.group_id,
                        task_id=group.task.task_id,
                        prompt="\n".join(m.content for m in group.task.messages),
                        completion=trajectory.text,
                        reward=trajectory.reward,
                        reference=group.task.reference,
                        status=str(trajectory.status),
                        policy_version=(
                            trajectory if trajectory.version_spans else group
                        ).min_policy_version,
                        verdicts=trajectory.verdicts,
                        tokens=columns,
                    )
                )

    def publish(self, step: int, policy_version: int, actors: list[ActorStatus]) -> None:
        """Replace `status.json`, and notice stages that stand still."""
        stages = self._stages.statuses()
        phase, detail, expected_s, phase_started_at = self._phase
        away_s = self._redis_away_s()
        if away_s > 0:
            detail = (
                f"waiting for Redis, {away_s // 10 * 10:.0f} s of {redis_client.OUTAGE_S:.0f} s"
            )
        if phase == "training":
            with self._sparing_the_run():
                self._watch(stages)
        state = RunStatus(
            run=self._run.name,
            phase=phase,
            phase_detail=detail,
            phase_expected_s=expected_s,
            phase_started_at=phase_started_at,
            started_at=self._started_at,
            updated_at=time.time(),
            step=step,
            steps=self._config.run.steps,
            policy_version=policy_version,
            tokens_per_s=self._last.get("rollout/tokens_per_s", 0.0),
            policy_age=self._last.get("policy_age/mean", 0.0),
            buffer_depth=int(self._last.get("buffer/depth", 0)),
            groups_dropped=sum(self._drops.values()),
            reward_history=list(self._rewards),
            entropy_history=list(self._entropies),
            eval_history=self._evals,
            stages=stages,
            actors=actors,
            last_events=list(self._recent),
            error=self._error,
        )
        with self._sparing_the_run():
            status.write(self._run.path, state)
        self._gauges.publish(state, self._drops)

    def close(self) -> None:
        self._metrics.close()
        traces.close()

    def _redis_away_s(self) -> float:
        """0 while it answers; its going and its coming back are events."""
        away_s = redis_client.waited_s()
        away_s = away_s if away_s > AWAY_AFTER_S else 0.0
        if bool(away_s) != self._is_redis_away:
            self._is_redis_away = bool(away_s)
            self.event("redis_lost" if away_s else "redis_back")
        return away_s

    @contextmanager
    def _sparing_the_run(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._is_unwritable:
                logger.warning("%s cannot be written, training goes on: %s", self._run, error)
            self._is_unwritable = True

    def _watch(self, stages: list[status.StageStatus]) -> None:
        """Name the stage that holds the learner up, and dump all stacks, once per stall."""
        learn = next(s for s in stages if s.name == "learn")
        bound_s = STALL_AFTER_S if learn.waiting_for else self._config.learner.timeout_s / 2
        was_stalled = self._is_stalled
        self._is_stalled = learn.since_s >= bound_s
        if not self._is_stalled or was_stalled:
            return
        busy = [s for s in stages if not s.waiting_for]
        culprit = max(busy, key=lambda s: s.since_s).name if busy else "dispatch"
        held = [f"{s.name}: {s.waiting_for or 'busy'} {s.since_s:.0f} s" for s in stages]
        files = [stacks.dump_tasks(self._run.path), *stacks.dump(self._run.path)]
        self.event(
            "stalled",
            stage=culprit,
            waiting_for=learn.waiting_for,
            stages="; ".join(held),
            stacks=str(files[0].parent),
            num_stacks=len(files),
        )
