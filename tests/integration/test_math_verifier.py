"""The math verifier through the rubric, with math-verify in its real worker processes."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from cluster.config import VerifierConfig
from cluster.types import Message, Task, TrajectoryGroup, Verdict
from rewards import self_check
from rewards.base import TIMED_OUT
from rewards.golden import golden_check
from rewards.isolation import IsolatedPool
from rewards.rubric import Rubric


def group_of(reference: str, texts: list[str]) -> TrajectoryGroup:
    message = Message(role="user", content="?")
    task = Task(task_id="t", taskset="x", messages=[message], reference=reference)
    return self_check.group_of(task, texts)


async def verdicts(rubric: Rubric, reference: str, *texts: str) -> list[Verdict]:
    scored = await rubric.score(group_of(reference, list(texts)))
    return [t.verdicts[0] for t in scored.trajectories]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def rubric() -> AsyncIterator[Rubric]:
    made = Rubric({"correct": VerifierConfig(use="math", timeout_s=30.0)})
    yield made
    await made.close()


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("x^2+1", [r"\boxed{1+x^2}", "y = 1 + x^2", "x**2 + 1"], [r"\boxed{x^2-1}", "x"]),
        ("2\\sqrt{2}", [r"\boxed{\sqrt{8}}", "sqrt(8)", r"$\frac{4}{\sqrt{2}}$"], ["2.83", "8"]),
        ("1024", [r"\boxed{2^{10}}", "1,024"], [r"\boxed{2^{11}}"]),
        (r"\{1,2\}", [r"\boxed{\{2,1\}}", r"\boxed{2, 1}"], [r"\boxed{1}", r"\boxed{\{1,3\}}"]),
        ("[0,\\infty)", [r"\boxed{x \ge 0}"], [r"\boxed{x > 0}", r"\boxed{(0,\infty)}"]),
        ("x \\ge 0", [r"\boxed{[0, \infty)}"], [r"\boxed{x \le 0}"]),
        (
            r"\begin{pmatrix}1\\2\end{pmatrix}",
            [r"\boxed{(1,2)}", r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}"],
            [r"\boxed{(2,1)}"],
        ),
        (r"\frac{2\pi}{3}", [r"\boxed{\frac{2}{3}\pi}", "2*pi/3"], [r"\boxed{2.0944}"]),
        ("So it is.\n#### 42", [r"\boxed{42}", "#### 42", "42.0"], [r"\boxed{43}", ""]),
        (r"x=1 \text{ or } x=-2", [r"\boxed{1, -2}", r"\boxed{\{-2, 1\}}"], [r"\boxed{1}"]),
    ],
)
async def test_equal_answers_score_one_and_others_zero(
    rubric: Rubric, reference: str, right: list[str], wrong: list[str]
):
    got = await verdicts(rubric, reference, *right, *wrong)
    assert [v.score for v in got] == [1.0] * len(right) + [0.0] * len(wrong), got


@pytest.mark.parametrize(
    "bomb",
    [
        "9^9^9^9",
        "10^10^10",
        "10^8!",
        "(x+1)^{5000}",
        "(" * 400 + "1" + ")" * 400,
        r"\sum_{n=1}^{99999} n^n",
        r"(x+1)^{99}(x+2)^{99}(x+3)^{99}(x+4)^{99}",
        r"\int_0^1 \sin(\sin(x^x)) dx",
        r"\prod_{k=1}^{9999} k^k",
        "((((9^9)^9)^9)^9)^9",
        r"\frac{1}{" * 60 + "2" + "}" * 60,
    ],
)
@pytest.mark.parametrize("reference", ["7", "x^2+1"])
async def test_bombs_cost_bounded_time_and_are_never_paid(
    rubric: Rubric, bomb: str, reference: str
):
    started = time.perf_counter()
    bombed, honest = await verdicts(rubric, reference, rf"\boxed{{{bomb}}}", reference)
    assert time.perf_counter() - started < 8.0
    assert bombed.score in (0.0, None)
    assert (bombed.score is None) == bool(bombed.error)
    assert honest.score == 1.0


async def test_a_check_that_runs_out_of_time_abstains():
    rubric = Rubric(
        {"correct": VerifierConfig(use="math", settings={"check_timeout_s": 0.001}, timeout_s=9)}
    )
    try:
        slow, fast = await verdicts(rubric, "x^2+1", r"\boxed{(x+2)^{50}-(x+1)^{50}}", "x^2+1")
    finally:
        await rubric.close()
    assert slow.score is None
    assert "killed after" in slow.error
    assert TIMED_OUT in slow.breakdown
    assert fast.score == 1.0


@pytest.mark.parametrize("reference", ["", r"\boxed{}"])
async def test_without_a_reference_nothing_is_checked(rubric: Rubric, reference: str):
    (verdict,) = await verdicts(rubric, reference, "7")
    assert verdict.score is None
    assert "no reference" in verdict.error


async def test_a_reference_that_cannot_be_parsed_abstains(rubric: Rubric):
    (verdict,) = await verdicts(rubric, r"}{ \frac", r"\boxed{x^2}")
    assert verdict.score is None
    assert "no expression" in verdict.error


async def test_verdicts_say_why(rubric: Rubric):
    got = await verdicts(rubric, "7", "7", "8", "", r"\boxed{9^9^9}")
    assert [v.evidence for v in got] == [
        "7 = 7",
        "8 is not 7",
        "no answer",
        "not a checkable answer: an exponent out of range",
    ]


async def test_it_works_from_any_thread():
    def in_thread() -> list[float | None]:
        async def score() -> list[float | None]:
            rubric = Rubric({"correct": VerifierConfig(use="math")})
            try:
                return [v.score for v in await verdicts(rubric, "x+1", "1+x", "x+2")]
            finally:
                await rubric.close()

        return asyncio.run(score())

    assert await asyncio.to_thread(in_thread) == [1.0, 0.0]


class Scorer:
    """What a reward worker does with a rubric, as a Ray actor."""

    def __init__(self) -> None:
        self._rubric = Rubric({"correct": VerifierConfig(use="math")})

    async def score(self, reference: str, texts: list[str]) -> list[float | None]:
        return [v.score for v in await verdicts(self._rubric, reference, *texts)]

    async def worker_pid(self) -> object:
        return await self._rubric._pool.run("os:getpid", timeout_s=5)


@pytest.mark.usefixtures("local_ray")
async def test_it_works_in_a_ray_actor_whose_death_ends_its_workers():
    import ray

    scorer: Any = ray.remote(Scorer).remote()
    rewards = await asyncio.wait_for(scorer.score.remote("x+1", ["1+x", "x+2", "(1+x)"]), 60)
    assert rewards == [1.0, 0.0, 1.0]
    worker = psutil.Process(await asyncio.wait_for(scorer.worker_pid.remote(), 60))
    ray.kill(scorer)
    await asyncio.to_thread(psutil.wait_procs, [worker], timeout=10)
    assert not worker.is_running()


async def test_many_groups_share_the_workers(rubric: Rubric):
    groups = [group_of("x^2+1", [f"{i}x+x^2-{i}x+1", f"x^2+{i + 2}"]) for i in range(40)]
    scored = await asyncio.gather(*(rubric.score(group) for group in groups))
    assert all(group.rewards == [1.0, 0.0] for group in scored)


async def test_the_first_check_of_a_worker_is_not_charged_for_imports():
    pool = IsolatedPool(num_workers=1)
    try:
        equal = await pool.run("rewards.symbolic:is_equal", "x+1", "1+x", timeout_s=0.5)
    finally:
        pool.close()
    assert equal is True


async def test_the_built_in_set_of_math_holds_and_finds_a_verifier_that_cannot_check():
    settings = {"require_boxed": True, "pairs": "interval", "boxes": "agree"}
    rubric = Rubric({"m": VerifierConfig(use="math", settings=settings, timeout_s=60.0)})
    broken = Rubric(
        {"m": VerifierConfig(use="math", settings={"check_timeout_s": 1e-6}, timeout_s=60.0)}
    )
    try:
        assert await golden_check(rubric) == []
        assert any("x^2+1" in line for line in await golden_check(broken))
    finally:
        await rubric.close()
        await broken.close()
