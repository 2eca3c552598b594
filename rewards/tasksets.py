"""Tasksets: where tasks come from, and the training and held-out tasks of a run.

Invariant: no held-out prompt is trained on; a task's id is a hash of its content, so both splits
and every process agree on it. Called by `actors.bring_up` and `hone check`.
"""

import hashlib
import importlib
import json
import logging
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from cluster import plugins
from cluster.config import Plugin, TasksSection
from cluster.errors import ConfigError
from cluster.types import Message, Task
from rewards.registry import TASKSETS

HELD_OUT_FRACTION = 0.1
MAX_HELD_OUT = 200
MAX_PROBLEMS_SHOWN = 10
log = logging.getLogger(__name__)


class Taskset(Protocol):
    """A source of tasks, named in a config by `"module:Class"` with keyword settings."""

    name: str

    def load(self) -> list[Task]:
        """All tasks, in an order that depends on the settings only. Raises `ConfigError`."""
        ...


def task_id(messages: list[Message], reference: str) -> str:
    """Sixteen hex digits over the content of a problem."""
    content = [[m.role, m.content] for m in messages] + [reference]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def load_tasks(section: TasksSection, split: Literal["train", "eval"]) -> list[Task]:
    """The tasks of one split, without duplicates, with `tasks.system_prompt` in front.

    Without `tasks.eval` the last tenth of the training tasks (at most 200) is held out. Training
    tasks whose prompt is also held out are dropped. A task that has a system message keeps its own.
    Raises `ConfigError`.
    """
    train = _load(section.train, "tasks.train")
    if section.eval is not None:
        held_out = _load(section.eval, "tasks.eval")
    elif len(train) > 1:
        size = min(MAX_HELD_OUT, max(1, int(len(train) * HELD_OUT_FRACTION)))
        train, held_out = train[:-size], train[-size:]
    else:
        raise ConfigError(
            "tasks.train: must hold at least 2 different tasks, so that one can be held out for "
            f"evaluation, got {len(train)} (or name a taskset in tasks.eval)"
        )
    chosen = held_out if split == "eval" else _without(train, held_out)
    return [_with_system_prompt(task, section.system_prompt) for task in chosen]


def _load(plugin: Plugin, knob: str) -> list[Task]:
    taskset: Taskset = plugins.build(plugin.use, plugin.settings, TASKSETS, knob)
    try:
        loaded = taskset.load()
    except ConfigError as error:
        raise ConfigError(f"{knob}: {error}") from error
    tasks = list({task.task_id: task for task in loaded}.values())
    if not tasks:
        raise ConfigError(f"{knob}: must hold at least one task, {taskset.name} has none")
    if len(tasks) < len(loaded):
        log.info("%s: %d of %d tasks are duplicates", knob, len(loaded) - len(tasks), len(loaded))
    return tasks


def _without(train: list[Task], held_out: list[Task]) -> list[Task]:
    forbidden = {_prompt_of(task) for task in held_out}
    kept = [task for task in train if _prompt_of(task) not in forbidden]
    if not kept:
        raise ConfigError("tasks.train: every task is also held out by tasks.eval, none is left")
    if len(kept) < len(train):
        log.info("tasks.train: %d tasks dropped, they are held out", len(train) - len(kept))
    return kept


def _prompt_of(task: Task) -> tuple[str, ...]:
    return tuple(message.content.strip() for message in task.messages)


def _with_system_prompt(task: Task, prompt: str) -> Task:
    if not prompt or (task.messages and task.messages[0].role == "system"):
        return task
    messages = [Message(role="system", content=prompt), *task.messages]
    return msgspec.structs.replace(task, messages=messages)


class FileTaskset:
    """Tasks of a `.jsonl` or `.parquet` file, one a line or row.

    Columns: `prompt` (text or chat messages), `answer`, and optionally `hints` (list, weakest
    first), `solution`, `tests`, `tags` (list), `id`; `prompt` and `answer` may be named otherwise.
    Example: the line `{"prompt": "2 + 2 =", "answer": 4}` is a task with the reference "4".
    """

    def __init__(self, path: str, prompt: str = "prompt", answer: str = "answer") -> None:
        self._path = Path(path).expanduser()
        if not self._path.is_file():
            raise ConfigError(f"path: no such file: {path}")
        if self._path.suffix not in (".jsonl", ".parquet"):
            raise ConfigError(f"path: must end in .jsonl or .parquet, got {path}")
        self._prompt = prompt
        self._answer = answer
        self.name = self._path.stem

    def load(self) -> list[Task]:
        """One task per row. Raises `ConfigError` with one `file:line: column: problem` a line."""
        tasks: list[Task] = []
        problems: list[str] = []
        for line, row in self._rows():
            try:
                tasks.append(self._task(row))
            except (ValueError, msgspec.MsgspecError) as error:
                problems.append(f"{self._path}:{line}: {error}")
        if problems:
            shown = problems[:MAX_PROBLEMS_SHOWN]
            if len(problems) > len(shown):
                shown.append(f"... and {len(problems) - len(shown)} more")
            raise ConfigError("\n".join(shown))
        return tasks

    def _rows(self) -> list[tuple[int, Any]]:
        if self._path.suffix == ".parquet":
            parquet: Any = importlib.import_module("pyarrow.parquet")
            rows: list[Any] = parquet.read_table(self._path).to_pylist()
            return list(enumerate(rows, start=1))
        lines = self._path.read_bytes().split(b"\n")
        return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]

    def _task(self, row: Any) -> Task:
        values: dict[str, Any] = msgspec.json.decode(row) if isinstance(row, bytes) else row
        if not isinstance(values, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"must be an object with columns, got {str(values)[:40]!r}")
        messages = _messages(values, self._prompt)
        reference = _text(values, self._answer)
        tests = values.get("tests")
        if not reference and not tests:
            raise ValueError(f"column {self._answer!r}: required (or 'tests'), missing or empty")
        identity = _text(values, "id")
        return Task(
            task_id=task_id(messages, reference),
            taskset=self.name,
            messages=messages,
            reference=reference,
            solution=_text(values, "solution"),
            hints=_texts(values, "hints"),
            tags=_texts(values, "tags") + ([f"id:{identity}"] if identity else []),
            entry=json.dumps({"tests": tests}) if tests else "",
        )


def _text(values: dict[str, Any], column: str) -> str:
    value = _convert(values, column, str | int | float | None)
    return "" if value is None else str(value)


def _texts(values: dict[str, Any], column: str) -> list[str]:
    return _convert(values, column, list[str] | None) or []


def _messages(values: dict[str, Any], column: str) -> list[Message]:
    value = _convert(values, column, str | list[Message] | None)
    if not value or (isinstance(value, str) and not value.strip()):
        raise ValueError(
            f"column {column!r}: required, missing or empty (columns: {', '.join(values)})"
        )
    return [Message(role="user", content=value)] if isinstance(value, str) else value


def _convert(values: dict[str, Any], column: str, kind: Any) -> Any:
    try:
        return msgspec.convert(values.get(column), kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"column {column!r}: {error}") from error
