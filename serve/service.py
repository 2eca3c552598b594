"""What one replica of the policy endpoint does: resolve a model name, answer, follow, guard.

Invariant: a request runs on a slot that stays its slot until it ends, and its answer names the
versions that sampled it. Weights and releases change in one task (`reconcile`), so decisions never
race with each other. The HTTP shape of it all is in `serve.http_api`.
"""

import asyncio
import logging
import os
import re
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import msgspec

from actors.openai_engine import Api, OpenAIEngine, Reply, Trace
from cluster.errors import HoneError, StageError
from cluster.run_dir import RunDir
from serve.api_errors import ApiError
from serve.endpoint_settings import EndpointSettings
from serve.engine_pool import EnginePool, Slot
from serve.guards import Outcome, Outcomes, eval_drop
from serve.release import Release
from serve.weight_library import WeightLibrary, Weights

NAME = "policy"
POLL_S = 0.2
GUARD_EVERY_S = 1.0
_MODEL = re.compile(rf"{NAME}(?:@(latest|0|[1-9]\d{{0,11}}))?")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A reply with the slot it came from; `stack` is closed when it was sent."""

    reply: Reply
    model: str
    trace: Trace
    policy_versions: list[int]
    stack: AsyncExitStack


class PolicyService:
    """Example: `answer = await service.answer("chat", body)`."""

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.home = RunDir(settings.home)
        run = self.home if settings.has_run else None
        files = self.home.weights.with_name(f"{self.home.weights.name}-endpoint") / str(os.getpid())
        self.library = WeightLibrary(run, files)
        self.release = Release(settings.home / "endpoint", self.home.append_event)
        self.outcomes = Outcomes(settings.guards)
        self.pool = EnginePool(self._start_engine, settings.max_engines, settings.policy_dir)
        self.last_problem = ""
        self._latest: Slot | None = None
        self._guarded_at = 0.0
        self._metrics: tuple[int, list[dict[str, float]]] = (0, [])  # file size, rows
        self._loop: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()

    async def open(self) -> None:
        """Start the first engine on the weights that `policy` means now."""
        await self.pool.open()
        state = self.release.state
        weights = self.library.newest()
        if not state.is_following and state.stable is not None:
            weights = await self.library.get(state.stable)
        elif weights is None:
            newest = self.library.newest_checkpoint()
            if newest is None:
                raise StageError("endpoint", "the run has published no weights and no checkpoint")
            weights = await self.library.get(newest)
        await self.pool.move(self.pool.stable, weights)
        self.release.note_stable(weights.policy_version)
        self._loop = asyncio.create_task(self._reconcile_forever())

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
        self.pool.close()
        self.library.close()

    async def is_healthy(self) -> bool:
        return await self.pool.is_alive() and not (self._loop is not None and self._loop.done())

    async def answer(self, api: Api, body: dict[str, Any]) -> Answer:
        """Run one request; raises `ApiError` when no engine can take it."""
        stack = AsyncExitStack()
        try:
            slot, model = await self._enter(str(body.get("model", "")), stack)
            trace = Trace()
            started = time.monotonic()
            version = slot.policy_version
            reply = await slot.engine.respond(api, body, model, trace)
            if reply.events is None:
                self._note(version, reply.status, trace, started)
            else:
                stack.callback(self._note, version, reply.status, trace, started)
            versions = trace.policy_versions or ([] if version is None else [version])
            return Answer(reply, model, trace, versions, stack)
        except BaseException:
            await stack.aclose()
            raise

    async def change(self, action: str, version: int | None, share: float, author: str) -> None:
        """One release action of the admin API, in force on return; raises `ApiError`."""
        async with self._changing:
            try:
                await self._change(action, version, share, author)
            except HoneError as error:
                raise ApiError(409, str(error), code="release_refused") from error

    async def reconcile(self) -> None:
        """Bring engines to what the release state and the run ask for, once."""
        async with self._changing:
            await self._follow()
            await self._keep_canary()
            if time.monotonic() - self._guarded_at >= GUARD_EVERY_S:
                self._guarded_at = time.monotonic()
                await self._guard()
            self.library.forget(self._reserved() | self.pool.held())

    async def _enter(self, model: str, stack: AsyncExitStack) -> tuple[Slot, str]:
        match = _MODEL.fullmatch(model)
        if match is None:
            raise ApiError(
                404, f"model {model[:80]!r} does not exist: use {NAME}, {NAME}@latest or "
                f"{NAME}@VERSION", code="model_not_found", param="model",
            )  # fmt: skip
        wanted = match[1]
        is_pinned = False
        if wanted is None:
            slot = await self._current()
        elif wanted == "latest":
            slot = await self._newest()
        else:
            is_pinned = True
            weights = await self.library.get(int(wanted))
            may_share = not self.release.state.is_following
            slot = await self.pool.exact(weights, self._reserved(), may_share_stable=may_share)
        stack.enter_context(slot.busy(is_pinned=is_pinned))
        return slot, f"{NAME}@{slot.policy_version}"

    async def _current(self) -> Slot:
        """The slot of `policy`: stable, or the canary when it is its turn."""
        canary = self.release.state.canary
        if canary is not None and self.release.is_canary_turn():
            for slot in self.pool.slots[1:]:
                if slot.policy_version == canary:
                    return slot
        return self.pool.stable

    async def _newest(self) -> Slot:
        """The slot of `policy@latest`: stable while it follows, else one that moves by itself."""
        newest = self.library.newest()
        if self.release.state.is_following or newest in (None, self.pool.stable.weights):
            return self.pool.stable
        if self._latest is None or self._latest.policy_version in self._reserved():
            self._latest = await self.pool.exact(newest, self._reserved(), may_share_stable=False)
        await self.pool.move(self._latest, newest)
        return self._latest

    def _reserved(self) -> set[int]:
        state = self.release.state
        return {version for version in (state.stable, state.canary) if version is not None}

    def _note(self, version: int | None, status: int, trace: Trace, started: float) -> None:
        if version is None or 400 <= status < 500:
            return
        elapsed = time.monotonic() - started
        token_s = elapsed / trace.num_output_tokens if trace.num_output_tokens else None
        has_failed = status >= 500 or trace.has_failed
        self.outcomes.add(version, Outcome(time.monotonic(), has_failed, token_s))

    async def _change(self, action: str, version: int | None, share: float, author: str) -> None:
        state, release = self.release.state, self.release
        if action == "follow":
            release.follow(author=author)
        elif action == "canary":
            weights = await self.library.get(_named(version))
            await self.pool.exact(weights, self._reserved(), may_share_stable=False)
            release.start_canary(weights.policy_version, share, author=author)
        elif action == "promote":
            chosen = version if version is not None else state.canary
            weights = await self.library.get(_named(chosen))
            await self.pool.move(self.pool.stable, weights)
            release.promote(weights.policy_version, author=author)
        elif state.canary is not None and version in (None, state.canary):
            release.roll_back(state.canary, state.stable, reason="asked for", author=author)
        else:
            target = _named(version if version is not None else (state.history or [None])[-1])
            bad = _named(self.pool.stable.policy_version)
            await self._return_to(target, bad=bad, reason="asked for", author=author)

    async def _return_to(self, target: int, *, bad: int, reason: str, author: str) -> None:
        weights = await self.library.get(target)
        await self.pool.move(self.pool.stable, weights)
        self.release.roll_back(bad, target, reason=reason, author=author)

    async def _follow(self) -> None:
        state, slot = self.release.state, self.pool.stable
        newest = self.library.newest()
        weights: Weights | None = None
        if state.is_following:
            weights = newest
            if newest is not None and newest.policy_version in state.refused:
                weights = None
        elif state.stable is not None and state.stable != slot.policy_version:
            weights = await self.library.get(state.stable)
        if weights is None or weights == slot.weights:
            return
        try:
            await self.pool.move(slot, weights)
        except StageError as error:
            self.release.refuse(weights.policy_version, reason=error.reason)
            return
        if state.is_following:
            self.release.note_stable(weights.policy_version)

    async def _keep_canary(self) -> None:
        """After a restart, or on another replica, the canary's engine has to be brought up."""
        canary = self.release.state.canary
        if canary is not None and canary not in {s.policy_version for s in self.pool.slots[1:]}:
            weights = await self.library.get(canary)
            await self.pool.exact(weights, self._reserved(), may_share_stable=False)

    async def _guard(self) -> None:
        """Roll back what the guards complain about."""
        state, guards = self.release.state, self.settings.guards
        suspect = state.canary if state.canary is not None else state.stable
        if suspect is None:
            return
        metrics = await self._read_metrics()
        drop = eval_drop(metrics, suspect, guards)
        is_judged = drop is not None and (state.is_following or drop.blamed == suspect)
        reason, blamed = "", suspect
        if drop is not None and is_judged and drop.blamed not in state.refused:
            reason, blamed = drop.reason, drop.blamed
        if not reason:
            reference = state.stable if state.canary is not None else None
            reason = self.outcomes.complaint(suspect, reference, time.monotonic())
            blamed = suspect
        if not reason:
            return
        if state.canary is not None:
            self.release.roll_back(suspect, state.stable, reason=reason, author="guard")
            return
        known = {version.policy_version for version in self.library.versions()}
        choices = [*([drop.best] if drop is not None else []), *reversed(state.history)]
        good = [v for v in choices if v in known and v < blamed and v not in state.refused]
        if good:
            await self._return_to(good[0], bad=blamed, reason=reason, author="guard")
        else:
            self._complain(f"policy@{suspect}: {reason}; no earlier version is kept")

    async def _read_metrics(self) -> list[dict[str, float]]:
        """Rows of the run's metrics; read again, beside the requests, when the file has grown."""
        file = self.home.metrics
        size = file.stat().st_size if self.settings.has_run and file.exists() else 0
        if size != self._metrics[0]:
            self._metrics = (size, await asyncio.to_thread(self.home.read_metrics))
        return self._metrics[1]

    def _complain(self, problem: str) -> None:
        if problem != self.last_problem:
            logger.warning("%s", problem)
            self.last_problem = problem

    async def _reconcile_forever(self) -> None:
        while True:
            try:
                await self.reconcile()
            except (HoneError, ApiError, OSError, msgspec.DecodeError) as error:
                self._complain(str(error))
            await asyncio.sleep(POLL_S)

    async def _start_engine(self) -> OpenAIEngine:
        """An engine loads in a thread: requests on the others go on."""
        engine = await asyncio.to_thread(OpenAIEngine, self.settings.engine)
        await engine.start()
        return engine


def _named(version: int | None) -> int:
    if version is None:
        raise ApiError(409, "there is no version to go to: name one", code="no_version")
    return version
