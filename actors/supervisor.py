"""What to do about a failure: drop, try again, start anew, or give up. Decides; others execute.

Invariant: a single failure never ends a run, and a cause that repeats always does: each kind has a
budget of failures in a row, given back by the success that disproves it; learner and controller may
be lost so often at one step, which a roll-back may make again and again. No clock, no I/O. Asked
by the controller and by the launcher.
"""

from collections import Counter

from cluster.errors import DeadlineError, HoneError, LearnerLostError, StageError, WireError

MAX_GROUPS_IN_A_ROW = 16
MAX_RESTARTS_AT_A_STEP = 3
MAX_SAVES_IN_A_ROW = 3
MAX_SKIPPED_IN_A_ROW = 8
MAX_UNSCORED_IN_A_ROW = 1024  # groups; an outage of minutes, since each one slows the next down
UNSCORED_PAUSE_S, MAX_UNSCORED_PAUSE_S = 0.1, 30.0


class Supervisor:
    """Failures by kind. Example: the third failed save in a row is raised."""

    def __init__(self) -> None:
        self._groups = 0
        self._lost_at: Counter[int] = Counter()
        self._saves = 0
        self._skipped = 0
        self._unscored = 0

    def group_failed(self, error: HoneError) -> str:
        """The reason to drop the group for; raises `error` when it is no accident."""
        self._groups += 1
        if not isinstance(error, StageError | WireError) or isinstance(error, LearnerLostError):
            raise error
        if self._groups >= MAX_GROUPS_IN_A_ROW:
            raise StageError(
                error.stage if isinstance(error, StageError) else "score",
                f"the last {self._groups} groups failed and none succeeded; the last one: {error}",
            ) from error
        if isinstance(error, WireError):
            return "damaged"
        return f"{error.stage}_{'deadline' if isinstance(error, DeadlineError) else 'error'}"

    def group_made(self) -> None:
        self._groups = 0

    def group_unscored(self) -> float:
        """No verifier could judge a group; seconds to wait before the next one takes its place."""
        self._unscored += 1
        if self._unscored >= MAX_UNSCORED_IN_A_ROW:
            raise StageError(
                "score",
                f"no trajectory of the last {self._unscored} groups got a verdict: the checks "
                "could not be made (rewards.verifiers; logs/reward-*.log say why)",
            )
        return min(MAX_UNSCORED_PAUSE_S, UNSCORED_PAUSE_S * self._unscored)

    def group_scored(self) -> None:
        self._unscored = 0

    def learner_lost(self, error: LearnerLostError, *, step: int, has_checkpoint: bool) -> None:
        """Start the group anew, unless it was lost again and again after the same step, or before
        its first checkpoint: a new one would lack the warm start.
        """
        if not has_checkpoint:
            raise StageError(
                error.stage, f"{error.reason}; no checkpoint holds what it had learnt: start again"
            ) from error
        self._count_loss(error, step)

    def controller_lost(self, error: StageError, *, step: int) -> None:
        """Start another one, which goes on from the last durable state; the same budget."""
        self._count_loss(error, step)

    def _count_loss(self, error: StageError, step: int) -> None:
        self._lost_at[step] += 1
        if self._lost_at[step] > MAX_RESTARTS_AT_A_STEP:
            raise error

    def step_made(self) -> None:
        self._skipped = 0

    def step_skipped(self) -> None:
        """Go on with the weights as they are, unless step after step has no finite gradient."""
        self._skipped += 1
        if self._skipped >= MAX_SKIPPED_IN_A_ROW:
            raise StageError(
                "learn",
                f"loss or gradient of the last {self._skipped} steps was not finite and none was "
                "taken: lower learner.lr, or go back to an older checkpoint",
            )

    def save_failed(self, error: HoneError) -> None:
        """Go on with the checkpoint before, unless saves fail again and again."""
        self._saves += 1
        if self._saves >= MAX_SAVES_IN_A_ROW:
            raise StageError(
                "checkpoint", f"{self._saves} saves failed in a row; the last one: {error}"
            ) from error

    def saved(self) -> None:
        self._saves = 0
