"""Answers made of several values: lists, sets, tuples, intervals, unions, matrices, plus-or-minus.

Invariant: pure and bounded by `MAX_PARTS`; brackets mean what they say ([1, 2] is not (1, 2)), the
order of a set or list means nothing, that of a tuple or matrix everything. Parts are compared by a
function of the caller, whose "cannot tell" (None) makes the whole one. Called by
`rewards.math_verifier` (text only) and, with algebra, by `rewards.symbolic`.
"""

import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from rewards.math_policy import MathPolicy

MAX_PARTS = 64
Compare = Callable[[str, str], bool | None]
Kind = Literal["list", "set", "tuple", "bracket", "interval", "union", "matrix"]

_OPEN, _CLOSE = "([{", ")]}"
_SEPARATOR = re.compile(r"[,;]|(?<= )(?:or|and)(?= )")
_AND = re.compile(r"(?:or|and)\s+")
_ASSIGNED = re.compile(r"([A-Za-z]) ?= ?(?=[^=])")
_MEMBER = re.compile(r"[A-Za-z] ?\\in(?![A-Za-z]) ?")
_MATRIX = re.compile(r"\\begin ?\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end ?\{\1\}", re.S)
_RELATION = re.compile(r"\\(?:leq?|geq?)(?:slant)?(?![A-Za-z])|<=|>=|\\[lg]t(?![A-Za-z])|[<>]")
_VARIABLE = re.compile(r"[A-Za-z]")
_CONSTANT = re.compile(r"\\[A-Za-z]+|e|pi|sqrt|oo")
_EMPTY = {r"\emptyset", r"\varnothing", r"\{\}", r"\{ \}", "{}"}
_REALS = {r"\mathbb{R}", r"\mathbb R", r"\R", r"\Reals"}
_INFINITY = re.compile(r"([-+]?) ?(?:\\infty|oo|inf|infinity)(?![A-Za-z])", re.IGNORECASE)


class Structure(NamedTuple):
    """`parts` are texts or structures; an interval's `edges` are its two brackets, a matrix's parts
    are its rows.
    """

    kind: Kind
    parts: tuple["str | Structure", ...]
    edges: str = ""


def agree(
    gold: str, answer: str, by_text: Compare, policy: MathPolicy, by_algebra: Compare | None = None
) -> bool | None:
    """Whether two normalised answers are equal as a whole; None where nobody can tell.

    Single values are compared by text, then by algebra. Example: with numbers compared exactly,
    "1, 2" agrees with `\\{2, 1\\}`, (1, 2) not with (2, 1) and x > 3 with `(3, \\infty)`.
    """

    def compare(gold: str, answer: str) -> bool | None:
        decided = by_text(gold, answer)
        return by_algebra(gold, answer) if decided is None and by_algebra else decided

    decided = by_text(gold, answer)
    if decided is not None:
        return decided
    return _same(parse(gold, policy), parse(answer, policy), compare, policy)


def parse(text: str, policy: MathPolicy) -> "str | Structure":
    """The structure that a normalised text writes, or the text itself where it is one value."""
    text = _MEMBER.sub("", text.strip(), count=1).strip()
    if text in _EMPTY:
        return Structure("set", ())
    if text in _REALS:
        return Structure("interval", (r"-\infty", r"\infty"), "()")
    unions = _split(text, re.compile(r"\\cup(?![A-Za-z])"))
    if len(unions) > 1:
        return Structure("union", tuple(parse(part, policy) for part in unions))
    parts = _split(text, _SEPARATOR)
    if len(parts) > 1:
        found = _list([_AND.sub("", part, count=1) for part in parts], policy)
        return text if found.kind == "union" and " and " in text else found  # an intersection
    return _enclosed(text, policy) or _inequality(text, policy) or _plus_minus(text, policy) or text


def _list(texts: list[str], policy: MathPolicy) -> Structure:
    """Several answers side by side; where all assign to one variable, its values."""
    names = {match[1] if (match := _ASSIGNED.match(text)) else "" for text in texts}
    if len(names) == 1 or names == {"", max(names)}:
        texts = [_ASSIGNED.sub("", text, count=1) for text in texts]
    parts = [parse(text, policy) for text in texts]
    if any(isinstance(part, Structure) and part.kind in ("interval", "union") for part in parts):
        return Structure("union", tuple(parts))
    return Structure("list", tuple(_flat(parts)))


