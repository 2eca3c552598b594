"""Tasks of reasoning_gym's generators, and the verifier that asks their own scorers.

Invariant: every task carries, as JSON, what its scorer needs in another process; a dataset whose
scorer runs the model's answer as code or pays for junk is refused. Used as `reasoning_gym` in
`tasks` and as `task` in `rewards.verifiers`.
"""

import asyncio
import difflib
import importlib
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

from cluster.errors import ConfigError, HoneError
from cluster.types import Message, Task, TrajectoryGroup, Verdict
from rewards.answers import after_thinking, final_part, last_box, last_line, last_tag
from rewards.base import VerifierIO, abstention
from rewards.gym_entries import EVALUATED, GymEntry, encode_entry, is_plain_expression
from rewards.tasksets import task_id

SCORE_ENTRY = "rewards.gym_scorer:score_entry"
FULL_SCORE = 1.0 - 1e-6
_RUNS_CODE = "its scorer runs the model's answer as Python code"
_PAYS_JUNK = "its scorer pays full marks for junk"
DENIED = {
    "string_insertion": _RUNS_CODE,
    "spiral_matrix": _RUNS_CODE,
    "binary_matrix": _RUNS_CODE,
    "n_queens": _RUNS_CODE,
    "game_of_life_halting": _PAYS_JUNK,
    "coin_flip": _PAYS_JUNK,
    "composite": "its items do not name their scorer; use one dataset per taskset",
}


class ReasoningGymTaskset:
    r"""`size` problems of one of reasoning_gym's datasets; item i is generated from `seed + i`.

    `config` goes to the dataset (`{min_terms: 2, max_terms: 3}`). The user message is `prompt` with
    `{question}` replaced; `question_regex` keeps its first group of the question only, so that tiny
    models get short prompts. `solution` is the worked solution, where one is known, and then the
    answer as `answer_format` writes it. Example: dataset "chain_sum", `question_regex`
    "problem: (.*)" and `answer_format` `\boxed{{answer}}` give "4 - 1 - 7 =" and `\boxed{-4}`.
    """

    def __init__(
        self,
        dataset: str,
        size: int = 2000,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        prompt: str = "{question}",
        question_regex: str | None = None,
        answer_format: str = "{answer}",
    ) -> None:
        if dataset in DENIED:
            raise ConfigError(f"dataset: {dataset!r} cannot be used: {DENIED[dataset]}")
        if size < 1:
            raise ConfigError(f"size must be at least 1, got {size}")
        for knob, template, mark in (
            ("prompt", prompt, "{question}"),
            ("answer_format", answer_format, "{answer}"),
        ):
            if mark not in template:
                raise ConfigError(f"{knob} must contain {mark}, got {template!r}")
        self.name = f"reasoning_gym/{dataset}"
        self._dataset = dataset
        self._size = size
        self._seed = seed
        self._config = config or {}
        self._prompt = prompt
        self._question = _compile(question_regex)
        self._answer_format = answer_format

    def load(self) -> list[Task]:
        """Generate the tasks; the library is imported here. Raises `ConfigError`."""
        generator = self._generator()
        tasks = [self._task(generator[index]) for index in range(self._size)]
        is_evaluated = self._dataset in EVALUATED
        return [t for t in tasks if not is_evaluated or is_plain_expression(t.reference)]

    def _generator(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gym: Any = importlib.import_module("reasoning_gym")
            names: dict[str, Any] = importlib.import_module("reasoning_gym.factory").DATASETS
        if self._dataset not in names:
            near = difflib.get_close_matches(self._dataset, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(names))}"
            raise ConfigError(f"dataset: reasoning_gym has no {self._dataset!r} ({hint})")
        try:
            return gym.create_dataset(
                self._dataset, size=self._size, seed=self._seed, **self._config
            )
        except (TypeError, ValueError, AssertionError) as error:
            known = ", ".join(names[self._dataset][1].__dataclass_fields__)
            raise ConfigError(f"config: {error} (settings of {self._dataset}: {known})") from error

    def _task(self, item: dict[str, Any]) -> Task:
        question, answer = item["question"], item["answer"]
        metadata: dict[str, Any] = item["metadata"]
        if not isinstance(answer, str):
            raise ConfigError(
                f"dataset: {self._dataset!r} cannot be used: its items have no gold answer, "
                "so its scorer cannot be checked"
            )
        if self._question is not None:
            found = self._question.search(question)
            if found is None:
                raise ConfigError(f"question_regex does not match the question {question!r}")
            question = found[1]
        messages = [Message(role="user", content=self._prompt.replace("{question}", question))]
        steps = _worked_steps(self._dataset, metadata)
        return Task(
            task_id=task_id(messages, answer),
            taskset=self.name,
            messages=messages,
            reference=answer,
            solution="\n".join([*steps, self._answer_format.replace("{answer}", answer)]),
            hints=hint_ladder(steps, answer),
            tags=[self._dataset],
            entry=encode_entry(GymEntry(self._dataset, self._config, item)),
        )


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"question_regex is no regular expression: {error}") from error
    if compiled.groups < 1:
        raise ConfigError(
            f"question_regex must have a group, as in 'problem: (.*)', got {pattern!r}"
        )
    return compiled


