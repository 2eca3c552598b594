"""Scores answers with a reasoning_gym dataset's own scorer. For an isolated worker only.

Invariant: an exception counts against the answer only when the same scorer accepts the gold answer;
otherwise it is the check that failed. Called by `rewards.gym_taskset` by its path.
"""

import importlib
import json
from functools import lru_cache
from typing import Any

from cluster.errors import StageError, boundary
from rewards.gym_entries import EVALUATED, decode_entry, is_plain_expression

_gym: Any = importlib.import_module("reasoning_gym")


def score_entry(entry: str, answer: str) -> tuple[float, str]:
    """The dataset's score of one answer, 0 to 1, and why it was refused, if it was.

    `entry` is what `encode_entry` made. Raises when the scorer fails on its own gold answer.
    """
    name, config, item = decode_entry(entry)
    if name in EVALUATED and not is_plain_expression(answer):
        return 0.0, "not a plain expression"
    dataset = _dataset(name, json.dumps(config))
    try:
        with boundary("the dataset's scorer"):
            return float(dataset.score_answer(answer, item)), ""
    except StageError as error:
        if float(dataset.score_answer(item["answer"], item)) < 1.0:
            raise
        return 0.0, str(error)


@lru_cache(maxsize=64)
def _dataset(name: str, config: str) -> Any:
    return _gym.create_dataset(name, size=1, seed=0, **json.loads(config))
