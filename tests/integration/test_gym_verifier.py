"""reasoning_gym tasks and their own scorers, through the rubric and its real worker processes."""

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from benchmarks.trl_peer import last_line_is_right
from cluster.config import Plugin, TasksSection, VerifierConfig
from cluster.errors import ConfigError
from cluster.types import Task
from rewards.gym_entries import GymEntry, decode_entry, encode_entry, is_plain_expression
from rewards.gym_taskset import DENIED, ReasoningGymTaskset
from rewards.rubric import Rubric
from rewards.self_check import gold_check, group_of, junk_probe
from rewards.tasksets import load_tasks
from tests.sum_cases import COMPLETIONS

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def rubric() -> AsyncIterator[Rubric]:
    made = Rubric({"correct": VerifierConfig(use="task", timeout_s=30.0)})
    yield made
    await made.close()


def chain_sum(**settings: Any) -> ReasoningGymTaskset:
    config = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    return ReasoningGymTaskset("chain_sum", size=12, seed=5, config=config, **settings)


async def test_tasks_are_short_and_the_same_each_time():
    tasks = chain_sum(question_regex="problem: (.*)").load()
    assert tasks == chain_sum(question_regex="problem: (.*)").load()
    for task in tasks:
        assert len(task.messages[0].content) < 16
        assert eval(task.messages[0].content.rstrip("= ")) == int(task.reference)
        *steps, answer = task.solution.splitlines()
        assert len(steps) == 2
        assert all(eval(step.replace("=", "==")) for step in steps)
        assert answer == task.reference
        assert json.loads(task.entry)[0] == "chain_sum"


async def test_worked_solutions_become_solution_and_hints():
    taskset = ReasoningGymTaskset("gsm_symbolic", size=20, answer_format=r"\boxed{{answer}}")
    for task in taskset.load():
        assert task.solution.endswith(rf"\boxed{{{task.reference}}}")
        assert "####" not in task.solution
        assert all(task.solution.startswith(hint) for hint in task.hints)
        assert sorted(task.hints, key=len) == task.hints


@pytest.mark.parametrize(
    "dataset", ["chain_sum", "gcd", "countdown", "simple_integration", "arc_agi", "letter_counting"]
)
async def test_gold_answers_are_paid_and_junk_is_not(rubric: Rubric, dataset: str):
    tasks = ReasoningGymTaskset(dataset, size=6, seed=3).load()
    assert await gold_check(rubric, tasks, count=6) == []
    assert await junk_probe(rubric, tasks) == []


async def test_wrong_text_earns_nothing_unless_partial_scores_are_wanted(rubric: Rubric):
    (task,) = ReasoningGymTaskset("countdown", size=1, seed=3).load()
    texts = [task.reference, f"<think>{task.reference}</think>1 + 1", "no idea", ""]
    assert (await rubric.score(group_of(task, texts))).rewards == [1.0, 0.0, 0.0, 0.0]
    partial = Rubric({"correct": VerifierConfig(use="task", settings={"partial": True})})
    try:
        rewards = (await partial.score(group_of(task, texts))).rewards
    finally:
        await partial.close()
    assert rewards == pytest.approx([1.0, 0.05, 0.0, 0.0])


@pytest.mark.parametrize(
    ("extract", "text"),
    [
        ("all", "<think>hm</think> {answer}"),
        ("boxed", r"so \boxed{{answer}}."),
        ("last_line", "5 + 7\n{answer}\n"),
        ("answer_tag", "it is <answer>{answer}</answer>!"),
    ],
)
async def test_the_answer_is_taken_from_where_it_should_be(extract: str, text: str):
    task = chain_sum().load()[0]
    rubric = Rubric({"correct": VerifierConfig(use="task", settings={"extract": extract})})
    texts = [text.replace("{answer}", task.reference), text.replace("{answer}", "7777"), "nothing"]
    try:
        assert (await rubric.score(group_of(task, texts))).rewards == [1.0, 0.0, 0.0]
    finally:
        await rubric.close()


async def test_the_rule_that_a_peer_shares_pays_as_the_scorer_of_sums_does():
    rubric = Rubric({"correct": VerifierConfig(use="task", settings={"extract": "last_line"})})
    try:
        for task in chain_sum().load()[:4]:
            texts = [text.replace("{answer}", task.reference) for text, _ in COMPLETIONS]
            scores = [score for _, score in COMPLETIONS]
            assert (await rubric.score(group_of(task, texts))).rewards == scores
            assert [last_line_is_right("", text, task.reference) for text in texts] == scores
    finally:
        await rubric.close()


async def test_code_in_an_answer_is_not_run(rubric: Rubric):
    (task,) = ReasoningGymTaskset("countdown", size=1, seed=3).load()
    attacks = ["__import__('os').abort()", "exit()", "eval(chr(49))", "(1).__class__", "9**9**9**9"]
    scored = await rubric.score(group_of(task, attacks))
    assert scored.rewards == [0.0] * len(attacks)
    assert {t.verdicts[0].evidence for t in scored.trajectories} == {"not a plain expression"}


