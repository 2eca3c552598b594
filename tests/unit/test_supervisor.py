"""One failure never ends a run; the same failure again and again does."""

import pytest

from actors.supervisor import (
    MAX_GROUPS_IN_A_ROW,
    MAX_RESTARTS_AT_A_STEP,
    MAX_SAVES_IN_A_ROW,
    MAX_SKIPPED_IN_A_ROW,
    MAX_UNSCORED_IN_A_ROW,
    Supervisor,
)
from cluster.errors import (
    BufferUnavailableError,
    DeadlineError,
    FencedError,
    HoneError,
    LearnerLostError,
    StageError,
    WireError,
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DeadlineError("rollout", "hangs"), "rollout_deadline"),
        (StageError("rollout", "program"), "rollout_error"),
        (DeadlineError("score", "hangs"), "score_deadline"),
        (WireError("damaged"), "damaged"),
    ],
)
def test_a_failed_group_is_dropped_with_a_reason(error: HoneError, reason: str) -> None:
    assert Supervisor().group_failed(error) == reason


def test_groups_that_all_fail_end_the_run_and_one_success_gives_the_budget_back() -> None:
    supervisor = Supervisor()
    error = StageError("rollout", "no such tool")
    for _ in range(2):
        for _ in range(MAX_GROUPS_IN_A_ROW - 1):
            supervisor.group_failed(error)
        supervisor.group_made()
    for _ in range(MAX_GROUPS_IN_A_ROW - 1):
        supervisor.group_failed(error)
    with pytest.raises(StageError, match=r"none succeeded.*no such tool"):
        supervisor.group_failed(error)


@pytest.mark.parametrize(
    "error", [FencedError("followed"), BufferUnavailableError("gone"), LearnerLostError("x", "y")]
)
def test_what_is_not_the_fault_of_a_group_is_never_a_drop(error: HoneError) -> None:
    with pytest.raises(type(error)):
        Supervisor().group_failed(error)


def test_a_learner_that_is_lost_at_one_step_again_and_again_ends_the_run() -> None:
    supervisor = Supervisor()
    error = LearnerLostError("learn", "a rank died")
    for step in range(5):
        for _ in range(MAX_RESTARTS_AT_A_STEP):
            supervisor.learner_lost(error, step=step, has_checkpoint=True)
            supervisor.step_made()  # the steps before it are made anew each time
    with pytest.raises(LearnerLostError):
        supervisor.learner_lost(error, step=4, has_checkpoint=True)


def test_a_controller_that_is_lost_at_one_step_again_and_again_ends_the_run() -> None:
    supervisor = Supervisor()
    error = StageError("controller", "died")
    for step in [7, 8] * MAX_RESTARTS_AT_A_STEP:
        supervisor.controller_lost(error, step=step)
    with pytest.raises(StageError, match="died"):
        supervisor.controller_lost(error, step=8)


def test_a_learner_lost_before_its_first_checkpoint_ends_the_run() -> None:
    error = LearnerLostError("learn", "a rank died")
    with pytest.raises(StageError, match=r"a rank died; no checkpoint holds") as raised:
        Supervisor().learner_lost(error, step=0, has_checkpoint=False)
    assert not isinstance(raised.value, LearnerLostError)


def test_saves_may_fail_but_not_for_ever() -> None:
    supervisor = Supervisor()
    error = StageError("checkpoint", "No space left on device")
    for _ in range(3):
        for _ in range(MAX_SAVES_IN_A_ROW - 1):
            supervisor.save_failed(error)
        supervisor.saved()
    for _ in range(MAX_SAVES_IN_A_ROW - 1):
        supervisor.save_failed(error)
    with pytest.raises(StageError, match=r"3 saves failed in a row.*No space left"):
        supervisor.save_failed(error)


def test_steps_without_a_finite_gradient_end_the_run_and_a_good_one_gives_the_budget_back() -> None:
    supervisor = Supervisor()
    for _ in range(2):
        for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
            supervisor.step_skipped()
        supervisor.step_made()
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        supervisor.step_skipped()
    with pytest.raises(StageError, match=r"not finite.*learner\.lr"):
        supervisor.step_skipped()


def test_groups_without_a_verdict_slow_the_run_down_before_they_end_it() -> None:
    supervisor = Supervisor()
    pauses = [supervisor.group_unscored() for _ in range(MAX_UNSCORED_IN_A_ROW - 1)]
    assert pauses[0] <= 0.1
    assert pauses == sorted(pauses)
    assert sum(pauses) > 3600
    with pytest.raises(StageError, match="got a verdict"):
        supervisor.group_unscored()
    supervisor.group_scored()
    assert supervisor.group_unscored() == pauses[0]
