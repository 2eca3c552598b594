"""A bounded number of engines, each holding one policy version; weights move, engines stay.

Invariant: the first slot answers `policy`; its weights change under running requests, but never
under one that was pinned to a version. Every other slot changes only while it has no request.
Used by the endpoint, one pool per replica.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractContextManager, contextmanager
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


class Slot:
    """One engine and what it holds. `weights` None: nothing that may be served yet."""

    def __init__(self, engine: "OpenAIEngine") -> None:
        self.engine = engine
        self.weights: Weights | None = None
        self.num_running = 0
        self.num_pinned = 0
        self.used_at = 0.0
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

    Example: `slot = await pool.exact(weights, reserved, may_share_stable=True)`.
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
        self.slots: list[Slot] = []

    @property
    def stable(self) -> Slot:
        return self.slots[0]

    async def open(self) -> None:
        """Start the first engine; it serves nothing until `move`."""
        self.slots.append(Slot(await self._start()))

    async def move(self, slot: Slot, weights: Weights) -> None:
        """Load `weights` under the running requests of `slot`; `StageError` leaves it as it was,
        `DeadlineError` when pinned requests did not end: nothing is wrong with the weights then.
        """
        with self._using(weights):
            async with slot.lock:
                if slot.weights == weights:
                    return
                slot.is_moving = True
                try:
                    await self._drain_pinned(slot)
                    await self._load(slot, weights)
                finally:
                    slot.is_moving = False

    async def exact(self, weights: Weights, reserved: set[int], *, may_share_stable: bool) -> Slot:
        """A slot that holds `weights` and keeps them while a pinned request runs.

        Takes an idle slot whose version is not `reserved`, or starts an engine; 503 when all are
        taken.
        """
        with self._using(weights):
            return await self._take(weights, reserved, may_share_stable)

    def loaded(self) -> list[Weights]:
        return [slot.weights for slot in self.slots if slot.weights is not None]

    async def is_alive(self) -> bool:
        return all([await slot.engine.is_alive() for slot in self.slots])

    def close(self) -> None:
        for slot in self.slots:
            slot.engine.shutdown()
        self.slots.clear()

    async def _take(self, weights: Weights, reserved: set[int], may_share_stable: bool) -> Slot:
        async with self._lock:
            found = self._holding(weights, may_share_stable)
            if found is not None:
                return found
            idle = [
                slot
                for slot in self.slots[1:]
                if slot.num_running == 0 and slot.policy_version not in reserved
            ]
            if len(self.slots) < self._max_engines:
                slot = Slot(await self._start())
                self.slots.append(slot)
            elif idle:
                slot = min(idle, key=lambda s: s.used_at)
            else:
                raise ApiError(
                    503, f"policy@{weights.policy_version}: all {self._max_engines} engines hold "
                    "other versions (hone serve --engines)",
                    code="engines_busy", retry_after_s=5.0,
                )  # fmt: skip
            try:
                async with slot.lock:
                    await self._load(slot, weights)
            except StageError:
                if not await slot.engine.is_alive():
                    self.slots.remove(slot)
                    slot.engine.shutdown()
                raise
            return slot

    def _holding(self, weights: Weights, may_share_stable: bool) -> Slot | None:
        slots = self.slots if may_share_stable else self.slots[1:]
        return next((s for s in slots if s.weights == weights and not s.is_moving), None)

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
                raise StageError("endpoint", f"policy@{weights.policy_version} refused: {problem}")
            with boundary("endpoint"):
                slot.pause_s = await self._swap(slot, weights)
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

    async def _drain_pinned(self, slot: Slot) -> None:
        deadline = time.monotonic() + DRAIN_S
        while slot.num_pinned:
            if time.monotonic() > deadline:
                raise DeadlineError("endpoint", f"pinned requests did not end in {DRAIN_S:.0f} s")
            await asyncio.sleep(POLL_S)
