"""Logging of one process: `runs/<name>/logs/<role>.log` gets everything, stderr gets warnings.

Invariant: one record starts one line `time level role step message`; no text from a model or a user
can start another, move the cursor or hide itself, because whatever is not printable is escaped.
With `HONE_LOG_FORMAT=json` in its environment a process writes one JSON object a record instead,
for a cluster's log collector. Called once in every process of a run, whose traces begin here, too.
"""

import logging
import os
import sys
import time
from pathlib import Path
from typing import TextIO

import msgspec

from cluster import stacks, traces

FORMAT_VARIABLE = "HONE_LOG_FORMAT"
_MARK = "_hone_handler"
_current_step: int | None = None  # until the process is told
_current_version: int | None = None


def setup(role: str, run_dir: str | os.PathLike[str], level: int = logging.INFO) -> None:
    """Send this process's records to `logs/<role>.log`; a later call replaces an earlier one.

    Example: `setup("rollout/0", run_dir)` writes `logs/rollout-0.log`.
    """
    directory = Path(run_dir) / "logs"
    directory.mkdir(parents=True, exist_ok=True)
    file_handler = logging.FileHandler(directory / f"{role.replace('/', '-')}.log")
    screen_handler = _ScreenHandler()
    screen_handler.setLevel(logging.WARNING)
    is_json = os.environ.get(FORMAT_VARIABLE) == "json"
    formatter = JsonFormatter(role, Path(run_dir).name) if is_json else LineFormatter(role)
    root = logging.getLogger()
    for handler in [h for h in root.handlers if hasattr(h, _MARK)]:
        root.removeHandler(handler)
        handler.close()
    for handler in (file_handler, screen_handler):
        setattr(handler, _MARK, True)
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(min(level, root.level) if root.level else level)
    stacks.enable(role, run_dir)
    traces.setup(role, run_dir)


def set_progress(*, step: int | None = None, policy_version: int | None = None) -> None:
    """The optimizer step and policy version that the following records of this process belong to;
    None leaves them.
    """
    global _current_step, _current_version
    _current_step = _current_step if step is None else step
    _current_version = _current_version if policy_version is None else policy_version


def escape(text: str) -> str:
    """`text` with what is not printable (newlines, terminal codes, bidi marks) escaped."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


class LineFormatter(logging.Formatter):
    """`2026-11-21T04:05:06.789Z WARNING rollout/0 12 message`; traceback lines are indented."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        when = f"{seconds}.{int(record.msecs):03d}Z"
        message = escape(record.getMessage())
        line = f"{when} {record.levelname} {self._role} {_current_step or 0} {message}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).split("\n")
            line += "".join(f"\n    {escape(part)}" for part in trace)
        return line


class JsonFormatter(logging.Formatter):
    """`{"time": ..., "level": "INFO", "run": "demo", "actor": "rollout", "rank": 0, "step": 12,
    "policy_version": 12, "message": ...}`; `rank` is null for the only actor of its kind, step and
    version where the process knows none.
    """

    def __init__(self, role: str, run: str) -> None:
        super().__init__()
        actor, _, rank = role.replace("/", "-").rpartition("-")
        who = (actor, int(rank)) if actor and rank.isdigit() else (role, None)
        self._who = {"run": run, "actor": who[0], "rank": who[1]}

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname,
            **self._who,
            "step": _current_step,
            "policy_version": _current_version,
            "message": escape(record.getMessage()),
        }
        if record.exc_info:
            row["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(row).decode()


class _ScreenHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is now, so that a live display can take it over."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr
