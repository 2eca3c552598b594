"""Verifiers of form: does a completion match a pattern, keep its length, avoid repeating itself?

Invariant: 1.0 is a completion within the rule; no text, however made, costs more than linear time
or `PATTERN_TIMEOUT_S`. Used as `format`, `length` and `repetition` in a config.
"""

from typing import Literal

import regex

from cluster.errors import ConfigError
from cluster.types import TrajectoryGroup, Verdict
from rewards.base import VerifierIO

MAX_CHARS = 65536  # of a completion, from its end
PATTERN_TIMEOUT_S = 0.05  # for one completion


class FormatVerifier:
    r"""Scores 1.0 where a completion matches a regular expression, else 0.0.

    Blanks around the completion do not count; the dot matches newlines. `example` shows a
    completion in the right form, with `{answer}` where the answer goes; the gold self-check uses
    it. A search that backtracks beyond `PATTERN_TIMEOUT_S` abstains. Example:
    `pattern="<think>.*</think>.*", example="<think>...</think>{answer}"`.
    """

    def __init__(
        self, pattern: str, match: Literal["fullmatch", "search"] = "fullmatch", example: str = ""
    ) -> None:
        if match not in ("fullmatch", "search"):
            raise ConfigError(f"match must be 'fullmatch' or 'search', got {match!r}")
        try:
            compiled = regex.compile(pattern, regex.DOTALL)
        except regex.error as error:
            raise ConfigError(f"pattern is no regular expression: {error}") from error
        self._match = compiled.fullmatch if match == "fullmatch" else compiled.search
        self.example = example
        if example and not self._match(example.replace("{answer}", "42"), timeout=1.0):
            raise ConfigError(f"example {example!r} must match the pattern {pattern!r}")

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        return [self._verdict(t.text.strip()) for t in group.trajectories]

    def _verdict(self, text: str) -> Verdict:
        try:
            found = self._match(text[-MAX_CHARS:], timeout=PATTERN_TIMEOUT_S)
        except TimeoutError:
            error = f"the pattern took more than {PATTERN_TIMEOUT_S} s: make it backtrack less"
            return Verdict(score=None, error=error)
        return Verdict(score=float(found is not None), evidence="" if found else "no match")


class LengthVerifier:
    """Soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), shifted by 1 into [0, 1].

    1.0 up to `max_tokens - soft_tokens` tokens of the policy's own, then linear to 0.0 at
    `max_tokens`. The shift changes no group-relative advantage. Example: with 100 and 20, 90 tokens
    score 0.5.
    """

    def __init__(self, max_tokens: int, soft_tokens: int = 0) -> None:
        if not 0 <= soft_tokens <= max_tokens or max_tokens < 1:
            raise ConfigError(
                f"must hold 0 <= soft_tokens <= max_tokens, got {soft_tokens} and {max_tokens}"
            )
        self._max_tokens = max_tokens
        self._soft_tokens = soft_tokens

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        return [self._verdict(t.num_written_tokens) for t in group.trajectories]

    def _verdict(self, num_tokens: int) -> Verdict:
        left = self._max_tokens - num_tokens
        score = left / self._soft_tokens if self._soft_tokens else float(left >= 0)
        return Verdict(score=min(1.0, max(0.0, score)), evidence=f"{num_tokens} tokens")


class RepetitionVerifier:
    """Scores 1.0 while at most `max_fraction` of the word n-grams are repeats, then falls to 0.0.

    Texts of fewer than `min_words` words score 1.0. Example: "a b a b a b a b" with `ngram=2` has 7
    bigrams, 5 of them repeats; with `max_fraction=0.2` it scores (1 - 5/7) / (1 - 0.2) = 0.36.
    """

    def __init__(self, ngram: int = 4, max_fraction: float = 0.2, min_words: int = 16) -> None:
        if ngram < 1 or not 0 <= max_fraction < 1:
            raise ConfigError(
                "must hold ngram >= 1 and 0 <= max_fraction < 1, "
                f"got ngram={ngram} and max_fraction={max_fraction}"
            )
        self._ngram = ngram
        self._max_fraction = max_fraction
        self._min_words = max(min_words, ngram)

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        return [self._verdict(t.text) for t in group.trajectories]

    def _verdict(self, text: str) -> Verdict:
        words = text[-MAX_CHARS:].split()
        if len(words) < self._min_words:
            return Verdict(score=1.0, evidence=f"{len(words)} words")
        starts = range(len(words) - self._ngram + 1)
        distinct = {tuple(words[i : i + self._ngram]) for i in starts}
        fraction = 1.0 - len(distinct) / len(starts)
        score = min(1.0, (1.0 - fraction) / (1.0 - self._max_fraction))
        return Verdict(score=score, evidence=f"{fraction:.2f} of {self._ngram}-grams repeat")
