"""Checks of the rubric itself: the gold answer must earn full reward, junk must earn none.

Invariant: real groups go through the real rubric; an answer counts as accepted if any usual form of
it (bare, boxed, tagged, after thinking, a verifier's own example) earns the full reward, or what a
gold answer must earn where a verifier never gives a 1.
Called by `hone check` and at the start of `hone train`.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
import numpy as np

from cluster.types import Task, Trajectory, TrajectoryGroup, TrajectoryStatus
from rewards.answers import normalise
from rewards.quantities import compare
from rewards.rubric import Rubric

Result = TypeVar("Result")
log = logging.getLogger(__name__)
FORMS = (
    "{answer}",
    r"\boxed{{answer}}",
    "<answer>{answer}</answer>",
    "<think>\n\n</think>\n\n{answer}",
    "<think>\n\n</think>\n\n\\boxed{{answer}}",
)
JUNK = ("", "0", "1", "yes", "no", "True", "A", ":", "Thought process:", "Let's solve this.", "\\")
TRIAL = "I think so."
ANOTHER_ANSWER = "the answer of another task"
NUM_PARALLEL = 4
TOLERANCE = 1e-6


class JunkFinding(msgspec.Struct, frozen=True, kw_only=True):
    """A constant answer that earned the full reward on `share` of the tasks where it is wrong."""

    junk: str
    share: float
    num_tasks: int

    def __str__(self) -> str:
        return (
            f"the junk answer {self.junk!r} earns the full reward on {self.share:.0%} "
            f"of {self.num_tasks} tasks where it is wrong"
        )


async def gold_check(rubric: Rubric, tasks: list[Task], count: int) -> list[str]:
    """One line for each of `count` evenly spread tasks whose gold answer is not fully rewarded.

    The gold answer is `solution` where there is one, and `reference` in every usual form. A task
    with neither passes, with a warning in the log, when the rubric scores completions without one.
    """
    if rubric.full_reward <= 0:
        return ["no verifier has a weight above 0, so no completion can be rewarded"]
    chosen = tasks[:: max(1, len(tasks) // max(1, count))][:count]
    if chosen and not any(task.solution or task.reference for task in chosen):
        log.warning("no task has a gold answer: whether right answers are rewarded is not checked")
    lines = await _in_parallel([_rejection(rubric, task) for task in chosen])
    return [line for line in lines if line]


async def junk_probe(rubric: Rubric, tasks: list[Task]) -> list[JunkFinding]:
    """The junk answers that were paid in full on some task, worst first; none is what you want."""
    others = [tasks[i - 1].reference for i in range(len(tasks))]
    paid = await _in_parallel(
        [_paid_junk(rubric, task, other) for task, other in zip(tasks, others, strict=True)]
    )
    findings: list[JunkFinding] = []
    for junk in [*JUNK, ANOTHER_ANSWER]:
        results = [verdicts[junk] for verdicts in paid if junk in verdicts]
        if any(results):
            share = sum(results) / len(results)
            findings.append(JunkFinding(junk=junk, share=share, num_tasks=len(results)))
    return sorted(findings, key=lambda finding: -finding.share)


async def _in_parallel(checks: list[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results in order, a few at a time: workers are few and verifiers have a clock."""
    free = asyncio.Semaphore(NUM_PARALLEL)

    async def one(check: Coroutine[Any, Any, Result]) -> Result:
        async with free:
            return await check

    return await asyncio.gather(*map(one, checks))


async def _rejection(rubric: Rubric, task: Task) -> str:
    """Why the gold answer of a task is not fully rewarded, or ""."""
    texts = [task.solution] if task.solution else []
    texts += _forms(rubric, task.reference) if task.reference else []
    where = f"task {task.task_id} ({_start(task)!r})"
    has_gold = bool(texts)
    scored = await rubric.score(group_of(task, texts or _forms(rubric, TRIAL)))
    best = max(scored.trajectories, key=lambda t: float("-inf") if t.reward is None else t.reward)
    if _is_full(rubric, best) or (not has_gold and best.reward is not None):
        return ""
    words = ", ".join(f"{v.name} {v.score} ({v.error or v.evidence})" for v in best.verdicts)
    if not has_gold:
        return f"{where}: has neither a reference nor a solution: {words}"
    reward = "nothing" if best.reward is None else f"{best.reward:g}"
    return (
        f"{where}: the gold answer {task.reference[:60]!r} earns {reward} "
        f"of {rubric.gold_reward:g}: {words}"
    )


async def _paid_junk(rubric: Rubric, task: Task, other: str) -> dict[str, bool]:
    """Junk answers that are wrong here, and whether one of their forms was paid in full."""
    candidates = {junk: junk for junk in JUNK} | {ANOTHER_ANSWER: other}
    wrong = {name: text for name, text in candidates.items() if not _is_right(task, text)}
    forms = {name: _forms(rubric, text) for name, text in wrong.items()}
    texts = list(dict.fromkeys(text for group in forms.values() for text in group))
    scored = await rubric.score(group_of(task, texts))
    paid = {t.text for t in scored.trajectories if _is_full(rubric, t)}
    return {name: not paid.isdisjoint(group) for name, group in forms.items()}


def _is_right(task: Task, junk: str) -> bool:
    return compare(normalise(task.reference), normalise(junk)) is True


def _forms(rubric: Rubric, answer: str) -> list[str]:
    return [form.replace("{answer}", answer) for form in (*rubric.examples, *FORMS)]


def _is_full(rubric: Rubric, trajectory: Trajectory) -> bool:
    return trajectory.reward is not None and trajectory.reward >= rubric.gold_reward - TOLERANCE


def _start(task: Task) -> str:
    return task.messages[-1].content[:60] if task.messages else ""


def group_of(task: Task, texts: list[str]) -> TrajectoryGroup:
    """A group of completions with these texts and one token each."""
    group_id = f"check-{task.task_id}"
    return TrajectoryGroup(
        group_id=group_id,
        task=task,
        trajectories=[
            Trajectory(
                trajectory_id=f"{group_id}-{index}",
                group_id=group_id,
                task_id=task.task_id,
                context_tokens=np.zeros(1, np.int32),
                token_ids=np.zeros(1, np.int32),
                loss_mask=np.ones(1, np.bool_),
                rollout_logprobs=np.zeros(1, np.float32),
                version_spans=[],
                status=TrajectoryStatus.COMPLETED,
                text=text,
            )
            for index, text in enumerate(texts)
        ],
    )
