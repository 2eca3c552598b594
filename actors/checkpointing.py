"""Checkpoints beside training: staged by the learner, written while it goes on, then published.

Invariant: at most one save is in flight, and a group is acknowledged only after the checkpoint
that holds its step is published. A save that fails (a full disk) leaves the checkpoint before it in
force and the run going, unless it is the last one. Owned by the controller, which begins one
between steps.
"""

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path

from actors.fleet import EventSink
from actors.supervisor import Supervisor
from cluster.checkpoint_store import CheckpointStore
from cluster.errors import DeadlineError, HoneError, LearnerLostError, StageError
from cluster.replay_buffer import ReplayBuffer
from cluster.run_state import RunState
from learners.group import LearnerGroup

SAVE_S = 900.0  # from the copy of the tensors until they are published
DROP_S = 60.0  # for a publication when the learner is lost
POLL_S = 0.05
LAST_TRIES = 2
LAST_PAUSE_S = 3.0  # between them
log = logging.getLogger(__name__)


class Checkpointing:
    """Begins a save, sees it through, and tells `supervisor` how it went."""

    def __init__(
        self,
        store: CheckpointStore,
        buffer: ReplayBuffer,
        supervisor: Supervisor,
        on_event: EventSink,
    ) -> None:
        self._store = store
        self._buffer = buffer
        self._supervisor = supervisor
        self._on_event = on_event
        self._state: RunState | None = None  # of the save in flight
        self._began_at = 0.0
        self._commit: asyncio.Task[Path] | None = None
        self._late: asyncio.Task[Path] | None = None  # one that was given up; nobody can stop it

    async def begin(self, learner: LearnerGroup, state: RunState) -> None:
        """Start to save the present step; returns when its tensors are staged."""
        await self.settle(learner, should_wait=True)
        if state.step in await asyncio.to_thread(self._store.steps):
            return
        try:
            if not await learner.is_saved():
                raise StageError("checkpoint", "the save that was given up is still being written")
            if self._late is not None and not self._late.done():
                raise StageError("checkpoint", "the save that was given up is being published")
            target = await asyncio.to_thread(self._store.begin, state.step)
            await learner.begin_save(target)
        except LearnerLostError:
            raise
        except HoneError as error:
            await self._fail(state.step, error)
            return
        self._state, self._began_at = state, time.monotonic()

    async def settle(self, learner: LearnerGroup, *, should_wait: bool = False) -> None:
        """Publish the save in flight if it is written, or wait until it is; then acknowledge its
        groups. A slow save is given up after `SAVE_S`; the learner is not lost for that.
        """
        if self._state is None:
            return
        try:
            if self._commit is None:
                while not await learner.is_saved():
                    if time.monotonic() - self._began_at > SAVE_S:
                        raise DeadlineError(
                            "checkpoint", f"step {self._state.step} not written in {SAVE_S:.0f} s"
                        )
                    if not should_wait:
                        return
                    await asyncio.sleep(POLL_S)
                await learner.finish_save()
                commit = asyncio.to_thread(self._store.commit, self._state.step, self._state)
                self._commit = asyncio.create_task(commit)
            if not should_wait and not self._commit.done():
                return
            left_s = max(0.0, self._began_at + SAVE_S - time.monotonic())
            await self._end_of(self._commit, left_s)
        except LearnerLostError:
            raise
        except HoneError as error:
            step, self._state, self._commit = self._state.step, None, None
            await self._fail(step, error)
            return
        step, self._state, self._commit = self._state.step, None, None
        await self._published(step)

    async def finish(self, learner: LearnerGroup, state: RunState) -> None:
        """The last save of a run, which no later one makes good: it has a second try, after a pause
        and when the learner no longer writes the first, then raises `StageError`.
        """
        for num_failed in range(LAST_TRIES):
            if num_failed:
                await self._rest(learner)
            await self.begin(learner, state)
            await self.settle(learner, should_wait=True)
            if state.step in await asyncio.to_thread(self._store.steps):
                return
        raise StageError(
            "checkpoint",
            f"step {state.step}, the last one, could not be saved: see checkpoint_failed in "
            "events.jsonl, then go on with --resume",
        )

    async def _rest(self, learner: LearnerGroup) -> None:
        """Until a save that was given up is off everyone's hands, `SAVE_S` at most."""
        deadline = time.monotonic() + SAVE_S
        await asyncio.sleep(LAST_PAUSE_S)
        while not await learner.is_saved() or (self._late and not self._late.done()):
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(POLL_S)

    async def drop(self, learner: LearnerGroup | None = None) -> None:
        """The learner is lost: a save that it had not finished is void, a finished one is not. One
        that is only to be started anew finishes it first.
        """
        if learner is not None:
            await self.settle(learner, should_wait=True)
        if self._commit is not None:
            with suppress(HoneError):
                await self._end_of(self._commit, DROP_S)
        self._state, self._commit = None, None

    async def _end_of(self, commit: asyncio.Task[Path], deadline_s: float) -> Path:
        await asyncio.wait([commit], timeout=deadline_s)
        if not commit.done():
            self._late = commit
            commit.add_done_callback(lambda task: task.cancelled() or task.exception())
            raise DeadlineError("checkpoint", "written, but not published in time")
        return commit.result()

    async def _published(self, step: int) -> None:
        self._supervisor.saved()
        self._on_event("checkpoint", step=step, path=str(self._store.path(step)))
        await asyncio.to_thread(self._buffer.acknowledge, step)

    async def _fail(self, step: int, error: HoneError) -> None:
        """Unless it was published after all, if late."""
        try:
            await asyncio.to_thread(self._store.abandon, step)
            if await asyncio.to_thread(self._store.is_durable, step):
                await self._published(step)
                return
        except StageError as failure:
            log.warning("what is left of the save of step %d stays: %s", step, failure)
        self._on_event("checkpoint_failed", step=step, reason=str(error)[:500])
        self._supervisor.save_failed(error)
