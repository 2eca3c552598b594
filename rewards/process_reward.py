"""The process reward: every step of a completion gets a score, and the steps give the sequence's.

Invariant: step scores lie at token ends of the trajectory's own tokens, or there are none; a
completion that the scorer could not score abstains. The work is done by a step scorer. Used as
`process` in a config; `learners.process_credit` turns its step scores into advantages.
"""

import asyncio
import hashlib
import importlib
import math
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any, Literal

import msgspec

from cluster import plugins
from cluster.config import Plugin
from cluster.errors import ConfigError
from cluster.types import Trajectory, TrajectoryGroup, Verdict
from rewards.base import VerifierIO
from rewards.step_scorer import StepScorer, StepScores
from rewards.steps import DEFAULT_SEPARATOR, compile_separator, split_steps, token_ends
from rewards.versions import sources_of

SCORERS = {
    "arithmetic": "rewards.arithmetic_steps:ArithmeticSteps",
    "classifier": "rewards.step_models:StepClassifier",
    "token_probability": "rewards.step_models:StepTokenProbability",
    "likelihood": "rewards.step_likelihood:StepLikelihood",
}
AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "min": min,
    "product": math.prod,
    "last": lambda scores: scores[-1],
    "mean": fmean,
}


class ProcessVerifier:
    """Scores steps with `scorer` (`{use: classifier, settings: {model: DIR}}`).

    A step is a piece of the completion up to a match of `separator`. `aggregate` makes the sequence
    score of the step scores; with `threshold` it is 1.0 from there on and 0.0 below, so that a
    learned scorer can be rewarded: no gold answer ever earns a full probability. `tokenizer` is the
    policy's (a directory or hub id), by default that of the run. Example: step scores 0.9 and 0.5
    give 0.5 by `min`, 0.45 by `product`, 0.5 by `last` and 0.7 by `mean`.
    """

    def __init__(
        self,
        scorer: dict[str, Any],
        aggregate: Literal["min", "product", "last", "mean"] = "min",
        separator: str = DEFAULT_SEPARATOR,
        threshold: float | None = None,
        tokenizer: str = "",
    ) -> None:
        if aggregate not in AGGREGATES:
            raise ConfigError(
                f"aggregate must be one of {', '.join(AGGREGATES)}, got {aggregate!r}"
            )
        chosen = Plugin.model_validate(scorer)
        self._scorer: StepScorer = plugins.build(chosen.use, chosen.settings, SCORERS, "scorer")
        self._aggregate = AGGREGATES[aggregate]
        self._separator = compile_separator(separator)
        self._threshold = threshold
        self._tokenizer = tokenizer
        self._decoders: dict[str, Callable[[list[int]], str]] = {}

    @staticmethod
    def fingerprint(settings: Mapping[str, Any]) -> str:
        """Changes with the scorer's code and, where it is a plug-in with weights, with those."""
        chosen = Plugin.model_validate(settings.get("scorer"))
        target = plugins.resolve(chosen.use, SCORERS, "scorer")
        own = getattr(target, "fingerprint", None)
        parts = [*sources_of(target.__module__).values(), own(chosen.settings) if own else ""]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        steps = [split_steps(t.text, self._separator) for t in group.trajectories]
        distinct = [list(one) for one in dict.fromkeys(map(tuple, steps)) if one]
        scored = await self._scorer.score(group.task, distinct) if distinct else []
        by_steps = {tuple(one): result for one, result in zip(distinct, scored, strict=True)}
        verdicts = [
            self._verdict(one, by_steps[tuple(one)]) if one else _nothing() for one in steps
        ]
        decode = await asyncio.to_thread(self._decoder, self._tokenizer or io.policy_dir)
        return [
            await asyncio.to_thread(_aligned, decode, trajectory, one, verdict)
            for trajectory, one, verdict in zip(group.trajectories, steps, verdicts, strict=True)
        ]

    def _verdict(self, steps: list[str], scored: StepScores) -> Verdict:
        """The sequence score, and those of the steps with the step's number for a token end."""
        if scored.error:
            return Verdict(score=None, error=scored.error)
        if len(scored.scores) != len(steps) or not all(map(math.isfinite, scored.scores)):
            return Verdict(
                score=None,
                error=f"the scorer must give {len(steps)} numbers, gave {scored.scores[:8]}",
            )
        total = self._aggregate(scored.scores)
        worst = min(range(len(steps)), key=scored.scores.__getitem__)
        return Verdict(
            score=total if self._threshold is None else float(total >= self._threshold),
            step_scores=list(enumerate(scored.scores)),
            evidence=f"{len(steps)} steps, weakest {scored.scores[worst]:.3f}: "
            f"{steps[worst].strip()[:80]!r}",
        )

    def _decoder(self, place: str) -> Callable[[list[int]], str] | None:
        """How rollouts turn tokens into text; None where the policy is not known."""
        if not place:
            return None
        if place not in self._decoders:
            transformers: Any = importlib.import_module("transformers")
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
            self._decoders[place] = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        return self._decoders[place]


def _nothing() -> Verdict:
    return Verdict(score=0.0, step_scores=[(0, 0.0)], evidence="no steps")


def _aligned(
    decode: Callable[[list[int]], str] | None,
    trajectory: Trajectory,
    steps: list[str],
    verdict: Verdict,
) -> Verdict:
    """The verdict with token ends; without step scores where tokens and text do not agree."""
    if verdict.score is None:
        return verdict
    ends = token_ends(decode, trajectory.token_ids, steps) if decode and steps else None
    if not steps:
        ends = [len(trajectory.token_ids)]
    if ends is None:
        why = "the policy's tokenizer is not known" if decode is None else "its tokens differ"
        return msgspec.structs.replace(
            verdict, step_scores=[], evidence=f"{verdict.evidence} (no step scores: {why})"
        )
    scores = [score for _, score in verdict.step_scores]
    return msgspec.structs.replace(verdict, step_scores=list(zip(ends, scores, strict=True)))
