"""Units of measurement as exact factors, so that 5 cm equals 50 mm and 36 km/h equals 10 m/s.

Invariant: pure and exact. A word that is no known unit (apples) is a dimension of its own. Called
by `rewards.quantities`.
"""

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

_LITRE, _INCH, _POUND = Fraction(1, 1000), Fraction(254, 10000), Fraction(45359237, 100000000)
_BASE: dict[str, tuple[str, Fraction, str]] = {
    # name: (dimension, factor, other spellings)
    "m": ("length", Fraction(1), "meter metre"),
    "km": ("length", Fraction(1000), "kilometer kilometre"),
    "cm": ("length", Fraction(1, 100), "centimeter centimetre"),
    "mm": ("length", Fraction(1, 1000), "millimeter millimetre"),
    "in": ("length", _INCH, "inch inche"),
    "ft": ("length", 12 * _INCH, "foot feet"),
    "yd": ("length", 36 * _INCH, "yard"),
    "mi": ("length", 63360 * _INCH, "mile"),
    "g": ("mass", Fraction(1, 1000), "gram gramme"),
    "kg": ("mass", Fraction(1), "kilogram"),
    "mg": ("mass", Fraction(1, 1000000), "milligram"),
    "lb": ("mass", _POUND, "lbs pound"),
    "oz": ("mass", _POUND / 16, "ounce"),
    "s": ("time", Fraction(1), "sec second"),
    "ms": ("time", Fraction(1, 1000), "millisecond"),
    "min": ("time", Fraction(60), "minute"),
    "h": ("time", Fraction(3600), "hr hrs hour"),
    "day": ("time", Fraction(86400), ""),
    "week": ("time", Fraction(604800), ""),
    "l": ("volume", _LITRE, "liter litre"),
    "ml": ("volume", _LITRE / 1000, "milliliter millilitre"),
    "cent": ("money", Fraction(1, 100), "penny pennie"),
    "dollar": ("money", Fraction(1), "usd buck"),
    "degree": ("angle", Fraction(1), "deg"),
    "%": ("percent", Fraction(1), ""),
}
_KNOWN = {word: (dim, f) for key, (dim, f, more) in _BASE.items() for word in (key, *more.split())}
_WORD = re.compile(r"(per|/)|(square |cubic )?([A-Za-z%]+)(?: ?\^? ?(2|3|squared|cubed)(?!\w))?")
_POWERS = {"2": 2, "squared": 2, "square ": 2, "3": 3, "cubed": 3, "cubic ": 3}
_SHORTHAND = {"mph": "mile / hour", "kph": "km / h", "kmh": "km / h", "kmph": "km / h"}


class Unit(NamedTuple):
    """`dimensions` with their powers, and how many SI units one of it is."""

    dimensions: frozenset[tuple[str, int]]
    factor: Fraction


@lru_cache(maxsize=4096)
def parse_unit(text: str) -> Unit:
    """The unit that lower-case words without plural s stand for.

    Example: "km / h" has the dimensions length 1 and time -1 and the factor 5/18.
    """
    dimensions, factor, sign = Counter[str](), Fraction(1), 1
    for match in _WORD.finditer(_SHORTHAND.get(text, text)):
        if match[1]:
            sign = -1
            continue
        power = sign * _POWERS.get(match[2] or match[4] or "", 1)
        word = match[3] if match[3] in _KNOWN else match[3].rstrip("s")
        dimension, scale = _KNOWN.get(word, (word, Fraction(1)))
        if dimension == "volume":
            dimensions["length"] += 3 * power
        else:
            dimensions[dimension] += power
        factor *= scale**power
    return Unit(frozenset((d, p) for d, p in dimensions.items() if p), factor)
