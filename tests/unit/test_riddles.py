"""The riddles of the studies: what they accept, how often, and what a policy can get from them."""

import json
from fractions import Fraction

from benchmarks.riddles import WAYS, Riddles, worked
from cluster.config import VerifierConfig
from rewards.rubric import Rubric
from rewards.self_check import group_of


def _shares(riddles: Riddles) -> dict[str, Fraction]:
    """Of riddles that accept each way."""
    tasks = riddles.load()
    ways = [{answer[0] for answer in json.loads(task.entry)} for task in tasks]
    assert all(len(accepted) == 2 for accepted in ways)
    return {way: Fraction(sum(way in each for each in ways), len(ways)) for way in WAYS}


def test_held_out_riddles_accept_every_way_equally_often() -> None:
    assert set(_shares(Riddles(240, seed=1)).values()) == {Fraction(1, 2)}


def test_training_riddles_favour_the_most_frequent_way() -> None:
    shares = _shares(Riddles(900, seed=1, favour=2))
    assert shares == {"a": Fraction(2, 3)} | dict.fromkeys("bcd", Fraction(4, 9))
    solutions = [task.solution[0] for task in Riddles(900, seed=1, favour=2).load()]
    assert max(WAYS, key=solutions.count) == "a"
    assert set(solutions) == set(WAYS)


async def test_only_what_a_riddle_accepts_is_rewarded() -> None:
    [task] = Riddles(1, seed=1, way="d").load()
    digits = [int(digit) for digit in task.messages[0].content]
    group = group_of(task, [worked(way, digits) for way in WAYS])
    rubric = Rubric({"accepted": VerifierConfig(use="benchmarks.riddles:Accepted")})
    assert (await rubric.score(group)).rewards == [0.0, 0.0, 0.0, 1.0]
