"""Prompts whose worked answers are digits of geometric length, for `benchmarks.throughput`.

A policy warmed up on them writes digits and ends at each token with probability 1 / `mean`,
whatever came before. So lengths have the long tail of reasoning, and a limit on new tokens cuts it
where one likes.
"""

import math
import random
import string

from cluster.types import Message, Task
from rewards.tasksets import task_id

NUM_LETTERS = 8


class Tailed:
    """`size` prompts of random letters; the solution has `mean` tokens with its end of sequence,
    and at most `cap` digits.
    """

    def __init__(self, size: int, seed: int, mean: int = 128, cap: int = 256) -> None:
        self.name = "tailed"
        self._size, self._seed = size, seed
        self._mean, self._cap = mean, cap

    def load(self) -> list[Task]:
        draw = random.Random(self._seed)
        return [self._task(draw) for _ in range(self._size)]

    def _task(self, draw: random.Random) -> Task:
        prompt = "".join(draw.choices(string.ascii_lowercase, k=NUM_LETTERS))
        messages = [Message(role="user", content=prompt)]
        going_on = math.log1p(-1 / self._mean)
        length = 1 + int(math.log(1.0 - draw.random()) / going_on)  # geometric, from 1
        digits = min(self._cap, max(1, length - 1))
        reference = draw.choice("02468")
        return Task(
            task_id=task_id(messages, reference),
            taskset=self.name,
            messages=messages,
            reference=reference,
            solution="".join(draw.choices(string.digits, k=digits)),
        )
