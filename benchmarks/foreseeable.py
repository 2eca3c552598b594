"""What could be known of a return while a sum is worked: how much of its variance a critic explains
that sees every slip when it is made.

A critic of a real run knows less. What it cannot know, however it is trained, is whether there will
be a slip: where that decides, explained variance has a bound below 1.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from cluster.run_dir import Sample
from cluster.types import Message, Task
from rewards.arithmetic_steps import ArithmeticSteps


class Known(NamedTuple):
    """Before a token is written."""

    is_worked: bool  # and not answered at once
    line: int
    is_right: bool  # up to the end of the line before


def explained_by_slips(samples: Iterable[Sample]) -> float:
    """1 - Var(return - E[return | `Known`]) / Var(return) over all tokens; NaN where returns are
    all equal.
    """
    returns: defaultdict[Known, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.reward is not None and sample.tokens is not None:
            for known in _states(sample, sample.tokens.texts):
                returns[known].append(sample.reward)
    every = [value for values in returns.values() for value in values]
    unexplained = sum(_squares(values) for values in returns.values())
    total = _squares(every)
    return 1 - unexplained / total if total > 0 else float("nan")


def _squares(values: list[float]) -> float:
    """Summed squared distances from the mean."""
    mean = sum(values) / len(values) if values else 0.0
    return sum((value - mean) ** 2 for value in values)


def _states(sample: Sample, tokens: list[str]) -> Iterable[Known]:
    lines = sample.completion.split("\n")
    message = Message(role="user", content=sample.prompt)
    task = Task(task_id=sample.task_id, taskset="", messages=[message], reference=sample.reference)
    [scored] = asyncio.run(ArithmeticSteps().score(task, [lines]))
    is_right = [True, *(score == 1.0 for score in scored.scores or [True] * len(lines))]
    line = 0
    for token in tokens:
        yield Known(len(lines) > 1, line, is_right[min(line, len(lines))])
        line += token.count("\n")
