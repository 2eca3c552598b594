"""Golden sets: completions whose scores are known, which a rubric must get right to go live.

Invariant: each signal is asked alone, through the real rubric, so that time limits and worker
processes are part of the check; an abstention is wrong too. A verifier brings its own set
(`HasGolden`), the config adds to it (`rewards.verifiers.<name>.golden`). Called at the start of a
run, at every change of rewards and by `hone check`.
"""

import json

from cluster.types import Message, Task
from rewards.base import GoldenPair
from rewards.rubric import Rubric
from rewards.self_check import group_of

TOLERANCE = 1e-6


async def golden_check(rubric: Rubric) -> list[str]:
    """One line for each completion that does not score what it must; none is what you want."""
    lines: list[str] = []
    for name, pairs in rubric.golden.items():
        for group in _by_task(pairs):
            lines += await _wrong(rubric, name, group)
    return lines


def _by_task(pairs: list[GoldenPair]) -> list[list[GoldenPair]]:
    """Completions of one task form one group, as they do in a run."""
    groups: dict[str, list[GoldenPair]] = {}
    for pair in pairs:
        groups.setdefault(json.dumps([pair.reference, pair.tests], default=str), []).append(pair)
    return list(groups.values())


async def _wrong(rubric: Rubric, name: str, pairs: list[GoldenPair]) -> list[str]:
    first = pairs[0]
    task = Task(
        task_id="golden",
        taskset="golden",
        messages=[Message(role="user", content="")],
        reference=first.reference,
        entry=json.dumps({"tests": first.tests}) if first.tests else "",
    )
    verdicts = await rubric.ask(name, group_of(task, [pair.completion for pair in pairs]))
    return [
        f"rewards.verifiers.{name}: the golden completion {pair.completion[:60]!r} for "
        f"{pair.reference[:40]!r} must score {pair.score:g}, got {verdict.score} "
        f"({verdict.error or verdict.evidence})"
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if verdict.score is None or abs(verdict.score - pair.score) > TOLERANCE
    ]
