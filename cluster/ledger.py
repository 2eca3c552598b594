"""The ledger: which groups moved the weights at each optimizer step, one JSON line per step.

Invariant: a step that `commit` returned for is on disk; steps increase from line to line; a line
that a crash tore (no newline at its end) was never committed and is ignored. Written by the run
loop after each step, read on resume and by `hone replay why`.
"""

import os
from pathlib import Path

import msgspec

from cluster.errors import StageError, WireError
from cluster.types import StepRecord

_STAGE = "ledger"


class Ledger:
    """One file of `StepRecord`s with one writer. Opening it for reading changes nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_step: int | None = None  # known once this object has written

    @property
    def rolled_back_path(self) -> Path:
        """Where `truncate_after` keeps what it takes out: `ledger.rolled_back.jsonl`."""
        return self._path.with_name(f"{self._path.stem}.rolled_back{self._path.suffix}")

    def commit(self, record: StepRecord) -> None:
        """Append `record` and wait until it is on disk.

        Raises `StageError` unless its step is after the last one.
        """
        if self._last_step is None:
            self._last_step = self._repair()
        if record.step <= self._last_step:
            raise StageError(
                _STAGE,
                f"steps must increase: step {record.step} came after step {self._last_step} in "
                f"{self._path} (truncate_after on resume)",
            )
        _append(self._path, [record])
        self._last_step = record.step

    def records(self) -> list[StepRecord]:
        """All committed records, in order of step.

        Raises `WireError` naming the line when a committed line cannot be read.
        """
        records: list[StepRecord] = []
        for number, line in enumerate(_committed(self._path).splitlines(), start=1):
            try:
                records.append(msgspec.json.decode(line, type=StepRecord))
            except msgspec.DecodeError as error:
                raise WireError(f"{self._path}:{number}: not a step record: {error}") from error
        return records

    def truncate_after(self, step: int) -> list[StepRecord]:
        """Take out the records after `step`, whose weights are lost, and return them.

        They are appended to `rolled_back_path` first: a crash in between leaves them in both files.
        """
        records = self.records()
        later = [record for record in records if record.step > step]
        if later:
            _append(self.rolled_back_path, later)
            _replace(self._path, _encode([r for r in records if r.step <= step]))
        self._last_step = None
        return later

    def _repair(self) -> int:
        """Cut off a torn last line; the last committed step, -1 for none."""
        data = _committed(self._path)
        if self._path.exists() and self._path.stat().st_size != len(data):
            _replace(self._path, data)
        records = self.records()
        return records[-1].step if records else -1


def _committed(path: Path) -> bytes:
    """The file up to its last newline; empty where there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]


def _encode(records: list[StepRecord]) -> bytes:
    return b"".join(msgspec.json.encode(record) + b"\n" for record in records)


def _append(path: Path, records: list[StepRecord]) -> None:
    is_new = not path.exists()
    with path.open("ab") as file:
        file.write(_encode(records))
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        _sync_directory(path.parent)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
