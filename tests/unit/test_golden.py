"""Golden sets: what a rubric must get right before it goes live."""

from cluster.config import VerifierConfig
from cluster.types import TrajectoryGroup, Verdict
from rewards.golden import golden_check
from rewards.golden_sets import CODE, MATH
from rewards.rubric import Rubric


class Exact:
    def __init__(self, score: float | None = 1.0) -> None:
        self._score = score

    async def score(self, group: TrajectoryGroup, io: object) -> list[Verdict]:
        gold = group.task.reference
        return [Verdict(score=self._score if t.text == gold else 0.0) for t in group.trajectories]


def config(golden: list[dict[str, object]], **settings: object) -> VerifierConfig:
    return VerifierConfig.model_validate(
        {"use": f"{__name__}:Exact", "settings": settings, "golden": golden}
    )


PAIRS: list[dict[str, object]] = [
    {"reference": "7", "completion": "7", "score": 1},
    {"reference": "7", "completion": "8", "score": 0},
]


async def test_a_right_verifier_passes_and_each_wrong_score_is_a_line():
    assert await golden_check(Rubric({"v": config(PAIRS)})) == []
    (line,) = await golden_check(Rubric({"v": config(PAIRS, score=0.5)}))
    assert line.startswith("rewards.verifiers.v: the golden completion '7' for '7' must score 1")


def test_another_golden_set_is_another_rubric_with_the_same_signals():
    plain, guarded = Rubric({"v": config([])}), Rubric({"v": config(PAIRS)})
    assert plain.versions == guarded.versions
    assert plain.version != guarded.version


async def test_an_abstention_fails_a_golden_set():
    (line,) = await golden_check(Rubric({"v": config(PAIRS, score=None)}))
    assert "got None" in line


def test_the_built_in_sets_hold_right_wrong_and_hostile_completions():
    for pairs in (MATH, CODE):
        assert {pair.score for pair in pairs} == {0.0, 1.0}
        assert any("__import__" in p.completion or "os._exit" in p.completion for p in pairs)
