"""A candidate on stored groups: what it would have paid, beside what was paid.

Invariant: nothing in the run changes, and the candidate ends with the trial. Called by
`actors.reward_admin`.
"""

from typing import Any

import msgspec

from actors.reward_candidate import Candidate, Tally
from cluster.errors import StageError
from cluster.types import Task, TrajectoryGroup


async def trial(
    candidate: Candidate,
    full_live: float,
    groups: list[tuple[TrajectoryGroup, bytes]],
    tasks: list[Task],
) -> dict[str, Any]:
    """The candidate's hash, what its self-check on `tasks` says (empty: all is paid), and how it
    compares on `groups`. Raises `StageError` when it does not start or dies.
    """
    tally = Tally()
    gold = ""
    try:
        facts = await candidate.start()
        try:
            await candidate.self_check(tasks)
        except StageError as error:
            gold = str(error)
        for group, encoded in groups:
            mine = await candidate.preview(encoded)
            tally.add(group.rewards, full_live, mine.rewards, facts.full_reward, mine.max_latency_s)
    finally:
        candidate.close()
    return {"hash": facts.hash, "gold": gold, "report": msgspec.to_builtins(tally.result())}
