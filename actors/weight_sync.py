"""Weights from the learner to the engines, in flight, and the probe that proves they arrived.

Invariant: an engine serves only weights under which it and the learner agree on the log-probs of
a few real sequences; one that drifts past `sync.probe_bound` is loaded once more, then quarantined,
named and, if another engine agrees, replaced. Called by the controller after each optimizer step
and by the fleet for a replaced worker.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actors.fleet import EventSink, RolloutFleet, Worker, WorkerState
from actors.stages import within
from cluster import published
from cluster.config import SyncSection
from cluster.errors import StageError
from cluster.types import TrajectoryGroup
from learners.group import LearnerGroup
from learners.learner import ScoreRequest

KEEP_FILES = 2
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncReport:
    """One sync. `probe_error` is the largest mean |engine - learner| log-prob over engines, in
    nats; None when `sync.probe_sequences` is 0.
    """

    policy_version: int
    total_s: float
    pause_s: float
    probe_error: float | None
    num_engines: int

    def metrics(self) -> dict[str, float]:
        """Metric keys of the contract; a probe that was not made has none."""
        metrics = {"sync/total_s": self.total_s, "sync/pause_s": self.pause_s}
        return (
            metrics
            if self.probe_error is None
            else metrics | {"sync/probe_error": self.probe_error}
        )


class WeightSync:
    """Publishes a version as a file, loads it into every serving engine, probes, and only then
    says so.
    """

    def __init__(
        self,
        config: SyncSection,
        learner: LearnerGroup,
        fleet: RolloutFleet,
        directory: Path,
        on_event: EventSink,
        *,
        context_length: int,
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self._config = config
        self._learner = learner
        self._fleet = fleet
        self._directory = directory
        self._on_event = on_event
        self._max_probe_tokens = context_length - 1  # an engine adds one token to what it scores
        self._probes: list[np.ndarray] = []
        self._expected: list[np.ndarray] = []
        self._published: tuple[Path, int] | None = None
        self._lock = asyncio.Lock()
        self._probe_with([np.asarray(prompt) for prompt in prompts])
        fleet.catch_up = self.catch_up

    def choose_probes(self, groups: list[TrajectoryGroup]) -> None:
        """Take sequences of real trajectories as the next probes, in place of those before, which
        were `prompts` at first; keeps them if there are none.
        """
        trajectories = [t for group in groups for t in group.trajectories if len(t.token_ids)]
        self._probe_with([np.concatenate([t.context_tokens, t.token_ids]) for t in trajectories])

    def _probe_with(self, sequences: list[np.ndarray]) -> None:
        step = max(1, len(sequences) // max(1, self._config.probe_sequences))
        chosen = sequences[::step][: self._config.probe_sequences]
        if chosen:
            self._probes = [tokens[: self._max_probe_tokens] for tokens in chosen]

    async def sync(self, policy_version: int) -> SyncReport:
        """Bring every serving engine to `policy_version`; `StageError` when none is left that
        agrees.
        """
        started = time.monotonic()
        async with self._lock:
            path = self._directory / f"policy_{policy_version:08d}.safetensors"
            self._directory.mkdir(parents=True, exist_ok=True)  # whoever may have removed it
            await self._learner.export_weights(path)
            if self._probes:
                requests = [ScoreRequest(probe.tolist(), num_context=1) for probe in self._probes]
                self._expected = await self._learner.score(requests)
            self._published = (path, policy_version)
            workers = [(w, w.handle) for w in self._fleet.serving]
            results = await asyncio.gather(*[self._bring_up(w) for w, _ in workers])
            self._forget_old()
        for worker, handle in workers:
            if worker.state not in (WorkerState.HEALTHY, WorkerState.QUARANTINED):
                self._fleet.bury(worker, handle, "was lost in a weight sync")
        await self._fleet.notify()
        done = [result for result in results if result is not None]
        if not done:
            done = [await self._wait_for_one(policy_version)]
        for worker, handle in workers:  # the fault is theirs: another engine agrees
            if worker.state is WorkerState.QUARANTINED:
                self._fleet.bury(worker, handle, "disagrees with the learner")
        published.announce(self._directory, policy_version, path)
        return SyncReport(
            policy_version=policy_version,
            total_s=time.monotonic() - started,
            pause_s=max(pause for pause, _ in done),
            probe_error=max((e for _, e in done if e is not None), default=None),
            num_engines=len(done),
        )

    async def _wait_for_one(self, policy_version: int) -> tuple[float, float | None]:
        """All engines are gone: wait until a replacement has caught up."""
        started = time.monotonic()
        if not self._fleet.has_hope:
            raise StageError("sync", f"no rollout engine holds policy version {policy_version}")
        await self._fleet.wait_for_healthy()
        return time.monotonic() - started, None

    async def catch_up(self, worker: Worker) -> None:
        """Bring one replaced worker to the current version; before the first there is none."""
        async with self._lock:
            if self._published is None:
                return
            result = await self._bring_up(worker)
        await self._fleet.notify()
        if result is None:
            raise StageError("sync", f"{worker.name} does not hold the current weights")

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _bring_up(self, worker: Worker) -> tuple[float, float | None] | None:
        """(pause_s, probe error) of a worker that now serves; None when it was lost or
        quarantined.
        """
        assert self._published is not None
        path, policy_version = self._published
        error: float | None = None
        worker.state = WorkerState.STALE
        for attempt in range(2):
            try:
                pause_s = await self._call(
                    worker, "load_weights", {"path": str(path)}, policy_version
                )
                error = await self._probe(worker)
            except StageError as failure:
                logger.warning("%s was lost in a weight sync: %s", worker.name, failure)
                return None
            if error is None or error <= self._config.probe_bound:
                worker.state = WorkerState.HEALTHY
                worker.policy_version = policy_version
                return pause_s, error
            logger.warning(
                "%s disagrees with the learner by %.4f nat a token after sync %d (try %d)",
                worker.name, error, policy_version, attempt + 1,
            )  # fmt: skip
        worker.state = WorkerState.QUARANTINED
        self._on_event(
            "engine_quarantined",
            actor=worker.name,
            policy_version=policy_version,
            probe_error=error,
            bound=self._config.probe_bound,
        )
        return None

    async def _probe(self, worker: Worker) -> float | None:
        """Mean |engine - learner| log-prob over all probe tokens, in nats; None without probes."""
        if not self._probes:
            return None
        measured = await self._call(worker, "score", self._probes)
        return float(np.abs(np.concatenate(measured) - np.concatenate(self._expected)).mean())

    async def _call(self, worker: Worker, method: str, *arguments: object):
        return await within(
            getattr(worker.handle, method).remote(*arguments),
            stage="sync",
            what=f"{worker.name} to {method}",
            deadline_s=self._config.timeout_s,
            knob="sync.timeout_s",
        )

    def _forget_old(self) -> None:
        """By age, not by number: a version number comes back when lost steps are repeated."""
        paths = self._directory.glob("policy_*.safetensors")
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)[:-KEEP_FILES]:
            path.unlink(missing_ok=True)
