"""Equality of two answers by computer algebra: math-verify, which reads LaTeX and asks sympy.

Invariant: runs in an isolated worker only, because a short text can keep sympy busy for hours and
no timeout of the library works outside a main thread. Called by `rewards.math_verifier` by its
path.
"""

import importlib
import logging
import re
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any

import msgspec

from rewards.math_policy import DEFAULT, MathPolicy
from rewards.quantities import compare, is_close
from rewards.structures import agree

_VECTOR = re.compile(r"\\begin\{([pbv]?matrix)\}([^&]*?)\\end\{\1\}")
_PLAIN_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt ?\(([^()]*)\)")
_PLAIN_NAME = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|log|ln|exp)(?![A-Za-z])")
_FREE_CONSTANT = re.compile(r"([-+]) ?(?:\\text ?)?([A-Za-z])(?:_\{?\d\}?)?$")
_NAME = re.compile(r"\\[A-Za-z]+|sqrt|pi|sin|cos|tan|log|ln|exp")
DIGITS = 15

_library: Any = importlib.import_module("math_verify")
_sympy: Any = importlib.import_module("sympy")
_config = _library.LatexExtractionConfig(boxed_match_priority=0)
logging.getLogger("math_verify").setLevel(logging.ERROR)


def is_equal(gold: str, answer: str, policy: dict[str, Any] | None = None) -> bool:
    """Whether two normalised answers are equal; they do not swap roles.

    `policy` is a `MathPolicy` as plain data. Raises `ValueError` when the gold answer cannot be
    parsed: then nothing can be checked.
    """
    chosen = msgspec.convert(policy, MathPolicy) if policy else DEFAULT
    by_text, by_algebra = partial(compare, policy=chosen), partial(_is_equal, policy=chosen)
    decided = agree(gold, answer, by_text, chosen, by_algebra)
    return by_algebra(gold, answer) if decided is None else decided


def _is_equal(gold: str, answer: str, policy: MathPolicy) -> bool:
    if policy.constants == "any" and re.search(r"\+ ?C$", gold):
        gold, answer = _with_constant(gold), _with_constant(answer)
    parsed_gold = _parse_gold(gold, policy.imaginary)
    if not parsed_gold:
        raise ValueError(f"the reference {gold!r} is no expression that can be compared")
    parsed = _parse(answer, policy.imaginary)
    if not parsed:
        return False
    if _library.verify(
        parsed_gold, parsed, allow_set_relation_comp=policy.inequalities == "sets",
        timeout_seconds=None,
    ):  # fmt: skip
        return True
    return policy.tolerance > 0 and _is_near(parsed_gold[0], parsed[0], policy.tolerance)


def _with_constant(text: str) -> str:
    """The last term as `C` where it is a letter that occurs nowhere else."""
    found = _FREE_CONSTANT.search(text)
    if found is None or found[2] in _NAME.sub("", text[: found.start()]):
        return text
    return f"{text[: found.start()]}{found[1]} C"


def _is_near(gold: Any, answer: Any, tolerance: float) -> bool:
    values = [_sympy.N(side, DIGITS) for side in (gold, answer)]
    if not all(getattr(value, "is_Float", False) for value in values):
        return False
    exact = [Fraction(str(value)) for value in values]
    return is_close(exact[0], exact[1], tolerance)


@lru_cache(maxsize=1024)
def _parse_gold(gold: str, has_imaginary: bool) -> list[Any]:
    return _parse(gold, has_imaginary)


def _parse(text: str, has_imaginary: bool) -> list[Any]:
    """Sympy expressions; a vector is read as a tuple, plain `sqrt(x)` and `pi` as LaTeX."""
    latex = _VECTOR.sub(lambda m: "(" + m[2].replace(r"\\", ",") + ")", text.replace("**", "^"))
    latex = _PLAIN_NAME.sub(r"\\\1 ", _PLAIN_ROOT.sub(r"\\sqrt{\1}", latex))
    parsed = _library.parse(rf"$\boxed{{{latex}}}$", [_config], "no_fallback", parsing_timeout=None)
    found = [expression for expression in parsed if not isinstance(expression, str)]
    if has_imaginary and re.search(r"(?<![A-Za-z\\])i(?![A-Za-z])", latex):
        return [_with_imaginary(expression) for expression in found]
    return found


def _with_imaginary(expression: Any) -> Any:
    letters = [s for s in getattr(expression, "free_symbols", ()) if s.name == "i"]
    return expression.subs(dict.fromkeys(letters, _sympy.I))


is_equal("x^2 + 1", "1 + x^2")  # builds the parser's tables before a clock runs
