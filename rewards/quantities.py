"""Exact comparison of single values as text: numbers, units, percentages, ratios, bases and words.

Invariant: pure, exact (rational numbers, no rounding), linear in the input. "Cannot tell" is a
third value, which `rewards.math_verifier` hands on to a computer algebra system in a worker
process.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from rewards.answers import MAX_ANSWER_CHARS
from rewards.math_policy import DEFAULT, MathPolicy
from rewards.units import parse_unit

_ASSIGNMENT = re.compile(r"^[A-Za-z] ?= ?(?=[^= ])")

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
_SHORT_UNITS = re.compile(
    r"%|[msglhnjwvkcf]|[ckm]m|[km]g|m[li]|[kmg]b|[ap]m|ms|ft|yd|in|lb|oz|hr|/"
)
_NOT_UNITS = {"sqrt", "sin", "cos", "tan", "log", "exp", "mod", "and", "for", "not", "lim", "inf"}
_WORD = re.compile(r"\(?([A-Za-z][A-Za-z' -]*)\)?")
_RATIO = re.compile(r"\d+(?: ?: ?\d+)+")
_TWO_TERMS = re.compile(r"(\d+) ?: ?(\d+)")
_BASED = re.compile(r"\(?([0-9A-Z]{1,64})\)? ?_ ?(?:\{ ?(\w+) ?\}|(\d\d?))")
_BASE_NAMES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
               "nine": 9, "ten": 10, "twelve": 12, "sixteen": 16}  # fmt: skip

_UNEVALUATED = re.compile(r"[\d)}] ?(?:[-+*]|\\times|\\cdot) ?[\d({\\]")
_KNOWN_NAME = re.compile(r"\\[A-Za-z]+|sqrt|pi|sin|cos|tan|log|ln|exp|[eEiI]")
_VARIABLE = re.compile(r"[A-Za-z:]")
_GROUPED = re.compile(r"(?<![\d.] )(?<![\d.])\d{1,3}(?: \d{3})+(?! ?[\d/])")
_BLANK = re.compile(r"(?<!\d) | (?!\d)")
_DIGITS_APART = re.compile(r"[-+]? ?[\d.,]+(?: [\d.,]+)+")
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
    """Equal but for blanks; one between digits counts, unless it groups thousands.

    Example: "x + 1" is "x+1" and "1 234" is "1234", but "7 7" is not "77".
    """
    return _BLANK.sub("", _closed(gold)) == _BLANK.sub("", _closed(answer))


def _closed(text: str) -> str:
    """With groups of thousands put together."""
    return _GROUPED.sub(lambda m: m[0].replace(" ", ""), text)


def compare(gold: str, answer: str, policy: MathPolicy = DEFAULT) -> bool | None:
    """Whether two normalised answers agree; None where only algebra can tell.

    Numbers compare exactly (1/3 is not 0.333) unless the policy has a tolerance. Words compare as
    text without case. Where a number is asked for, a list, a variable (x/x is 1), or an unevaluated
    sum or product (the problem repeated) is wrong; powers, roots and fractions go on to algebra.
    """
    gold, answer = _closed(gold), _closed(answer)
    if is_same_text(gold, answer):
        return True
    if "=" not in gold:
        answer = _assigned(answer)
        if _ASSIGNMENT.match(answer):
            return False
    if "=" not in answer:
        gold = _assigned(gold)
    special = _compare_bases(gold, answer, policy)
    if special is None:
        special = _compare_ratios(gold, answer, policy)
    if special is not None:
        return special
    numbers = parse_quantity(gold), parse_quantity(answer)
    if numbers[0] and "=" in answer:
        left, _, right = answer.rpartition("=")
        return False if _SEVERAL.search(left) else compare(gold, right.strip(), policy)
    if numbers[0] and numbers[1]:
        return _is_same_quantity(numbers[0], numbers[1], policy)
    words = _WORD.fullmatch(gold), _WORD.fullmatch(answer)
    if words[0] and words[1]:
        return words[0][1].strip().casefold() == words[1][1].strip().casefold()
    if (words[0] and numbers[1]) or (words[1] and numbers[0]):
        return False
    if numbers[0] and not _is_one_value(answer):
        return False
    return None


def _assigned(text: str) -> str:
    """What a letter is set to; an equation in that letter (x = x + 1) stays as it is."""
    value = _ASSIGNMENT.sub("", text)
    if value == text:
        return text
    return text if text[:1] in _KNOWN_NAME.sub("", value) else value


def _compare_bases(gold: str, answer: str, policy: MathPolicy) -> bool | None:
    """Numbers written in a base, such as `1010_2`; None where neither is."""
    parsed = _based(gold), _based(answer)
    if parsed == (None, None):
        return None
    if policy.bases == "value":
        values = [
            _value_in_base(*(b or (t, 10))) for b, t in zip(parsed, (gold, answer), strict=True)
        ]
        return values[0] is not None and values[0] == values[1]
    if parsed[0] and parsed[1]:
        return parsed[0] == parsed[1]
    if parsed[0]:
        return parsed[0][0] == answer
    return parsed[1] == (gold, 10)


def _based(text: str) -> tuple[str, int] | None:
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    name = match[2] or match[3]
    base = int(name) if name.isdecimal() else _BASE_NAMES.get(name.lower(), 0)
    return (match[1], base) if 2 <= base <= 36 else None


def _value_in_base(digits: str, base: int) -> int | None:
    try:
        return int(digits, base)
    except ValueError:
        return None


def _compare_ratios(gold: str, answer: str, policy: MathPolicy) -> bool | None:
    is_ratio = bool(_RATIO.fullmatch(gold)), bool(_RATIO.fullmatch(answer))
    if policy.ratios == "value":
        values = _as_fraction(gold), _as_fraction(answer)
        return values[0] == values[1] if any(is_ratio) and None not in values else None
    return False if is_ratio[0] or (is_ratio[1] and parse_quantity(gold)) else None


def _as_fraction(text: str) -> Fraction | None:
    terms = _TWO_TERMS.fullmatch(text)
    if terms is None:
        quantity = parse_quantity(text)
        return quantity.value if quantity else None
    return Fraction(int(terms[1]), int(terms[2])) if int(terms[2]) else None


def _is_one_value(answer: str) -> bool:
    if _SEVERAL.search(answer) or _UNEVALUATED.search(answer) or _DIGITS_APART.fullmatch(answer):
        return False
    return not _VARIABLE.search(_KNOWN_NAME.sub("", answer))


def _is_same_quantity(gold: Quantity, answer: Quantity, policy: MathPolicy) -> bool:
    if "%" in (gold.unit, answer.unit) and gold.unit != answer.unit:
        return _is_same_percentage(gold, answer, policy)
    if not gold.unit or not answer.unit or policy.units == "ignore":
        is_missing = policy.units == "require" and bool(gold.unit)
        return not is_missing and is_close(gold.value, answer.value, policy.tolerance)
    units = parse_unit(gold.unit), parse_unit(answer.unit)
    scaled = gold.value * units[0].factor, answer.value * units[1].factor
    return units[0].dimensions == units[1].dimensions and is_close(*scaled, policy.tolerance)


def _is_same_percentage(gold: Quantity, answer: Quantity, policy: MathPolicy) -> bool:
    """One of the two has a percent sign."""
    units = {gold.unit, answer.unit} - {"%"}
    if units != {""}:
        return False
    if policy.percent == "ignore":
        return is_close(gold.value, answer.value, policy.tolerance)
    if gold.unit == "%":
        accepted = [gold.value, gold.value / 100]
        return any(is_close(value, answer.value, policy.tolerance) for value in accepted)
    if policy.percent == "strict" and gold.value.denominator == 1:
        return False
    return is_close(gold.value, answer.value / 100, policy.tolerance)


def is_close(gold: Fraction, value: Fraction, tolerance: float) -> bool:
    """Equal up to a relative error, exactly where `tolerance` is 0."""
    return abs(gold - value) <= abs(gold) * Fraction(tolerance)
