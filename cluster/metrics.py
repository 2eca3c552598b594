"""Metrics of a run: one JSONL row per optimizer step, the same values to trackers and Prometheus.

Invariant: `metrics.jsonl` is complete whatever the trackers do. Each tracker runs in its own thread
behind a bounded queue; one that fails or falls behind is dropped with a single warning.
Called by the controller.
"""

import contextlib
import importlib
import importlib.util
import logging
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from cluster.errors import ConfigError
from cluster.run_dir import RunDir

QUEUE_ROWS = 256
CLOSE_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


class MetricsSink(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def require_trackers(names: list[str]) -> None:
    """Raise `ConfigError` naming the pip package of a tracker that is not installed."""
    for name in names:
        package = _TRACKERS[name][0]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"run.trackers: {name!r} needs the package {package!r}: `pip install {package}`"
            )


class Metrics:
    """Example: `Metrics(run_dir, ["tensorboard"], "demo").log(1, {"reward/mean": 0.5})`."""

    def __init__(self, run_dir: RunDir, trackers: list[str], run_name: str) -> None:
        require_trackers(trackers)
        self._run_dir = run_dir
        self._sinks = [
            _BackgroundSink(name, partial(_TRACKERS[name][1], run_dir, run_name))
            for name in trackers
        ]
        self._sinks.append(_BackgroundSink("prometheus", partial(_RayGauges, run_name)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the row of `step`; later rows of one step are merged by the reader."""
        row = dict(values)
        for sink in self._sinks:
            sink.log(step, row)
        self._run_dir.append_metrics(step, row)

    def close(self) -> None:
        """Flush the trackers; one that does not end in `CLOSE_TIMEOUT_S` seconds is left behind."""
        for sink in self._sinks:
            sink.close()


class _BackgroundSink:
    """A tracker that is built, fed and closed in a daemon thread: it cannot block training."""

    def __init__(self, name: str, build: Callable[[], MetricsSink]) -> None:
        self._name = name
        self._rows: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(QUEUE_ROWS)
        self._is_dropped = False
        self._thread = threading.Thread(
            target=self._run, args=(build,), name=f"tracker-{name}", daemon=True
        )
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._is_dropped:
            return
        try:
            self._rows.put_nowait((step, values))
        except queue.Full:
            self._drop(f"it is {QUEUE_ROWS} rows behind")

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)
            self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive() and not self._is_dropped:
            self._drop(f"it did not close in {CLOSE_TIMEOUT_S:.0f} s")

    def _run(self, build: Callable[[], MetricsSink]) -> None:
        try:
            sink = build()
            while (row := self._rows.get()) is not None and not self._is_dropped:
                sink.log(*row)
            sink.close()
        except Exception as error:
            self._drop(f"{type(error).__name__}: {error}")

    def _drop(self, reason: str) -> None:
        self._is_dropped = True
        logger.warning("tracker %s is dropped, training goes on: %s", self._name, reason)


def _import(module: str) -> Any:
    return importlib.import_module(module)


class _TensorBoard:
    """Event files under `runs/<name>/tensorboard`, written without torch."""

    def __init__(self, run_dir: RunDir, run_name: str) -> None:
        self._event = _import("tensorboard.compat.proto.event_pb2").Event
        self._summary = _import("tensorboard.compat.proto.summary_pb2").Summary
        writers = _import("tensorboard.summary.writer.event_file_writer")
        self._writer = writers.EventFileWriter(str(run_dir.tensorboard / run_name), flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [self._summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        summary = self._summary(value=scalars)
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: RunDir, run_name: str) -> None:
        self._run = _import("wandb").init(project="hone", name=run_name, dir=str(run_dir.path))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, run_dir: RunDir, run_name: str) -> None:
        self._mlflow = _import("mlflow")
        self._mlflow.set_experiment("hone")
        self._run_id = self._mlflow.start_run(run_name=run_name).info.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        allowed = {key.replace("@", "_at_"): value for key, value in values.items()}
        self._mlflow.log_metrics(allowed, step=step, run_id=self._run_id)

    def close(self) -> None:
        self._mlflow.end_run()


class _Trackio:
    def __init__(self, run_dir: RunDir, run_name: str) -> None:
        self._run = _import("trackio").init(project="hone", name=run_name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, tuple[str, Callable[[RunDir, str], MetricsSink]]] = {
    "tensorboard": ("tensorboard", _TensorBoard),
    "wandb": ("wandb", _Wandb),
    "mlflow": ("mlflow", _Mlflow),
    "trackio": ("trackio", _Trackio),
}


class _RayGauges:
    """Prometheus gauges where this process has joined Ray, scraped as `ray_hone_reward_mean`."""

    def __init__(self, run_name: str) -> None:
        self._run_name = run_name
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        gauge = _import("ray.util.metrics").Gauge
        for key, value in {**values, "step": float(step)}.items():
            if key not in self._gauges:
                self._gauges[key] = gauge(prometheus_name(key), description=key, tag_keys=("run",))
            self._gauges[key].set(value, tags={"run": self._run_name})

    def close(self) -> None:
        self._gauges.clear()


def prometheus_name(key: str) -> str:
    """`"eval/pass@1"` to `"hone_eval_pass_at_1"`."""
    return "hone_" + re.sub(r"[^a-zA-Z0-9]+", "_", key.replace("@", "_at_")).strip("_").lower()
