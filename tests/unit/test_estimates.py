import itertools
import math
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.estimates import Estimate, TaskSamples, majority, pass_at_k
from actors.evaluate import EvalResult


def samples(passed: list[bool], answers: list[str] | None = None) -> TaskSamples:
    return TaskSamples(passed, answers or [str(i) for i in range(len(passed))])


def test_the_interval_takes_the_task_as_its_unit():
    estimate = Estimate.over_tasks([1.0, 1.0, 0.0, 0.0])
    assert estimate.value == 0.5
    assert estimate.half_width == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
    assert math.isnan(Estimate.over_tasks([1.0]).half_width)
    assert math.isnan(Estimate.over_tasks([]).value)


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 7))
def test_pass_at_k_is_the_mean_over_all_subsets(passed: list[bool], k: int):
    k = min(k, len(passed))
    expected = fmean(any(subset) for subset in itertools.combinations(passed, k))
    assert pass_at_k(samples(passed), k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("passed", "answers", "expected"),
    [
        ([True, True, False], ["7", "7", "8"], 1.0),
        ([True, False, False], ["7", "8", "8"], 0.0),
        ([True, False], ["7", "8"], 0.5),
        ([True, False, False], ["7", "7", "8"], 0.5),  # a judge that differs with itself
    ],
)
def test_the_majority_answer_is_judged(passed: list[bool], answers: list[str], expected: float):
    assert majority(samples(passed, answers)) == expected


def test_what_abstained_is_in_no_denominator():
    result = EvalResult.of([samples([True, False]), samples([True]), samples([])], 2, 3)
    assert result.num_tasks == 2
    assert result.pass_at_1.value == 0.75
    assert result.pass_at_k.value == 1.0
