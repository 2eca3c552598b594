"""What crosses the process border for a reasoning_gym item, and which answers may be evaluated.

Invariant: `decode_entry(encode_entry(...))` gives the item back, tuples included. A scorer that
evaluates answers gets plain arithmetic and calculus only. Called by `rewards.gym_taskset` and
`rewards.gym_scorer`; imports nothing of the library.
"""

import json
import re
from typing import Any, NamedTuple, cast

from rewards.answers import normalise, why_uncheckable

EVALUATED = {  # their scorers hand the answer to sympy's parse_expr, which evaluates it as Python
    "countdown",
    "puzzle24",
    "simple_integration",
    "intermediate_integration",
    "polynomial_multiplication",
}
_FUNCTION = re.compile(r"[A-Za-z]|a?(?:sin|cos|tan)h?|exp|log|sqrt|pi")
_EXPRESSION = re.compile(r"[A-Za-z0-9+\-*/^()., \t]*")
_ATTRIBUTE = re.compile(r"\.\s*[A-Za-z]")
_TUPLE = "__tuple__"


class GymEntry(NamedTuple):
    dataset: str
    config: dict[str, Any]
    item: dict[str, Any]


def encode_entry(entry: GymEntry) -> str:
    """JSON text for `Task.entry`; a number that JSON does not know (a Fraction) becomes text."""
    return json.dumps([entry.dataset, entry.config, _mark_tuples(entry.item)], default=str)


def decode_entry(text: str) -> GymEntry:
    return GymEntry(*json.loads(text, object_hook=_restore))


def is_plain_expression(text: str) -> bool:
    """Numbers, operators, one-letter names and a few functions: nothing that could do harm.

    Example: "4*8 - 6 - 2" and "x*sin(x) + C" are, "Integral(f, x)" and "9**9**9" are not.
    """
    if not _EXPRESSION.fullmatch(text) or _ATTRIBUTE.search(text):
        return False
    names = re.findall(r"[A-Za-z]+", text)
    return all(map(_FUNCTION.fullmatch, names)) and not why_uncheckable(normalise(text))


def _mark_tuples(value: object) -> object:
    if isinstance(value, dict):
        items = cast("dict[str, object]", value).items()
        return {key: _mark_tuples(child) for key, child in items}
    if isinstance(value, (list, tuple)):
        children = [_mark_tuples(child) for child in cast("list[object]", value)]
        return {_TUPLE: children} if isinstance(value, tuple) else children
    return value


def _restore(value: dict[str, Any]) -> Any:
    return tuple(value[_TUPLE]) if set(value) == {_TUPLE} else value
