"""Steps and their token ends, on tokens that split text in the oddest places."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from cluster.errors import ConfigError
from rewards.steps import MAX_STEPS, compile_separator, split_steps, token_ends

LINES = compile_separator(r"\n+")
ALPHABET = "ab1 \n\n=é€😀ñ\u0301"
TEXTS = st.text(ALPHABET, max_size=24)


def _byte_letters() -> list[str]:
    """The printable stand-in of each byte in byte-level vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


LETTERS = _byte_letters()


class Pieces:
    """A byte-level tokenizer whose vocabulary is made of the given byte strings, and an end token:
    any cut of a text is a token sequence that it can decode.
    """

    def __init__(self, pieces: list[bytes]) -> None:
        words = ["".join(LETTERS[b] for b in piece) for piece in pieces]
        vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
        self.token_ids = [vocabulary[word] for word in words]
        self._tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
        self._tokenizer.decoder = decoders.ByteLevel()
        self._tokenizer.add_special_tokens(["<|end|>"])
        self.end = self._tokenizer.token_to_id("<|end|>")

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """A text and its bytes cut anywhere: inside letters, across separators, before and after."""
    text = draw(st.text(ALPHABET, min_size=1, max_size=24).filter(str.strip))
    data = text.encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=len(data))))
    bounds = [0, *(cut for cut in cuts if cut < len(data)), len(data)]
    return text, [data[a:b] for a, b in pairwise(bounds)]


@given(TEXTS)
def test_steps_joined_are_the_text(text: str) -> None:
    steps = split_steps(text, LINES)
    assert "".join(steps) == (text if text.strip() else "")
    assert all(step.strip() for step in steps)
    assert all(sum(bool(line.strip()) for line in step.split("\n")) == 1 for step in steps)


@given(cut_texts(), st.integers(0, 2))
@settings(deadline=None, max_examples=300)
def test_a_step_ends_with_the_token_that_brings_its_last_byte(
    case: tuple[str, list[bytes]], num_end_tokens: int
) -> None:
    text, pieces = case
    tokenizer = Pieces(pieces)
    steps = split_steps(text, LINES)
    token_ids = tokenizer.token_ids + [tokenizer.end] * num_end_tokens
    ends = token_ends(tokenizer.decode, token_ids, steps)
    sizes = [len(piece) for piece in pieces]
    expected = []
    num_bytes = 0
    for step in steps:
        num_bytes += len(step.encode())
        expected.append(next(n for n in range(len(sizes) + 1) if sum(sizes[:n]) >= num_bytes))
    assert ends == [*expected[:-1], len(token_ids)]


@pytest.mark.parametrize(
    ("pieces", "steps", "ends"),
    [
        (["1=1", "\n", "2=2", "\n", "2"], ["1=1\n", "2=2\n", "2"], [2, 4, 5]),
        (["1=1\n", "2=2\n2"], ["1=1\n", "2=2\n", "2"], [1, 2, 2]),
        (["1", "=1\n\n2", "=2"], ["1=1\n\n", "2=2"], [2, 3]),
        (["\n", "a\n", "b\n\n"], ["\na\n", "b\n\n"], [2, 3]),
    ],
)
def test_odd_splits(pieces: list[str], steps: list[str], ends: list[int]) -> None:
    """Separators of their own, merged backwards, forwards, into both sides, and blank lines."""
    assert split_steps("".join(pieces), LINES) == steps
    tokenizer = Pieces([piece.encode() for piece in pieces])
    assert token_ends(tokenizer.decode, tokenizer.token_ids, steps) == ends


def test_tokens_that_do_not_say_the_text_have_no_ends() -> None:
    tokenizer = Pieces([b"1=1\n", b"2"])
    assert token_ends(tokenizer.decode, tokenizer.token_ids, ["1=1\n", "3"]) is None
    assert token_ends(tokenizer.decode, tokenizer.token_ids[:1], ["1=1\n", "2"]) is None


def test_other_separators_and_their_limits() -> None:
    sentences = compile_separator(r"(?<=[.!?])\s+")
    assert split_steps("It is 3.5. So what? Done", sentences) == [
        "It is 3.5. ",
        "So what? ",
        "Done",
    ]
    assert split_steps(" \n ", LINES) == []
    many = split_steps("1\n" * (MAX_STEPS + 9), LINES)
    assert len(many) == MAX_STEPS
    assert many[-1] == "1\n" * 10
    for bad in ("(", "", "x*"):
        with pytest.raises(ConfigError, match="separator"):
            compile_separator(bad)
