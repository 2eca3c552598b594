"""The math verifier: is the final answer of a completion equal to the reference?

Invariant: a missing, wrong or uncheckable answer scores 0.0; a check that timed out or crashed
abstains. Plain numbers and words are decided in this process in microseconds; everything else goes
to math-verify in a worker that is killed when it hangs. Used as `math` in a config.
"""

import asyncio
from functools import lru_cache, partial
from typing import Any

import msgspec

from cluster.errors import ConfigError, HoneError
from cluster.types import TrajectoryGroup, Verdict
from rewards.answers import (
    all_boxes,
    extract_answer,
    final_part,
    last_box,
    normalise,
    why_uncheckable,
)
from rewards.base import VerifierIO, abstention
from rewards.golden_sets import MATH
from rewards.math_policy import read_policy
from rewards.quantities import compare, is_same_text
from rewards.structures import agree

IS_EQUAL = "rewards.symbolic:is_equal"


class MathVerifier:
    r"""Scores 1.0 or 0.0; `require_boxed` accepts an answer in `\boxed{}` only.

    The reference may be the bare answer, `#### 42` at the end of a solution, or boxed. One check in
    a worker may take `check_timeout_s`. All other settings are those of `MathPolicy`.
    Example: with the reference "1/2", `\boxed{0.5}` scores 1.0.
    """

    golden = MATH

    def __init__(
        self, require_boxed: bool = False, check_timeout_s: float = 2.0, **policy: Any
    ) -> None:
        if check_timeout_s <= 0:
            raise ConfigError(f"check_timeout_s must be above 0, got {check_timeout_s}")
        self._require_boxed = require_boxed
        self._check_timeout_s = check_timeout_s
        self._policy = read_policy(policy)
        self._compare = partial(compare, policy=self._policy)

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        gold = gold_answer(group.task.reference)
        if not gold:
            error = f"task {group.task.task_id} has no reference to check against"
            return [Verdict(score=None, error=error) for _ in group.trajectories]
        answers = [self._extract(t.text) for t in group.trajectories]
        distinct = dict.fromkeys(answers)
        verdicts = await asyncio.gather(*(self._verdict(gold, a, io) for a in distinct))
        by_answer = dict(zip(distinct, verdicts, strict=True))
        return [by_answer[answer] for answer in answers]

    def _extract(self, text: str) -> str | None:
        if self._policy.boxes == "agree":
            boxes = {normalise(box) for box in all_boxes(final_part(text))}
            if len(boxes) > 1:
                return None
        return extract_answer(text, self._require_boxed)

    async def _verdict(self, gold: str, raw: str | None, io: VerifierIO) -> Verdict:
        if raw is None:
            return Verdict(score=0.0, evidence="no answer")
        answer = normalise(raw)
        reason = "" if is_same_text(gold, answer) else why_uncheckable(answer)
        if reason:
            return Verdict(score=0.0, evidence=f"not a checkable answer: {reason}")
        is_right = agree(gold, answer, self._compare, self._policy)
        if is_right is None:
            try:
                is_right = await io.run_isolated(
                    IS_EQUAL, gold, answer, msgspec.to_builtins(self._policy),
                    timeout_s=self._check_timeout_s,
                )  # fmt: skip
            except HoneError as error:
                return abstention(error)
        sign = "=" if is_right else "is not"
        return Verdict(score=float(bool(is_right)), evidence=f"{answer} {sign} {gold}")


@lru_cache(maxsize=4096)
def gold_answer(reference: str) -> str:
    """The normalised answer in a reference: after `####`, in the last box, or all of it."""
    after_mark = reference.rpartition("####")[2]
    box = last_box(after_mark)
    return normalise(after_mark if box is None else box)
