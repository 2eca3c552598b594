"""Messages in a secret code: tasks that plain rollouts cannot solve and a hint makes easy.

A message of `LENGTH` different digits has to be written in a code that replaces each digit by
another. The hints of a task are its answer, first with the last digits hidden, then whole. The
warm start shows messages in codes drawn anew, so it teaches nothing of the secret one: with a hint
the answer follows it, though each digit with a slip now and then; without a hint it is the message
unchanged, or in a code that nobody can know. So a plain rollout is right one time in 150,000.
Imports no torch, so that reward workers stay light.
"""

import json
import random
from pathlib import Path

from cluster.types import Message, Task, TrajectoryGroup, Verdict
from rewards.base import VerifierIO

LENGTH, SHOWN = 6, 4  # digits of a message, and of the answer that the weak hint shows
TRAIN_TASKS, EVAL_TASKS = 2000, 100
PLAIN_FRACTION, UNCHANGED_FRACTION = 0.3, 0.5  # of warm-start examples, and of the plain ones
WRONG_FRACTION = 0.2  # of the tasks in `misled.jsonl`
SLIP = 0.12  # share of digits that do not follow the hint
TEMPLATE = "{prompt}\n{hint}"
DIGITS = "0123456789"


class Exact:
    """1 for the answer and nothing else."""

    async def score(self, group: TrajectoryGroup, io: VerifierIO) -> list[Verdict]:
        gold = group.task.reference
        return [Verdict(score=float(t.text.strip() == gold)) for t in group.trajectories]


def message(rng: random.Random) -> str:
    return "".join(rng.sample(DIGITS, LENGTH))


def encode(text: str, code: str) -> str:
    """`code` lists what stands for 0, 1, ... 9."""
    return "".join(code[int(digit)] for digit in text)


def hints(answer: str) -> list[str]:
    """Weakest first: "830196" gives "8301.." and "830196"."""
    return [answer[:SHOWN].ljust(LENGTH, "."), answer]


def write_tasks(folder: Path, seed: int) -> None:
    """`train.jsonl` and `eval.jsonl`: different messages in one code; `misled.jsonl`: those of
    `train.jsonl`, `WRONG_FRACTION` of them with hints in another code.
    """
    rng = random.Random(f"tasks/{seed}")
    code = draw_code(rng)
    texts = list(dict.fromkeys(message(rng) for _ in range(2 * (TRAIN_TASKS + EVAL_TASKS))))
    rows: list[dict[str, str | list[str]]] = []
    for name, part in (
        ("eval", texts[:EVAL_TASKS]),
        ("train", texts[EVAL_TASKS : EVAL_TASKS + TRAIN_TASKS]),
    ):
        answers = {text: encode(text, code) for text in part}
        rows = [
            {"prompt": text, "answer": answer, "hints": hints(answer)}
            for text, answer in answers.items()
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    misled = random.Random(f"misled/{seed}")
    other = draw_code(misled)
    for row in rows:  # of train
        if misled.random() < WRONG_FRACTION:
            row["hints"] = hints(encode(str(row["prompt"]), other))
    (folder / "misled.jsonl").write_text("\n".join(map(json.dumps, rows)))


def draw_code(rng: random.Random) -> str:
    return "".join(rng.sample(DIGITS, len(DIGITS)))


def warm_tasks(count: int, seed: int) -> list[Task]:
    """Prompts of a warm start, with what is to be learned as their reference."""
    rng = random.Random(f"warm/{seed}")
    tasks: list[Task] = []
    for number in range(count):
        text = message(rng)
        answer = encode(text, draw_code(rng))
        if rng.random() < PLAIN_FRACTION:
            prompt, shown = text, text if rng.random() < UNCHANGED_FRACTION else answer
        else:
            prompt = TEMPLATE.format(prompt=text, hint=rng.choice(hints(answer)))
            shown = with_slips(answer, rng)
        messages = [Message(role="user", content=prompt)]
        tasks.append(
            Task(task_id=str(number), taskset="secret_code", messages=messages, reference=shown)
        )
    return tasks


def with_slips(answer: str, rng: random.Random) -> str:
    return "".join(rng.choice(DIGITS) if rng.random() < SLIP else digit for digit in answer)
