"""CHAMP: 270 competition problems with 456 hints and 89 concepts (arXiv 2401.06961).

Invariant: hints are the concepts and hints of the annotators in the order in which the solution
needs them, ever more of them, and none names the answer. The data come with the package
`champ-dataset` (72 MB, not installed by default), whose code is not imported. Used as `champ` in
`tasks`.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from cluster.errors import ConfigError
from cluster.types import Message, Task
from rewards.gym_taskset import hint_ladder
from rewards.tasksets import task_id

FILE = "dataset_files/v0.json"
_NUMBER = re.compile(r"-?\d+(?:[./]\d+)?")


class ChampTaskset:
    """Problems of `categories` (Combinatorics, Inequality, Number-Theory, Polynomial, Sequence),
    by default all. `numbers_only` keeps those whose answer is a number, which the verifier `math`
    can check; other answers are formulas and sentences. `prompt` holds `{question}`.
    """

    name = "champ"

    def __init__(
        self,
        categories: list[str] | None = None,
        numbers_only: bool = True,
        prompt: str = "{question}",
    ) -> None:
        if "{question}" not in prompt:
            raise ConfigError(f"prompt must contain {{question}}, got {prompt!r}")
        self._categories = categories
        self._numbers_only = numbers_only
        self._prompt = prompt

    def load(self) -> list[Task]:
        """All problems in the order of the data. Raises `ConfigError`."""
        found = find_spec("champ_dataset")
        if found is None or found.origin is None:
            raise ConfigError("use: champ needs its data: `pip install --no-deps champ-dataset`")
        data: Any = msgspec.json.decode((Path(found.origin).parent / FILE).read_bytes())
        texts = {
            key: entry["_text"]
            for kind in ("concepts", "hints")
            for key, entry in data[kind].items()
        }
        problems = list(data["problems"].values())
        known = {problem["category"] for problem in problems}
        if unknown := set(self._categories or []) - known:
            raise ConfigError(
                f"categories: no {', '.join(sorted(unknown))} in {', '.join(sorted(known))}"
            )
        return [
            self._task(problem, texts)
            for problem in problems
            if problem["category"] in (self._categories or known)
            and (not self._numbers_only or _NUMBER.fullmatch(problem["_answer"]))
        ]

    def _task(self, problem: dict[str, Any], texts: dict[str, str]) -> Task:
        answer = problem["_answer"]
        messages = [
            Message(role="user", content=self._prompt.replace("{question}", problem["_text"]))
        ]
        steps = [texts[key] for key in dict.fromkeys(problem["ch_list"])]
        return Task(
            task_id=task_id(messages, answer),
            taskset=self.name,
            messages=messages,
            reference=answer,
            solution="\n".join(step["_text"] for step in problem["solution"]["steps"]),
            hints=hint_ladder(steps, answer),
            tags=[problem["category"]],
        )
