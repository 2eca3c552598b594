"""What one replica of the policy endpoint does with a request: model name to engine to answer.

Invariant: a request runs on a slot that stays its slot until it ends, and its answer names the
versions that sampled it. A version or an engine that cannot be had is 503 with Retry-After, one
that hangs 504. Which version `policy` means is in `serve.release_control`, the HTTP shape in
`serve.http_api`.
"""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from actors.openai_reply import Api, Reply, Trace
from actors.placement import EngineSettings
from cluster.errors import HoneError, boundary
from cluster.run_dir import RunDir
from serve.api_errors import ApiError, too_late
from serve.endpoint_settings import EndpointSettings
from serve.engine_pool import EnginePool, Slot
from serve.engine_time import EngineTime
from serve.guards import Outcome
from serve.kept_versions import KeptVersions
from serve.release import Release
from serve.release_control import ReleaseControl
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


async def start_engine(settings: EngineSettings) -> "OpenAIEngine":
    """An engine loads in a thread: requests on the others go on."""
    from actors.openai_engine import OpenAIEngine

    with boundary("endpoint"):
        engine = await asyncio.to_thread(OpenAIEngine, settings)
        try:
            await engine.start()
        except BaseException:
            engine.shutdown()
            raise
    return engine


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
        files = self.home.weights.with_name(f"{self.home.weights.name}-endpoint") / str(os.getpid())
        decided = settings.home / "endpoint"
        self.library = WeightLibrary(run, files, KeptVersions(decided / "versions"))
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
        self.library.close()

    async def is_healthy(self) -> bool:
        return await self.pool.is_alive() and not (self._loop is not None and self._loop.done())

    async def answer(self, api: Api, body: dict[str, Any], trace: Trace) -> Answer:
        """Run one request, and note in `trace` what it costs.

        Raises `ApiError` when no engine can take it (503) or none answered in `limits.deadline_s`
        (504). What an engine takes too long for counts against its version.
        """
        stack, clock = AsyncExitStack(), EngineTime()
        version: int | None = None
        started = time.monotonic()
        deadline_s = self.settings.limits.deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                slot, model = await self._enter(str(body.get("model", "")), stack)
                version = slot.policy_version
                reply = await clock.wait_for(slot.engine.respond(api, body, model, trace))
            if reply.events is not None:
                reply = replace(reply, events=clock.timed(reply.events))
                stack.callback(self._note, version, reply.status, trace, clock, started)
            else:
                self._note(version, reply.status, trace, clock, started)
            if reply.status == 503 or (reply.status >= 500 and not await slot.engine.is_alive()):
                raise _unavailable(f"{model}: its engine takes no requests now")
            versions = trace.policy_versions or ([] if version is None else [version])
            return Answer(reply, versions, stack)
        except BaseException as error:
            await stack.aclose()
            if isinstance(error, TimeoutError):
                self._note(version, 504, trace, clock, started)
                raise too_late(deadline_s) from None
            if isinstance(error, HoneError):
                raise _unavailable(str(error)) from error
            raise

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
            slot = await self.pool.exact(
                weights, self.control.reserved(), may_share_stable=may_share
            )
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
        """The slot of `policy@latest`: stable while it follows or the newest version is refused,
        else one that moves by itself.
        """
        newest, state, slot = self.library.newest(), self.release.state, self._latest
        if state.is_following or newest is None or newest == self.pool.stable.weights:
            return self.pool.stable
        if newest.policy_version in state.refused:
            return self.pool.stable
        reserved = self.control.reserved()
        if slot is None or slot not in self.pool.slots or slot.policy_version in reserved:
            slot = await self.pool.exact(newest, reserved, may_share_stable=False)
            self._latest = slot
        await self.pool.move(slot, newest)
        return slot

    def _note(
        self, version: int | None, status: int, trace: Trace, clock: EngineTime, started: float
    ) -> None:
        """Tell the guards how a request ended; time in which its client did not read is not the
        engine's.
        """
        if version is None or 400 <= status < 500:
            return
        now = time.monotonic()
        is_hung = clock.is_waiting and now - started >= self.settings.limits.deadline_s
        has_failed = status >= 500 or trace.has_failed or is_hung
        token_s = clock.total_s / trace.num_output_tokens if trace.num_output_tokens else None
        self.control.outcomes.add(version, Outcome(now, has_failed, token_s))

    async def _reconcile_forever(self) -> None:
        while True:
            await self.control.reconcile()
            await asyncio.sleep(POLL_S)


def _unavailable(reason: str) -> ApiError:
    return ApiError(503, reason, code="version_unavailable", retry_after_s=RETRY_S)
