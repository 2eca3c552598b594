"""The one tree of errors. Every message says what must hold, what was found, and which knob
changes it.

`boundary` is the only place that catches broadly; it turns a foreign exception into the named
stage's `StageError`. All errors survive pickling, because Ray carries them between processes.
"""

from collections.abc import Generator
from contextlib import contextmanager


class HoneError(Exception):
    """Root of all errors that Hone raises on purpose."""


class ConfigError(HoneError, ValueError):
    """The user's configuration or input cannot work. Exit code 2; nothing was started."""


class StageError(HoneError):
    """A stage of a run failed. Exit code 1.

    Example: `StageError("rollout", "worker 0 did not load its engine in 300 s (sync.timeout_s)")`.
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(stage, reason)
        self.stage = stage
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


class DeadlineError(StageError):
    """A bounded wait ran out; `reason` names what was waited for and for how long."""


class ActorLostError(StageError):
    """The actor that was asked, its node or its answer is gone: another one may be asked."""


class InputLostError(StageError):
    """What an actor was given was lost with its node: it has to be made again."""


class HintError(HoneError):
    """No hint can be given for this task at this level; the task is not at fault, nor the run."""


class LearnerLostError(StageError):
    """A learner rank died, hung or failed: the group must be started again from durable state.
    `event` is what it is called in `events.jsonl`.
    """

    event = "worker_died"
    is_learner_well = False


class GroupsVanishedError(LearnerLostError):
    """Redis no longer knows groups that it had taken in. What came of them goes with the learner's
    memory: the run goes on from durable state, and samples them again.
    """

    event = "groups_vanished"
    is_learner_well = True


class StartLostError(StageError):
    """A part of a run was lost while it came up, and a checkpoint to come up from is there."""


class BufferFullError(HoneError):
    """The replay buffer holds `buffer.capacity_groups` groups: the producer must wait (back-
    pressure).
    """


class BufferUnavailableError(HoneError):
    """Redis did not answer within the retry budget."""


class FencedError(HoneError):
    """This writer was presumed dead and has a successor: it must change nothing any more."""


class WireError(HoneError, ValueError):
    """Bytes that claim to be a record are truncated, corrupted, or of another schema."""


@contextmanager
def boundary(stage: str) -> Generator[None]:
    """Re-raise any foreign exception as `StageError(stage, ...)`; Hone's own errors pass
    unchanged.
    """
    try:
        yield
    except HoneError:
        raise
    except Exception as error:
        raise StageError(stage, f"{type(error).__name__}: {error}") from error
