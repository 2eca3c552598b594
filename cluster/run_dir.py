"""The run directory `runs/<name>/`: every path in it, and its append-only JSONL files.

Invariant: a line is appended with one write and read back whole or not at all; a line torn by a
crash is skipped and never joins the next one. Written by the launcher and the controller; read by
the live view, the report and `hone status`, which need nothing but this directory.
"""

import errno
import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import msgspec

from cluster.errors import ConfigError
from cluster.owned_folder import MEMORY
from cluster.types import Verdict

LATEST = "latest"
_BUFFER_ID = "buffer_id"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Row = TypeVar("Row")

logger = logging.getLogger(__name__)


class TokenColumns(msgspec.Struct, frozen=True, kw_only=True):
    """A completion of L tokens; every list has L entries.

    `entropies` in nats, None where the policy was not the author; `is_peak` is SIREN's mask.
    """

    texts: list[str]
    entropies: list[float | None]
    advantages: list[float]
    policy_versions: list[int]
    is_peak: list[bool]


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `samples.jsonl`: a trajectory as a person reads it."""

    step: int
    group_id: str
    task_id: str
    prompt: str
    completion: str
    reward: float | None = None
    reference: str = ""
    status: str = ""
    policy_version: int = 0
    verdicts: list[Verdict] = []
    tokens: TokenColumns | None = None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `events.jsonl`: `time` in unix seconds, a `kind`, and what that kind carries."""

    time: float
    kind: str
    fields: dict[str, object] = {}


