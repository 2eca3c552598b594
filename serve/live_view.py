"""The live view of a run in its own thread: a rich screen on a terminal, plain lines anywhere else.

Invariant: it reads only the run directory, so it cannot disturb the run; an error in it ends the
view, never the training. Opened by `hone train` around the run.
"""

import logging
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live

from cluster import status as run_status
from cluster.errors import HoneError, boundary
from cluster.run_dir import JsonLines, RunDir
from serve import status_view

POLL_S = 0.5
STILL_HERE_S = 30.0
CLOSE_TIMEOUT_S = 5.0
_PLAIN_KEYS = {
    "reward/mean": "reward",
    "policy/entropy": "entropy",
    "eval/pass@1": "pass@1",
    "policy_age/mean": "age",
    "rollout/tokens_per_s": "tokens/s",
    "time/step_s": "step_s",
}

logger = logging.getLogger(__name__)


class LiveView:
    """Example: `with LiveView(run_dir): train.run(...)`."""

    def __init__(self, run_dir: RunDir, console: Console | None = None) -> None:
        self._run_dir = run_dir
        self._console = console or Console(highlight=False)
        self._ended = threading.Event()
        self._rows = JsonLines(run_dir.metrics)
        _, self._offset = self._rows.read_from(0, dict[str, float | None])
        self._started_at = time.time()
        self._metrics: list[dict[str, float]] = []
        self._thread = threading.Thread(target=self._run, name="live-view", daemon=True)

    def __enter__(self) -> "LiveView":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            with boundary("live view"):
                self._show_screen() if self._console.is_terminal else self._show_lines()
        except HoneError as error:
            logger.warning("the live view ended, the run goes on: %s", error)

    def _show_screen(self) -> None:
        with Live(console=self._console, auto_refresh=False) as live:
            is_last = False
            while not is_last:
                is_last = self._ended.wait(POLL_S)
                self._new_rows()
                if status := self._status():
                    pace = status_view.seconds_per_step(self._metrics)
                    screen = status_view.render(status, now=time.time(), step_s=pace)
                    live.update(screen, refresh=True)

    def _show_lines(self) -> None:
        last_phase, said_at = "", time.monotonic()
        is_last = False
        while not is_last:
            is_last = self._ended.wait(POLL_S)
            lines = [_plain(row) for row in self._new_rows()]
            if status := self._status():
                phase = status_view.phase_name(status)
                is_silent = time.monotonic() - said_at > STILL_HERE_S and not lines
                if phase != last_phase or is_silent:
                    lines.append(status_view.phase_line(status, time.time()))
                last_phase = phase
            for line in lines:
                self._console.out(line, highlight=False)
                said_at = time.monotonic()

    def _status(self) -> run_status.RunStatus | None:
        """The status of this attempt; what an earlier attempt left behind does not count."""
        status = run_status.read(self._run_dir.path)
        return status if status and status.updated_at >= self._started_at else None

    def _new_rows(self) -> list[dict[str, float]]:
        rows, self._offset = self._rows.read_from(self._offset, dict[str, float | None])
        known = [{k: v for k, v in row.items() if v is not None} for row in rows]
        self._metrics = [*self._metrics, *known][-100:]
        return known


def _plain(row: dict[str, float]) -> str:
    values = [f"{name} {row[key]:.4g}" for key, name in _PLAIN_KEYS.items() if key in row]
    return f"step {row.get('step', 0):.0f}  " + "  ".join(values)
