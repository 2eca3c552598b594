"""Tasks from tables: a local `.jsonl` or `.parquet` file, or a dataset of the Hugging Face hub.

Columns: `prompt` (text or chat messages), `answer`, and optionally `hints` (list, weakest first),
`solution`, `tests`, `tags` (list), `id`; `prompt` and `answer` may be named otherwise.
Invariant: a row that cannot be a task is an error that names its place and column, never skipped.
"""

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec

from cluster.errors import ConfigError
from cluster.types import Message, Task
from rewards.tasksets import task_id

MAX_PROBLEMS_SHOWN = 10


class FileTaskset:
    """Tasks of a `.jsonl` or `.parquet` file, one a line or row.

    Example: the line `{"prompt": "2 + 2 =", "answer": 4}` is a task with the reference "4".
    """

    def __init__(self, path: str, prompt: str = "prompt", answer: str = "answer") -> None:
        self._path = Path(path).expanduser()
        if not self._path.is_file():
            hub = f" (a dataset of the hub is `use: hub, settings: {{dataset: {path}}}`)"
            raise ConfigError(f"path: no such file: {path}{hub if path.count('/') == 1 else ''}")
        if self._path.suffix not in (".jsonl", ".parquet"):
            raise ConfigError(f"path: must end in .jsonl or .parquet, got {path}")
        self._columns = Columns(prompt, answer)
        self.name = self._path.stem

    def load(self) -> list[Task]:
        """One task per row. Raises `ConfigError` with one `file:line: column: problem` a line."""
        return _tasks(self._rows(), self._columns, self.name, str(self._path))

    def _rows(self) -> Iterator[tuple[int, Any]]:
        if self._path.suffix == ".parquet":
            parquet: Any = importlib.import_module("pyarrow.parquet")
            rows: list[Any] = parquet.read_table(self._path).to_pylist()
            yield from enumerate(rows, start=1)
            return
        for number, line in enumerate(self._path.read_bytes().split(b"\n"), start=1):
            if line.strip():
                yield number, line


class HubTaskset:
    """Tasks of a split of a Hugging Face dataset, by its id or its local folder.

    Example: `dataset: openai/gsm8k, config: main, split: train, prompt: question`.
    """

    def __init__(
        self,
        dataset: str,
        split: str = "train",
        config: str | None = None,
        prompt: str = "prompt",
        answer: str = "answer",
    ) -> None:
        self._dataset = dataset
        self._split = split
        self._config = config
        self._columns = Columns(prompt, answer)
        self.name = dataset.rstrip("/").rsplit("/", 1)[-1]

    def load(self) -> list[Task]:
        """One task per row. Raises `ConfigError` when the hub has no such table or is not there."""
        datasets: Any = importlib.import_module("datasets")
        try:
            rows: Any = datasets.load_dataset(self._dataset, self._config, split=self._split)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"dataset: {self._dataset}, config {self._config}, split {self._split}: "
                f"could not be loaded: {reason}"
            ) from error
        return _tasks(
            enumerate(cast(list[Any], rows), start=1), self._columns, self.name, self._dataset
        )


class Columns(msgspec.Struct, frozen=True):
    """Which columns hold the prompt and the reference answer."""

    prompt: str
    answer: str


def _tasks(
    rows: Iterator[tuple[int, Any]], columns: Columns, taskset: str, place: str
) -> list[Task]:
    tasks: list[Task] = []
    problems: list[str] = []
    for number, row in rows:
        try:
            tasks.append(_task(row, columns, taskset))
        except (ValueError, msgspec.MsgspecError) as error:
            problems.append(f"{place}:{number}: {error}")
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        raise ConfigError("\n".join(shown))
    return tasks


def _task(row: Any, columns: Columns, taskset: str) -> Task:
    decoded: Any = msgspec.json.decode(row) if isinstance(row, bytes) else row
    if not isinstance(decoded, dict):
        raise ValueError(f"must be an object with columns, got {str(decoded)[:40]!r}")
    values = cast(dict[str, Any], decoded)
    messages = _messages(values, columns.prompt)
    reference = _text(values, columns.answer)
    tests = values.get("tests")
    if not reference and not tests:
        raise ValueError(f"column {columns.answer!r}: required (or 'tests'), missing or empty")
    identity = _text(values, "id")
    return Task(
        task_id=task_id(messages, reference),
        taskset=taskset,
        messages=messages,
        reference=reference,
        solution=_text(values, "solution"),
        hints=_texts(values, "hints"),
        tags=_texts(values, "tags") + ([f"id:{identity}"] if identity else []),
        entry=json.dumps({"tests": tests}) if tests else "",
    )


def _text(values: Mapping[str, Any], column: str) -> str:
    value = _convert(values, column, str | int | float | None)
    return "" if value is None else str(value)


def _texts(values: Mapping[str, Any], column: str) -> list[str]:
    return _convert(values, column, list[str] | None) or []


def _messages(values: Mapping[str, Any], column: str) -> list[Message]:
    value = _convert(values, column, str | list[Message] | None)
    if not value or (isinstance(value, str) and not value.strip()):
        raise ValueError(
            f"column {column!r}: required, missing or empty (columns: {', '.join(values)})"
        )
    return [Message(role="user", content=value)] if isinstance(value, str) else value


def _convert(values: Mapping[str, Any], column: str, kind: Any) -> Any:
    try:
        return msgspec.convert(values.get(column), kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"column {column!r}: {error}") from error