def _worked_steps(dataset: str, metadata: dict[str, Any]) -> list[str]:
    """The lines of a worked solution without its closing `#### answer`; none where it is unknown.

    Sums are worked from left to right: "4 - 1 - 7" gives "4 - 1 = 3" and "3 - 7 = -4".
    """
    if dataset == "chain_sum":
        return _sum_steps(metadata["expression"].split())
    worked = metadata.get("answer_cot")
    lines = worked.splitlines() if isinstance(worked, str) else []
    return [line for line in lines if line.strip() and not line.startswith("####")]


def _sum_steps(terms: list[str]) -> list[str]:
    total, steps = int(terms[0]), list[str]()
    for sign, number in zip(terms[1::2], terms[2::2], strict=True):
        result = total + int(number) if sign == "+" else total - int(number)
        steps.append(f"{total} {sign} {number} = {result}")
        total = result
    return steps


def hint_ladder(steps: list[str], answer: str) -> list[str]:
    """Ever longer beginnings of the worked solution, up to where the answer would appear."""
    given = re.compile(rf"(?<![\w.]){re.escape(answer)}(?!\w)")
    hints: list[str] = []
    for count, step in enumerate(steps, start=1):
        if given.search(step):
            break
        hints.append("\n".join(steps[:count]))
    return hints


class TasksetVerifier:
    """The score of the dataset's own scorer, in a worker process.

    `extract` says what of the completion is the answer: all of it (after the thinking), the last
    box, line, or `<answer>` tag. Anything short of full marks is 0.0 unless `partial`: most scorers
    pay 0.01 for wrong text. Example: for the answer "12", `extract="last_line"` takes "5+7\n12".
    """

    def __init__(
        self,
        extract: Literal["all", "boxed", "last_line", "answer_tag"] = "all",
        partial: bool = False,
    ) -> None:
        if extract not in _EXTRACTORS:
            raise ConfigError(f"extract must be one of {', '.join(_EXTRACTORS)}, got {extract!r}")
        self._extract = _EXTRACTORS[extract]
        self._partial = partial

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        entry = group.task.entry
        if not entry:
            error = f"task {group.task.task_id} is not of a reasoning_gym taskset (tasks.train.use)"
            return [Verdict(score=None, error=error) for _ in group.trajectories]
        answers = [self._extract(t.text) for t in group.trajectories]
        distinct = dict.fromkeys(answers)
        verdicts = await asyncio.gather(*(self._verdict(entry, answer, io) for answer in distinct))
        by_answer = dict(zip(distinct, verdicts, strict=True))
        return [by_answer[answer] for answer in answers]

    async def _verdict(self, entry: str, answer: str | None, io: VerifierIO) -> Verdict:
        if not answer:
            return Verdict(score=0.0, evidence="no answer")
        try:
            reply: Any = await io.run_isolated(SCORE_ENTRY, entry, answer)
        except HoneError as error:
            return abstention(error)
        score, reason = reply
        kept = score if self._partial else float(score >= FULL_SCORE)
        return Verdict(score=kept, evidence=reason or f"scorer gave {score:g}")


def _all(text: str) -> str:
    return after_thinking(text).strip()


def _boxed(text: str) -> str | None:
    return last_box(final_part(text))


def _last_line(text: str) -> str | None:
    return last_line(final_part(text))


def _answer_tag(text: str) -> str | None:
    return last_tag(final_part(text))


_EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "all": _all,
    "boxed": _boxed,
    "last_line": _last_line,
    "answer_tag": _answer_tag,
}
