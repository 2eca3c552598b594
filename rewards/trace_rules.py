"""Verifiers of how a completion was reached: brevity within a group, language, and instructions
that the reasoning trace must follow.

Invariant: 1.0 is a completion within the rule; linear time in the text; a rule that cannot be
checked is not passed. Used as `efficiency`, `language` and `trace` in a config.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, Literal

from cluster.config import VerifierConfig
from cluster.errors import ConfigError
from cluster.types import TrajectoryGroup, Verdict
from rewards.base import Verifier, VerifierIO
from rewards.registry import build_verifier
from rewards.text_rules import MAX_CHARS
from rewards.versions import nested_version

_SCRIPTS = {
    "en": "LATIN", "de": "LATIN", "fr": "LATIN", "es": "LATIN", "latin": "LATIN", "zh": "CJK",
    "ru": "CYRILLIC", "el": "GREEK", "ar": "ARABIC", "he": "HEBREW", "hi": "DEVANAGARI",
    "ko": "HANGUL", "th": "THAI", "ja": "HIRAGANA KATAKANA CJK",
}  # fmt: skip
_FREQUENT = {
    "en": "the of and to in is that it for we so this be are with as then which have from",
    "de": "der die das und ist nicht wir ein eine zu mit den auf für dass also sind dann von es",
    "fr": "le la les et est nous un une des que pour dans donc pas ce sont avec alors de du",
    "es": "el la los las y es que un una de en por con para se no entonces son como del",
}
_WORD = re.compile(r"[^\W\d_]+")
MIN_WORDS = 5


class EfficiencyVerifier:
    """Right and short beats right and long, against right siblings; given tokens are no length.

    `correct` names the verifier that says what is right (at least `threshold`); that verdict must
    exist, so an abstention of it abstains here. With lengths l in tokens of the right ones of the
    group, a right one scores 1 - eta (l - min) / (max - min), a wrong one 0: any right one above
    any wrong one for eta < 1. Doubling all lengths changes nothing. Example: right ones of 10, 20
    and 30 tokens with eta 0.5 score 1.0, 0.75 and 0.5.
    """

    def __init__(
        self, correct: dict[str, Any], eta: float = 0.5, threshold: float = 0.5
    ) -> None:  # fmt: skip
        if not 0 < eta < 1:
            raise ConfigError(f"eta must lie between 0 and 1, got {eta}")
        self._correct: Verifier = build_verifier(
            "correct", VerifierConfig.model_validate(correct)
        )  # fmt: skip
        self._eta = eta
        self._threshold = threshold

    @staticmethod
    def fingerprint(settings: Mapping[str, Any]) -> str:
        """Changes with the code of the verifier in `correct`."""
        return nested_version("correct", settings.get("correct"))

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        verdicts = await self._correct.score(group, io)
        lengths = [t.num_written_tokens for t in group.trajectories]
        right = [
            length
            for length, verdict in zip(lengths, verdicts, strict=True)
            if length and verdict.score is not None and verdict.score >= self._threshold
        ]
        low, high = min(right, default=0), max(right, default=0)
        return [
            self._verdict(verdict, length, low, high)
            for verdict, length in zip(verdicts, lengths, strict=True)
        ]

    def _verdict(self, verdict: Verdict, length: int, low: int, high: int) -> Verdict:
        if verdict.score is None:
            return verdict
        if verdict.score < self._threshold:
            return Verdict(score=0.0, evidence="not right")
        excess = max(0, length - low) / (high - low) if high > low else 0.0
        return Verdict(score=1.0 - self._eta * excess, evidence=f"{length} of {low}..{high} tokens")


class LanguageVerifier:
    """Scores the share of words in `language`'s script; for de, en, es and fr its frequent words
    must also outnumber those of the other three.

    `part` chooses what is looked at. Fewer than five words score 1.0: there is no telling.
    """

    def __init__(
        self, language: str = "en", part: Literal["trace", "answer", "all"] = "all"
    ) -> None:
        if language not in _SCRIPTS:
            raise ConfigError(f"language must be one of {', '.join(_SCRIPTS)}, got {language!r}")
        if part not in ("trace", "answer", "all"):
            raise ConfigError(f"part must be trace, answer or all, got {part!r}")
        self._language = language
        self._part = part

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        return [self._verdict(t.text) for t in group.trajectories]

    def _verdict(self, text: str) -> Verdict:
        trace, answer = split_trace(text)
        chosen = {"trace": trace, "answer": answer, "all": text}[self._part]
        words = _WORD.findall(chosen[-MAX_CHARS:])
        if len(words) < MIN_WORDS:
            return Verdict(score=1.0, evidence=f"{len(words)} words")
        share = language_share(words, self._language)
        return Verdict(score=share, evidence=f"{share:.2f} of {len(words)} words")


class TraceVerifier:
    """ReasonIF's checks on the reasoning trace alone: the share of the given ones that hold.

    `max_words`, `uppercase` (all letters, as in English shouting), `ends_with`, `is_json`,
    `no_comma`, `language`. An empty trace fails them all: nothing was followed. Commas in the
    answer do not count. Example: `no_comma: true, max_words: 50` on a trace of 60 words without
    commas scores 0.5.
    """

    def __init__(
        self,
        max_words: int = 0,
        uppercase: bool = False,
        ends_with: str = "",
        is_json: bool = False,
        no_comma: bool = False,
        language: str = "",
    ) -> None:
        if max_words < 0 or (language and language not in _SCRIPTS):
            raise ConfigError("max_words must not be negative and language one of those known")
        chosen = (max_words, uppercase, ends_with, is_json, no_comma, language)
        if not any(chosen):
            raise ConfigError("at least one instruction must be set: max_words, uppercase, ...")
        self._max_words = max_words
        self._uppercase = uppercase
        self._ends_with = ends_with
        self._is_json = is_json
        self._no_comma = no_comma
        self._language = language
        self.example = self._example()

    def _example(self) -> str:
        """A completion that follows all instructions; "" where none of a few tries does."""
        words = sample(self._language or "en")
        for count in (5, 2, 1, 0):
            text = " ".join(words[:count])
            text = text.upper() if self._uppercase else text
            ends = f"{text} {self._ends_with}".strip()
            for trace in (ends, json.dumps(text), f'{{"{text}": {{}}}}', f'["{text}"]'):
                if trace and all(self._checks(trace).values()):
                    return f"<think>\n{trace}\n</think>\n\n{{answer}}"
        return ""

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        return [self._verdict(split_trace(t.text)[0].strip()) for t in group.trajectories]

    def _verdict(self, trace: str) -> Verdict:
        held = self._checks(trace)
        share = sum(held.values()) / len(held) if trace else 0.0
        return Verdict(score=share, breakdown={name: float(ok) for name, ok in held.items()})

    def _checks(self, trace: str) -> dict[str, bool]:
        held: dict[str, bool] = {}
        if self._max_words:
            held["max_words"] = len(trace.split()) <= self._max_words
        if self._uppercase:
            held["uppercase"] = trace.isupper()
        if self._ends_with:
            held["ends_with"] = trace.endswith(self._ends_with)
        if self._is_json:
            held["is_json"] = _is_json(trace)
        if self._no_comma:
            held["no_comma"] = "," not in trace
        if self._language:
            words = _WORD.findall(trace[-MAX_CHARS:])
            held["language"] = bool(words) and language_share(words, self._language) > 0.8
        return held


def split_trace(text: str) -> tuple[str, str]:
    """(reasoning trace, answer): what stands inside and behind `<think>`; ("", text) without."""
    trace, end, answer = text.rpartition("</think>")
    if end:
        return trace.rpartition("<think>")[2], answer
    before, start, trace = text.rpartition("<think>")
    return (trace, "") if start else ("", before or text)


def sample(language: str) -> list[str]:
    """A few words of a language, or one-letter words of its script."""
    if language in _FREQUENT:
        return _FREQUENT[language].split()
    letters = map(chr, range(0x80, 0x10000))
    script = _SCRIPTS[language].split()[0]
    return [next((c for c in letters if c.isalpha() and _script(c) == script), "a")] * MIN_WORDS


def language_share(words: list[str], language: str) -> float:
    """Share of words in the language's script; 0 where another language's words are as frequent."""
    scripts = _SCRIPTS[language].split()
    fitting = [word for word in words if _script(word[0]) in scripts]
    if language in _FREQUENT:
        lower = [word.lower() for word in words]
        counts = {
            name: sum(word in known for word in lower)
            for name, known in ((n, set(text.split())) for n, text in _FREQUENT.items())
        }
        best_other = max(count for name, count in counts.items() if name != language)
        if best_other > counts[language]:
            return 0.0
    return len(fitting) / len(words)


def _script(character: str) -> str:
    return unicodedata.name(character, "?").split()[0]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
