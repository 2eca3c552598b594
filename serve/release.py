"""Which policy version `policy` means: followed, fixed or split with a canary; kept on disk.

Invariant: one file is the record of all replicas and of a restarted endpoint, replaced atomically
under a lock. A decision names the state it was made on: when another decision came first it changes
nothing and raises `ReleaseConflictError`. Every decision is one line of `events.jsonl` with its
reason and its author. What a replica notes by itself (`note_stable`, `note_reissue`) never undoes a
decision.
"""

import fcntl
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from cluster.errors import HoneError

FILE_NAME = "release.json"
MAX_HISTORY = 20
EventSink = Callable[..., None]


class ReleaseConflictError(HoneError):
    """Someone else decided meanwhile: look at the new state before deciding again."""


class ReleaseState(msgspec.Struct, frozen=True, kw_only=True):
    """`is_following`: stable moves with the run. `stable` None: nothing was fixed yet.

    `refused` versions were rolled back: they are neither followed nor promoted again by themselves,
    until an announcement after `refused_stamp` gives their numbers to other weights. Stamps are
    those of `serve.weight_library.Weights`; `revision` counts decisions.
    """

    is_following: bool = True
    stable: int | None = None
    stable_stamp: float = 0.0
    canary: int | None = None
    canary_share: float = 0.0
    canary_since: float = 0.0
    history: list[int] = []  # earlier stable versions, newest last
    refused: list[int] = []
    refused_stamp: float = 0.0
    revision: int = 0


class Release:
    """The release state of one endpoint, seen by one of its replicas.

    Example: `seen = release.state; release.promote(7, seen=seen, author="alice")`.
    """

    def __init__(self, directory: Path, on_event: EventSink) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / FILE_NAME
        self._on_event = on_event
        self._stamp: tuple[int, int] | None = None
        self._state = ReleaseState()
        self._share = 0.0

    @property
    def state(self) -> ReleaseState:
        """The state on disk; read again only when it changed."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return self._state
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp != self._stamp:
            self._state = msgspec.json.decode(self.path.read_bytes(), type=ReleaseState)
            self._stamp = stamp
        return self._state

    def is_canary_turn(self) -> bool:
        """Whether the next request of `policy` goes to the canary: exactly its share of them."""
        state = self.state
        if state.canary is None:
            self._share = 0.0
            return False
        self._share += state.canary_share
        if self._share < 1.0 - 1e-9:
            return False
        self._share -= 1.0
        return True

    def start_canary(self, version: int, share: float, *, seen: ReleaseState, author: str) -> None:
        """Send `share` of the requests of `policy` to `version`; stable stays where it is."""
        with self._changing(seen) as change:
            change(
                is_following=False, canary=version, canary_share=share, canary_since=time.time(),
                refused=[v for v in self._state.refused if v != version],
            )  # fmt: skip
        self._on_event("release_canary", version=version, share=share, author=author)

    def promote(self, version: int, *, seen: ReleaseState, author: str) -> None:
        """Make `version` stable and end a canary."""
        with self._changing(seen) as change:
            change(
                is_following=False, stable=version, canary=None, canary_share=0.0,
                history=self._with_stable(version),
                refused=[v for v in self._state.refused if v != version],
            )  # fmt: skip
        self._on_event("release_promoted", version=version, author=author)

    def follow(self, *, seen: ReleaseState, author: str) -> None:
        """Let stable move with the run again."""
        with self._changing(seen) as change:
            change(is_following=True, stable_stamp=0.0, canary=None, canary_share=0.0)
        self._on_event("release_following", author=author)

    def roll_back(
        self,
        bad: int,
        to: int | None,
        *,
        seen: ReleaseState,
        stamp: float,
        reason: str,
        author: str,
    ) -> None:
        """Take `bad` out of service: end it as a canary, or return stable to `to`.

        `stamp` is that of the newest announcement.
        """
        with self._changing(seen) as change:
            state = self._state
            refused = self._with_refused(bad, stamp)
            if bad == state.canary:
                change(canary=None, canary_share=0.0, **refused)
            else:
                change(
                    is_following=False, stable=to, **refused,
                    history=[v for v in state.history if v != to],
                )  # fmt: skip
        self._on_event("release_rolled_back", version=bad, to=to, reason=reason, author=author)

    def refuse(self, bad: int, *, stamp: float, reason: str) -> None:
        """Never load `bad` by itself: its file is broken. What is served stays as it is."""
        with self._changing() as change:
            if bad in self._state.refused:
                return  # by another replica
            change(**self._with_refused(bad, stamp))
        self._on_event("release_refused", version=bad, reason=reason, author="guard")

    def note_stable(self, version: int, stamp: float, *, is_first: bool = False) -> None:
        """The weights that stable reached by following; nothing once a decision has fixed stable,
        or when another replica is further. `is_first`: what a replica starts on may be older.
        """
        if (version, stamp) == (self.state.stable, self.state.stable_stamp):
            return
        with self._changing() as change:
            state = self._state
            is_moving = state.is_following and (is_first or stamp >= state.stable_stamp)
            if is_moving or state.stable is None:
                change(stable=version, stable_stamp=stamp, history=self._with_stable(version))

    def note_reissue(self, version: int, stamp: float) -> None:
        """The newest announcement: when the run went back to `version` after the last refusal, its
        numbers from there on name other weights, and are refused no more.
        """
        if not self._is_reissue(version, stamp):
            return
        with self._changing() as change:
            if self._is_reissue(version, stamp):
                change(refused=[v for v in self._state.refused if v < version])

    def _is_reissue(self, version: int, stamp: float) -> bool:
        state = self.state
        return stamp > state.refused_stamp and any(v >= version for v in state.refused)

    def _with_refused(self, bad: int, stamp: float) -> dict[str, object]:
        state = self._state
        return {
            "refused": sorted({*state.refused, bad}),
            "refused_stamp": max(state.refused_stamp, stamp),
        }

    def _with_stable(self, version: int) -> list[int]:
        stable = self._state.stable
        if stable is None or stable == version:
            return self._state.history
        earlier = [v for v in self._state.history if v not in (stable, version)]
        return [*earlier, stable][-MAX_HISTORY:]

    @contextmanager
    def _changing(self, seen: ReleaseState | None = None) -> Generator[Callable[..., None]]:
        """One change at a time, over all replicas; `seen` None is a note, not a decision."""
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self.state
            if seen is not None and seen.revision != before.revision:
                raise ReleaseConflictError(
                    f"the release was changed meanwhile (decision {before.revision}, seen "
                    f"{seen.revision}): look at it and decide again"
                )
            revision = before.revision + (seen is not None)

            def change(**fields: object) -> None:
                after = msgspec.structs.replace(before, revision=revision, **fields)
                temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
                temporary.write_bytes(msgspec.json.encode(after))
                temporary.replace(self.path)

            yield change
