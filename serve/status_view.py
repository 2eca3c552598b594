"""One screen of a run, drawn from its `RunStatus`: used by `hone status` and the live view.

Invariant: a view is honest: a run that stopped reporting says so, a phase that takes longer than
expected says so, and text that came from models or users is escaped.
"""

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.log import escape
from cluster.status import RunStatus

BLOCKS = "▁▂▃▄▅▆▇█"
SILENT_AFTER_S = 30.0
ENDED = ("finished", "failed")
_PACE_STEPS = 20
_STATE_STYLES = {
    "healthy": "green",
    "asleep": "cyan",
    "quarantined": "yellow",
    "leaving": "yellow",
    "dead": "red",
    "starting": "cyan",
}


def render(status: RunStatus, *, now: float, step_s: float | None) -> RenderableType:
    """The screen at unix time `now`; `step_s` is the recent duration of a step, for the ETA."""
    parts: list[RenderableType] = [_header(status, now), _progress(status, step_s), _curves(status)]
    is_live = status.phase not in ENDED
    if is_live and status.stages:
        parts += [Text(), _stages(status)]
    if is_live and status.actors:
        parts += [Text(), _actors(status)]
    if status.last_events:
        parts += [Text(), *(Text(f"  {escape(e)}", "dim") for e in status.last_events[-5:])]
    if status.error:
        parts += [Text(), Text(f"error: {escape(status.error)}", "bold red")]
    return Group(*parts)


def phase_line(status: RunStatus, now: float) -> str:
    """`starting: loading engine 1/1, 12 s of about 1m 00s`."""
    text = phase_name(status)
    if status.phase in ENDED or not status.phase_started_at:
        return text
    elapsed = max(0.0, now - status.phase_started_at)
    if not status.phase_expected_s:
        return f"{text}, {duration(elapsed)}"
    if elapsed > status.phase_expected_s:
        usual = duration(status.phase_expected_s)
        return f"{text}, {duration(elapsed)}, longer than the usual {usual}"
    return f"{text}, {duration(elapsed)} of about {duration(status.phase_expected_s)}"


def phase_name(status: RunStatus) -> str:
    """`starting: loading engine 1/1`."""
    return status.phase + (f": {escape(status.phase_detail)}" if status.phase_detail else "")


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """Unicode blocks from the smallest to the largest of the last `width` values."""
    recent = [v for v in values if v == v][-width:]
    if not recent:
        return ""
    low, high = min(recent), max(recent)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((v - low) * scale)] for v in recent)


def duration(seconds: float) -> str:
    """`45 s`, `2m 05s`, `3h 07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def seconds_per_step(metrics: Sequence[Mapping[str, float]]) -> float | None:
    """Mean `time/step_s` of the last rows; None before the first step."""
    recent = [row["time/step_s"] for row in metrics if "time/step_s" in row][-_PACE_STEPS:]
    return sum(recent) / len(recent) if recent else None


def _header(status: RunStatus, now: float) -> Text:
    style = {"failed": "bold red", "finished": "bold green"}.get(status.phase, "bold cyan")
    line = Text.assemble((f"{status.run}  ", "bold"), (phase_line(status, now), style))
    until = status.updated_at if status.phase in ENDED else now
    if status.started_at:
        line.append(f"  total {duration(max(0.0, until - status.started_at))}", "dim")
    silent_s = now - status.updated_at
    if status.phase not in ENDED and status.updated_at and silent_s > SILENT_AFTER_S:
        line.append(f"\nno report for {duration(silent_s)}: the run may be gone", "bold yellow")
    return line


def _progress(status: RunStatus, step_s: float | None) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    text = f"step {status.step}/{status.steps}  v{status.policy_version}"
    if step_s and status.phase not in ENDED and status.step < status.steps:
        text += f"  ETA {duration(step_s * (status.steps - status.step))}"
    bar = ProgressBar(total=max(1, status.steps), completed=status.step, width=36)
    row.add_row(bar, Text(text))
    return row


def _curves(status: RunStatus) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, values in (("reward", status.reward_history), ("entropy", status.entropy_history)):
        last = f"{values[-1]:.3f}" if values else "-"
        table.add_row(name, Text(sparkline(values), "cyan"), last)
    evals = " ".join(f"{value:.2f} (step {step})" for step, value in _ends(status.eval_history))
    table.add_row("pass@1", Text(sparkline([v for _, v in status.eval_history]), "green"), evals)
    rates = (
        f"{status.tokens_per_s:,.0f} tokens/s   policy age {status.policy_age:.2f}   "
        f"buffer {status.buffer_depth}   dropped {status.groups_dropped}"
    )
    return Group(table, Text(rates))


def _ends(history: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [*history[:1], *history[1:][-3:]]


def _stages(status: RunStatus) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("stage", "busy", "state"):
        table.add_column(column)
    for stage in status.stages:
        waiting = f"waits for {escape(stage.waiting_for)}" if stage.waiting_for else "works"
        state = Text(f"{waiting}, {duration(stage.since_s)}", "" if stage.waiting_for else "green")
        table.add_row(stage.name, f"{stage.busy_fraction:.0%}", state)
    return table


def _actors(status: RunStatus) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("actor", "state", "version", "pid"):
        table.add_column(column)
    for actor in status.actors:
        version = f"v{actor.policy_version}" if actor.policy_version >= 0 else "-"
        state = Text(actor.state, _STATE_STYLES.get(actor.state, ""))
        table.add_row(actor.name, state, version, str(actor.pid or "-"))
    return table
