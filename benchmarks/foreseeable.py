"""What could be known of a return while a sum is worked: how much of its variance a critic explains
that knows of every slip once its line is written.

A critic of a real run knows less. What it cannot know, however it is trained, is whether there will
be a slip: where that decides, explained variance has a bound below 1.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean
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
    """1 - Var(return - E[return | `Known`]) / Var(return) over all tokens, returns taken as their
    distance from the mean of their step; NaN where those are all equal.
    """
    steps: defaultdict[int, list[tuple[Known, float]]] = defaultdict(list)
    for sample in samples:
        if sample.reward is not None and sample.tokens is not None:
            states = _states(sample, sample.tokens.texts)
            steps[sample.step] += [(known, sample.reward) for known in states]
    returns: defaultdict[Known, list[float]] = defaultdict(list)
    for tokens in steps.values():
        mean = fmean(value for _, value in tokens)
        for known, value in tokens:
            returns[known].append(value - mean)
    unexplained = sum(_squares(values) for values in returns.values())
    total = _squares([value for values in returns.values() for value in values])
    return 1 - unexplained / total if total > 1e-9 else float("nan")


def _squares(values: list[float]) -> float:
    """Summed squared distances from the mean."""
    mean = fmean(values) if values else 0.0
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
