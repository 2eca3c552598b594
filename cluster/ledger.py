"""The ledger: which groups moved the weights at each optimizer step, one JSON line per step.

Invariant: a step that `commit` returned for is on disk; steps increase from line to line; a line
that a crash or a full disk tore (no newline at its end) was never committed and is ignored. A
writer keeps its file open and a successor puts another in its place, so what a writer that was
presumed dead still appends goes nowhere. Written by the run loop after each step, read on resume
and by `hone replay`.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from cluster.errors import StageError, WireError
from cluster.types import StepRecord

_STAGE = "ledger"


class Ledger:
    """One file of `StepRecord`s with one writer. Opening it for reading changes nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last_step: int | None = None  # known once this object has written
        self._file: BinaryIO | None = None

    @property
    def rolled_back_path(self) -> Path:
        """Where `truncate_after` keeps what it takes out: `ledger.rolled_back.jsonl`."""
        return self._path.with_name(f"{self._path.stem}.rolled_back{self._path.suffix}")

    def commit(self, record: StepRecord) -> None:
        """Append `record` and wait until it is on disk.

        Raises `StageError` unless its step is after the last one, and when the disk refuses: what
        it took of the line is then repaired away by the next commit.
        """
        with self._writing(f"step {record.step}"):
            self._commit(record)

    def _commit(self, record: StepRecord) -> None:
        if self._file is None or self._last_step is None:
            self._last_step = self._repair()
            self._file = self._open()
        if record.step <= self._last_step:
            raise StageError(
                _STAGE,
                f"steps must increase: step {record.step} came after step {self._last_step} in "
                f"{self._path} (truncate_after on resume)",
            )
        _write(self._file, [record])
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

    def last_step(self) -> int:
        """The last committed step, -1 for none; raises as `records`."""
        records = self.records()
        return records[-1].step if records else -1

    def truncate_after(self, step: int) -> list[StepRecord]:
        """Become the writer: take out the records after `step`, whose weights are lost, and return
        them.

        They are appended to `rolled_back_path` first: a crash in between leaves them in both files.
        Raises `StageError` when the disk refuses.
        """
        records = self.records()
        later = [record for record in records if record.step > step]
        with self._writing(f"a roll-back to step {step}"):
            if later:
                _cut_torn_line(self.rolled_back_path)
                with self.rolled_back_path.open("ab") as file:
                    _write(file, later)
            _replace(self._path, _encode([r for r in records if r.step <= step]))
            self.close()
            self._last_step = self._repair()
            self._file = self._open()
        return later

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    @contextmanager
    def _writing(self, what: str) -> Generator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError):
                self.close()
            raise StageError(
                _STAGE,
                f"{what} could not be written: {error}; free the disk and go on with --resume",
            ) from error

    def _open(self) -> BinaryIO:
        is_new = not self._path.exists()
        file = self._path.open("ab")
        if is_new:
            _sync_directory(self._path.parent)
        return file

    def _repair(self) -> int:
        """Cut off a torn last line; the last committed step, -1 for none."""
        _cut_torn_line(self._path)
        return self.last_step()


def _committed(path: Path) -> bytes:
    """The file up to its last newline; empty where there is no file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]


def _cut_torn_line(path: Path) -> None:
    data = _committed(path)
    if path.exists() and path.stat().st_size != len(data):
        _replace(path, data)


def _encode(records: list[StepRecord]) -> bytes:
    return b"".join(msgspec.json.encode(record) + b"\n" for record in records)


def _write(file: BinaryIO, records: list[StepRecord]) -> None:
    file.write(_encode(records))
    file.flush()
    os.fsync(file.fileno())


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
