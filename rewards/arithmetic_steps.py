"""An exact step scorer for procedural arithmetic: worked sums, products and other equations.

Invariant: a step is right when every equation so far is exact and the solution can still reach the
answer without taking anything back; after a wrong step all are wrong. Needs no model. Used as
`arithmetic` in `process` verifiers.
"""

import asyncio
import re
from collections import Counter
from fractions import Fraction

from cluster.types import Task
from rewards.step_scorer import StepScores

MAX_STEP_CHARS = 2048
_BLANKS = re.compile(r"\s+")
_NUMBER = r"\d{1,40}(?:\.\d{1,40})?"
_SIDE = rf"(?>-?\s*{_NUMBER}(?:\s*[-+*/]\s*-?\s*{_NUMBER})*)"
_SIDES = re.compile(_SIDE)
_OPERAND = re.compile(rf"([-+*/])\s*(-?\s*{_NUMBER})")
_ANSWER = re.compile(
    rf"\s*(?:####|answer\s*(?:is|[:=])|\\boxed\{{)?\s*(-?\s*{_NUMBER})\s*\}}?\.?\s*", re.I
)
_SUM = re.compile(rf"(?>-?\s*{_NUMBER}(?:\s*[-+]\s*{_NUMBER})+)")


class ArithmeticSteps:
    """1.0 for a right step, 0.0 for a wrong one and all after it.

    An equation is right when its sides have equal values, a bare number when it is the reference.
    Where the question is a sum, an equation must also go on from the total before it and use only
    terms that are left: "3 - 7 = -4" is wrong after "4 - 1 = 2", and after "4 - 1 = 3" when the sum
    has no 7 to take away. A step without arithmetic is worth what the one before it is; without any
    arithmetic the completion is not scored.
    """

    async def score(self, task: Task, completions: list[list[str]]) -> list[StepScores]:
        return [await asyncio.to_thread(_check, task, steps) for steps in completions]


def _check(task: Task, steps: list[str]) -> StepScores:
    work = _Work(task)
    scores = [float(work.accepts(step)) for step in steps]
    if steps and not work.num_checked:
        return StepScores(error="no equation and no number to check")
    return StepScores(scores=scores)


class _Work:
    """What has been worked out so far: right or not, the running total, the terms left."""

    def __init__(self, task: Task) -> None:
        answer = _ANSWER.fullmatch(_plain(task.reference))
        self._answer = _number(answer[1]) if answer else None
        self._left = _question_terms(task, self._answer)
        self._total: Fraction | int | None = None
        self._is_right = True
        self.num_checked = 0

    def accepts(self, step: str) -> bool:
        """Whether all is right up to and with this step."""
        step = _plain(step)
        equations = _equations(step)
        answer = _ANSWER.fullmatch(step)
        self.num_checked += len(equations) + (answer is not None)
        if not all(self._follows(equation) for equation in equations):
            self._is_right = False
        if answer and _number(answer[1]) != self._answer:
            self._is_right = False
        return self._is_right

    def _follows(self, equation: list[str]) -> bool:
        sides = [_terms(side) for side in equation]
        values = [None if terms is None else sum(terms) for terms in sides]
        before, self._total = self._total, values[-1]
        if values[-1] is None or any(value != values[-1] for value in values):
            return False
        return self._left is None or self._takes_what_is_left(sides[0] or [], before)

    def _takes_what_is_left(self, terms: list[Fraction], before: Fraction | int | None) -> bool:
        assert self._left is not None
        if before is not None:
            if terms[:1] != [before]:
                return False
            terms = terms[1:]
        self._left.subtract(terms)
        return min(self._left.values()) >= 0


def _equations(step: str) -> list[list[str]]:
    """The sides of each equation: "1 + 2 = 3 = 6/2, 4" has one, of three."""
    chains: list[list[str]] = []
    end = 0
    for side in _SIDES.finditer(step):
        if chains and step[end : side.start()].strip() == "=":
            chains[-1].append(side[0])
        else:
            chains.append([side[0]])
        end = side.end()
    return [chain for chain in chains if len(chain) > 1]


def _question_terms(task: Task, answer: Fraction | None) -> Counter[Fraction] | None:
    """The signed terms of a question that is one sum; None for any other."""
    question = _plain(task.messages[-1].content) if task.messages else ""
    terms = _terms(max(_SUM.findall(question), key=len, default=""))
    return Counter(terms) if terms and sum(terms) == answer else None


def _terms(side: str) -> list[Fraction] | None:
    """What "4 - 2*3" adds up, exactly: 4 and -6; None for a division by zero."""
    terms: list[Fraction] = []
    for operator, digits in _OPERAND.findall(f"+{side}" if side else ""):
        number = Fraction(digits.replace(" ", ""))
        if operator in "+-":
            terms.append(number if operator == "+" else -number)
        elif operator == "*":
            terms[-1] *= number
        elif number:
            terms[-1] /= number
        else:
            return None
    return terms


def _plain(text: str) -> str:
    """With single blanks, and at most `MAX_STEP_CHARS`, so that the patterns cost little."""
    return _BLANKS.sub(" ", text)[-MAX_STEP_CHARS:]


def _number(digits: str) -> Fraction:
    return Fraction(digits.replace(" ", ""))
