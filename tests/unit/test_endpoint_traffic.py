"""When an answer of a moving policy counts as honest, and when the row on a live run holds."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from benchmarks.endpoint_traffic import Traffic
from benchmarks.show_serve_live import traffic_row

Span = tuple[int, int, int]  # version, start, end


def _answer(model: str, spans: Sequence[Span], num_tokens: int = 8) -> SimpleNamespace:
    names = ("policy_version", "start", "end")
    return SimpleNamespace(
        model=model,
        policy_versions=[dict(zip(names, span, strict=True)) for span in spans],
        usage=SimpleNamespace(completion_tokens=num_tokens),
    )


@pytest.mark.parametrize(
    ("model", "spans", "is_honest"),
    [
        ("policy@7", [(7, 0, 8)], True),
        ("policy@8", [(7, 0, 3), (8, 3, 8)], True),
        ("policy@7", [(8, 0, 8)], False),  # named after a version that sampled nothing
        ("policy", [(8, 0, 8)], False),
        ("policy@8", [(7, 0, 3), (8, 4, 8)], False),
        ("policy@8", [(8, 0, 7)], False),
        ("policy@8", [], False),
    ],
)
def test_an_answer_is_honest_under_a_version_that_sampled_it(
    model: str, spans: list[Span], is_honest: bool
) -> None:
    traffic = Traffic()
    traffic.add(_answer(model, spans), 8)
    assert traffic.is_whole == is_honest
    assert traffic.num_crossed == (len(spans) > 1)


def test_a_short_answer_is_cut() -> None:
    traffic = Traffic()
    traffic.add(_answer("policy@7", [(7, 0, 5)], num_tokens=5), 8)
    assert (traffic.num_cut, traffic.num_dishonest) == (1, 0)


@pytest.mark.parametrize(
    ("versions", "num_crossed", "verdict"),
    [
        ({3, 4, 5, 6}, 2, "holds"),
        ({3}, 0, "falls short"),  # the run published, the endpoint followed nothing
        ({1, 2, 3, 4}, 2, "falls short"),
        ({4, 5, 6}, 0, "falls short"),  # no answer met a load
    ],
)
def test_the_row_asks_what_answered_and_not_what_was_published(
    versions: set[int], num_crossed: int, verdict: str
) -> None:
    traffic = Traffic(num_requests=400, versions=versions, num_crossed=num_crossed)
    assert traffic_row(traffic, 400, 6, first=3, last=9).verdict == verdict
