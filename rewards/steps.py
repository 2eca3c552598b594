"""Reasoning steps of a completion, and the token with which each of them ends.

Invariant: the steps, joined, are the completion's text; the ends rise and the last one is the
number of tokens, so that end-of-sequence belongs to the last step. Called by
`rewards.process_reward` and by whoever continues a trajectory from the end of a step.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from cluster.errors import ConfigError

DEFAULT_SEPARATOR = r"\n+"
MAX_STEPS = 512


def compile_separator(pattern: str) -> re.Pattern[str]:
    """Raises `ConfigError` for what is no regular expression or could cut between any two letters.

    Example: `r"\\n+"` for lines, `r"\\n\\n+"` for paragraphs, `r"(?<=[.!?])\\s+"` for sentences.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"separator is no regular expression: {error}") from error
    if compiled.fullmatch(""):
        raise ConfigError(f"separator must match at least one character, got {pattern!r}")
    return compiled


def split_steps(text: str, separator: re.Pattern[str]) -> list[str]:
    """Pieces of `text`, each with the separator that ends it; blank ones join a neighbour.

    What comes after `MAX_STEPS` separators is one last step; a blank text has no steps.
    Example: "a\\n\\nb" by lines gives "a\\n\\n" and "b".
    """
    if not text.strip():
        return []
    cuts = [m.end() for m in separator.finditer(text)][: MAX_STEPS - 1]
    bounds = [0, *cuts, len(text)]
    steps: list[str] = []
    for start, end in pairwise(bounds):
        piece = text[start:end]
        if steps and not (piece.strip() and steps[-1].strip()):
            steps[-1] += piece
        elif piece:
            steps.append(piece)
    return steps


def token_ends(
    decode: Callable[[list[int]], str], token_ids: Sequence[int] | np.ndarray, steps: list[str]
) -> list[int] | None:
    """For each step the number of tokens [L] that hold it and all before it, whole.

    A token with the end of one step and the begin of the next counts to the first; a character that
    takes several tokens ends with the last of them. None when the tokens do not say this text.
    """
    tokens = [int(token) for token in token_ids]
    text = "".join(steps)
    if decode(tokens) != text:
        return None
    ends: list[int] = []
    num_chars = end = 0
    for step in steps[:-1]:
        num_chars += len(step)
        begin = text[:num_chars]
        end = bisect_left(
            range(len(tokens) + 1), True, lo=end, key=lambda n: decode(tokens[:n]).startswith(begin)
        )
        ends.append(end)
    return [*ends, len(tokens)] if steps else []
