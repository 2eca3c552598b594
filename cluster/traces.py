"""OpenTelemetry traces of groups: a trace each, with a span of every actor that has had the group.

Invariant: off, and free, unless one of `ENDPOINTS` is set where the actors start. No context
travels: the ids of a trace and of its root span are made of run and group, so every process finds
them by itself. A thread sends spans over HTTP and drops what nobody takes; a run waits for it at
its end alone, and not long. `OTEL_TRACES_SAMPLER` chooses the groups.
"""

import os
import secrets
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PACKAGE = "opentelemetry-exporter-otlp-proto-http"
SEND_EVERY_S = 1.0
CLOSE_S = 3.0
_traces: "_Traces | None" = None


def setup(role: str, run_dir: str | os.PathLike[str]) -> None:
    """Trace as `role` from now on, if the environment says so."""
    global _traces
    close()
    if any(os.environ.get(name) for name in ENDPOINTS):
        _traces = _Traces(role, Path(run_dir))


def begin(group_id: str) -> None:
    """The group is drawn, unless it was before; the controller alone says so."""
    if _traces is not None:
        _traces.begun.setdefault(group_id, time.time_ns())


def end(group_id: str, **outcome: str | int) -> None:
    """What became of a group that this process has seen begin."""
    if _traces is not None and (began := _traces.begun.pop(group_id, None)):
        _traces.record_root(group_id, began, outcome)


@contextmanager
def span(name: str, *group_ids: str, **attributes: str | int) -> Generator[None]:
    """What is done to these groups, at once."""
    traces = _traces
    if traces is None:
        yield
        return
    began = time.time_ns()
    failure: dict[str, str | int] = {}
    try:
        yield
    except BaseException as error:
        failure = {"error.type": type(error).__name__}
        raise
    finally:
        for group_id in group_ids:
            traces.record(name, group_id, began, attributes | failure)


def close() -> None:
    """Send what is left, if somebody takes it in `CLOSE_S` seconds."""
    global _traces
    if _traces is not None:
        sending = threading.Thread(target=_traces.provider.shutdown, daemon=True)
        sending.start()
        sending.join(CLOSE_S)
    _traces = None


class _Ids:
    """Random ones, except of a root span."""

    root: tuple[int, int] | None = None

    def generate_trace_id(self) -> int:
        return self.root[0] if self.root else secrets.randbits(128)

    def generate_span_id(self) -> int:
        return self.root[1] if self.root else secrets.randbits(64)

    def is_trace_id_random(self) -> bool:
        return True


class _Traces:
    """Of one process."""

    def __init__(self, role: str, run_dir: Path) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(f"{ENDPOINTS[1]}: `pip install {PACKAGE}`, or unset it") from error

        # A new run in the place of one of that name is another file of the system.
        self._run = f"{run_dir.name}/{run_dir.stat().st_ino}"
        self._ids: Any = _Ids()
        who = {"service.name": "hone", "service.instance.id": role, "hone.run": run_dir.name}
        self.provider = TracerProvider(
            resource=Resource.create(who), id_generator=self._ids, shutdown_on_exit=False
        )
        self.provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=SEND_EVERY_S * 1000)
        )
        self._tracer = self.provider.get_tracer("hone")
        self.begun: dict[str, int] = {}  # group -> unix nanoseconds

    def record_root(self, group_id: str, began: int, outcome: dict[str, str | int]) -> None:
        from opentelemetry.context import Context

        self._ids.root = self._ids_of(group_id)
        try:
            self._end("group", group_id, began, outcome, Context())
        finally:
            self._ids.root = None

    def record(
        self, name: str, group_id: str, began: int, attributes: dict[str, str | int]
    ) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context

        trace_id, span_id = self._ids_of(group_id)
        is_sampled = self.provider.sampler.should_sample(
            Context(), trace_id, "group"
        ).decision.is_sampled()
        flags = trace.TraceFlags(is_sampled)
        root = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)
        context = trace.set_span_in_context(trace.NonRecordingSpan(root), Context())
        self._end(name, group_id, began, attributes, context)

    def _end(
        self, name: str, group_id: str, began: int, attributes: dict[str, str | int], context: Any
    ) -> None:
        found = {"hone.group_id": group_id, **attributes}
        self._tracer.start_span(name, context, attributes=found, start_time=began).end()

    def _ids_of(self, group_id: str) -> tuple[int, int]:
        """Of the trace, and of its root span."""
        digest = blake2b(f"{self._run}/{group_id}".encode(), digest_size=24).digest()
        return int.from_bytes(digest[:16]), int.from_bytes(digest[16:])
