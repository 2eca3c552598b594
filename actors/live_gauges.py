"""What Prometheus sees of a run between two optimizer steps: stages, actors, drops, bounds.

Invariant: set from the same `RunStatus` that `hone status` shows, so a dashboard and the terminal
never disagree; the values of a finished step come from `cluster.metrics`. Scraped from Ray's
exporter as `ray_hone_*`. Owned by the observer.
"""

from collections import Counter
from collections.abc import Mapping

from ray.util.metrics import Gauge

from actors.bookkeeping import SKIPPED, TOO_OLD
from cluster.config import Config
from cluster.status import RunStatus

# Shown as 0 from the start: a rate needs the value before the first drop.
DROP_REASONS = ("uniform", "unscored", TOO_OLD, SKIPPED)
STATES = ("starting", "stale", "healthy", "asleep", "quarantined", "dead")


class LiveGauges:
    """Gauges with a label `run`; times in seconds."""

    def __init__(self, config: Config, run: str) -> None:
        self._run = run
        self._waiting = _gauge("stage_waiting_s", "How long the stage has waited", "stage")
        self._busy = _gauge("stage_busy_fraction", "Share of time the stage worked", "stage")
        self._actors = _gauge("actors", "Actors by role and state", "role", "state")
        self._dropped = _gauge("groups_dropped", "Groups not trained on, by reason", "reason")
        self._step = _gauge("live_step", "Optimizer steps so far")
        self._bound = _gauge("bound", "Settings that alerts compare with", "key")
        self._bounds = {
            "max_policy_age": config.rollout.max_policy_age,
            "groups_per_step": config.rollout.groups_per_step,
            "probe_bound": config.sync.probe_bound,
        }

    def publish(self, status: RunStatus, drops: Mapping[str, int]) -> None:
        """Set everything to the state that `status` shows; `drops` counts since the start."""
        self._step.set(status.step, self._tags())
        for key, value in self._bounds.items():  # Ray forgets a series that nobody sets again
            self._bound.set(value, self._tags(key=key))
        for stage in status.stages:
            waits = stage.waiting_for and status.phase == "training"  # a long start is no stall
            waited_s = stage.since_s if waits else 0.0
            self._waiting.set(waited_s, self._tags(stage=stage.name))
            self._busy.set(stage.busy_fraction, self._tags(stage=stage.name))
        counts = Counter((actor.name.split("/")[0], actor.state) for actor in status.actors)
        for role in {role for role, _ in counts}:
            for state in STATES:
                self._actors.set(counts[role, state], self._tags(role=role, state=state))
        for reason in {*DROP_REASONS, *drops}:
            self._dropped.set(drops.get(reason, 0), self._tags(reason=reason))

    def _tags(self, **labels: str) -> dict[str, str]:
        return {"run": self._run, **labels}


def _gauge(name: str, description: str, *labels: str) -> Gauge:
    return Gauge(f"hone_{name}", description, tag_keys=("run", *labels))
