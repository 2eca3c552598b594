"""Gold answers of the shipped tasksets: a reward that refuses one teaches the opposite.

Invariant: every dataset of reasoning_gym that may be used goes through its own scorer and `math`,
CHAMP through `math`; files and hub datasets are the user's, and `hone check` has them. Used by
`benchmarks.show_rewards`.
"""

import asyncio
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from benchmarks.show import Row, judged
from cluster.config import VerifierConfig
from cluster.errors import ConfigError
from cluster.types import Task
from rewards.champ_taskset import ChampTaskset
from rewards.gym_taskset import DENIED, ReasoningGymTaskset
from rewards.rubric import Rubric
from rewards.self_check import gold_check

SEED = 7


class Checked(NamedTuple):
    refused: list[str]  # a line each
    num_answers: int


def rows(num_tasks: int) -> Iterator[Row]:
    """With `num_tasks` of each dataset of reasoning_gym, and all of CHAMP where it is installed."""
    yield asyncio.run(_gym(num_tasks))
    yield asyncio.run(champ())


async def champ() -> Row:
    claim = "gold answers refused, over CHAMP by `math`"
    try:
        tasks = ChampTaskset().load()
    except ConfigError as error:
        return Row(claim, "-", "0", "not shown here", str(error))
    return _judged(claim, await _check(["math"], [tasks]), "all problems with a number for answer")


async def _gym(num_tasks: int) -> Row:
    names: dict[str, Any] = import_module("reasoning_gym.factory").DATASETS
    covered, without = list[list[Task]](), list[str]()
    for name in sorted(set(names) - set(DENIED)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                covered.append(ReasoningGymTaskset(name, size=num_tasks, seed=SEED).load())
        except ConfigError:
            without.append(name)  # its items have no gold answer
    found = await _check(["math", "task"], covered)
    claim = (
        "gold answers refused, over reasoning_gym (gsm_symbolic is one of it) by `math` and by its "
        "own scorers; files and hub datasets are the user's"
    )
    return _judged(claim, found, f"{len(covered)} datasets; without gold answers: {len(without)}")


async def _check(uses: Sequence[str], tasksets: Sequence[list[Task]]) -> Checked:
    refused, num_answers = list[str](), 0
    for use in uses:
        rubric = Rubric({use: VerifierConfig(use=use, timeout_s=60)})
        try:
            for tasks in tasksets:
                refused += await gold_check(rubric, tasks, len(tasks))
                num_answers += len(tasks)
        finally:
            await rubric.close()
    return Checked(refused, num_answers)


def _judged(claim: str, found: Checked, of: str) -> Row:
    measured = f"{len(found.refused)} of {found.num_answers} ({of})"
    is_held = not found.refused and found.num_answers > 0
    return judged(claim, measured, "0", is_held, "; ".join(found.refused)[:200])
