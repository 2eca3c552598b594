"""Riddles with several ways to solve them, for the studies of this package.

A riddle is five digits; a way turns them into five others, and a completion names its way and works
it out: "b 41853" of "35814" reverses it. Each riddle accepts two of the four ways, and nothing in
it says which; every pair is accepted equally often. So every mixture of ways has the same expected
pass@1, while a policy that has settled on one way solves at most half of the riddles in any number
of samples. With `way` all riddles accept that one alone: a policy has to move there.
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


def worked(way: str, digits: list[int]) -> str:
    """The completion that solves `digits` by `way`."""
    return f"{way} " + "".join(map(str, WAYS[way](digits)))


class Riddles:
    """`size` riddles; the `solution` is worked in a way drawn by `mixture`, right or not."""

    def __init__(
        self,
        size: int,
        seed: int,
        mixture: tuple[float, ...] = (4, 3, 2, 1),
        way: str | None = None,
    ) -> None:
        self.name = "riddles"
        self._size, self._seed = size, seed
        self._mixture = mixture
        self._accepted = PAIRS if way is None else [(way,)]

    def load(self) -> list[Task]:
        draw = random.Random(self._seed)
        return [
            self._task(draw, self._accepted[i % len(self._accepted)]) for i in range(self._size)
        ]

    def _task(self, draw: random.Random, accepted: tuple[str, ...]) -> Task:
        digits = [draw.randrange(10) for _ in range(NUM_DIGITS)]
        messages = [Message(role="user", content="".join(map(str, digits)))]
        [way] = draw.choices(list(WAYS), self._mixture)
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
