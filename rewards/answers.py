"""Answers as text: find the final one, give it one spelling, refuse what cannot be checked.

Invariant: pure functions that take time linear in their input, whatever a model wrote, and never
evaluate it. One answer counts, the last; a list where one value is asked for is no answer.
Called by `rewards.math_verifier` and `rewards.gym_taskset`; `rewards.quantities` compares.
"""

import math
import re

TAIL_CHARS = 8192  # an answer is looked for at the end of a completion only
MAX_ANSWER_CHARS = 512
MAX_DIGITS = 64
MAX_DEPTH = 20

_ANSWER_MARK = re.compile(r"answer[ \t]{0,4}(?:is|:|=)[ \t:]{0,4}", re.IGNORECASE)
_NUMBER_AT_END = re.compile(
    r"(?:(?<![\w)])[-+])?(?:\\[dt]?frac\{\d+\}\{\d+\}|\d[\d,]*(?:\.\d+)?(?:/\d+)?|\.\d+)%?"
)
_HEDGE = re.compile(r"[\s$]*(?:[,;/]|or|and|[,;]\s*(?:or|and))[\s$]*")
_NAME = re.compile(r"\s*[A-Za-z](?:\([A-Za-z]\))?\s*")
_LABEL = re.compile(r"^[A-Za-z][A-Za-z ]{0,30}:\s+")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")

