"""Tasksets: where tasks come from, and the training and held-out tasks of a run.

Invariant: no held-out prompt is trained on; a task's id is a hash of its content, so both splits
and every process agree on it. Called by `actors.bring_up` and `hone check`.
"""

import hashlib
import json
import logging
from typing import Literal, Protocol

import msgspec

from cluster import plugins
from cluster.config import Plugin, TasksSection
from cluster.errors import ConfigError
from cluster.types import Message, Task
from rewards.registry import TASKSETS

HELD_OUT_FRACTION = 0.1
MAX_HELD_OUT = 200
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
    """The tasks of one split; see `load_splits`."""
    return load_splits(section)[0 if split == "train" else 1]


def load_splits(section: TasksSection) -> tuple[list[Task], list[Task]]:
    """Training and held-out tasks, without duplicates, with `tasks.system_prompt` in front.

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
    train = _without(train, held_out)
    return (
        [_with_system_prompt(task, section.system_prompt) for task in train],
        [_with_system_prompt(task, section.system_prompt) for task in held_out],
    )


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
