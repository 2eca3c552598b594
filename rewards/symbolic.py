"""Equality of two answers by computer algebra: math-verify, which reads LaTeX and asks sympy.

Invariant: runs in an isolated worker only, because a short text can keep sympy busy for hours and
no timeout of the library works outside a main thread. Called by `rewards.math_verifier` by its
path.
"""

import importlib
import logging
import re
from functools import lru_cache
from typing import Any

_VECTOR = re.compile(r"\\begin\{([pbv]?matrix)\}([^&]*?)\\end\{\1\}")
_PLAIN_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt ?\(([^()]*)\)")
_PLAIN_NAME = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|log|ln|exp)(?![A-Za-z])")

_library: Any = importlib.import_module("math_verify")
_config = _library.LatexExtractionConfig(boxed_match_priority=0)
logging.getLogger("math_verify").setLevel(logging.ERROR)


def is_equal(gold: str, answer: str) -> bool:
    """Whether two normalised answers are equal, decimals to six digits; they do not swap roles.

    Raises `ValueError` when the gold answer cannot be parsed: then nothing can be checked.
    """
    parsed_gold = _parse_gold(gold)
    if not parsed_gold:
        raise ValueError(f"the reference {gold!r} is no expression that can be compared")
    parsed = _parse(answer)
    return bool(parsed) and _library.verify(
        parsed_gold, parsed, allow_set_relation_comp=True, timeout_seconds=None
    )


@lru_cache(maxsize=1024)
def _parse_gold(gold: str) -> list[Any]:
    return _parse(gold)


def _parse(text: str) -> list[Any]:
    """Sympy expressions; a vector is read as a tuple, plain `sqrt(x)` and `pi` as LaTeX."""
    latex = _VECTOR.sub(lambda m: "(" + m[2].replace(r"\\", ",") + ")", text.replace("**", "^"))
    latex = _PLAIN_NAME.sub(r"\\\1 ", _PLAIN_ROOT.sub(r"\\sqrt{\1}", latex))
    parsed = _library.parse(rf"$\boxed{{{latex}}}$", [_config], "no_fallback", parsing_timeout=None)
    return [expression for expression in parsed if not isinstance(expression, str)]


is_equal("x^2 + 1", "1 + x^2")  # builds the parser's tables before a clock runs
