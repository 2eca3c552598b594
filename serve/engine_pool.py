"""A bounded number of engines, each holding one policy version; weights move, engines stay.

Invariant: the first slot answers `policy`. Weights change under running requests, but never under
one that was pinned to a version, and a start or a load goes on when the request that wanted it has
gone: an engine is never left between two versions, nor started twice for the same one. Used by the
endpoint, one pool per replica.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cluster.errors import DeadlineError, StageError, boundary
from serve.api_errors import ApiError
from serve.kept_versions import Weights
from serve.weight_check import check_file

if TYPE_CHECKING:
    from actors.openai_engine import OpenAIEngine

PROBE_TOKENS = 8
DRAIN_S = 60.0
POLL_S = 0.02
logger = logging.getLogger(__name__)


class BadWeightsError(StageError):
    """These weights must not be served; their engine lives and holds what it held before."""


class Slot:
    """One engine and what it holds. `weights` None: nothing that may be served yet."""

    def __init__(self, engine: "OpenAIEngine") -> None:
        self.engine = engine
        self.weights: Weights | None = None
        self.num_running = 0
        self.num_pinned = 0
        self.used_at = 0.0
        self.done_at = 0.0  # when a request ended well
        self.is_moving = False
        self.pause_s = 0.0
        self.lock = asyncio.Lock()

    @property
    def policy_version(self) -> int | None:
        return None if self.weights is None else self.weights.policy_version

    @contextmanager
    def busy(self, *, is_pinned: bool) -> Generator[None]:
        """Around one request on this engine."""
        self.num_running += 1
        self.num_pinned += is_pinned
        try:
            yield
        finally:
            self.num_running -= 1
            self.num_pinned -= is_pinned
            self.used_at = time.monotonic()


class EnginePool:
    """Up to `max_engines` slots; `using` keeps the file of weights on their way to an engine.

    Example: `slot = await pool.exact(weights, control.reserved, may_share_stable=True)`.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable["OpenAIEngine"]],
        max_engines: int,
        policy_dir: Path,
        using: Callable[[Weights], AbstractContextManager[None]],
    ) -> None:
        self._start = start
        self._max_engines = max_engines
        self._policy_dir = policy_dir
        self._using = using
        self._lock = asyncio.Lock()
        self._arriving: dict[Weights, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wanted: Counter[Weights] = Counter()  # by callers that wait for them
        self.slots: list[Slot] = []

    @property
    def stable(self) -> Slot:
        return self.slots[0]

    async def open(self) -> None:
        """Start the first engine; it serves nothing until `move`."""
        self.slots.append(Slot(await self._start()))

    async def move(self, slot: Slot, weights: Weights) -> None:
        """Load `weights` under the running requests of `slot`; `StageError` leaves it as it was:
        `BadWeightsError` when they are at fault, `DeadlineError` when pinned requests did not end.
        """
        with self._wanting(weights):
            await asyncio.shield(self._own(weights, self._fill(slot, weights)))

    async def exact(
        self, weights: Weights, reserved: Callable[[], set[int]], *, may_share_stable: bool
    ) -> Slot:
        """A slot that holds `weights`, and keeps them for a caller that makes it `busy` at once.

        Takes an idle slot whose version is not `reserved` when it is taken, or starts an engine;
        503 when all are taken. Raises as `move`.
        """
        with self._wanting(weights):
            while (slot := self._holding(weights, may_share_stable)) is None:
                task = self._arriving.get(weights)
                if task is None:
                    task = self._own(weights, self._bring_up(weights, reserved, may_share_stable))
                    self._arriving[weights] = task
                await asyncio.shield(task)
            return slot

    def loaded(self) -> list[Weights]:
        return [slot.weights for slot in self.slots if slot.weights is not None]

    async def is_alive(self) -> bool:
        return all([await slot.engine.is_alive() for slot in self.slots])

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in self.slots:
            slot.engine.shutdown()
        self.slots.clear()

    def _own(self, weights: Weights, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """`work` with `weights` as a task of the pool: who waits for it may leave."""
        keeping = ExitStack()
        keeping.enter_context(self._using(weights))
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: keeping.close())
        return task

    @contextmanager
    def _wanting(self, weights: Weights) -> Generator[None]:
        """No slot that holds `weights` is idle inside: their caller is about to use it."""
        self._wanted[weights] += 1
        try:
            yield
        finally:
            self._wanted[weights] -= 1
            self._wanted = +self._wanted

    async def _bring_up(
        self, weights: Weights, reserved: Callable[[], set[int]], may_share_stable: bool
    ) -> None:
        try:
            async with self._lock:
                if self._holding(weights, may_share_stable) is not None:
                    return
                slot = await self._free_slot(weights, reserved)
                try:
                    await self._fill(slot, weights)
                except StageError:
                    if not await slot.engine.is_alive():
                        self.slots.remove(slot)
                        slot.engine.shutdown()
                    raise
        finally:
            del self._arriving[weights]

    async def _free_slot(self, weights: Weights, reserved: Callable[[], set[int]]) -> Slot:
        """A new engine while there may be more, else the slot that was idle for longest; 503."""
        if len(self.slots) < self._max_engines:
            self.slots.append(Slot(await self._start()))
            return self.slots[-1]
        idle = [
            slot
            for slot in self.slots[1:]
            if slot.num_running == 0
            and not slot.lock.locked()  # a load is under way, or about to be
            and slot.policy_version not in reserved()
            and slot.weights not in self._wanted
        ]
        if not idle:
            raise ApiError(
                503, f"policy@{weights.policy_version}: all {self._max_engines} engines hold "
                "other versions (hone serve --engines)",
                code="engines_busy", retry_after_s=5.0,
            )  # fmt: skip
        return min(idle, key=lambda slot: slot.used_at)

    def _holding(self, weights: Weights, may_share_stable: bool) -> Slot | None:
        slots = self.slots if may_share_stable else self.slots[1:]
        return next((s for s in slots if s.weights == weights and not s.is_moving), None)

    async def _fill(self, slot: Slot, weights: Weights) -> None:
        """Wait for those that were promised what `slot` holds and for its pinned requests, then
        load. Stable waits for no promise: it has to follow.
        """
        async with slot.lock:
            if slot.weights == weights:
                return
            if slot is not self.stable:
                await _while(lambda: slot.weights in self._wanted, "its requests did not begin")
            slot.is_moving = True
            try:
                await _while(lambda: slot.num_pinned > 0, "pinned requests did not end")
                await self._load(slot, weights)
            finally:
                slot.is_moving = False

    async def _load(self, slot: Slot, weights: Weights) -> None:
        """Check the file, load it, and prove that the engine answers with finite numbers."""
        if weights.path is None:
            await slot.engine.relabel(weights.policy_version)
        else:
            try:
                problem = await asyncio.to_thread(check_file, weights.path, self._policy_dir)
            except FileNotFoundError as error:
                raise ApiError(
                    503, f"policy@{weights.policy_version}: its file is gone, ask again",
                    code="version_gone", retry_after_s=1.0,
                ) from error  # fmt: skip
            if problem:
                raise BadWeightsError(
                    "endpoint", f"policy@{weights.policy_version} refused: {problem}"
                )
            try:
                with boundary("endpoint"):
                    slot.pause_s = await self._swap(slot, weights)
            except StageError as error:
                if await slot.engine.is_alive():
                    raise BadWeightsError(error.stage, error.reason) from error
                raise
        slot.weights = weights

    async def _swap(self, slot: Slot, weights: Weights) -> float:
        """Load and probe; an engine that fails the probe gets its old weights back."""
        pause_s = await slot.engine.load_weights(
            {"path": str(weights.path)}, weights.policy_version
        )
        if await slot.engine.probe(np.arange(1, PROBE_TOKENS + 1, dtype=np.int32)):
            return pause_s
        old = slot.weights
        if old is not None and old.path is not None:
            await slot.engine.load_weights({"path": str(old.path)}, old.policy_version)
        raise StageError(
            "endpoint", f"policy@{weights.policy_version} answers with values not finite"
        )


async def _while(is_so: Callable[[], bool], reason: str) -> None:
    """Wait until it `is_so` no more; `DeadlineError` says the `reason` why it took too long."""
    deadline = time.monotonic() + DRAIN_S
    while is_so():
        if time.monotonic() > deadline:
            raise DeadlineError("endpoint", f"{reason} in {DRAIN_S:.0f} s")
        await asyncio.sleep(POLL_S)
