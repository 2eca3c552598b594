"""What one replica of the policy endpoint does with a request: model name to engine to answer.

Invariant: a request runs on a slot that stays its slot until it ends, its answer names the versions
that sampled it, and a version is blamed only for what its engine did. A version or an engine that
cannot be had is 503 with Retry-After, one that hangs 504. Which version `policy` means is in
`serve.release_control`, the HTTP shape in `serve.http_api`.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from actors import engine_imports
from actors.openai_reply import Api, Reply, Trace
from actors.placement import EngineSettings
from cluster import status as run_status
from cluster.errors import HoneError, boundary
from cluster.run_dir import RunDir
from serve.api_errors import ApiError, too_late
from serve.endpoint_settings import EndpointSettings
from serve.engine_pool import BadWeightsError, EnginePool, Slot
from serve.engine_time import EngineTime
from serve.guards import Outcome
from serve.kept_versions import KeptVersions, Weights
from serve.release import Release
from serve.release_control import ReleaseControl
from serve.replica_folder import ReplicaFolder, sweep
from serve.status_view import ENDED
from serve.weight_library import WeightLibrary

if TYPE_CHECKING:
    from actors.openai_engine import OpenAIEngine

NAME = "policy"
POLL_S = 0.2
RETRY_S = 5.0
_MODEL = re.compile(rf"{NAME}(?:@(latest|0|[1-9]\d{{0,11}}))?")


@dataclass(frozen=True)
class Answer:
    """A reply with the slot it came from; `stack` is closed when it was sent."""

    reply: Reply
    policy_versions: list[int]
    stack: AsyncExitStack


@dataclass
class _Visit:
    """One request on its way: `slot` None until it has one."""

    trace: Trace
    clock: EngineTime = field(default_factory=EngineTime)
    started: float = field(default_factory=time.monotonic)
    slot: Slot | None = None
    entered_with: int = -1

    @property
    def version(self) -> int:
        """The newest that sampled a token of it, as far as that is known."""
        return max(self.trace.policy_versions, default=self.entered_with)


async def start_engine(settings: EngineSettings) -> "OpenAIEngine":
    """An engine loads in a thread: requests on the others go on."""
    with boundary("endpoint"):
        engine = await asyncio.to_thread(_load, settings)
        try:
            await engine.start()
        except BaseException:
            engine.shutdown()
            raise
    return engine


def _load(settings: EngineSettings) -> "OpenAIEngine":
    if not settings.is_gpu:
        engine_imports.prepare()
    from actors.openai_engine import OpenAIEngine

    return OpenAIEngine(settings)


class PolicyService:
    """Example: `answer = await service.answer("chat", body, Trace())`."""

    def __init__(
        self,
        settings: EndpointSettings,
        start: Callable[[EngineSettings], Awaitable["OpenAIEngine"]] = start_engine,
    ) -> None:
        self.settings = settings
        self.home = RunDir(settings.home)
        run = self.home if settings.has_run else None
        sweep(self.home)
        self._folder = ReplicaFolder(self.home)
        decided = settings.home / "endpoint"
        self.library = WeightLibrary(run, self._folder.path, KeptVersions(decided / "versions"))
        self.release = Release(decided, self.home.append_event)
        self.pool = EnginePool(
            lambda: start(settings.engine),
            settings.max_engines,
            settings.policy_dir,
            self.library.using,
        )
        self.control = ReleaseControl(
            self.home, self.release, self.library, self.pool, settings.guards
        )
        self._latest: Slot | None = None
        self._finding = asyncio.Lock()
        self._loop: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start the first engine on the weights that `policy` means now."""
        await self.pool.open()
        await self.control.open()
        self._loop = asyncio.create_task(self._reconcile_forever())

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.cancel()
        await self.pool.close()
        self._folder.close()

    async def is_healthy(self) -> bool:
        return await self.pool.is_alive() and not (self._loop is not None and self._loop.done())

    async def answer(self, api: Api, body: dict[str, Any], trace: Trace) -> Answer:
        """Run one request, and note in `trace` what it costs.

        Raises `ApiError` when no engine can take it (503) or none answered in `limits.deadline_s`
        (504).
        """
        stack, visit = AsyncExitStack(), _Visit(trace)
        deadline_s = self.settings.limits.deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                slot, version = await self._enter(str(body["model"]), stack)
                visit.slot, visit.entered_with = slot, version
                model = f"{NAME}@{version}"
                reply = await visit.clock.wait_for(slot.engine.respond(api, body, model, trace))
            if reply.events is not None:
                reply = replace(reply, events=visit.clock.timed(reply.events))
                stack.callback(self._note, visit, reply.status)
            else:
                self._note(visit, reply.status)
            if reply.status == 503 or (reply.status >= 500 and not await slot.engine.is_alive()):
                raise _unavailable(f"{model}: its engine takes no requests now")
            if reply.status == 200:  # a whole answer: all its versions are known
                reply.body["model"] = f"{NAME}@{visit.version}"
            return Answer(reply, trace.policy_versions or [version], stack)
        except BaseException as error:
            await stack.aclose()
            if isinstance(error, TimeoutError):
                self._note(visit, 504)
                raise too_late(deadline_s) from None
            if isinstance(error, HoneError):
                raise _unavailable(str(error)) from error
            raise

    async def _enter(self, model: str, stack: AsyncExitStack) -> tuple[Slot, int]:
        """The slot of `model` and its version now; `stack` keeps the request's place on it."""
        match = _MODEL.fullmatch(model)
        if match is None:
            raise ApiError(
                404, f"model {model[:80]!r} does not exist: use {NAME}, {NAME}@latest or "
                f"{NAME}@VERSION", code="model_not_found", param="model",
            )  # fmt: skip
        wanted = match[1]
        is_pinned = False
        if wanted is None:
            slot = self._current()
        elif wanted == "latest":
            slot = await self._newest()
        else:
            is_pinned = True
            weights = await self.library.get(int(wanted))
            slot = await self.pool.exact(
                weights, self.control.reserved, may_share_stable=self._may_share_stable(weights)
            )
        stack.enter_context(slot.busy(is_pinned=is_pinned))
        assert slot.weights is not None, "served before it was loaded"
        return slot, slot.weights.policy_version

    def _may_share_stable(self, weights: Weights) -> bool:
        """Whether a request pinned to `weights` may hold up the next move of stable: where nothing
        will move it by itself.
        """
        if not self.settings.has_run or not self.release.state.is_following:
            return True
        is_last = weights == self.pool.stable.weights
        is_last = is_last and self.library.newest() in (None, weights)
        state = run_status.read(self.home.path) if is_last else None
        return state is not None and state.phase in ENDED

    def _current(self) -> Slot:
        """The slot of `policy`: stable, or the canary when it is its turn."""
        canary = self.release.state.canary
        if canary is not None and self.release.is_canary_turn():
            for slot in self.pool.slots[1:]:
                if slot.policy_version == canary and not slot.is_moving:
                    return slot
        return self.pool.stable

    async def _newest(self) -> Slot:
        """The slot of `policy@latest`: stable, or beside a fixed version one that moves by itself.
        One request at a time finds it, so that a version published meanwhile is loaded into the
        engine that is being started, not into another one.
        """
        if self._beside_stable() is None:
            return self.pool.stable
        async with self._finding:
            newest, slot = self._beside_stable(), self._latest
            if newest is None:
                return self.pool.stable
            is_taken = slot is not None and slot.policy_version in self.control.reserved()
            try:
                if slot is not None and slot in self.pool.slots and not is_taken:
                    await self.pool.move(slot, newest)
                    return slot
                self._latest = await self.pool.exact(
                    newest, self.control.reserved, may_share_stable=False
                )
                return self._latest
            except BadWeightsError as error:
                self.release.refuse(newest.policy_version, stamp=newest.stamp, reason=error.reason)
                return self.pool.stable

    def _beside_stable(self) -> Weights | None:
        """The newest weights, unless stable answers for them: it follows, holds them, or they were
        refused.
        """
        newest, state = self.library.newest(), self.release.state
        if state.is_following or newest is None or newest == self.pool.stable.weights:
            return None
        return None if newest.policy_version in state.refused else newest

    def _note(self, visit: _Visit, status: int) -> None:
        """Tell the guards how a request ended. Time in which its client did not read is not the
        engine's, and one that came too late is a failure of its version only where the engine
        finished nothing else meanwhile: otherwise it waited for others.
        """
        slot, now = visit.slot, time.monotonic()
        if slot is None or 400 <= status < 500:
            return
        waited_s = now - visit.started if visit.clock.is_waiting else 0.0
        is_late = status == 504 or waited_s >= self.settings.limits.deadline_s
        if is_late and slot.done_at > visit.started:
            return
        has_failed = is_late or status >= 500 or visit.trace.has_failed
        if not (has_failed or visit.clock.is_waiting):
            slot.done_at = now
        num_tokens = visit.trace.num_output_tokens
        token_s = visit.clock.total_s / num_tokens if num_tokens else None
        self.control.outcomes.add(visit.version, Outcome(now, has_failed, token_s))

    async def _reconcile_forever(self) -> None:
        while True:
            await self.control.reconcile()
            await asyncio.sleep(POLL_S)


def _unavailable(reason: str) -> ApiError:
    return ApiError(503, reason, code="version_unavailable", retry_after_s=RETRY_S)
