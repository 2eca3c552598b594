"""Logging of one process: `runs/<name>/logs/<role>.log` gets everything, stderr gets warnings.

Invariant: one record starts one line `time level role step message`; no text from a model or a user
can start another, move the cursor or hide itself, because whatever is not printable is escaped.
Called once in every process of a run.
"""

import logging
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from cluster import stacks

_MARK = "_hone_handler"
_current_step = 0


def setup(role: str, run_dir: str | os.PathLike[str], level: int = logging.INFO) -> None:
    """Send this process's records to `logs/<role>.log`; a later call replaces an earlier one.

    Example: `setup("rollout/0", run_dir)` writes `logs/rollout-0.log`.
    """
    directory = Path(run_dir) / "logs"
    directory.mkdir(parents=True, exist_ok=True)
    file_handler = logging.FileHandler(directory / f"{role.replace('/', '-')}.log")
    screen_handler = _ScreenHandler()
    screen_handler.setLevel(logging.WARNING)
    root = logging.getLogger()
    for handler in [h for h in root.handlers if hasattr(h, _MARK)]:
        root.removeHandler(handler)
        handler.close()
    for handler in (file_handler, screen_handler):
        setattr(handler, _MARK, True)
        handler.setFormatter(LineFormatter(role))
        root.addHandler(handler)
    root.setLevel(min(level, root.level) if root.level else level)
    stacks.enable(role, run_dir)


def set_step(step: int) -> None:
    """The optimizer step that the following records of this process belong to."""
    global _current_step
    _current_step = step


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
        line = f"{when} {record.levelname} {self._role} {_current_step} {message}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).split("\n")
            line += "".join(f"\n    {escape(part)}" for part in trace)
        return line


class _ScreenHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is now, so that a live display can take it over."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr
