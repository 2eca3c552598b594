"""Messages in a secret code: tasks that plain rollouts cannot solve and rules make easy.

A message of `LENGTH` digits has to be written in a code that replaces each digit by another. The
hints of a task are the rules for its digits. Warm-start examples are messages in codes drawn anew,
with rules or without: who has learned them can look rules up, and without any can only guess, one
time in 10^`LENGTH`. Imports no torch, so that reward workers stay light.
"""

import json
import random
from pathlib import Path

from cluster.types import TrajectoryGroup, Verdict
from rewards.base import VerifierIO

LENGTH, SHOWN = 6, 4  # digits of a message, and of the rules that the weak hint gives
TRAIN_TASKS, EVAL_TASKS = 2000, 100
PLAIN_FRACTION = 0.3  # of the warm-start examples
TEMPLATE = "{prompt}\n{hint}"


class Exact:
    """1 for the answer and nothing else."""

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        gold = group.task.reference
        return [Verdict(score=float(t.text.strip() == gold)) for t in group.trajectories]


def message(rng: random.Random) -> str:
    return "".join(rng.sample("0123456789", LENGTH))


def draw_code(rng: random.Random) -> dict[str, str]:
    return dict(zip("0123456789", rng.sample("0123456789", 10), strict=True))


def book(text: str, code: dict[str, str]) -> str:
    """The rule for each digit of `text`: "472" in a code that adds one gives "45 78 23"."""
    return " ".join(digit + code[digit] for digit in text)


def hints(text: str, code: dict[str, str]) -> list[str]:
    """Weakest first: rules for the first digits, then for all."""
    return [book(text[:SHOWN], code), book(text, code)]


def encode(text: str, code: dict[str, str]) -> str:
    return "".join(code[digit] for digit in text)


def write_tasks(folder: Path, seed: int) -> None:
    """`train.jsonl` and `eval.jsonl`: different messages in one code."""
    rng = random.Random(f"tasks/{seed}")
    code = draw_code(rng)
    texts = list(dict.fromkeys(message(rng) for _ in range(2 * (TRAIN_TASKS + EVAL_TASKS))))
    for name, part in (
        ("eval", texts[:EVAL_TASKS]),
        ("train", texts[EVAL_TASKS : EVAL_TASKS + TRAIN_TASKS]),
    ):
        rows = [
            {"prompt": text, "answer": encode(text, code), "hints": hints(text, code)}
            for text in part
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def warm_examples(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompts and answers, each in a code of its own."""
    rng = random.Random(f"warm/{seed}")
    examples: list[tuple[str, str]] = []
    for _ in range(count):
        text, code = message(rng), draw_code(rng)
        hint = rng.choice(hints(text, code))
        is_plain = rng.random() < PLAIN_FRACTION
        prompt = text if is_plain else TEMPLATE.format(prompt=text, hint=hint)
        examples.append((prompt, encode(text, code)))
    return examples
