import asyncio
import math
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from cluster import wire
from cluster.config import VerifierConfig
from cluster.errors import ConfigError
from cluster.types import Message, Task, TrajectoryGroup, TrajectoryStatus
from rewards import self_check
from rewards.base import TIMED_OUT
from rewards.rubric import Rubric
from rewards.versions import sources_of

ROOT = Path(__file__).parents[2]
PLUGIN = """
import asyncio, os, time
from cluster.types import Verdict

def is_upper(prompt, completion, reference):
    return float(completion.isupper())

def abstains(prompt, completion, reference):
    return None

def picky(prompt, completion, reference):
    if completion == "hang":
        time.sleep(60)
    if completion == "die":
        os._exit(3)
    if completion == "raise":
        raise ValueError("cannot read it")
    if completion == "text":
        return "a lot"
    return float(prompt == "Say it." and reference == "42")

def two_arguments(prompt, completion):
    return 1.0

class Constant:
    def __init__(self, value=1.0):
        self.value = value
    async def score(self, group, io):
        return [Verdict(score=self.value) for _ in group.trajectories]

class Raises:
    async def score(self, group, io):
        raise KeyError("lost")

class Hangs:
    async def score(self, group, io):
        await asyncio.sleep(60)

class TooFew:
    async def score(self, group, io):
        return [Verdict(score=1.0)]

class NoVerdicts:
    async def score(self, group, io):
        return [1.0 for _ in group.trajectories]

class NotAVerifier:
    pass
"""


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `my_rewards` that every process can import, made for this test."""
    path = tmp_path / "my_rewards.py"
    path.write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return path


def group_of(*texts: str, reference: str = "42") -> TrajectoryGroup:
    message = Message(role="user", content="Say it.")
    task = Task(task_id="t", taskset="x", messages=[message], reference=reference)
    return self_check.group_of(task, list(texts))


def verifier(name: str, weight: float = 1.0, timeout_s: float = 10.0, **settings: object):
    use = f"my_rewards:{name}"
    return VerifierConfig(use=use, weight=weight, timeout_s=timeout_s, settings=settings)


async def test_the_reward_is_the_weighted_sum_and_verdicts_are_stamped():
    rubric = Rubric(
        {
            "correct": VerifierConfig(use="math"),
            "half": verifier("Constant", weight=0.5, value=0.4),
            "seen": verifier("Constant", weight=0.0, value=9.0),
        }
    )
    given = group_of("42", "41")
    scored = await rubric.score(given)
    assert scored.rewards == pytest.approx([1.2, 0.2])
    assert given.rewards == [None, None]
    assert rubric.full_reward == 1.5
    assert scored.reward_versions == rubric.versions
    first = scored.trajectories[0].verdicts
    assert [v.name for v in first] == ["correct", "half", "seen"]
    assert [v.reward_version for v in first] == list(rubric.versions.values())
    assert all(v.latency_s > 0 for v in first)
    again = wire.decode(wire.encode(scored), TrajectoryGroup)
    assert again.rewards == scored.rewards


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Raises", "KeyError: 'lost'"),
        ("Hangs", "rewards.verifiers.bad.timeout_s"),
        ("TooFew", "1 verdicts, 2 trajectories"),
        ("NoVerdicts", "AttributeError"),
    ],
)
async def test_a_broken_verifier_abstains_for_the_group_and_only_for_itself(name: str, words: str):
    rubric = Rubric({"good": verifier("Constant"), "bad": verifier(name, timeout_s=0.2)})
    scored = await rubric.score(group_of("a", "b"))
    assert scored.rewards == [None, None]
    for trajectory in scored.trajectories:
        good, bad = trajectory.verdicts
        assert good.score == 1.0
        assert bad.score is None
        assert words in bad.error
        assert bad.reward_version == rubric.versions["bad"]
        assert (TIMED_OUT in bad.breakdown) == (name == "Hangs")


@pytest.mark.parametrize("value", [math.nan, math.inf])
async def test_scores_that_are_no_numbers_abstain(value: float):
    scored = await Rubric({"c": verifier("Constant", value=value)}).score(group_of("a"))
    assert scored.rewards == [None]
    assert "finite" in scored.trajectories[0].verdicts[0].error


async def test_a_monitor_may_abstain_without_harm_but_alone_gives_no_reward():
    both = Rubric({"c": verifier("Constant"), "m": verifier("Raises", weight=0.0)})
    assert (await both.score(group_of("a"))).rewards == [1.0]
    alone = Rubric({"m": verifier("Constant", weight=0.0)})
    assert (await alone.score(group_of("a"))).rewards == [None]


async def test_a_failed_rollout_has_no_reward():
    group = group_of("42", "42")
    failed = msgspec.structs.replace(group.trajectories[1], status=TrajectoryStatus.ERROR)
    group = msgspec.structs.replace(group, trajectories=[group.trajectories[0], failed])
    scored = await Rubric({"correct": VerifierConfig(use="math")}).score(group)
    assert scored.rewards == [1.0, None]


async def test_verifiers_run_concurrently():
    names = {f"slow{i}": verifier("Hangs", timeout_s=0.3) for i in range(5)}
    started = time.perf_counter()
    await Rubric(names).score(group_of("a"))
    assert time.perf_counter() - started < 1.0


async def test_a_plain_function_is_a_verifier():
    rubric = Rubric({"loud": verifier("is_upper"), "maybe": verifier("abstains", weight=0.0)})
    try:
        scored = await rubric.score(group_of("YES", "yes"))
    finally:
        await rubric.close()
    assert scored.rewards == [1.0, 0.0]
    assert scored.trajectories[0].verdicts[1].score is None


async def test_a_function_that_hangs_dies_or_raises_costs_one_verdict():
    rubric = Rubric({"picky": verifier("picky", timeout_s=2.0)})
    try:
        scored = await rubric.score(group_of("fine", "hang", "die", "raise", "text", "fine too"))
    finally:
        await rubric.close()
    assert scored.rewards == [1.0, None, None, None, None, 1.0]
    errors = [t.verdicts[0].error for t in scored.trajectories]
    for error, words in zip(
        errors[1:5], ["killed after 1 s", "exited with 3", "cannot read it", "a lot"], strict=True
    ):
        assert words in error


def test_starting_a_worker_does_not_use_up_the_time_limit(plugin: Path):
    plugin.write_text("import time\ntime.sleep(1.0)\n" + PLUGIN)

    async def rewards() -> list[float | None]:
        rubric = Rubric({"loud": verifier("is_upper", timeout_s=0.5)})
        try:
            return (await rubric.score(group_of("YES"))).rewards
        finally:
            await rubric.close()

    assert asyncio.run(rewards()) == [1.0]


def test_versions_follow_code_and_settings_only(plugin: Path):
    def version(config: VerifierConfig) -> str:
        return Rubric({"c": config}).versions["c"]

    first = version(verifier("Constant"))
    assert version(verifier("Constant", weight=0.3, timeout_s=3.0)) == first
    assert version(verifier("Constant", value=2.0)) != first
    del sys.modules["my_rewards"]
    plugin.write_text(PLUGIN.replace("value=1.0", "value=1.5"))
    assert version(verifier("Constant")) != first


def test_the_math_version_covers_the_modules_it_uses():
    Rubric({"correct": VerifierConfig(use="math")})
    sources = sources_of("rewards.math_verifier")
    assert {"rewards.answers", "rewards.quantities", "rewards.symbolic"} <= set(sources)
    assert "math_verify" in sources["rewards.symbolic"]
    assert not [name for name in sources if not name.startswith("rewards.")]


def test_the_code_version_covers_what_runs_inside_the_sandbox():
    sources = sources_of("rewards.code_verifier")
    assert {"rewards.code_runs", "rewards.sandbox"} <= set(sources)
    inside = {"zygote", "program", "suite", "kernel"}
    assert {f"rewards.sandbox_{name}" for name in inside} <= set(sources)
    assert all(sources.values())


@pytest.mark.parametrize(("use", "key"), [("efficiency", "correct"), ("judge", "first")])
def test_the_code_of_a_nested_verifier_counts(plugin: Path, use: str, key: str):
    nested = {"use": "my_rewards:Constant"}
    others = {"base_url": "http://127.0.0.1:1", "model": "m"} if use == "judge" else {}
    config = VerifierConfig(use=use, settings={key: nested, **others})
    first = Rubric({"c": config}).versions["c"]
    del sys.modules["my_rewards"]
    plugin.write_text(PLUGIN.replace("value=1.0", "value=1.5"))
    assert Rubric({"c": config}).versions["c"] != first


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (VerifierConfig(use="maths"), "did you mean 'math'"),
        (VerifierConfig(use="my_rewards:is_uper"), "did you mean 'is_upper'"),
        (VerifierConfig(use="my_rewards:two_arguments"), "(prompt, completion, reference)"),
        (VerifierConfig(use="my_rewards:is_upper", settings={"a": 1}), "takes none"),
        (VerifierConfig(use="my_rewards:NotAVerifier"), "async def score"),
        (VerifierConfig(use="math", settings={"check_timeout_s": 0}), "check_timeout_s"),
    ],
)
def test_bad_entries_name_the_knob(config: VerifierConfig, words: str):
    with pytest.raises(ConfigError, match=r"rewards\.verifiers\.correct") as error:
        Rubric({"correct": config})
    assert words in str(error.value)


def test_importing_the_rubric_imports_nothing_heavy():
    heavy = ["sympy", "math_verify", "reasoning_gym", "torch", "ray", "vllm", "pyarrow"]
    code = f"import sys, rewards.rubric; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.strip() == "[]", found.stderr


async def test_integer_answers_are_scored_in_well_under_two_milliseconds():
    rubric = Rubric({"correct": VerifierConfig(use="math")})
    group = group_of(*[f"The answer is {i}." for i in range(38, 46)])
    times: list[float] = []
    for _ in range(50):
        started = time.perf_counter()
        await rubric.score(group)
        times.append(time.perf_counter() - started)
    assert sorted(times)[len(times) // 2] < 0.002
