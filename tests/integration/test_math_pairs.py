"""The table of `tests/data/math_pairs.yaml` through the real verifier and its worker processes."""

import asyncio
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import VerifierConfig
from cluster.types import Message, Task
from rewards.math_policy import MathPolicy
from rewards.rubric import Rubric
from rewards.self_check import group_of

TABLE: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parents[1] / "data" / "math_pairs.yaml").read_text()
)


def task(reference: str) -> Task:
    return Task(task_id="t", taskset="x", reference=reference,
                messages=[Message(role="user", content="?")])  # fmt: skip


def rubric_of(settings: dict[str, Any]) -> Rubric:
    return Rubric({"m": VerifierConfig(use="math", settings=settings, timeout_s=60.0)})


async def wrong_verdicts(rubric: Rubric, entry: dict[str, Any]) -> list[str]:
    """One line for each answer of an entry whose score is not the one that the table states."""
    settings = entry.get("settings", {})
    expected = dict.fromkeys(entry["equal"], 1.0) | dict.fromkeys(entry["unequal"], 0.0)
    texts = [text if entry.get("completions") else rf"\boxed{{{text}}}" for text in expected]
    scored = await rubric.score(group_of(task(entry["reference"]), texts))
    return [
        f"{entry['reference']} {settings} | {text}: {t.reward} ({t.verdicts[0].evidence}"
        f"{t.verdicts[0].error}), not {score}"
        for (text, score), t in zip(expected.items(), scored.trajectories, strict=True)
        if t.reward != score
    ]


@pytest.mark.timeout(240)
async def test_every_pair_is_decided_as_the_table_says(record_property: Any) -> None:
    wrong: list[str] = []
    by_settings: dict[str, list[dict[str, Any]]] = {}
    for entry in TABLE:
        by_settings.setdefault(json.dumps(entry.get("settings", {})), []).append(entry)
    for settings, entries in by_settings.items():
        rubric = rubric_of(json.loads(settings))
        for start in range(0, len(entries), 2):
            some = entries[start : start + 2]
            rows = await asyncio.gather(*(wrong_verdicts(rubric, entry) for entry in some))
            wrong += [line for row in rows for line in row]
        await rubric.close()
    num_pairs = sum(len(entry["equal"]) + len(entry["unequal"]) for entry in TABLE)
    record_property("pairs", num_pairs)
    assert not wrong, "\n".join(wrong)
    assert num_pairs >= 400


def test_what_math_verify_alone_is_known_to_miss_is_decided_under_the_name_of_a_setting() -> None:
    """Each is an answer of the table, so judged right above; the library by itself judges it
    otherwise.
    """
    library: Any = importlib.import_module("math_verify")

    def judge(reference: str, text: str) -> bool:
        gold, answer = (library.parse(t, parsing_timeout=None) for t in (f"${reference}$", text))
        return bool(library.verify(gold, answer, timeout_seconds=None))

    misses = [(e, name, text) for e in TABLE for name, texts in e.get("known_misses", {}).items()
              for text in texts]  # fmt: skip
    named = {*MathPolicy.__struct_fields__, "require_boxed", "none"}
    assert {name for _, name, _ in misses} <= named
    assert len(misses) >= 17
    agreed: list[str] = []
    for entry, _, text in misses:
        assert text in entry["equal"] + entry["unequal"]
        completion = text if entry.get("completions") else rf"\boxed{{{text}}}"
        if judge(entry["reference"], completion) == (text in entry["equal"]):
            agreed.append(f"{entry['reference']} | {text}")
    assert not agreed, "\n".join(agreed)


def test_every_value_of_every_policy_has_a_case() -> None:
    chosen = {(k, v) for entry in TABLE for k, v in entry.get("settings", {}).items()}
    default = MathPolicy()
    for name in MathPolicy.__struct_fields__:
        values = {value for key, value in chosen if key == name} | {getattr(default, name)}
        annotation = str(MathPolicy.__annotations__[name])
        for literal in annotation.partition("[")[2].rstrip("]").replace("'", "").split(", "):
            if "Literal" in annotation:
                assert literal in values, f"{name}: {literal}"
        assert len(values) > 1, name
