"""Riddles with several ways to solve them, for the studies of this package.

A riddle is five digits; a way turns them into five others, and a completion names its way and works
it out: "b 41853" of "35814" reverses it. Each riddle accepts two of the four ways, and nothing in
it says which. Held-out riddles accept every pair equally often: every mixture of ways has the same
expected pass@1 there, .5 where all is worked out right, while a policy that has settled on one way
solves at most half of them in any number of samples. Training riddles may favour the way that a
warm start shows most: with `favour` 2 it is right on 6 of 9 riddles and each other way on 4 of 9,
so whoever only maximises the reward settles on it. With `way` all riddles accept that one alone: a
policy has to move there.
"""

import json
import random
from itertools import combinations

from cluster.types import Message, Task, TrajectoryGroup, Verdict
from rewards.base import VerifierIO
from rewards.tasksets import task_id

NUM_DIGITS = 5
WAYS = {
    "a": lambda digits: digits,
    "b": lambda digits: digits[::-1],
    "c": lambda digits: [(digit + 1) % 10 for digit in digits],
    "d": lambda digits: [9 - digit for digit in digits],
}
PAIRS = list(combinations(WAYS, 2))
MIXTURE = (4, 3, 2, 1)  # of the ways that solutions are worked in, right or not
FAVOURITE = "a"


def worked(way: str, digits: list[int]) -> str:
    """The completion that solves `digits` by `way`."""
    return f"{way} " + "".join(map(str, WAYS[way](digits)))


class Riddles:
    """`size` riddles; pairs with the favourite are accepted `favour` times as often as others."""

    def __init__(self, size: int, seed: int, favour: int = 1, way: str | None = None) -> None:
        self.name = "riddles"
        self._size, self._seed = size, seed
        pairs = [pair for pair in PAIRS for _ in range(favour if FAVOURITE in pair else 1)]
        self._accepted = pairs if way is None else [(way,)]

    def load(self) -> list[Task]:
        draw = random.Random(self._seed)
        return [
            self._task(draw, self._accepted[i % len(self._accepted)]) for i in range(self._size)
        ]

    def _task(self, draw: random.Random, accepted: tuple[str, ...]) -> Task:
        digits = [draw.randrange(10) for _ in range(NUM_DIGITS)]
        messages = [Message(role="user", content="".join(map(str, digits)))]
        [way] = draw.choices(list(WAYS), MIXTURE)
        answers = [worked(each, digits) for each in accepted]
        return Task(
            task_id=task_id(messages, answers[0]),
            taskset=self.name,
            messages=messages,
            reference=answers[0],
            solution=worked(way, digits),
            entry=json.dumps(answers),
        )


class Accepted:
    """1 for a completion that its riddle accepts."""

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        answers = json.loads(group.task.entry)
        return [Verdict(score=float(t.text.strip() in answers)) for t in group.trajectories]
