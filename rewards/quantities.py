"""Exact comparison of answers as text: numbers, units, percentages, ratios and words; no algebra.

Invariant: pure, exact (rational numbers, no rounding), linear in the input. "Cannot tell" is a
third value, which `rewards.math_verifier` hands on to a computer algebra system in a worker
process.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from rewards.answers import MAX_ANSWER_CHARS

_ASSIGNMENT = re.compile(r"^[A-Za-z] ?= ?(?=[^=])")

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]?) ?(?:"
    rf"(?:(?P<whole>\d+) ?)?\\frac(?:\{{(?P<top>\d+)\}}\{{(?P<bottom>\d+)\}}|(?P<t>\d)(?P<b>\d))"
    rf"|(?P<mixed>\d+) (?P<num>\d+)/(?P<den>\d+)"
    rf"|(?P<over>{_DIGITS}(?:\.\d+)?) ?/ ?(?P<under>\d+)"
    rf"|(?P<decimal>{_DIGITS}(?:\.\d*)?|\.\d+)"
    rf"(?:[eE](?P<exponent>[-+]?\d{{1,3}})|"
    rf" ?\\(?:times|cdot) ?10 ?\^ ?(?:(?P<ten>\d)|\{{(?P<power>[-+]?\d{{1,3}})\}}))?"
    rf")(?P<unit> ?%| ?[A-Za-z][A-Za-z /]{{0,40}}(?:\^[23])?)?"
)
_SHORT_UNITS = re.compile(r"%|[msglhnjwvkcf]|[ckm]m|[km]g|m[li]|[kmg]b|[ap]m|ft|in|lb|oz|hr|/")
_NOT_UNITS = {"sqrt", "sin", "cos", "tan", "log", "exp", "mod", "and", "for", "not", "lim", "inf"}
_WORD = re.compile(r"\(?([A-Za-z][A-Za-z' -]*)\)?")
_RATIO = re.compile(r"\d+(?: ?: ?\d+)+")

_UNEVALUATED = re.compile(r"[\d)}] ?(?:[-+*]|\\times|\\cdot) ?[\d({\\]")
_KNOWN_NAME = re.compile(r"\\[A-Za-z]+|sqrt|pi|sin|cos|tan|log|ln|exp|[eEiI]")
_VARIABLE = re.compile(r"[A-Za-z:]")
_SEVERAL = re.compile(r"[,;]|\b(?:or|and)\b")


class Quantity(NamedTuple):
    """An exact number and its unit, in lower case without plural s; "" without one."""

    value: Fraction
    unit: str


def parse_quantity(text: str) -> Quantity | None:
    r"""The number that a normalised answer is, or None.

    Example: "1,234.50", "3/4", `\frac34`, "1 1/2", "3e8", `2 \times 10^{3}`, "42%", "5 cm".
    """
    match = _QUANTITY.fullmatch(text) if len(text) <= MAX_ANSWER_CHARS else None
    if match is None:
        return None
    unit = _unit(match["unit"] or "", (match["unit"] or "").startswith(" "))
    value = _value(match)
    if unit is None or value is None:
        return None
    return Quantity(-value if match["sign"] == "-" else value, unit)


def _value(match: re.Match[str]) -> Fraction | None:
    part = match.groupdict()
    if part["decimal"]:
        number = Fraction(part["decimal"].replace(",", ""))
        return number * Fraction(10) ** int(part["exponent"] or part["power"] or part["ten"] or 0)
    whole = int(part["whole"] or part["mixed"] or 0)
    top = part["top"] or part["t"] or part["num"] or part["over"].replace(",", "")
    bottom = int(part["bottom"] or part["b"] or part["den"] or part["under"])
    return whole + Fraction(top) / bottom if bottom else None


def _unit(text: str, is_apart: bool) -> str | None:
    """The unit in its compared form; None where the letters are variables or functions."""
    words = (
        text.lower().replace("^2", " squared").replace("^3", " cubed").replace("/", " / ").split()
    )
    for word in words:
        is_short = len(word) < 3
        if word in _NOT_UNITS or (is_short and not _SHORT_UNITS.fullmatch(word)):
            return None
        if len(word) == 1 and word != "%" and not is_apart:
            return None
    if words in (["percent"], ["pct"]):
        return "%"
    return " ".join(word if len(word) < 4 else word.rstrip("s") for word in words)


def is_same_text(gold: str, answer: str) -> bool:
    """Equal but for blanks."""
    return gold.replace(" ", "") == answer.replace(" ", "")


def compare(gold: str, answer: str) -> bool | None:
    """Whether two normalised answers agree; None where only algebra can tell.

    Numbers compare exactly (1/3 is not 0.333). A unit counts when both have one; a percentage of an
    answer counts as a hundredth unless the gold answer is one. Words and ratios compare as text.
    Where a number is asked for, a list, a variable (x/x is 1), or an unevaluated sum or product
    (the problem repeated) is wrong; powers, roots and fractions go on to algebra.
    """
    if is_same_text(gold, answer):
        return True
    if "=" not in gold:
        answer = _ASSIGNMENT.sub("", answer)
    if "=" not in answer:
        gold = _ASSIGNMENT.sub("", gold)
    numbers = parse_quantity(gold), parse_quantity(answer)
    if numbers[0] and "=" in answer:
        left, _, right = answer.rpartition("=")
        return False if _SEVERAL.search(left) else compare(gold, right.strip())
    if numbers[0] and numbers[1]:
        return _is_same_quantity(numbers[0], numbers[1])
    words = _WORD.fullmatch(gold), _WORD.fullmatch(answer)
    if words[0] and words[1]:
        return words[0][1].strip().casefold() == words[1][1].strip().casefold()
    if (words[0] and numbers[1]) or (words[1] and numbers[0]):
        return False
    if _RATIO.fullmatch(gold) or (numbers[0] and _RATIO.fullmatch(answer)):
        return False
    if numbers[0] and not _is_one_value(answer):
        return False
    return None


def _is_one_value(answer: str) -> bool:
    if _SEVERAL.search(answer) or _UNEVALUATED.search(answer):
        return False
    return not _VARIABLE.search(_KNOWN_NAME.sub("", answer))


def _is_same_quantity(gold: Quantity, answer: Quantity) -> bool:
    if "%" in (gold.unit, answer.unit) and gold.unit != answer.unit:
        if answer.unit == "%":
            return not gold.unit and gold.value == answer.value / 100
        return not answer.unit and answer.value in (gold.value, gold.value / 100)
    is_same_unit = gold.unit == answer.unit or not gold.unit or not answer.unit
    return is_same_unit and gold.value == answer.value
