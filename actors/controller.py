"""The conductor of a run: dispatch, score, learn, sync.

    admit ──> rollout ──> score ──> replay buffer ──> learn ──> sync ──┐
      ^                                                                │
      └──────────────── slots come back when engines hold the weights ─┘

Invariant: a slot is taken per admitted group and given back once, after the sync of the step that
consumed the group or when it was dropped with a reason. One Ray actor per run, created by
`actors.train`; anything with an `if` about policy lives in staleness, curriculum, fleet or
weight_sync.
"""

import asyncio
import time

from actors.bookkeeping import SKIPPED, TOO_OLD, Bookkeeping
from actors.bring_up import Parts, bring_up
from actors.evaluate import evaluate
from actors.observer import Observer
from actors.producer import Producer
from actors.rollout import RolloutRequest
from actors.stages import Stages
from actors.staleness import StalenessPolicy
from actors.statistics import RolloutStatistics
from actors.weight_sync import SyncReport
from cluster import log
from cluster.config import Config
from cluster.errors import HoneError, StageError
from cluster.run_dir import RunDir
from cluster.status import ActorStatus
from cluster.types import GroupHeader, StepResult

CLAIM_WAIT_S = 0.5
STATUS_EVERY_S = 0.5


class Controller:
    """Runs one training run from start to end; see the diagram above."""

    def __init__(self, config: Config, run_path: str, buffer_url: str, is_resumed: bool) -> None:
        log.setup("controller", run_path)
        self._config = config
        self._run = RunDir(run_path)
        self._url = buffer_url
        self._is_resumed = is_resumed
        self._stages = Stages(["dispatch", "rollout", "score", "learn", "sync", "eval"])
        self._statistics = RolloutStatistics()
        self._observer = Observer(config, self._run, self._stages)
        self._books = Bookkeeping(config, self._run, buffer_url)
        self._slots = StalenessPolicy(config.max_groups_in_flight)
        self._stopping = asyncio.Event()
        self._starting: asyncio.Task[Parts] | None = None
        self._parts: Parts | None = None

    async def run(self) -> int:
        """Train to `run.steps` or until `stop`; returns the number of steps taken."""
        publisher = asyncio.create_task(self._publish())
        kind = "resumed" if self._is_resumed else "run_started"
        self._observer.event(kind, run=self._run.name)
        try:
            await self._train()
            self._observer.phase("finished", "", 0.0)
            self._observer.event("run_finished", step=self._books.step, outcome=self._outcome)
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
            self._observer.close()
        return self._books.step

    async def stop(self) -> None:
        """Finish what cannot be left half done, save, and end."""
        self._observer.phase("stopping", "saving the state", 5.0)
        self._stopping.set()
        if self._parts is None and self._starting is not None:
            self._starting.cancel()

    @property
    def _outcome(self) -> str:
        return "interrupted" if self._stopping.is_set() else "done"

    async def _train(self) -> None:
        self._starting = asyncio.create_task(
            bring_up(
                self._config,
                self._run,
                self._url,
                self._is_resumed,
                self._observer,
            )
        )
        try:
            self._parts = parts = await self._starting
        except asyncio.CancelledError:
            return
        await self._begin(parts)
        if not self._stopping.is_set():
            await self._loop(parts)
        await self._save(parts)

    async def _begin(self, parts: Parts) -> None:
        """Back to the last state if there is one; first weights to the engines, first eval."""
        parts.buffered.on_drop = lambda ids, reason: self._drop(parts, ids, reason)
        if self._is_resumed:
            num_groups = await self._books.restore(parts.learner, parts.curriculum)
            self._observer.event("restored", step=self._books.step, num_groups=num_groups)
        self._observer.phase("starting", "first weight sync", 3.0)
        await self._sync(parts)
        if not self._is_resumed:
            metrics = parts.warm_start | await self._evaluate(parts)
            self._observer.log_step(0, metrics)
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
            raise failures.exceptions[0] from None

    async def _dispatch(
        self, parts: Parts, group: asyncio.TaskGroup, producers: set[asyncio.Task[None]]
    ) -> None:
        """Admit one group per free slot."""
        program = self._config.rollout.program
        producer = Producer(program, parts.fleet, parts.rewards, self._stages)
        while True:
            with self._stages.wait("dispatch", "a free slot (rollout.max_policy_age)"):
                await self._slots.admit()
            task = group.create_task(self._produce(parts, producer, parts.curriculum.next()))
            producers.add(task)
            task.add_done_callback(producers.discard)

    async def _produce(self, parts: Parts, producer: Producer, request: RolloutRequest) -> None:
        """One group from task to buffer; a dropped group frees its slot at once."""
        production = await producer.produce(request)
        self._statistics.add(production)
        summary = production.last
        known = [reward for reward in summary.rewards if reward is not None]
        parts.curriculum.observe(summary.is_uniform, sum(known) / max(1, len(known)))
        if summary.outcome not in ("added", "duplicate"):
            await self._drop(parts, [summary.group_id], summary.outcome)

    async def _drop(self, parts: Parts, group_ids: list[str], reason: str) -> None:
        """These groups will not be trained on: count why, and free their slots."""
        for _ in group_ids:
            self._observer.count_drop(reason)
        parts.curriculum.settle(group_ids)
        await self._slots.release(len(group_ids))

    async def _learn(self, parts: Parts) -> None:
        """Micro-batches start as groups arrive; one optimizer step per `groups_per_step` groups."""
        while self._books.step < self._config.run.steps:
            started = time.monotonic()
            headers: list[GroupHeader] = []
            while len(headers) < self._config.rollout.groups_per_step:
                missing = self._config.rollout.groups_per_step - len(headers)
                with self._stages.wait("learn", "scored groups"):
                    claim = await self._books.claim(missing, CLAIM_WAIT_S)
                await self._drop(parts, claim.too_old, TOO_OLD)
                headers += claim.headers
                if self._stopping.is_set():
                    await self._books.release(headers)
                    return
                if claim.headers:
                    await parts.learner.forward_backward(claim.headers)
            result = await parts.learner.optim_step()
            ages = [self._books.policy_version - h.min_policy_version for h in headers]
            if result.policy_version == self._books.policy_version:
                self._observer.event("step_skipped", step=result.step, num_groups=len(headers))
                for _ in headers:
                    self._observer.count_drop(SKIPPED)
            shown = await self._books.commit(headers, result)
            parts.curriculum.settle([header.group_id for header in headers])
            parts.sync.choose_probes(shown)
            chosen = self._observer.choose(shown)
            self._observer.samples(result.step, chosen, await parts.learner.inspect(chosen))
            with self._stages.wait("learn", "weight sync"):
                report = await self._sync(parts)
            await self._close_step(parts, ages, result, report, started)

    async def _sync(self, parts: Parts) -> SyncReport:
        with self._stages.busy("sync"):
            report = await parts.sync.sync(self._books.policy_version)
        self._observer.event(
            "sync",
            policy_version=report.policy_version,
            **{name.removeprefix("sync/"): value for name, value in report.metrics().items()},
        )
        return report

    async def _close_step(
        self,
        parts: Parts,
        ages: list[int],
        result: StepResult,
        report: SyncReport,
        started: float,
    ) -> None:
        """Free the slots, evaluate, log, save."""
        is_last = result.step >= self._config.run.steps
        if not is_last:
            await self._slots.release(len(ages))
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
                metrics |= await self._evaluate(parts)
        self._observer.log_step(result.step, metrics)
        if result.step % self._config.run.checkpoint_every == 0 and not is_last:
            await self._save(parts)

    async def _evaluate(self, parts: Parts) -> dict[str, float]:
        self._observer.phase("evaluating", f"held-out pass@1 at step {self._books.step}", 0.0)
        with self._stages.busy("eval"), parts.rewards.one_version() as score:
            result = await evaluate(
                parts.fleet,
                score,
                parts.eval_tasks,
                self._config.eval,
                parts.sampling,
                self._books.policy_version,
            )
        self._observer.phase("training", "", 0.0)
        return {"eval/pass@1": result.pass_at_1.value, "eval/pass@k": result.pass_at_k.value}

    async def _save(self, parts: Parts) -> None:
        path = await self._books.save(parts.learner, parts.curriculum, parts.admin.versions)
        if path:
            self._observer.event("checkpoint", step=self._books.step, path=path)

    async def _publish(self) -> None:
        while True:
            self._publish_once()
            await asyncio.sleep(STATUS_EVERY_S)

    def _publish_once(self) -> None:
        actors: list[ActorStatus] = []
        if self._parts is not None:
            learners = [
                ActorStatus(
                    name=f"learner/{rank}",
                    state="healthy",
                    policy_version=self._books.policy_version,
                    pid=pid,
                )
                for rank, pid in enumerate(self._parts.learner.pids)
            ]
            actors = self._parts.fleet.statuses() + self._parts.rewards.statuses() + learners
        self._observer.publish(self._books.step, self._books.policy_version, actors)
