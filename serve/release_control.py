"""Engines brought to what the release state and the run ask for, and versions that must go.

Invariant: weights and releases change in one task (`reconcile`) or under its lock, so decisions of
one replica never race with each other; those of several meet in the release record, where the first
one counts. A version is refused only for what its own weights did.
"""

import asyncio
import time
from contextlib import suppress

from cluster.errors import HoneError, StageError
from cluster.run_dir import JsonLines, RunDir
from serve.api_errors import ApiError
from serve.chores import Chores
from serve.engine_pool import BadWeightsError, EnginePool
from serve.guards import GuardSettings, Outcomes, eval_drop, standing
from serve.kept_versions import Weights
from serve.release import Release, ReleaseConflictError, ReleaseState
from serve.weight_library import WeightLibrary

GUARD_EVERY_S = 1.0


class ReleaseControl:
    """Example: `await control.open()`, then `await control.reconcile()` again and again."""

    def __init__(
        self,
        home: RunDir,
        release: Release,
        library: WeightLibrary,
        pool: EnginePool,
        guards: GuardSettings,
    ) -> None:
        self.release = release
        self.outcomes = Outcomes(guards)
        self._guards = guards
        self._library = library
        self._pool = pool
        self._chores = Chores()
        self._metrics = JsonLines(home.metrics)
        self._read: tuple[int, list[dict[str, float]]] = (0, [])  # file size, rows
        self._guarded_at = 0.0
        self._changing = asyncio.Lock()

    @property
    def problem(self) -> str:
        return self._chores.problem

    def reserved(self) -> set[int]:
        """Versions whose engines and files are not given to others."""
        state = self.release.state
        return {version for version in (state.stable, state.canary) if version is not None}

    async def open(self) -> None:
        """Load what `policy` means now into the first engine. A version that does not load is
        refused and the one before it tried; `StageError` when none is left.
        """
        slot = self._pool.stable
        while slot.weights is None:
            state, weights = self.release.state, await self._first()
            try:
                await self._pool.move(slot, weights)
            except BadWeightsError as error:
                if not state.is_following:  # a decision asked for them
                    raise
                self._refuse(weights, error)
        self.release.note_stable(slot.weights.policy_version, slot.weights.stamp, is_first=True)

    async def change(self, action: str, version: int | None, share: float, author: str) -> None:
        """One release action of the admin API, in force on return; raises `ApiError`."""
        async with self._changing:
            try:
                await self._change(action, version, share, author)
            except ReleaseConflictError as error:
                raise ApiError(409, str(error), code="release_conflict") from error
            except HoneError as error:
                raise ApiError(409, str(error), code="release_refused") from error

    async def reconcile(self) -> None:
        """Each chore once, whatever became of the others."""
        async with self._changing:
            await self._chores.run("follow", self._follow)
            await self._chores.run("canary", self._keep_canary)
            if time.monotonic() - self._guarded_at >= GUARD_EVERY_S:
                self._guarded_at = time.monotonic()
                await self._chores.run("guard", self._guard)
            await self._chores.run("files", self._tidy)

    async def _first(self) -> Weights:
        """What a replica starts on: the fixed version; else the newest one that was not refused."""
        newest = self._announced()
        state = self.release.state
        if not state.is_following and state.stable is not None:
            try:
                return await self._library.get(state.stable)
            except ApiError as error:
                raise StageError(
                    "endpoint", f"policy is fixed to version {state.stable}, whose weights are "
                    f"gone: remove {self.release.path} to follow the run",
                ) from error  # fmt: skip
        if newest is not None and newest.policy_version not in state.refused:
            return newest
        earlier = {*self._library.checkpoints()}
        if state.stable is not None:
            earlier.add(state.stable)
        for version in sorted(earlier - {*state.refused}, reverse=True):
            with suppress(ApiError):  # its file is gone
                return await self._library.get(version)
        raise StageError(
            "endpoint", "the run has published no weights and no checkpoint "
            f"(refused: {state.refused or 'none'})",
        )  # fmt: skip

    def _announced(self) -> Weights | None:
        newest = self._library.newest()
        if newest is not None:
            self.release.note_reissue(newest.policy_version, newest.stamp)
        return newest

    def _stamp(self) -> float:
        newest = self._library.newest()
        return 0.0 if newest is None else newest.stamp

    def _refuse(self, weights: Weights, error: BadWeightsError) -> None:
        """Never load `weights` by themselves again, until their number is given to others."""
        self.release.refuse(weights.policy_version, stamp=self._stamp(), reason=error.reason)

    async def _change(self, action: str, version: int | None, share: float, author: str) -> None:
        state, release = self.release.state, self.release
        if action == "follow":
            release.follow(seen=state, author=author)
        elif action == "canary":
            weights = await self._fetch(_named(version))
            await self._pool.exact(weights, self.reserved, may_share_stable=False)
            release.start_canary(weights.policy_version, share, seen=state, author=author)
        elif action == "promote":
            chosen = version if version is not None else state.canary
            weights = await self._fetch(_named(chosen))
            await self._pool.move(self._pool.stable, weights)
            release.promote(weights.policy_version, seen=state, author=author)
        elif state.canary is not None and version in (None, state.canary):
            release.roll_back(
                state.canary, state.stable, seen=state, stamp=self._stamp(), reason="asked for",
                author=author,
            )  # fmt: skip
        else:
            target = _named(version if version is not None else (state.history or [None])[-1])
            bad = _named(self._pool.stable.policy_version)
            await self._return_to(target, bad=bad, seen=state, reason="asked for", author=author)

    async def _return_to(
        self, target: int, *, bad: int, seen: ReleaseState, reason: str, author: str
    ) -> None:
        weights = await self._fetch(target)
        await self._pool.move(self._pool.stable, weights)
        self.release.roll_back(
            bad, target, seen=seen, stamp=self._stamp(), reason=reason, author=author
        )

    async def _fetch(self, version: int) -> Weights:
        """The weights of a decision, kept on disk before anything depends on them."""
        weights = await self._library.get(version)
        await self._library.store(weights)
        return weights

    async def _follow(self) -> None:
        newest, state, slot = self._announced(), self.release.state, self._pool.stable
        weights: Weights | None = None
        if state.is_following:
            is_refused = newest is not None and newest.policy_version in state.refused
            weights = None if is_refused else newest
        elif state.stable is not None and state.stable != slot.policy_version:
            weights = await self._library.get(state.stable)
        if weights is None or weights == slot.weights:
            return
        try:
            await self._pool.move(slot, weights)
        except BadWeightsError as error:
            if not state.is_following:
                raise
            self._refuse(weights, error)
            return
        if state.is_following:
            self.release.note_stable(weights.policy_version, weights.stamp)

    async def _keep_canary(self) -> None:
        """After a restart, or on another replica, the canary's engine has to be brought up."""
        canary = self.release.state.canary
        if canary is not None and canary not in {s.policy_version for s in self._pool.slots[1:]}:
            weights = await self._library.get(canary)
            await self._pool.exact(weights, self.reserved, may_share_stable=False)

    async def _guard(self) -> None:
        """Roll back what the guards complain about, unless someone else decided meanwhile."""
        with suppress(ReleaseConflictError):
            await self._judge()

    async def _judge(self) -> None:
        state = self.release.state
        suspect = state.canary if state.canary is not None else state.stable
        if suspect is None:
            return
        drop = eval_drop(await self._rows(), suspect, self._guards)
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
            self.release.roll_back(
                suspect, state.stable, seen=state, stamp=self._stamp(), reason=reason,
                author="guard",
            )  # fmt: skip
            return
        known = {version.policy_version for version in self._library.versions()}
        choices = [*([drop.best] if drop is not None else []), *reversed(state.history)]
        good = [v for v in choices if v in known and v < blamed and v not in state.refused]
        if not good:
            raise StageError("guard", f"policy@{suspect}: {reason}; no earlier version is kept")
        await self._return_to(good[0], bad=blamed, seen=state, reason=reason, author="guard")

    async def _rows(self) -> list[dict[str, float]]:
        """Rows of the run's metrics; read again, beside the requests, when the file has grown."""
        file = self._metrics.path
        size = file.stat().st_size if file.exists() else 0
        if size != self._read[0]:
            rows = await asyncio.to_thread(self._metrics.read, dict[str, float | None])
            self._read = (size, standing(rows))
        return self._read[1]

    async def _tidy(self) -> None:
        """Drop what is not needed any more; keep on disk what a restart could not find elsewhere:
        fixed versions, and the one before a refused announcement.
        """
        state, newest = self.release.state, self._library.newest()
        is_refused = newest is not None and newest.policy_version in state.refused
        loaded, reserved = self._pool.loaded(), self.reserved()
        await self._library.keep(
            reserved if is_refused or not state.is_following else set(), loaded
        )
        self._library.forget(reserved, loaded)
        self.outcomes.forget(reserved | {weights.policy_version for weights in loaded})


def _named(version: int | None) -> int:
    if version is None:
        raise ApiError(409, "there is no version to go to: name one", code="no_version")
    return version
