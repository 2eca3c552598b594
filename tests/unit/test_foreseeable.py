"""How much of the returns of worked sums a critic can explain at best: by hand on four of them."""

import math

import pytest

from benchmarks.foreseeable import explained_by_slips
from cluster.run_dir import Sample, TokenColumns


def _sample(completion: str, reward: float | None, step: int = 1) -> Sample:
    return Sample(
        step=step,
        group_id="g",
        task_id="t",
        prompt="4 - 1 + 3 =",
        completion=completion,
        reward=reward,
        reference="6",
        tokens=TokenColumns(
            texts=[*completion, ""], entropies=[], advantages=[], policy_versions=[], is_peak=[]
        ),
    )


def test_a_slip_is_known_from_the_line_after_it() -> None:
    right, wrong = "4 - 1 = 3\n3 + 3 = 6\n6", "4 - 1 = 2\n2 + 3 = 5\n5"
    first = len("4 - 1 = 3\n")  # tokens before which both look alike
    later = len(right) + 1 - first
    # Tokens of the first line are half 1 and half 0; of those after it all is known.
    expected = 1 - first / (first + later)
    found = explained_by_slips([_sample(right, 1.0), _sample(wrong, 0.0)])
    assert found == pytest.approx(expected)
    assert explained_by_slips([_sample(right, 1.0), _sample(right, 0.0)]) == pytest.approx(0.0)


def test_what_was_answered_at_once_is_told_from_what_was_worked() -> None:
    worked = _sample("4 - 1 = 3\n3 + 3 = 6\n6", 1.0)
    assert explained_by_slips([worked, _sample("7", 0.0), _sample("8", None)]) == 1.0


def test_that_the_policy_gets_better_from_step_to_step_explains_nothing() -> None:
    first = [_sample("6", 1.0), _sample("6", 0.0), _sample("6", 0.0)]
    second = [_sample("6", 1.0, 2), _sample("6", 1.0, 2), _sample("6", 0.0, 2)]
    assert explained_by_slips([*first, *second]) == pytest.approx(0.0)


def test_equal_returns_have_nothing_to_explain() -> None:
    assert math.isnan(explained_by_slips([_sample("6", 1.0), _sample("6", 1.0)]))