def _flat(parts: list["str | Structure"]) -> Iterator["str | Structure"]:
    for part in parts:
        if isinstance(part, Structure) and part.kind == "list":
            yield from part.parts
        else:
            yield part


def _enclosed(text: str, policy: MathPolicy) -> Structure | None:
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row.split("&") for row in matrix[2].strip().rstrip("\\").split(r"\\")]
        cells = [Structure("tuple", tuple(cell.strip() for cell in row)) for row in rows]
        return Structure("matrix", tuple(cells))
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inner = text[2:-2]
        kind: Kind = "set"
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and _is_one_bracket(text):
        inner, kind = text[1:-1], "bracket"
    else:
        return None
    parts = _split(inner, re.compile(r"[,;]"))
    if len(parts) < 2 and kind == "bracket":
        return _enclosed(inner, policy) if _MATRIX.fullmatch(inner) else None
    members = tuple(parse(part, policy) for part in parts if part)
    if kind != "bracket":
        return Structure(kind, members)
    edges = text[0] + text[-1]
    return Structure("tuple" if len(parts) > 2 else "bracket", members, edges)


def _is_one_bracket(text: str) -> bool:
    """The first bracket closes at the very end, as in (1, 2) but not in (1)(2)."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return i == len(text) - 1
    return False


def _inequality(text: str, policy: MathPolicy) -> Structure | None:
    r"""The interval that `1 < x \leq 2` or `x > 1` describes; one letter is the variable."""
    if policy.inequalities == "as_written":
        return None
    signs = [_sign(sign) for sign in _RELATION.findall(text)]
    terms = [term.strip() for term in _RELATION.split(text)]
    if len(terms) not in (2, 3) or not all(terms):
        return None
    if len(terms) == 3:
        left, name, right = terms
        if signs[0][0] != signs[1][0]:
            return None
        if signs[0][0] == ">":
            left, right, signs = right, left, signs[::-1]
        low, high = left, right
        edges = ("[" if signs[0][1:] else "(") + ("]" if signs[1][1:] else ")")
    else:
        is_flipped = not _VARIABLE.fullmatch(terms[0])
        name, bound = terms[::-1] if is_flipped else terms
        is_below = (signs[0][0] == "<") != is_flipped
        low, high = (r"-\infty", bound) if is_below else (bound, r"\infty")
        near = ("[]" if signs[0][1:] else "()")[is_below]
        edges = "(" + near if is_below else near + ")"
    if not _VARIABLE.fullmatch(name) or _VARIABLE.search(_CONSTANT.sub("", low + high)):
        return None
    return Structure("interval", (low, high), edges)


def _sign(relation: str) -> str:
    is_less = relation[0] == "<" or relation[1:2] == "l"
    return ("<" if is_less else ">") + ("=" if "e" in relation or "=" in relation else "")


def _plus_minus(text: str, policy: MathPolicy) -> Structure | None:
    before, mark, after = text.partition(r"\pm")
    if not mark or r"\pm" in after or (after and after[0].isalpha()):
        return None
    before = _ASSIGNED.sub("", before, count=1).strip()
    return Structure("list", (f"{before} + {after}" if before else after, f"{before} - {after}"))


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts of a text at separators outside all brackets."""
    parts, start, depth, position = list[str](), 0, 0, 0
    marks = {match.start(): match.end() for match in separator.finditer(text)}
    while position < len(text) and len(parts) < MAX_PARTS:
        character = text[position]
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0 and position in marks:
            parts.append(text[start:position].strip())
            start = position = marks[position]
        else:
            position += 1
    parts.append(text[start:].strip())
    kept = [part for part in parts if part]
    return kept if len(kept) > 1 else [text.strip()]


