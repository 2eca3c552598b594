"""Riddles with several ways to solve them, for the studies of this package.

A riddle is five digits; a way turns them into five others, and a completion names its way and works
it out: "b 41853" of "35814" reverses it. Each riddle accepts two of the four ways, and nothing in
it says which: its own secret, drawn by a hash. So every mixture of ways has the same expected
pass@1, while a policy that has settled on one way solves at most half of the riddles in any number
of samples. With `way` all riddles accept that one alone: a policy has to move there.
"""

import hashlib
import random

from cluster.types import Message, Task, TrajectoryGroup, Verdict
from rewards.base import VerifierIO
from rewards.tasksets import task_id

NUM_DIGITS = 5
NUM_ACCEPTED = 2
WAYS = {
    "a": lambda digits: digits,
    "b": lambda digits: digits[::-1],
    "c": lambda digits: [(digit + 1) % 10 for digit in digits],
    "d": lambda digits: [9 - digit for digit in digits],
}


def worked(way: str, digits: list[int]) -> str:
    """The completion that solves `digits` by `way`."""
    return f"{way} " + "".join(map(str, WAYS[way](digits)))


def accepted(question: str, way: str | None = None) -> list[str]:
    """The completions that this riddle accepts, one for each of its ways."""
    draw = random.Random(hashlib.sha256(question.encode()).digest())
    ways = draw.sample(list(WAYS), NUM_ACCEPTED) if way is None else [way]
    digits = [int(digit) for digit in question]
    return [worked(each, digits) for each in ways]


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
        self._mixture, self._way = mixture, way

    def load(self) -> list[Task]:
        draw = random.Random(self._seed)
        return [self._task(draw) for _ in range(self._size)]

    def _task(self, draw: random.Random) -> Task:
        digits = [draw.randrange(10) for _ in range(NUM_DIGITS)]
        question = "".join(map(str, digits))
        messages = [Message(role="user", content=question)]
        [way] = draw.choices(list(WAYS), self._mixture)
        reference = accepted(question, self._way)[0]
        return Task(
            task_id=task_id(messages, reference),
            taskset=self.name,
            messages=messages,
            reference=reference,
            solution=worked(way, digits),
        )


class Accepted:
    """1 for a completion that its riddle accepts."""

    def __init__(self, way: str | None = None) -> None:
        self._way = way

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        answers = accepted(group.task.messages[-1].content, self._way)
        return [Verdict(score=float(t.text.strip() in answers)) for t in group.trajectories]