_GREEK = (
    ("αβγδεζηθικλμν", "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu"),
    ("ξπρστυφχψωϕϵϑ", "xi pi rho sigma tau upsilon phi chi psi omega phi epsilon theta"),
    ("ΓΔΘΛΞΠΣΦΨΩ∞∅⋅", "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega infty emptyset cdot"),
)
_NAMED = [pair for letters, names in _GREEK for pair in zip(letters, names.split(), strict=True)]
_CHARACTERS = str.maketrans(
    {0xFF01 + i: chr(0x21 + i) for i in range(94)}  # full-width forms
    | {ord(c): "-" for c in "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63"}
    | {ord(c): " " for c in "\u00a0\u2009\u202f\u3000~"}
    | {"\u00d7": r"\times ", "·": r"\cdot ", "÷": "/", "\u2044": "/", "±": r"\pm "}
    | {letter: rf"\{name} " for letter, name in _NAMED}
    | {"≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "\u222a": r"\cup ", "∩": r"\cap ", "∈": r"\in "}
    | {
        "≈": r"\approx ",
        "½": " 1/2",
        "¼": " 1/4",
        "¾": " 3/4",
        "⅓": " 1/3",
        "⅔": " 2/3",
        "°": r"^\circ",
        "√": r"\sqrt ",
    }
    | {"$": ""}
)
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "₀₁₂₃₄₅₆₇₈₉₊₋"
_LEVEL = str.maketrans(_RAISED + _LOWERED, 2 * "0123456789+-")
_RAISED_RUN, _LOWERED_RUN = re.compile(f"[{_RAISED}]+"), re.compile(f"[{_LOWERED}]+")
_NEW_ROW = "\0"  # stands for the double backslash of a matrix, which is no escaped blank
_REWRITES = [
    (re.compile(r"\\(?:left|right|displaystyle|[!()\[\]])(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:[,;: ]|q?quad(?![A-Za-z]))"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\var(?=(?:phi|epsilon|theta|rho|sigma|pi)(?![A-Za-z]))"), r"\\"),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s?\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\^\s?\{?\s?\\circ\s?\}?"), " degrees"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\s+"), " "),
    (re.compile(r"^ ?(?:the )?(?:final )?answer is:? ?", re.IGNORECASE), ""),
    (re.compile(r"^ ?(?:\\approx(?![A-Za-z])|(?:approximately|about|roughly)(?= )) ?"), ""),
    (re.compile(r"\\langle(?![A-Za-z]) ?"), "("),
    (re.compile(r" ?\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\lbrace(?![A-Za-z]) ?"), r"\\{"),
    (re.compile(r" ?\\rbrace(?![A-Za-z])"), r"\\}"),
]
_TOWER = re.compile(r"\^[\s{(]*(\d+)[\s)}]*\^[\s{(]*(\d+)")
_TALL_TOWER = re.compile(r"(?:\^[\s{(]*(?:\d+|[A-Za-z])[\s)}]*){3}")
_BIG_EXPONENT = re.compile(r"\^[\s{(]*[-+]?\d{5,}|[A-Za-z][^()]*\)\s?\^[\s{(]*\d{3,}")
_BIG_FACTORIAL = re.compile(r"\d{5,}\s*!|\^[\s{(]*\d+[\s)}]*!|![\s)}\]]*!")
_LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
_CODE = re.compile(r"__|[`\"#@?]|\\(?:input|write|def|catcode)|[^\x20-\x7e\s]")


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds; None without one or where its braces do not close."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len(r"\boxed"), len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + len(r"\boxed{") : i].strip()
    return None


def all_boxes(text: str) -> list[str]:
    r"""What each of the last 32 `\boxed{...}` holds, in order, inner boxes within outer ones."""
    boxes, rest = list[str](), text
    while len(boxes) < 32 and (start := rest.rfind(r"\boxed{")) >= 0:
        found = last_box(rest)
        boxes += [found] if found else []
        rest = rest[:start]
    return boxes[::-1]


def last_tag(text: str) -> str | None:
    """What the last `<answer>...</answer>` holds, or None."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def last_line(text: str) -> str:
    """The last line that is not blank, or ""."""
    return text.rstrip().rpartition("\n")[2].strip()


def after_thinking(text: str) -> str:
    """What follows `</think>`; "" where the thinking did not end, all of a text without any."""
    _, end, rest = text.rpartition("</think>")
    return "" if not end and "<think>" in text else rest


def final_part(text: str) -> str:
    """What follows the thinking, at most the last `TAIL_CHARS` characters."""
    return after_thinking(text)[-TAIL_CHARS:]


def extract_answer(text: str, require_boxed: bool) -> str | None:
    r"""The final answer of a completion, or None.

    In this order: the last `\boxed{}`; unless that is required also the last `<answer>` tag, what
    follows `####` or "answer is", a text that is nothing but an answer, and the last number.

    Example: `extract_answer("2 + 5 = 7, so 7.", False)` is "7"; "It is 3, 5, or 7." ends
    in a list, so None.
    """
    tail = final_part(text)
    if r"\boxed" in tail or require_boxed:
        return last_box(tail) or None
    return last_tag(tail) or _marked(tail) or _bare(tail) or _last_number(tail)


def _marked(tail: str) -> str | None:
    _, mark, rest = tail.rpartition("####")
    if mark:
        return rest.strip().partition("\n")[0].strip() or None
    marks = list(_ANSWER_MARK.finditer(tail))
    if not marks:
        return None
    line, _, after = tail[marks[-1].end() :].partition("\n")
    sentence, _, more = line.partition(". ")
    if any(c.isdigit() for c in more + after):
        return None  # it went on to other numbers: the last of them counts
    return sentence.strip().rstrip(".").strip("*") or None


def _bare(tail: str) -> str | None:
    answer = _LABEL.sub("", tail.strip())
    if not answer or len(answer) > 64 or "\n" in answer:
        return None
    left, equals, right = answer.rpartition("=")
    if len(_PROSE.findall(answer)) > (0 if equals else 1):
        return None
    return answer if _NAME.fullmatch(left) else right.strip()


def _last_number(tail: str) -> str | None:
    previous_end, last = -1, None
    for match in _NUMBER_AT_END.finditer(tail):
        previous_end, last = (last.end() if last else -1), match
    if last is None:
        return None
    is_list = previous_end >= 0 and _HEDGE.fullmatch(tail, previous_end, last.start())
    return None if is_list else last.group().rstrip(",")


def normalise(answer: str) -> str:
    r"""One spelling for what is written in many ways.

    Example: `normalise(r"$\dfrac{1}{2}\text{ cm}$.")` is `r"\frac{1}{2} cm"`.
    """
    text = _RAISED_RUN.sub(lambda m: _level("^", m[0]), answer.replace(r"\$", ""))
    text = _LOWERED_RUN.sub(lambda m: _level("_", m[0]), text)
    text = text.translate(_CHARACTERS).strip().strip("*")
    text = text.replace("\\\\", _NEW_ROW)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".").strip().replace(_NEW_ROW, "\\\\")


def _level(sign: str, run: str) -> str:
    digits = run.translate(_LEVEL)
    return f"{sign}{digits}" if len(digits) == 1 else f"{sign}{{{digits}}}"


def why_uncheckable(answer: str) -> str:
    """Why a normalised answer of the model is refused, or "" where it can be checked.

    Over-long answers, towers of exponents, huge factorials, deep nesting and code are wrong answers
    by rule, so that nobody has to compute them. The gold answer itself is never asked about.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return f"longer than {MAX_ANSWER_CHARS} characters"
    text = answer.replace("**", "^")
    if _LONG_NUMBER.search(text):
        return f"a number of more than {MAX_DIGITS} digits"
    if _is_tower(text):
        return "an exponent out of range"
    if _BIG_FACTORIAL.search(text):
        return "a factorial out of range"
    if _depth(text) > MAX_DEPTH:
        return f"brackets nested more than {MAX_DEPTH} deep"
    return "characters that are no mathematics" if _CODE.search(text.replace(r"\\", "")) else ""


def _is_tower(text: str) -> bool:
    if _TALL_TOWER.search(text) or _BIG_EXPONENT.search(text):
        return True
    exponents = [(int(m[1][:9]), int(m[2][:9])) for m in _TOWER.finditer(text)]
    return any(exponent * math.log10(max(base, 1)) > 4 for base, exponent in exponents)


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest
