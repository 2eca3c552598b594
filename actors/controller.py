"""The conductor of a run: dispatch, score, learn, sync.

    admit ──> rollout ──> score ──> replay buffer ──> learn ──> sync ──┐
      ^                                                                │
      └──────────────── slots come back when engines hold the weights ─┘

Two loops, dispatch and learn, and a task per group between them: the slots bound what is under way,
so no queue is needed, and a sync or an evaluation has its place in the step that it belongs to.

Invariant: a slot is taken per admitted group and given back once, after the sync of the step that
consumed the group or when it was dropped with a reason. A lost learner and a resumed run take the
same way: become the writer, go back to the last durable state, go on. One Ray actor per run,
created by `actors.train`; anything with an `if` about policy lives in staleness, curriculum,
intake, supervisor, fleet or weight_sync.
"""

import asyncio
import os
import time

from actors.bookkeeping import SKIPPED, Bookkeeping
from actors.bring_up import Parts, bring_up
from actors.checkpointing import Checkpointing
from actors.gathering import Gathering
from actors.held_out import HeldOut
from actors.observer import Observer
from actors.producer import Producer
from actors.rollout import RolloutRequest
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
from cluster.types import StepResult

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
        self._gathering = Gathering(config, self._books, self._stages, self._stopping, self._drop)
        self._slots = StalenessPolicy(config.max_groups_in_flight)
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
                has_checkpoint = self._books.has_checkpoint
                self._supervisor.learner_lost(error, has_checkpoint=has_checkpoint)
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
        self._observer.event("worker_died", actor="learner", cause=lost.reason[:300])
        self._observer.phase("recovering", "starting the learner anew", 15.0)
        parts.learner.shutdown()
        await self._checkpoints.drop()
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
            self._observer.log_step(0, parts.warm_start | await self._measure(parts))
        self._observer.phase("training", "", 0.0)

    async def _loop(self, parts: Parts) -> None:
        """Dispatch runs beside learning; the first failure of either ends both."""
        try:
            async with asyncio.TaskGroup() as group:
                producers: set[asyncio.Task[None]] = set()
                dispatch = group.create_task(self._dispatch(parts, group, producers))
                await group.create_task(self._learn(parts))
                for task in (dispatch, *producers):
                    task.cancel()
        except* HoneError as failures:
            errors = failures.exceptions
            raise min(errors, key=lambda e: isinstance(e, LearnerLostError)) from None

    async def _dispatch(
        self, parts: Parts, group: asyncio.TaskGroup, producers: set[asyncio.Task[None]]
    ) -> None:
        """Admit one group per free slot."""
        program = self._config.rollout.program
        producer = Producer(program, parts.fleet, parts.rewards, self._stages)
        while True:
            with self._stages.wait("dispatch", "a free slot (rollout.max_policy_age)"):
                await self._slots.admit()
            request = parts.curriculum.next(self._books.policy_version)
            task = group.create_task(self._produce(parts, producer, request))
            producers.add(task)
            task.add_done_callback(producers.discard)

    async def _produce(self, parts: Parts, producer: Producer, request: RolloutRequest) -> None:
        """One group from task to buffer; a dropped group frees its slot at once."""
        group_id = request.group_id
        if parts.curriculum.is_held(group_id):
            return
        try:
            production = await producer.produce(request)
        except HoneError as error:
            reason = self._supervisor.group_failed(error)
            await self._drop([group_id], reason, str(error))
            return
        self._supervisor.group_made()
        self._statistics.add(production)
        summary = production.last
        self._books.note_scored(summary)
        known = [reward for reward in production.plain.rewards if reward is not None]
        if known:
            self._supervisor.group_scored()
            is_idle = summary.is_uniform and self._config.tasks.skip_uniform
            parts.curriculum.observe(is_idle, sum(known) / len(known))
        else:
            await asyncio.sleep(self._supervisor.group_unscored())
        is_known = summary.outcome == "duplicate" and await self._books.is_stored(group_id)
        if summary.outcome != "added" and not is_known:
            await self._drop([group_id], summary.outcome)

    async def _drop(self, group_ids: list[str], reason: str, detail: str = "") -> None:
        """These groups will not be trained on: say why, and free their slots."""
        for group_id in group_ids:
            self._observer.count_drop(reason)
            self._books.note_dropped(group_id, reason, detail)
        if self._parts is not None:
            await self._slots.release(self._parts.curriculum.settle(group_ids))

    async def _learn(self, parts: Parts) -> None:
        """One optimizer step per `groups_per_step` groups, until the end."""
        while self._books.step < self._config.run.steps:
            started = time.monotonic()
            headers = await self._gathering.step(parts.learner, parts.curriculum)
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
            parts.sync.choose_probes(shown)
            chosen = self._observer.choose(shown)
            self._observer.samples(result.step, chosen, await parts.learner.inspect(chosen))
            with self._stages.wait("learn", "weight sync"):
                report = await self._sync(parts)
            if result.step < self._config.run.steps:
                await self._slots.release(num_slots)
            await self._close_step(parts, ages, result, report, started)

    async def _sync(self, parts: Parts) -> SyncReport:
        with self._stages.busy("sync"):
            report = await parts.sync.sync(self._books.policy_version)
        figures = {n.removeprefix("sync/"): value for n, value in report.metrics().items()}
        self._observer.event("sync", policy_version=report.policy_version, **figures)
        return report

    async def _close_step(
        self,
        parts: Parts,
        ages: list[int],
        result: StepResult,
        report: SyncReport,
        started: float,
    ) -> None:
        """Evaluate, log, save."""
        is_last = result.step >= self._config.run.steps
        metrics = result.metrics | self._statistics.drain() | report.metrics()
        metrics |= {
            "policy_version": result.policy_version,
            "policy_age/mean": sum(ages) / len(ages),
            "policy_age/max": max(ages),
            "buffer/depth": await self._books.depth(),
            "time/step_s": time.monotonic() - started,
        }
        if is_last or result.step % self._config.eval.every == 0:
            with self._stages.wait("learn", "evaluation"):
                metrics |= await self._measure(parts)
        self._observer.log_step(result.step, metrics)
        if result.step % self._config.run.checkpoint_every == 0 and not is_last:
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
