"""Where hints come from: the task, its worked solution, its answer, or a model behind an endpoint.

Invariant: a source says from the task alone how many hints it has, weakest first; asking for one
gives text or a `HintError`, never a hint that names the answer unless that is what it is for. Built
by `actors.guide`; a source of your own stands on the same footing ("my_package.my_module:MyHints").
"""

import asyncio
import math
import re
from collections.abc import Sequence
from typing import Protocol

from cluster.errors import ConfigError, HintError
from cluster.types import Task
from rewards.endpoint import Breaker, Endpoint, EndpointError

SOURCES = {
    "dataset": "actors.hints:DatasetHints",
    "solution": "actors.hints:SolutionHints",
    "answer": "actors.hints:AnswerHints",
    "writer": "actors.hints:WrittenHints",
}
_SYSTEM = (
    "You help a student who failed a task. Write a hint of strength {level} on a scale of 1 (a "
    "nudge) to {levels} (nearly the whole way). Never state the final answer. Reply with the hint "
    "alone, in at most {words} words."
)


class HintSource(Protocol):
    """`template` puts a `{hint}` beside the `{prompt}`; `needs` names what a task must have.

    May also have `is_beginning = True`: a completion that begins with the hint goes on in its last
    line instead of the next one.
    """

    template: str
    needs: str

    def num_levels(self, task: Task) -> int:
        """How many hints there are for `task`; 0 where what is needed is missing."""
        ...

    async def hint(self, task: Task, level: int) -> str:
        """The hint of `level` in 1 .. `num_levels`, 1 being the weakest. Raises `HintError`."""
        ...


class DatasetHints:
    """`task.hints`, of which at most `max_levels` are used, evenly spread, the strongest among
    them: of 8 hints and 3 levels the 3rd, 6th and 8th.
    """

    template = "{prompt}\n\nHint: {hint}"
    needs = "hints (column `hints` of a file, or worked steps of a generator)"

    def __init__(self, max_levels: int = 3) -> None:
        if max_levels < 1:
            raise ConfigError(f"max_levels must be at least 1, got {max_levels}")
        self._max_levels = max_levels

    def num_levels(self, task: Task) -> int:
        return min(self._max_levels, len(task.hints))

    async def hint(self, task: Task, level: int) -> str:
        return task.hints[math.ceil(level * len(task.hints) / self.num_levels(task)) - 1]


class SolutionHints:
    """The beginning of `task.solution`: each of `shares` of its words, smallest first.

    Partial solutions as prompts are QuestA (arXiv 2507.13266), as beginnings of the completion
    (`place: completion`) BREAD (arXiv 2506.17211).
    """

    template = "{prompt}\n\nA solution begins like this:\n{hint}"
    needs = "a worked solution (column `solution` of a file)"
    is_beginning = True

    def __init__(self, shares: Sequence[float] = (0.25, 0.5, 0.75)) -> None:
        if not shares or list(shares) != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] < 1:
            raise ConfigError(f"shares must rise and lie between 0 and 1, got {list(shares)}")
        self._shares = shares

    def num_levels(self, task: Task) -> int:
        return len(self._shares) if task.solution.strip() else 0

    async def hint(self, task: Task, level: int) -> str:
        words = re.findall(r"\S+\s*", task.solution)
        count = math.floor(self._shares[level - 1] * len(words))
        if count == 0:
            raise HintError(f"{self._shares[level - 1]:.0%} of {len(words)} words is no hint")
        return "".join(words[:count]).rstrip()


class AnswerHints:
    """The reference itself: the policy explains a given answer (ExPO, arXiv 2507.02834), and that
    explanation is learned without it. ExPO's supervised term is not part of this.
    """

    template = "{prompt}\n\nThe answer is {hint}. Show how to find it, then give it."
    needs = "a reference"

    def num_levels(self, task: Task) -> int:
        return 1 if task.reference else 0

    async def hint(self, task: Task, level: int) -> str:
        return task.reference


class WrittenHints:
    """Hints by a model that is shown the task and its reference; one that gives the answer away is
    refused. At temperature 0 a hint is written once per task and level and worker.
    """

    template = "{prompt}\n\nHint: {hint}"
    needs = "a reference or a solution"

    def __init__(
        self,
        base_url: str,
        model: str,
        levels: int = 3,
        max_words: int = 60,
        temperature: float = 0.0,
        api_key_env: str = "",
        call_timeout_s: float = 30.0,
        retries: int = 2,
        max_parallel: int = 16,
    ) -> None:
        if levels < 1 or max_words < 1 or max_parallel < 1:
            raise ConfigError("levels, max_words and max_parallel must be at least 1")
        self._levels = levels
        self._max_words = max_words
        self._temperature = temperature
        self._give_up_s = call_timeout_s * (retries + 2)  # all tries and the waits between
        self._endpoint = Endpoint(
            base_url,
            model,
            api_key_env=api_key_env,
            call_timeout_s=call_timeout_s,
            retries=retries,
            max_parallel=max_parallel,
            breaker=Breaker(threshold=5, open_s=10.0),
            prices=(0.0, 0.0),
        )

    def num_levels(self, task: Task) -> int:
        return self._levels if task.reference or task.solution else 0

    async def hint(self, task: Task, level: int) -> str:
        problem = "\n".join(message.content for message in task.messages)
        known = f"Answer: {task.reference}\n\n{task.solution}".strip()
        system = _SYSTEM.format(level=level, levels=self._levels, words=self._max_words)
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": f"Task:\n{problem}\n\n{known}"},
        ]
        try:
            answer = await self._endpoint.ask(
                messages,
                deadline=asyncio.get_running_loop().time() + self._give_up_s,
                temperature=self._temperature,
                max_tokens=4 * self._max_words,
            )
        except EndpointError as error:
            raise HintError(f"the hint writer gave nothing: {error}") from error
        text = answer.text.strip()
        if not text:
            raise HintError("the hint writer gave an empty hint")
        if names(text, task.reference):
            raise HintError("the hint writer gave the answer away")
        return text


def names(text: str, answer: str) -> bool:
    """Whether `answer` stands in `text` as a word of its own: "12" in "= 12." but not in "112"."""
    return bool(answer) and bool(
        re.search(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", text, re.IGNORECASE)
    )
