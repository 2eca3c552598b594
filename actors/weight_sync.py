"""Weights from the learner to the engines, in flight, and the probe that proves they arrived.

Invariant: an engine serves only weights under which it and the learner agree on the log-probs of
the beginnings of a few real sequences; one that drifts past `sync.probe_bound` is loaded once more,
then quarantined, named and, if another engine agrees, replaced. Called by the controller after each
optimizer step and by the fleet for a replaced worker.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.fleet import EventSink, RolloutFleet, Worker, WorkerState
from actors.probes import Probes
from actors.stages import within
from actors.weight_broadcast import WeightBroadcast
from actors.weight_sharing import WeightSharing
from cluster import published
from cluster.config import SyncSection
from cluster.errors import DeadlineError, StageError
from learners.group import LearnerGroup

logger = logging.getLogger(__name__)

Outcome = tuple[float, float | None]  # pause_s and probe error of a worker that serves


@dataclass(frozen=True)
class SyncReport:
    """One sync. `probe_error` is the largest mean |engine - learner| log-prob over engines, in
    nats; None when all of them had to be replaced. `hold_s` is until the learner is free again,
    `probe_s` what the probe took it and the slowest engine. `num_without_file` of the
    `num_engines` needed no file.
    """

    policy_version: int
    total_s: float
    hold_s: float
    pause_s: float
    probe_error: float | None
    probe_s: float
    num_engines: int
    num_without_file: int = 0

    def metrics(self) -> dict[str, float]:
        """Metric keys of docs/reference.md; a probe that was not made has none."""
        metrics = {
            "sync/total_s": self.total_s,
            "sync/hold_s": self.hold_s,
            "sync/pause_s": self.pause_s,
        }
        if self.probe_error is None:
            return metrics
        return metrics | {"sync/probe_error": self.probe_error, "sync/probe_s": self.probe_s}


class WeightSync:
    """Brings a version to every serving engine, by broadcast or shared memory if so configured and
    by file where there is none or it failed, probes, and only then publishes it.
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
        self._transfer: WeightBroadcast | WeightSharing | None = None
        if config.transport == "broadcast":
            self._transfer = WeightBroadcast(config, learner, fleet.engine_size, on_event)
        elif config.transport == "shared":
            self._transfer = WeightSharing(config, learner, on_event)
        self.probes = Probes(prompts, context_length)
        self._probe_s = 0.0  # of the slowest engine in this sync
        self._published: tuple[Path, int] | None = None
        self._lock = asyncio.Lock()
        fleet.catch_up = self.catch_up

    async def sync(self, policy_version: int, is_sent: asyncio.Event | None = None) -> SyncReport:
        """Bring every serving engine to `policy_version`; `StageError` when none is left that
        agrees. `is_sent` is set when nothing more is asked of the learner.
        """
        started = time.monotonic()
        await self._learner.rest()
        async with self._lock:
            path = self._directory / f"policy_{policy_version:08d}.safetensors"
            self._directory.mkdir(parents=True, exist_ok=True)  # whoever may have removed it
            workers = [(w, w.handle) for w in self._fleet.serving]
            sent = await self._send([w for w, _ in workers], policy_version)
            self._probe_s, began = 0.0, time.monotonic()
            await self.probes.renew(self._learner)
            scoring_s = time.monotonic() - began
            taking = asyncio.create_task(self._take_all(workers, sent, policy_version))
            try:
                await self._learner.export_weights(path)
            except BaseException:  # who catches up takes the version before, measured by its own
                taking.cancel()
                await asyncio.wait([taking])
                self.probes.restore()
                raise
            self._published = (path, policy_version)
            hold_s = time.monotonic() - started
            if is_sent is not None:
                is_sent.set()
            proven = await taking
            results = await asyncio.gather(
                *[
                    self._catch_up(worker, handle, how, outcome)
                    for (worker, handle), how, outcome in zip(workers, sent, proven, strict=True)
                ]
            )
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
            hold_s=hold_s,
            pause_s=max(pause for pause, _ in done),
            probe_error=max((e for _, e in done if e is not None), default=None),
            probe_s=scoring_s + self._probe_s,
            num_engines=len(done),
            num_without_file=sum(outcome is not None for outcome in proven),
        )

    async def _send(
        self, workers: Sequence[Worker], policy_version: int
    ) -> Sequence[float | StageError | None]:
        """What the broadcast came to for each worker; None where there is none."""
        if self._transfer is None or not workers:
            return [None] * len(workers)
        for worker in workers:
            worker.state = WorkerState.STALE
        return await self._transfer.send(workers, policy_version)

    async def _take_all(
        self,
        workers: Sequence[tuple[Worker, Any]],
        sent: Sequence[float | StageError | None],
        policy_version: int,
    ) -> Sequence[Outcome | None]:
        """What became of each; those that can serve do not wait for the file."""
        proven = await asyncio.gather(
            *[self._take(w, s, policy_version) for (w, _), s in zip(workers, sent, strict=True)]
        )
        await self._fleet.notify()
        return proven

    async def _take(
        self, worker: Worker, sent: float | StageError | None, policy_version: int
    ) -> Outcome | None:
        """Let a worker serve what it has been sent; None when it still needs the file."""
        if not isinstance(sent, float) or worker.is_in_repair:
            return None
        try:
            error = await self._prove(worker, policy_version)
        except StageError as failure:
            logger.warning("%s did not answer after a broadcast: %s", worker.name, failure)
            return None
        return (sent, error) if self._is_close(error) else None

    async def _catch_up(
        self, worker: Worker, handle: Any, sent: float | StageError | None, proven: Outcome | None
    ) -> Outcome | None:
        """By file, unless it serves already or can no more be asked."""
        if proven is not None or isinstance(sent, DeadlineError) or worker.handle is not handle:
            return proven
        return proven if worker.is_in_repair else await self._bring_up(worker)

    async def _wait_for_one(self, policy_version: int) -> Outcome:
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

    async def _bring_up(self, worker: Worker) -> Outcome | None:
        """Load the file; None when the worker was lost or quarantined."""
        assert self._published is not None
        path, policy_version = self._published
        error: float | None = None
        worker.state = WorkerState.STALE
        for _ in range(2):
            try:
                pause_s = await self._call(
                    worker, "load_weights", {"path": str(path)}, policy_version
                )
                error = await self._prove(worker, policy_version)
            except StageError as failure:
                logger.warning("%s was lost in a weight sync: %s", worker.name, failure)
                return None
            if self._is_close(error):
                return pause_s, error
        worker.state = WorkerState.QUARANTINED
        self._on_event(
            "engine_quarantined",
            actor=worker.name,
            policy_version=policy_version,
            probe_error=error,
            bound=self._config.probe_bound,
        )
        return None

    async def _prove(self, worker: Worker, policy_version: int) -> float | None:
        """The probe error of a worker, which serves from now on if that is within the bound."""
        error = await self._probe(worker)
        if self._is_close(error):
            worker.state = WorkerState.HEALTHY
            worker.policy_version = policy_version
        else:
            logger.warning(
                "%s disagrees with the learner by %.4f nat a token after sync %d",
                worker.name, error, policy_version,
            )  # fmt: skip
        return error

    def _is_close(self, probe_error: float | None) -> bool:
        return probe_error is None or probe_error <= self._config.probe_bound

    async def _probe(self, worker: Worker) -> float | None:
        """Mean |engine - learner| log-prob over all probe tokens, in nats; None without probes."""
        if not self.probes.sequences:
            return None
        started = time.monotonic()
        measured = await self._call(worker, "score", self.probes.sequences)
        self._probe_s = max(self._probe_s, time.monotonic() - started)
        return self.probes.error(measured)

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
        paths = list(self._directory.glob("policy_*.safetensors"))
        paths.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in paths[: -published.KEEP_FILES]:
            path.unlink(missing_ok=True)