def _same(
    gold: "str | Structure", answer: "str | Structure", compare: Compare, policy: MathPolicy
) -> bool | None:
    if isinstance(gold, str) and isinstance(answer, str):
        return _same_text(gold, answer, compare)
    if isinstance(gold, str) or isinstance(answer, str):
        return _single(gold, answer, compare, policy)
    pair = _as_compared(gold, answer, policy)
    if pair is None:
        return False
    gold, answer = pair
    if gold.edges != answer.edges and {gold.kind, answer.kind} & {"interval", "bracket"}:
        return False
    if gold.kind in ("list", "set", "union") and answer.kind in ("list", "set", "union"):
        return _same_members(gold.parts, answer.parts, compare, policy)
    if len(gold.parts) != len(answer.parts):
        return False
    return _all(_same(g, a, compare, policy) for g, a in zip(gold.parts, answer.parts, strict=True))


def _same_text(gold: str, answer: str, compare: Compare) -> bool | None:
    infinite = _INFINITY.fullmatch(gold), _INFINITY.fullmatch(answer)
    if infinite[0] or infinite[1]:
        signs = [match and match[1].replace("+", "") for match in infinite]
        return signs[0] == signs[1]
    return True if gold.replace(" ", "") == answer.replace(" ", "") else compare(gold, answer)


def _single(
    gold: "str | Structure", answer: "str | Structure", compare: Compare, policy: MathPolicy
) -> bool | None:
    """One value against a structure: equal to a set or list of that one value only."""
    structure = answer if isinstance(gold, str) else gold
    assert isinstance(structure, Structure)
    if structure.kind in ("list", "set", "union") and len(structure.parts) == 1:
        (part,) = structure.parts
        return _same(gold, part, compare, policy) if isinstance(gold, str) else _same(
            part, answer, compare, policy
        )  # fmt: skip
    return None if structure.kind in ("interval", "union") else False


def _as_compared(
    gold: Structure, answer: Structure, policy: MathPolicy
) -> tuple[Structure, Structure] | None:
    """Both in the one reading that makes them comparable; None where there is none."""
    if gold.kind == answer.kind:
        return gold, answer
    kinds = (gold.kind, answer.kind)
    if {*kinds} <= {"list", "set", "union"}:
        return gold, answer
    if {*kinds} == {"bracket", "interval"}:
        pair = gold if gold.kind == "bracket" else answer
        is_point = pair.edges == "()" and r"\infty" not in "".join(map(str, pair.parts))
        return None if is_point and policy.pairs == "tuple" else (gold, answer)
    if {*kinds} == {"bracket", "list"} and "[]" in (gold.edges, answer.edges):
        return gold._replace(kind="list", edges=""), answer._replace(kind="list", edges="")
    rows = [_as_row(side, policy) for side in (gold, answer)]
    if rows[0] is None or rows[1] is None or {*kinds} == {"matrix", "list"}:
        return None
    return rows[0], rows[1]


def _as_row(side: Structure, policy: MathPolicy) -> Structure | None:
    """A tuple, a vector, a pair in round brackets or a bare list, as a row of values."""
    if side.kind in ("tuple", "list"):
        return Structure("tuple", side.parts)
    if side.kind == "bracket" and side.edges == "()" and policy.pairs != "interval":
        return Structure("tuple", side.parts)
    if side.kind == "matrix":
        rows = [row for row in side.parts if isinstance(row, Structure)]
        if len(rows) == 1:
            return rows[0]
        if all(len(row.parts) == 1 for row in rows):
            return Structure("tuple", tuple(row.parts[0] for row in rows))
    return None


def _same_members(
    gold: tuple["str | Structure", ...], answer: tuple["str | Structure", ...],
    compare: Compare, policy: MathPolicy,
) -> bool | None:  # fmt: skip
    """Each member of one among the members of the other, however often and in any order."""
    results = [[_same(g, a, compare, policy) for a in answer] for g in gold]
    columns = [[row[i] for row in results] for i in range(len(answer))]
    return _all(_any(members) for members in (*results, *columns))


def _any(results: list[bool | None]) -> bool | None:
    return True if True in results else None if None in results else False


def _all(results: Iterator[bool | None]) -> bool | None:
    known = list(results)
    return False if False in known else None if None in known else True
