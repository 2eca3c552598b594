"""Checkpoint directories: written aside, made durable, published by one rename.

Invariant: a directory named `step_000010` holding COMPLETE is whole; COMPLETE lists the size and
crc32 of every other file. A crash at any point leaves the older checkpoints as they were. A writer
works in a folder of its own that its successor removes, so a writer that was presumed dead cannot
publish any more. Written by the run loop (the learner ranks fill the directory of `begin`), read on
resume and on export.

A checkpoint takes this way:
    begin -> .writing-<epoch>/step_000010 -> ranks write -> commit: state, COMPLETE, fsync, rename
"""

import logging
import os
import re
import shutil
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec

from cluster.errors import StageError, boundary
from cluster.run_state import RunState

_STAGE = "checkpoint"
_MARKER = "COMPLETE"
_STATE = "state.json"
_NAME = re.compile(r"step_(\d{6,})")
_CHUNK_BYTES = 1 << 20

_log = logging.getLogger(__name__)


class _FileSum(msgspec.Struct, frozen=True):
    size: int
    crc32: int


class CheckpointStore:
    """The newest `keep` checkpoints under `directory`; one writer, the one with the last `epoch`.

    Example: `path = store.begin(10)`, the ranks write under `path`, `store.commit(10, state)`.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._keep = max(1, keep)
        self._desk: Path | None = None

    def take_over(self, epoch: int) -> None:
        """Become the writer; what a predecessor has begun cannot be committed any more."""
        with boundary(_STAGE):
            self._directory.mkdir(parents=True, exist_ok=True)
            for desk in list(self._directory.glob(".writing-*")):
                self._void(desk)
            self._desk = self._directory / f".writing-{epoch}"
            self._desk.mkdir()

    def begin(self, step: int) -> Path:
        """An empty directory for the files of `step`; remains of earlier ones are removed.

        Raises `StageError` unless `step` is after the newest checkpoint and this is the writer.
        """
        if self._desk is None:
            self.take_over(0)
        with boundary(_STAGE):
            newest = max(self.steps(), default=-1)
            if step <= newest:
                raise StageError(
                    _STAGE,
                    f"a checkpoint must come after the newest one in {self._directory}: "
                    f"step {step}, newest {newest}",
                )
            path = self._draft(step)
            for remains in path.parent.iterdir():
                self._void(remains)
            path.mkdir()
            return path

    def abandon(self, step: int) -> None:
        """Remove what was begun for `step`, for example to give a full disk its space back. A
        `commit` of it that still runs cannot publish it any more, or already has.
        """
        with boundary(_STAGE):
            self._void(self._draft(step))

    def is_durable(self, step: int) -> bool:
        """Whether `step` is published, and stays so if the machine loses its power now."""
        with boundary(_STAGE):
            if step not in self.steps():
                return False
            _sync(self._directory)
            return True

    def commit(self, step: int, state: RunState) -> Path:
        """Publish what the ranks wrote since `begin(step)`; durable on return.

        Then removes all but the newest `keep` (run.keep_checkpoints), as far as it can. Raises
        `StageError` when `begin` was not called, the state is of another step, or the disk refuses.
        """
        target = self.path(step)
        source = self._draft(step)
        if state.step != step or not source.is_dir():
            raise StageError(
                _STAGE,
                f"commit({step}) must follow begin({step}) with a state of that step, got one of "
                f"step {state.step}; {source} exists: {source.is_dir()}",
            )
        with boundary(_STAGE):
            (source / _STATE).write_bytes(msgspec.json.encode(state))
            sums = _sums(source, should_sync=True)
            marker = source / _MARKER
            marker.write_bytes(msgspec.json.encode(sums))
            _sync(marker)
            for folder in [p for p in source.rglob("*") if p.is_dir()]:
                _sync(folder)
            _sync(source)
            source.rename(target)
            _sync(self._directory)
        try:
            for old in self.steps()[: -self._keep]:
                self._void(self.path(old))
        except OSError as error:
            _log.warning("older checkpoints could not be removed: %s", error)
        return target

    def latest(self) -> tuple[Path, RunState] | None:
        """The newest whole checkpoint and its state; None where there is none.

        Every byte is checked. A damaged one is logged and renamed `*.corrupt`.
        """
        for step in reversed(self._published()):
            path = self.path(step)
            try:
                return path, _verified_state(path)
            except (ValueError, FileNotFoundError) as error:
                self._quarantine(path, error)
        return None

    def all(self) -> list[tuple[Path, RunState]]:
        """Whole checkpoints, oldest first, every byte checked. Changes nothing on disk."""
        whole: list[tuple[Path, RunState]] = []
        for step in self.steps():
            try:
                whole.append((self.path(step), _verified_state(self.path(step))))
            except (ValueError, FileNotFoundError) as error:
                _log.error("checkpoint %s is damaged: %s", self.path(step), error)
        return whole

    def states(self) -> list[tuple[Path, RunState]]:
        """Complete checkpoints and their states, oldest first; bytes are not checked."""
        found: list[tuple[Path, RunState]] = []
        for step in self.steps():
            try:
                text = (self.path(step) / _STATE).read_bytes()
                found.append((self.path(step), msgspec.json.decode(text, type=RunState)))
            except (FileNotFoundError, msgspec.DecodeError):
                continue  # removed or damaged meanwhile
        return found

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first; looks no further than COMPLETE."""
        return [step for step in self._published() if (self.path(step) / _MARKER).is_file()]

    def has_any(self) -> bool:
        """Something was published here, whatever became of it."""
        return any(self._directory.glob("step_*"))

    def _published(self) -> list[int]:
        if not self._directory.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self._directory.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Where `step` is published, if it is."""
        return self._directory / f"step_{step:06d}"

    def _draft(self, step: int) -> Path:
        desk = self._desk or self._directory / ".writing-0"
        return desk / f"step_{step:06d}"

    def _void(self, path: Path) -> None:
        """Put `path` out of the reach of who may still read or write there, by one rename, and then
        remove it. What cannot be removed now is when the next writer takes over.
        """
        void = self._directory / f".writing-void-{uuid.uuid4().hex}"
        with suppress(FileNotFoundError):
            path.rename(void)
        shutil.rmtree(void, ignore_errors=True)

    def _quarantine(self, path: Path, error: Exception) -> None:
        target = path.with_suffix(".corrupt")
        number = 1
        while target.exists():
            number += 1
            target = path.with_suffix(f".corrupt{number}")
        try:
            path.rename(target)
        except FileNotFoundError:
            return  # retention removed it while it was being read
        _log.error("checkpoint %s is damaged, moved to %s: %s", path, target.name, error)


def _verified_state(path: Path) -> RunState:
    """The state of the checkpoint at `path`; raises `ValueError` naming the damaged file."""
    expected = msgspec.json.decode((path / _MARKER).read_bytes(), type=dict[str, _FileSum])
    found = _sums(path, should_sync=False)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{name} must match {_MARKER}: {expected.get(name)}, got {found.get(name)}"
            )
    return msgspec.json.decode((path / _STATE).read_bytes(), type=RunState)


def _sums(root: Path, *, should_sync: bool) -> dict[str, _FileSum]:
    """Size and crc32 of every file under `root` but COMPLETE, by relative path; in parallel."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p != root / _MARKER)

    def sum_file(path: Path) -> _FileSum:
        if should_sync:
            _sync(path)
        size = crc32 = 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                size += len(chunk)
                crc32 = zlib.crc32(chunk, crc32)
        return _FileSum(size, crc32)

    with ThreadPoolExecutor(max_workers=8) as pool:
        names = [path.relative_to(root).as_posix() for path in files]
        return dict(zip(names, pool.map(sum_file, files), strict=True))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