async def test_an_integral_sign_does_not_solve_an_integral(rubric: Rubric):
    (task,) = ReasoningGymTaskset("simple_integration", size=1, seed=3).load()
    metadata = decode_entry(task.entry).item["metadata"]
    unsolved = f"Integral({metadata['integrand']}, {metadata['variable']})"
    assert (await rubric.score(group_of(task, [unsolved, task.reference]))).rewards == [0.0, 1.0]


@pytest.mark.parametrize("dataset", ["game_of_life", "prime_factorization"])
async def test_junk_that_makes_a_scorer_raise_is_wrong(rubric: Rubric, dataset: str):
    (task,) = ReasoningGymTaskset(dataset, size=1).load()
    scored = await rubric.score(
        group_of(task, ["junk", "[[1]]", "{}", "a \u00d7 b", task.reference])
    )
    assert scored.rewards == [0.0, 0.0, 0.0, 0.0, 1.0]


async def test_a_scorer_that_fails_on_its_own_gold_answer_abstains(rubric: Rubric):
    (task,) = ReasoningGymTaskset("prime_factorization", size=1).load()
    entry = decode_entry(task.entry)
    broken = encode_entry(entry._replace(item={**entry.item, "answer": "two"}))
    task = msgspec.structs.replace(task, entry=broken)
    (verdict,) = (await rubric.score(group_of(task, ["three"]))).trajectories[0].verdicts
    assert verdict.score is None
    assert "ValueError: invalid literal" in verdict.error


async def test_a_task_of_another_taskset_abstains(rubric: Rubric):
    task = msgspec.structs.replace(chain_sum().load()[0], entry="")
    (verdict,) = (await rubric.score(group_of(task, ["1"]))).trajectories[0].verdicts
    assert verdict.score is None
    assert "reasoning_gym" in verdict.error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *[({"dataset": name}, reason) for name, reason in DENIED.items()],
        ({"dataset": "propositional_logic"}, "no gold answer"),
        ({"dataset": "chain_sums"}, "did you mean 'chain_sum'"),
        ({"dataset": "chain_sum", "config": {"terms": 3}}, "min_terms"),
        ({"dataset": "chain_sum", "config": {"min_terms": 5, "max_terms": 2}}, "config"),
        ({"dataset": "chain_sum", "size": 0}, "size must be at least 1"),
        ({"dataset": "chain_sum", "question_regex": "problem: .*"}, "must have a group"),
        ({"dataset": "chain_sum", "question_regex": "task: (.*)"}, "does not match the question"),
        ({"dataset": "chain_sum", "prompt": "Solve!"}, "must contain {question}"),
    ],
)
async def test_bad_settings_name_the_knob(settings: dict[str, Any], words: str):
    section = TasksSection(train=Plugin(use="reasoning_gym", settings={"size": 3} | settings))
    with pytest.raises(ConfigError, match=r"^tasks\.train: ") as error:
        load_tasks(section, "train")
    assert words in str(error.value)


async def test_gold_check_refuses_a_rubric_that_no_gold_answer_satisfies():
    tasks = chain_sum().load()
    form = {"pattern": "Answer = .*"}
    configs = {
        "correct": VerifierConfig(use="math"),
        "form": VerifierConfig(use="format", settings=form),
    }
    lines = await gold_check(Rubric(configs), tasks, count=4)
    assert len(lines) == 4
    assert "form 0.0 (no match)" in lines[0]
    assert "earns 1 of 2" in lines[0]
    with_example = VerifierConfig(use="format", settings=form | {"example": "Answer = {answer}"})
    assert await gold_check(Rubric(configs | {"form": with_example}), tasks, count=4) == []
    monitor = {"correct": VerifierConfig(use="math", weight=0.0)}
    assert "weight above 0" in (await gold_check(Rubric(monitor), tasks, count=4))[0]


async def test_gold_check_reports_a_task_without_an_answer():
    task = msgspec.structs.replace(chain_sum().load()[0], reference="", solution="")
    (line,) = await gold_check(Rubric({"c": VerifierConfig(use="math")}), [task], count=1)
    assert "neither a reference nor a solution" in line


async def test_junk_probe_finds_a_rubric_that_pays_for_anything():
    rule = VerifierConfig(use="length", settings={"max_tokens": 10})
    findings = await junk_probe(Rubric({"short": rule}), chain_sum().load())
    assert {finding.share for finding in findings} == {1.0}
    assert "the junk answer '0' earns the full reward on 100%" in "\n".join(map(str, findings))


async def test_entries_survive_the_trip():
    item = {"a": (1, [2, (3,)]), "b": {"c": None}}
    assert decode_entry(encode_entry(GymEntry("d", {"k": 1}, item))) == ("d", {"k": 1}, item)


@pytest.mark.parametrize("text", ["4*8 - 6 - 2", "x*sin(x) + C", "-9*x**8/10", "2.5*(1 + 3)"])
async def test_plain_expressions(text: str):
    assert is_plain_expression(text)


async def test_the_task_type_is_what_the_wire_carries():
    task = chain_sum().load()[0]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(task), type=Task) == task
