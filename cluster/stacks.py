"""What each process of a run is doing right now: `logs/stacks/<role>.<host>.<pid>.txt`, on request.

Invariant: only processes that have opened their own file here are signalled, so a process id that
another program has inherited is left alone. Set up with the log of a process (`cluster.log`), asked
for by the stall watchdog.
"""

import asyncio
import faulthandler
import os
import signal
import socket
from io import StringIO
from pathlib import Path
from typing import TextIO

REQUEST = signal.SIGUSR2
_files: list[TextIO] = []  # kept open for the handler


def enable(role: str, run_dir: str | os.PathLike[str]) -> None:
    """Let this process write the stacks of all its threads whenever it gets `REQUEST`."""
    folder = _folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{role.replace('/', '-')}.{socket.gethostname()}.{os.getpid()}.txt"
    file = path.open("a")
    _files.append(file)
    faulthandler.register(REQUEST, file=file, all_threads=True, chain=False)


def dump(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Ask every process of the run on this host; returns the files that they write to."""
    asked: list[Path] = []
    for path in sorted(_folder(run_dir).glob("*.txt")):
        *_, host, number = path.stem.rsplit(".", 2)
        if host == socket.gethostname() and number.isdigit() and _has_open(int(number), path):
            os.kill(int(number), REQUEST)
            asked.append(path)
    return asked


def dump_tasks(run_dir: str | os.PathLike[str]) -> Path:
    """Write the stacks of the asyncio tasks of this process, which no thread shows."""
    text = StringIO()
    for task in asyncio.all_tasks():
        task.print_stack(file=text)
    path = _folder(run_dir) / f"tasks-{os.getpid()}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue())
    return path


def _folder(run_dir: str | os.PathLike[str]) -> Path:
    return Path(run_dir).resolve() / "logs" / "stacks"


def _has_open(pid: int, path: Path) -> bool:
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
    return any(os.path.realpath(descriptor) == str(path) for descriptor in descriptors)