class RunDir:
    """Example: `RunDir.create("runs", "demo", yaml, exist_ok=False).append_event("sync")`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.ledger = self.path / "ledger.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.report = self.path / "report.html"
        self.logs = self.path / "logs"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.policy = self.path / "policy"
        self.prepared = self.path / "policy.json"
        self.redis = self.path / "redis"

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def weights(self) -> Path:
        """Where versions are handed to the engines: in memory on one machine; inside the run
        directory after `share_weights`, because another host does not see this one's memory.
        """
        shared, memory = self.path / "weights", MEMORY
        if shared.is_dir() or not memory.is_dir():
            return shared
        key = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:12]
        return memory / f"hone-{key}"

    @property
    def models(self) -> Path | None:
        """Where a cluster's runs keep models that were fetched or converted, beside themselves;
        None before `share_weights`: one machine has caches of its own.
        """
        place = self.path.parent / ".models"
        return place if place.is_dir() else None

    @property
    def is_shared(self) -> bool:
        """`share_weights` was called for this run, and it has not ended."""
        return (self.path / "weights").is_dir()

    @property
    def buffer_id(self) -> str:
        """What the run's keys in Redis, its Ray actors and its reserved places are named after: the
        run, unless `own_buffer` was called. No other run on a cluster has it, nor a run of the same
        name elsewhere.
        """
        file = self.path / _BUFFER_ID
        return (file.read_text() if file.exists() else "") or self.name

    def own_buffer(self) -> None:
        """On a Redis that other runs use: a new run must not find what one of the same name left.

        A run that has begun keeps the keys that it has.
        """
        if not self.ledger.exists() and not (self.path / _BUFFER_ID).exists():
            (self.path / _BUFFER_ID).write_text(f"{self.name}-{uuid.uuid4().hex[:8]}")

    def share_weights(self) -> None:
        """What is handed to other hosts lies here and beside: all nodes see it."""
        (self.path / "weights").mkdir(parents=True, exist_ok=True)
        (self.path.parent / ".models").mkdir(exist_ok=True)

    @classmethod
    def at(cls, parent: str | os.PathLike[str], name: str, *, exist_ok: bool) -> "RunDir":
        """The place of run `name`; nothing is written.

        Raises `ConfigError` for a name that is no plain folder name, and for an existing run
        unless `exist_ok`.
        """
        if not _NAME.fullmatch(name) or name == LATEST:
            raise ConfigError(
                f"run.name must be letters, digits, '.', '_', '-' and not {LATEST!r}, got {name!r}"
            )
        run = cls(Path(parent).absolute() / name)
        if run.config.exists() and not exist_ok:
            raise ConfigError(
                f"run {name!r} exists in {run.path}: continue it with `--resume`, "
                "or name a new one with `--run NEW`"
            )
        return run

    @classmethod
    def create(
        cls, parent: str | os.PathLike[str], name: str, config_yaml: str, *, exist_ok: bool
    ) -> "RunDir":
        """Make `parent/name` (see `at`), write `config.yaml` and point `parent/latest` at it."""
        run = cls.at(parent, name, exist_ok=exist_ok)
        for directory in (run.path, run.logs, run.checkpoints):
            directory.mkdir(parents=True, exist_ok=True)
        temporary = run.config.with_suffix(".tmp")
        temporary.write_text(config_yaml)
        temporary.replace(run.config)
        run._become_latest()
        return run

    @classmethod
    def open(
        cls, reference: str | None = None, parent: str | os.PathLike[str] = "runs"
    ) -> "RunDir":
        """An existing run by name under `parent`, by path, or the latest one (None)."""
        choices = [Path(parent) / (reference or LATEST)] + ([Path(reference)] if reference else [])
        for choice in choices:
            if (choice / "config.yaml").is_file():
                return cls(choice.resolve())
        known = sorted(p.parent.name for p in Path(parent).glob("*/config.yaml"))
        names = ", ".join(n for n in known if n != LATEST) or "none yet"
        wanted = f"no run {reference!r}" if reference else "no latest run"
        raise ConfigError(f"{wanted} in {Path(parent)}/ (runs there: {names})")

    def append_event(self, kind: str, **fields: object) -> None:
        """One line `{"time": unix seconds, "kind": kind, ...fields}` of `events.jsonl`."""
        self._event_lines.append({"time": time.time(), "kind": kind, **fields})

    def append_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One flat row of `metrics.jsonl`; NaN and infinity are written as null."""
        self._metric_lines.append({"step": step, **{key: float(v) for key, v in values.items()}})

    def append_sample(self, sample: Sample) -> None:
        self._sample_lines.append(sample)

    def read_metrics(self) -> list[dict[str, float]]:
        """Rows in step order, one per step: later rows of a step (a resumed run) win key by key."""
        steps: dict[int, dict[str, float]] = {}
        for row in self._metric_lines.read(dict[str, float | None]):
            values = {key: value for key, value in row.items() if value is not None}
            if "step" in values:
                steps.setdefault(int(values["step"]), {}).update(values)
        return [steps[step] for step in sorted(steps)]

    def read_events(self) -> list[Event]:
        rows = self._event_lines.read(dict[str, object])
        return [
            Event(time=float(when), kind=str(row.pop("kind", "?")), fields=row)
            for row in rows
            if isinstance(when := row.pop("time", None), int | float)
        ]

    def read_samples(self) -> list[Sample]:
        return self._sample_lines.read(Sample)

    @cached_property
    def _event_lines(self) -> "JsonLines":
        return JsonLines(self.events)

    @cached_property
    def _metric_lines(self) -> "JsonLines":
        return JsonLines(self.metrics)

    @cached_property
    def _sample_lines(self) -> "JsonLines":
        return JsonLines(self.samples)

    def _become_latest(self) -> None:
        link = self.path.parent / LATEST
        temporary = self.path.parent / f".{LATEST}.{os.getpid()}"
        try:
            temporary.symlink_to(self.path.name)
            temporary.replace(link)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            logger.warning("cannot point %s at this run: %s", link, error)


class JsonLines:
    """An append-only file of JSON lines; each append is one write, so readers may follow it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: object) -> None:
        """Raises `OSError` when the disk does not take all of it."""
        line = msgspec.json.encode(row) + b"\n"
        with self.path.open("ab+", buffering=0) as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def read(self, kind: type[Row]) -> list[Row]:
        """All whole rows; lines that do not decode as `kind` (torn by a crash) are skipped."""
        return self.read_from(0, kind)[0]

    def each(self, kind: type[Row]) -> Iterator[Row]:
        """As `read`, but one row after the other, of a file that may be long."""
        decoder = msgspec.json.Decoder(kind)
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                with suppress(msgspec.DecodeError):
                    if line.endswith(b"\n"):
                        yield decoder.decode(line)

    def read_from(self, offset: int, kind: type[Row]) -> tuple[list[Row], int]:
        """Rows from byte `offset` on, and the offset behind the last whole line."""
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return [], offset
        whole = data[: data.rfind(b"\n") + 1]
        decoder = msgspec.json.Decoder(kind)
        rows: list[Row] = []
        num_torn = 0
        for line in filter(None, whole.split(b"\n")):
            try:
                rows.append(decoder.decode(line))
            except msgspec.DecodeError:
                num_torn += 1
        if num_torn:
            logger.info("%s: skipped %d torn line(s)", self.path, num_torn)
        return rows, offset + len(whole)
