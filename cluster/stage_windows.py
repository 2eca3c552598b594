"""What the files of a run say about its stages between the ends of two steps.

Invariant: only the later half of the run counts, without its first step and without the steps
beside an evaluation, which shares the engines. Called by `cluster.stage_profile`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from cluster.config import Config
from cluster.group_log import Fate, GroupLine, GroupLog
from cluster.run_dir import Event, RunDir

Wave = tuple[float, float, float]  # iterations, tokens an engine, seconds


class _Book:
    """Sampled groups by the version that sampled them, when which were dropped, and when the
    engines got a version.
    """

    def __init__(self, lines: Sequence[GroupLine], events: Sequence[Event]) -> None:
        self.dropped_at = {g.group_id: g.time for g in lines if g.fate is Fate.DROPPED}
        self.sampled: defaultdict[int, list[GroupLine]] = defaultdict(list)
        for line in sorted(lines, key=lambda line: line.time):
            if line.fate is Fate.SAMPLED:
                self.sampled[line.policy_version].append(line)
        self.synced_at = {
            event.fields.get("policy_version"): event.time
            for event in events
            if event.kind == "sync"
        }


class Window:
    """One step. `waves` are of groups that an engine began together."""

    def __init__(
        self, row: Mapping[str, float], book: _Book, config: Config, max_running: int
    ) -> None:
        rollout = config.rollout
        version = int(row["policy_version"]) - 1  # that the engines held
        window_s = _window_s(row)
        self.row = row
        self.sampled = book.sampled[version]
        self.num_dropped = sum(line.group_id in book.dropped_at for line in self.sampled)
        self.num_groups = rollout.groups_per_step
        self.loss_tokens = row["learner/num_loss_tokens"]
        self.learn_s = window_s * row["learner/busy_fraction"]
        self.score_s = window_s * row["score/busy_fraction"]
        self.score_latency_s = _latency_s(row)
        self.sync_s = row["sync/total_s"]
        if rollout.max_policy_age == 0:
            self.waves = self._waves(book, book.synced_at[version], rollout.workers)
        else:
            tokens = row["rollout/tokens_per_s"] * window_s / rollout.workers
            running = config.max_groups_in_flight * rollout.group_size / rollout.workers
            busy_s = window_s * row["rollout/busy_fraction"]
            self.waves = [(tokens / min(running, max_running), tokens, busy_s)]

    def _waves(self, book: _Book, started: float, num_workers: int) -> list[Wave]:
        """In `sync` mode: a step's groups begin at the sync, then one for each that is dropped."""
        waves: list[Wave] = []
        begin, size = 0, self.num_groups
        while wave := self.sampled[begin : begin + size]:
            seconds = wave[-1].time - started - self.score_latency_s
            longest = max(max(line.completion_tokens, default=0) for line in wave)
            tokens = sum(sum(line.completion_tokens) for line in wave) / num_workers
            if seconds > 0:
                waves.append((longest, tokens, seconds))
            dropped_at = [
                book.dropped_at[g.group_id] for g in wave if g.group_id in book.dropped_at
            ]
            begin, size, started = begin + size, len(dropped_at), max(dropped_at, default=started)
        return waves


def windows_of(run_dir: RunDir, config: Config, max_running: int) -> list[Window]:
    """Of the steps that count, in their order; `max_running` sequences fit an engine."""
    book = _Book(GroupLog(run_dir).read(), run_dir.read_events())
    rows = run_dir.read_metrics()
    evaluated = {row["step"] for row in rows if "eval/pass@1" in row}
    first = rows[-1]["step"] / 2 if rows else 0.0
    counted = [
        row
        for row in rows
        if row["step"] > max(1.0, first)
        and not {row["step"], row["step"] - 1} & evaluated
        and "rollout/tokens_per_s" in row
        and row["policy_version"] - 1 in book.synced_at
    ]
    windows = [Window(row, book, config, max_running) for row in counted]
    return [window for window in windows if window.waves and window.sampled]


def _window_s(row: Mapping[str, float]) -> float:
    """Seconds of the row: waited / (1 - busy) of the stage that waited most."""
    waited = {key.removeprefix("time/wait_s/"): s for key, s in row.items() if "wait_s" in key}
    stage = max(waited, key=waited.__getitem__)
    return waited[stage] / (1.0 - row[f"{'learner' if stage == 'learn' else stage}/busy_fraction"])


def _latency_s(row: Mapping[str, float]) -> float:
    """Mean of the slowest signal; in a row without means, the slowest verdict."""
    means = [
        s for key, s in row.items() if key.startswith("reward/") and key.endswith("/latency_s")
    ]
    return max(means, default=row.get("reward/latency_max_s", 0.0))
