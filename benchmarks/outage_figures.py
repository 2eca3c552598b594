"""What the files of a run say of an outage of its judge.

Invariant: the signal `correct` is the rule in front of the judge, on its own and without a weight,
so it abstains exactly where the judge, signal `judged`, was asked. Used by
`benchmarks.judge_outage`.
"""

from typing import NamedTuple

from cluster.group_log import Fate, GroupLine, GroupLog
from cluster.run_dir import RunDir

RULE, JUDGE = "correct", "judged"


class Phase(NamedTuple):
    """Completions that the rule could not decide, and how many of them the judge scored."""

    asked: int
    scored: int


class Outage(NamedTuple):
    """`during` leaves out the groups that may have asked before the outage. `abstained` is the
    largest share of the judge's abstentions that the metrics of a step in it have. `back_s` is the
    time from its end to the first group with a score of the judge, None without one.
    """

    num_steps: int
    before: Phase
    during: Phase
    after: Phase
    abstained: float
    back_s: float | None
    exit_code: int
    outcome: str


def figures(run: RunDir, started: float, ended: float, settled_s: float, exit_code: int) -> Outage:
    """Of an outage from `started` to `ended`, in unix seconds; calls from before it have come to an
    end after `settled_s`.
    """
    inside = {step for step, at in steps(run).items() if started < at <= ended}
    shares = [
        row.get(f"reward/{JUDGE}/abstain_fraction", 0.0)
        for row in run.read_metrics()
        if int(row["step"]) in inside
    ]
    back = [line.time for line in _lines(run, ended) if _phase([line]).scored]
    ends = [event for event in run.read_events() if event.kind == "run_finished"]
    return Outage(
        num_steps=len(inside),
        before=phase(run, until=started),
        during=phase(run, started + settled_s, ended),
        after=phase(run, ended),
        abstained=max(shares, default=0.0),
        back_s=min(back) - ended if back else None,
        exit_code=exit_code,
        outcome=str(ends[-1].fields["outcome"]) if ends else "no end",
    )


def phase(run: RunDir, since: float = 0.0, until: float = float("inf")) -> Phase:
    """Over the groups that were scored after `since` and not after `until`."""
    return _phase(_lines(run, since, until))


def steps(run: RunDir) -> dict[int, float]:
    """When the weights of each step reached the engines, in unix seconds."""
    events = [event for event in run.read_events() if event.kind == "sync"]
    return {int(str(event.fields["policy_version"])): event.time for event in events}


def _phase(lines: list[GroupLine]) -> Phase:
    verdicts = [
        score
        for line in lines
        for rule, score in zip(line.signals[RULE], line.signals[JUDGE], strict=True)
        if rule is None
    ]
    return Phase(len(verdicts), sum(score is not None for score in verdicts))


def _lines(run: RunDir, since: float, until: float = float("inf")) -> list[GroupLine]:
    found = [line for line in GroupLog(run).read() if line.fate is Fate.SAMPLED]
    return [line for line in found if since < line.time <= until]
