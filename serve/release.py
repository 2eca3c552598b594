"""Which policy version `policy` means: followed, fixed or split with a canary; kept on disk.

Invariant: the state changes only through a decision, and every decision is one line of
`events.jsonl` with its reason and its author. The file is replaced atomically, so replicas and a
restarted endpoint agree on it.
"""

import fcntl
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec

FILE_NAME = "release.json"
MAX_HISTORY = 20
EventSink = Callable[..., None]


class ReleaseState(msgspec.Struct, frozen=True, kw_only=True):
    """`is_following`: stable moves with the run. `stable` None: nothing was fixed yet.

    `refused` versions were rolled back: they are neither followed nor promoted again by themselves.
    """

    is_following: bool = True
    stable: int | None = None
    canary: int | None = None
    canary_share: float = 0.0
    canary_since: float = 0.0
    history: list[int] = []  # earlier stable versions, newest last
    refused: list[int] = []
    revision: int = 0


class Release:
    """The release state of one endpoint. Example: `release.promote(7, author="alice")`."""

    def __init__(self, directory: Path, on_event: EventSink) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / FILE_NAME
        self._on_event = on_event
        self._stamp: tuple[int, int] | None = None
        self._state = ReleaseState()
        self._share = 0.0

    @property
    def state(self) -> ReleaseState:
        """The state on disk; read again only when it changed."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return self._state
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp != self._stamp:
            self._state = msgspec.json.decode(self._path.read_bytes(), type=ReleaseState)
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

    def start_canary(self, version: int, share: float, *, author: str) -> None:
        """Send `share` of the requests of `policy` to `version`; stable stays where it is."""
        with self._changing() as change:
            change(
                is_following=False, canary=version, canary_share=share, canary_since=time.time(),
                refused=[v for v in self._state.refused if v != version],
            )  # fmt: skip
        self._on_event("release_canary", version=version, share=share, author=author)

    def promote(self, version: int, *, author: str) -> None:
        """Make `version` stable and end a canary."""
        with self._changing() as change:
            change(
                is_following=False, stable=version, canary=None, canary_share=0.0,
                history=self._with_stable(version),
                refused=[v for v in self._state.refused if v != version],
            )  # fmt: skip
        self._on_event("release_promoted", version=version, author=author)

    def follow(self, *, author: str) -> None:
        """Let stable move with the run again."""
        with self._changing() as change:
            change(is_following=True, canary=None, canary_share=0.0)
        self._on_event("release_following", author=author)

    def roll_back(self, bad: int, to: int | None, *, reason: str, author: str) -> None:
        """Take `bad` out of service: end it as a canary, or return stable to `to`."""
        with self._changing() as change:
            state = self._state
            refused = sorted({*state.refused, bad})
            if bad == state.canary:
                change(canary=None, canary_share=0.0, refused=refused)
            else:
                change(
                    is_following=False, stable=to, refused=refused,
                    history=[v for v in state.history if v != to],
                )  # fmt: skip
        self._on_event("release_rolled_back", version=bad, to=to, reason=reason, author=author)

    def refuse(self, bad: int, *, reason: str) -> None:
        """Never load `bad` by itself: its file is broken. What is served stays as it is."""
        with self._changing() as change:
            change(refused=sorted({*self._state.refused, bad}))
        self._on_event("release_refused", version=bad, reason=reason, author="guard")

    def note_stable(self, version: int) -> None:
        """The version that stable reached by following; not a decision."""
        if self.state.stable != version:
            with self._changing() as change:
                change(stable=version, history=self._with_stable(version))

    def _with_stable(self, version: int) -> list[int]:
        stable = self._state.stable
        if stable is None or stable == version:
            return self._state.history
        return [*[v for v in self._state.history if v != stable], stable][-MAX_HISTORY:]

    @contextmanager
    def _changing(self) -> Generator[Callable[..., None]]:
        """One change at a time, over all replicas of this machine."""
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self.state

            def change(**fields: object) -> None:
                after = msgspec.structs.replace(before, revision=before.revision + 1, **fields)
                temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
                temporary.write_bytes(msgspec.json.encode(after))
                temporary.replace(self._path)

            yield change
