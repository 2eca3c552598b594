"""The conductor of a run: dispatch, score, learn, sync.

    admit ──> rollout ──> score ──> replay buffer ──> learn ──> sync ──┐
      ^                                                                │
      └──────────────── slots come back when engines hold the weights ─┘

Two loops, dispatch and learn, and a task per group between them; the slots bound what is under way.
While engines take over the weights of a step, the learner takes in groups of the next one; an
evaluation and a save have their place between two steps.

Invariant: a slot is taken per admitted group and given back once, after the sync of the step that
consumed the group or when it was dropped with a reason. A lost learner and a resumed run take the
same way: become the writer, go back to the last durable state, go on. One Ray actor per run; any
`if` about policy is in staleness, curriculum, intake, supervisor, fleet or weight_sync.
"""

import asyncio
import os
import time

from actors.bookkeeping import SKIPPED, Bookkeeping
from actors.bring_up import Parts, bring_up
from actors.checkpointing import Checkpointing
from actors.dispatch import Dispatch
from actors.gathering import Gathering
from actors.held_out import HeldOut
from actors.observer import Observer
from actors.stages import Stages
from actors.staleness import StalenessPolicy
from actors.statistics import RolloutStatistics
from actors.supervisor import Supervisor
from actors.weight_sync import SyncReport
from cluster import log
from cluster.config import Config
from cluster.errors import HoneError, LearnerLostError, StageError
from cluster.run_dir import RunDir
from cluster.status import ActorStatus

STATUS_EVERY_S = 0.5


class Controller:
    """Runs one training run from start to end; see the diagram above."""

    def __init__(self, config: Config, run_path: str, buffer_url: str) -> None:
        log.setup("controller", run_path)
        self._config = config
        self._run = RunDir(run_path)
        self._url = buffer_url
        self._stages = Stages(["dispatch", "rollout", "score", "learn", "sync", "eval"])
        self._stopping = asyncio.Event()
        self._statistics = RolloutStatistics()
        self._observer = Observer(config, self._run, self._stages)
        self._books = Bookkeeping(config, self._run, buffer_url)
        self._supervisor = Supervisor()
        self._checkpoints = Checkpointing(
            self._books.store, self._books.buffer, self._supervisor, self._observer.event
        )
        self._held_out = HeldOut(config, self._stages, self._observer, self._stopping)
        self._slots = StalenessPolicy(config.max_groups_in_flight)
        parts = self._books, self._stages, self._slots, self._supervisor, self._statistics
        self._dispatch = Dispatch(config, *parts, self._drop)
        waits = self._stages, self._stopping, self._drop, self._dispatch.producing
        self._gathering = Gathering(config, self._books, *waits)
        self._starting: asyncio.Task[Parts] | None = None
        self._parts: Parts | None = None
        self._is_over = False

    async def run(self) -> int:
        """Train to `run.steps` or until `stop`; returns the number of steps taken."""
        publisher = asyncio.create_task(self._publish())
        self._observer.begin()
        try:
            await self._train()
            self._observer.phase("finished", "", 0.0)
            outcome = "interrupted" if self._stopping.is_set() else "done"
            self._observer.event("run_finished", step=self._books.step, outcome=outcome)
        except Exception as error:
            self._observer.fail(error)
            raise (
                error if isinstance(error, HoneError) else StageError("run", repr(error))
            ) from error
        finally:
            if self._parts is not None:
                await self._parts.stop()
            publisher.cancel()
            self._publish_once()
            self._books.close()
            self._observer.close()
        if not self._stopping.is_set():
            await self._books.let_buffer_expire()
        return self._books.step

    async def stop(self) -> None:
        """Finish what cannot be left half done, save, and end."""
        self._observer.phase("stopping", "saving the state", 5.0)
        self._stopping.set()
        if self._parts is None and self._starting is not None:
            self._starting.cancel()

    async def _train(self) -> None:
        await self._books.take_over()
        self._starting = asyncio.create_task(
            bring_up(self._config, self._run, self._url, self._books.has_checkpoint, self._observer)
        )
        try:
            self._parts = parts = await self._starting
        except asyncio.CancelledError:
            return
        parts.buffered.on_drop = self._drop
        lost: LearnerLostError | None = None
        while not self._is_over:
            try:
                if lost is not None:
                    await self._start_learner_anew(parts, lost)
                await self._go(parts)
            except LearnerLostError as error:
                step, has_checkpoint = self._books.step, self._books.has_checkpoint
                self._supervisor.learner_lost(error, step=step, has_checkpoint=has_checkpoint)
                lost = error

    async def _go(self, parts: Parts) -> None:
        """From the last durable state to the end of the run."""
        await self._begin(parts)
        if not self._stopping.is_set():
            await self._loop(parts)
        await self._save(parts, is_last=True)
        self._is_over = True

    async def _start_learner_anew(self, parts: Parts, lost: LearnerLostError) -> None:
        """Engines and reward workers live on; who still writes for the lost steps is fenced off."""
        self._observer.event(lost.event, actor="learner", cause=lost.reason[:300])
        self._observer.phase("recovering", "starting the learner anew", 15.0)
        await self._checkpoints.drop(parts.learner if lost.is_learner_well else None)
        parts.learner.shutdown()
        await self._books.take_over()
        await parts.learner.restart()
        self._observer.event("worker_restarted", actor="learner")

    async def _begin(self, parts: Parts) -> None:
        """Back to the last durable state, or make the first one; its weights to the engines."""
        parts.rewards.epoch = self._books.epoch
        parts.buffered.write_as(self._books.epoch)
        is_new = not self._books.has_checkpoint
        num_groups = await self._books.restore(parts.learner, parts.curriculum)
        await self._slots.reset()
        self._gathering.forget()
        self._statistics.drain()
        if is_new:
            await self._save(parts)
            await self._checkpoints.settle(parts.learner, should_wait=True)
        else:
            self._observer.event("restored", step=self._books.step, num_groups=num_groups)
        self._observer.phase("starting", "first weight sync", 3.0)
        await self._sync(parts)
        if is_new:
            first = parts.warm_start | await self._measure(parts)
            self._observer.log_step(0, first | self._observer.drain_stages())
        self._observer.phase("training", "", 0.0)

    async def _loop(self, parts: Parts) -> None:
        """Dispatch runs beside learning; the first failure of either ends both."""
        try:
            async with asyncio.TaskGroup() as group:
                self._dispatch.start(parts, group)
                await group.create_task(self._learn(parts, group))
                self._dispatch.stop()
        except* HoneError as failures:
            errors = failures.exceptions
            raise min(errors, key=lambda e: isinstance(e, LearnerLostError)) from None

    async def _drop(self, group_ids: list[str], reason: str, detail: str = "") -> None:
        """These groups will not be trained on: say why, and free their slots."""
        for group_id in group_ids:
            self._observer.count_drop(reason)
            self._books.note_dropped(group_id, reason, detail)
        if self._parts is not None:
            await self._slots.release(self._parts.curriculum.settle(group_ids))

    async def _learn(self, parts: Parts, group: asyncio.TaskGroup) -> None:
        """One optimizer step per `groups_per_step` groups, until the end."""
        syncing: asyncio.Task[SyncReport] | None = None  # of the step before
        closing: asyncio.Task[None] | None = None
        while self._books.step < self._config.run.steps:
            started = time.monotonic()
            try:
                headers = await self._gathering.step(parts.learner, parts.curriculum)
            except LearnerLostError:
                if syncing is not None:  # it needs no learner any more, and engines need its end
                    with self._stages.wait("learn", "weight sync"):
                        await asyncio.wait([syncing])
                raise
            if closing is not None:
                with self._stages.wait("learn", "weight sync"):
                    await closing
            if self._stopping.is_set():
                await self._books.release(headers)
                return
            result = await parts.learner.optim_step()
            ages = [self._books.policy_version - h.min_policy_version for h in headers]
            is_skipped = result.policy_version == self._books.policy_version
            if is_skipped:
                self._observer.event("step_skipped", step=result.step, num_groups=len(headers))
                for header in headers:
                    self._observer.count_drop(SKIPPED)
                    self._books.note_dropped(header.group_id, SKIPPED, "")
            shown = await self._books.commit(headers, result)
            self._supervisor.step_skipped() if is_skipped else self._supervisor.step_made()
            num_slots = parts.curriculum.settle([header.group_id for header in headers])
            parts.curriculum.end_step(header.passes for header in headers)
            parts.sync.probes.choose(shown)
            chosen = self._observer.choose(shown)
            self._observer.samples(result.step, chosen, await parts.learner.inspect(chosen))
            is_sent = asyncio.Event()
            syncing = group.create_task(self._sync(parts, is_sent))
            metrics = result.metrics | {
                "policy_version": result.policy_version,
                "policy_age/mean": sum(ages) / len(ages),
                "policy_age/max": max(ages),
                "buffer/depth": await self._books.depth(),
            }
            may_go_on = self._may_go_on(result.step)
            with self._stages.wait("learn", "weight sync"):
                await (is_sent.wait() if may_go_on else syncing)
            metrics["time/step_s"] = time.monotonic() - started
            if may_go_on:  # what comes now is of the next step
                metrics |= self._statistics.drain() | self._observer.drain_stages()
            closing = group.create_task(
                self._close_step(parts, result.step, metrics, syncing, num_slots)
            )
            if not may_go_on:
                await closing

    def _may_go_on(self, step: int) -> bool:
        """Whether the next step may begin while engines still take over the weights of this one."""
        is_async = self._config.rollout.max_policy_age > 0
        return is_async and not self._is_measured(step) and not self._is_saved(step)

    def _is_measured(self, step: int) -> bool:
        return step >= self._config.run.steps or step % self._config.eval.every == 0

    def _is_saved(self, step: int) -> bool:
        return step < self._config.run.steps and step % self._config.run.checkpoint_every == 0

    async def _sync(self, parts: Parts, is_sent: asyncio.Event | None = None) -> SyncReport:
        try:
            with self._stages.busy("sync"):
                report = await parts.sync.sync(self._books.policy_version, is_sent)
        finally:
            if is_sent is not None:
                is_sent.set()  # also when it failed: whoever awaits this task is told how
        figures = {name.removeprefix("sync/"): v for name, v in report.metrics().items()}
        self._observer.event("sync", policy_version=report.policy_version, **figures)
        return report

    async def _close_step(
        self,
        parts: Parts,
        step: int,
        metrics: dict[str, float],
        syncing: asyncio.Task[SyncReport],
        num_slots: int,
    ) -> None:
        """Let further groups come when engines hold the weights; evaluate, log, save."""
        report = await syncing
        if step < self._config.run.steps:
            await self._slots.release(num_slots)
        metrics = metrics | report.metrics()
        if not self._may_go_on(step):
            metrics |= self._statistics.drain()
            if self._is_measured(step):
                with self._stages.wait("learn", "evaluation"):
                    metrics |= await self._measure(parts)
            metrics |= self._observer.drain_stages()
        self._observer.log_step(step, metrics)
        if self._is_saved(step):
            await self._save(parts)
        else:
            await self._checkpoints.settle(parts.learner)

    async def _measure(self, parts: Parts) -> dict[str, float]:
        return await self._held_out.measure(parts, self._books.step, self._books.policy_version)

    async def _save(self, parts: Parts, *, is_last: bool = False) -> None:
        """Start to make the present step durable; the last one is when this returns."""
        state = self._books.state(parts.curriculum.state(), parts.admin.versions)
        save = self._checkpoints.finish if is_last else self._checkpoints.begin
        await save(parts.learner, state)

    async def _publish(self) -> None:
        while True:
            self._publish_once()
            await asyncio.sleep(STATUS_EVERY_S)

    def _publish_once(self) -> None:
        actors = [ActorStatus(name="controller", state="healthy", pid=os.getpid())]
        if self._parts is not None:
            actors += self._parts.statuses(self._books.policy_version)
        self._observer.publish(self._books.step, self._books.policy_version, actors)
