"""Right code passes and wrong code fails, whatever the form of its tests and however slow it is."""

import json
import math
import os
import time

import psutil
import pytest

from cluster.config import VerifierConfig
from cluster.errors import ConfigError, HoneError
from cluster.types import Message, Task, TrajectoryGroup
from rewards import isolation, self_check
from rewards.code_runs import BudgetError, check_cases, run_cases, run_tests
from rewards.code_verifier import CodeVerifier
from rewards.rubric import Rubric
from rewards.sandbox import Limits, Sandbox, SandboxError, choose

TIER = choose()
LIMITS = {"wall_s": 1.0, "cpu_s": 1}
LOOP = "while True: pass"


def group(tests: object, *codes: str) -> TrajectoryGroup:
    message = Message(role="user", content="Write it.")
    entry = json.dumps({"tests": tests})
    task = Task(task_id="t", taskset="x", messages=[message], entry=entry)
    return self_check.group_of(task, [f"```python\n{code}\n```" for code in codes])


async def test_with_default_settings_a_loop_is_wrong_and_slow_right_code_is_right() -> None:
    rubric = Rubric({"code": VerifierConfig(use="code")})
    cases = [{"input": "", "output": "1"}] * 10
    try:
        scored = await rubric.score(group(cases, LOOP, "import time\ntime.sleep(0.6)\nprint(1)"))
    finally:
        await rubric.close()
    assert scored.rewards == [0.0, 1.0]


def cases(code: str, inputs: list[object], function: str = "", budget_s: float = 5.0) -> list[str]:
    answers = run_cases(TIER, code, function, inputs, Limits(wall_s=1, cpu_s=1), False, budget_s)
    return [status if status != "ok" else str(answer) for status, answer in answers]


async def test_what_a_hundred_cases_print_in_all_does_not_keep_them_from_a_score() -> None:
    """Each output is within its limit; all of them as text are larger than a worker's reply."""
    noise = "import os\nif input() == '0': print(1)\nelse: os.write(1, b'\\xff' * 65000)"
    cases = [{"input": str(i), "output": "1"} for i in range(100)]
    assert len(cases) * 65000 * len("\ufffd".encode()) > isolation.MAX_FRAME
    rubric = Rubric({"code": VerifierConfig(use="code", timeout_s=60)})
    try:
        scored = await rubric.score(group(cases, noise))
    finally:
        await rubric.close()
    assert scored.rewards == [0.01], scored.trajectories[0].verdicts


def test_a_reply_may_be_as_large_as_its_limits_make_it() -> None:
    box = Sandbox(TIER)
    try:
        reply = box.run(
            "program",
            "import os\nfor f in (1, 3): os.write(f, b'\\0' * (1 << 20))",
            Limits(output_bytes=1 << 20),
        )
    finally:
        box.close()
    assert (reply.status, len(reply.stdout), len(reply.result)) == ("ok", 1 << 20, 1 << 20)


def test_each_call_may_take_the_limit_of_a_test_and_only_a_slow_one_fails() -> None:
    slow = "import time\ndef f(x):\n  time.sleep(x)\n  return x"
    assert cases(slow, [[0.7], [0.7], [0.7]], "f") == ["0.7"] * 3
    assert cases(slow, [[0.1], [9], [0.2]], "f") == ["0.1", "wall_timeout", "0.2"]


@pytest.mark.parametrize(
    "body",
    [
        "return 'x' * 1000",  # 200 KB in all, each within 64 KiB
        "print('x' * 1000)\n  return 0",
        "return 'x' * 70000 if i == 9 else i",
        "if i == 9: raise SystemExit\n  return i",
        "if i == 9: import os; os._exit(0)\n  return i",
        "if i == 9: import ctypes; ctypes.string_at(0)\n  return i",
        "return len('x' * (1 << 40)) if i == 9 else i",
    ],
)
def test_one_bad_call_fails_itself_only_and_output_is_limited_per_call(body: str) -> None:
    statuses = [
        status
        for status, _ in run_cases(
            TIER, f"def f(i):\n  {body}", "f", [[i] for i in range(200)], Limits(), False, 30.0
        )
    ]
    bad = {9} if "i == 9" in body else set[int]()
    assert {i for i, status in enumerate(statuses) if status != "ok"} == bad


def test_calls_larger_than_a_request_in_all_are_made_in_parts() -> None:
    inputs: list[object] = [["x" * (3 << 20)] for _ in range(4)]
    answers = run_cases(TIER, "f = len", "f", inputs, Limits(), False, 30.0)
    assert list(answers) == [("ok", str(3 << 20))] * 4


def check(code: str, budget_s: float, function: str = "") -> int:
    case = {"args": [], "expected": 1} if function else {"output": "1"}
    tests = {"function": function, "cases": [case] * 4}
    entry = json.dumps({"tests": tests})
    return check_cases(TIER, code, entry, LIMITS, False, 0.0, budget_s)[0]


@pytest.mark.parametrize(
    ("code", "function"),
    [
        (LOOP, ""),
        (f"def f():\n  {LOOP}", "f"),
        ("import time\ntime.sleep(0.9)\nprint(0)", ""),
        ("import time\ndef f():\n  time.sleep(0.9)\n  return 0", "f"),
        ("import time\ntime.sleep(0.5)\n1 / 0", "f"),
    ],
)
def test_what_has_failed_a_test_buys_no_abstention_with_time(code: str, function: str) -> None:
    assert check(code, 1.4, function) == 0


def test_a_budget_that_honest_tests_use_up_says_nothing() -> None:
    with pytest.raises(BudgetError, match="timeout_s"):
        cases("import time\ntime.sleep(0.5)", ["", "", ""], budget_s=0.8)
    with pytest.raises(BudgetError, match="timeout_s"):
        cases("import time\ndef f(x): time.sleep(0.5)", [[1], [2], [3]], "f", budget_s=0.8)


@pytest.mark.parametrize("settings", [{"memory_mib": 2049}, {"file_mib": 65}])
def test_a_limit_above_that_of_the_worker_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}: at most"):
        CodeVerifier(**settings)  # pyright: ignore[reportArgumentType]


async def test_a_test_limit_beyond_the_verifiers_is_refused_in_one_line() -> None:
    settings = {"test_timeout_s": 9}
    rubric = Rubric({"code": VerifierConfig(use="code", settings=settings)})
    (trajectory,) = (await rubric.score(group([{"output": "1"}], "print(1)"))).trajectories
    assert trajectory.reward is None
    assert "test_timeout_s: 9 s for a test needs a timeout_s of at least 11.25 s" in (
        trajectory.verdicts[0].error
    )


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
async def test_integers_of_any_size_are_right_or_wrong_like_others(tolerance: float) -> None:
    rubric = Rubric({"code": VerifierConfig(use="code", settings={"tolerance": tolerance})})
    factorial = {"args": [30], "expected": math.factorial(30)}
    huge = {"args": [10**400], "expected": math.factorial(10)}
    right = "import math\ndef f(n): return math.factorial(n if n < 99 else 10)"
    raw = "import os\nos.write(3, (b'{\"value\": ' + b'9' * 5000 + b'}\\n') * 2)\nos._exit(0)"
    big = [f"def f(n): return {value}" for value in ("10**30", "-10**400", "10**9999", "[10**30]")]
    try:
        tests = {"function": "f", "cases": [factorial, huge]}
        scored = await rubric.score(group(tests, right, raw, *big))
    finally:
        await rubric.close()
    assert scored.rewards == [1.0] + [0.0] * 5


def tally(tests: str, code: str, budget_s: float = 5.0) -> tuple[int, int]:
    reply = run_tests(TIER, code, tests, LIMITS, budget_s)
    return reply["passed"], reply["tests"]


SWAP = "def swap(pair): return (pair[1], pair[0])"
CHECK = "def check(f):\n  assert f(1, 2) == 3\n  assert f(0, 0) == 0\n"
ADD = "def add(a, b): return a + b"
SUBTESTS = (
    "import unittest\nclass T(unittest.TestCase):\n  def test_all(self):\n    for i in range(3):\n"
    "      with self.subTest(i): self.assertEqual(add(i, 9), i + 9)\n"
    "  def test_one(self): self.assertEqual(add(0, 0), 0)\n"
)
CASE = "import unittest\nclass T(unittest.TestCase):\n  def test_one(self): {}\n"
IMPORT = "from solution import add\n"


@pytest.mark.parametrize(
    ("tests", "code", "wanted"),
    [
        ("assert swap((1, 2)) == (2, 1)\nassert swap([1, 2]) != [2, 1]", SWAP, (2, 2)),
        ("assert f({1, 2}) == {1, 2, 3}", "def f(s): return s | {3}", (1, 1)),
        ("assert f({1: (2,)}) == {1: (2,), 'a': {}}", "def f(d): return d | {'a': {}}", (1, 1)),
        ("assert add(a=1, b=2) == 3", ADD, (1, 1)),
        (f"{IMPORT}{CHECK}check(add)", ADD, (1, 1)),
        (f"{CHECK}check(add)", ADD, (1, 1)),
        (f"{IMPORT}{CHECK}check(add)", "def add(a, b): return a - b", (0, 1)),
        (f"{IMPORT}{CHECK}check(add)", "def add(a, b): return None", (0, 1)),
        (f"{IMPORT}{CHECK}check(add)", "def", (0, 1)),
        (f"{IMPORT}{CHECK}check(add)", "import os\nos._exit(0)", (0, 1)),
        (f"{IMPORT}{CHECK}check(add)", f"def add(a, b):\n  {LOOP}", (0, 1)),
        (f"{IMPORT}x = add(1, 2)\nassert x == 3", "def add(a, b): raise KeyError", (0, 2)),
        (IMPORT + SUBTESTS, ADD, (2, 2)),
        (IMPORT + SUBTESTS, "def add(a, b): return 0", (1, 2)),
        ("x = 1\nassert add(x, 1) == 2\nx = 2\nassert add(x, 1) == 3", ADD, (2, 2)),
        ("import unittest\nfrom solution import f\nclass T(unittest.TestCase):\n"
         "  def test_it(self):\n    with self.assertRaises(ValueError): f()",
         "def f(): raise ValueError('no')", (1, 1)),
        (CASE.format("self.assertEqual(add(1, 2), 3)"), ADD, (1, 1)),
        (CASE.format("self.assertEqual(add(1, 2), 3)"), "def add(a, b): return 0", (0, 1)),
        (CASE.format("self.assertEqual(add(1, 2).real, 3)"), "def add(a, b): return 'x'", (0, 1)),
        ("def test_pair(f): assert f(1, 2) == 3\ntest_pair(add)", ADD, (1, 1)),
        ("import unittest\nclass T(unittest.TestCase):\n  @classmethod\n"
         "  def setUpClass(cls): cls.sum = add(1, 2)\n"
         "  def test_it(self): self.assertEqual(self.sum.real, 3)",
         "def add(a, b): return 'x'", (0, 1)),
        ("assert f() == float('inf')", "def f(): return float('inf')", (1, 1)),
        ("assert not f() == 3", "def f(): return float('nan')", (0, 1)),
        ("assert f(99999) != 0\nassert f(1) == 'x'", "def f(n): return 'x' * n", (1, 2)),
        ("assert f() == 1\nassert 1 == 1",
         "import os, time\ndef f():\n  os.write(4, b'{')\n  time.sleep(60)", (1, 2)),
    ],
)  # fmt: skip
def test_modules_of_every_form_tell_right_from_wrong(
    tests: str, code: str, wanted: tuple[int, int]
) -> None:
    assert tally(tests, code) == wanted


@pytest.mark.parametrize(
    "tests",
    [
        "x = 1",
        "import nothing_here\nassert add(1, 2) == 3",
        "1 / 0",
        "def test_add(fixture): assert add(1, 2) == fixture",
        CASE.format("self.assertEqual(self.wanted, add(1, 2))"),
        CASE.format("self.wanted; add(1, 2)") + "  def test_two(self): add(1, 2)\n",
    ],
)
def test_a_module_that_is_broken_by_itself_gives_no_tally(tests: str) -> None:
    with pytest.raises(HoneError):
        tally(tests, ADD)


def test_many_honest_calls_within_a_module_use_up_its_budget() -> None:
    tests = "from solution import f\nfor i in range(9): assert f(i) is None"
    with pytest.raises(BudgetError):
        tally(tests, "import time\ndef f(x): time.sleep(0.5)", budget_s=2.5)
    wrong = "import time\ndef f(x):\n  time.sleep(0.8)\n  return 0"
    tests = "\n".join(f"assert f({i}) is None" for i in range(4))
    assert tally(tests, wrong, budget_s=2.5) == (0, 4)
    methods = "".join(f"  def test_{i}(self): self.assertIsNone(f({i}))\n" for i in range(4))
    tests = "import unittest\nclass T(unittest.TestCase):\n" + methods
    assert tally(tests, wrong, budget_s=2.5) == (0, 4)
    with pytest.raises(BudgetError):
        tally(tests, wrong.replace("return 0", "return"), budget_s=2.5)


def test_a_fault_of_the_programs_own_sandbox_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    box, start = Sandbox(TIER), Sandbox.start

    def broken_start(self: Sandbox, mode: str, code: str, limits: Limits, *args, **fields):
        chosen = Limits(wall_s=5, file_bytes=-7) if mode == "server" else limits
        return start(self, mode, code, chosen, *args, **fields)

    monkeypatch.setattr(Sandbox, "start", broken_start)
    with pytest.raises(SandboxError):
        box.run_tests(ADD, "assert add(1, 2) == 3", Limits(), call_s=2.0)
    box.close()


def test_a_program_killed_from_outside_is_no_verdict() -> None:
    box = Sandbox(TIER)
    try:
        running = box.start("program", "import time\ntime.sleep(9)", Limits(wall_s=8), None)
        deadline = time.monotonic() + 5
        while not (victims := _program(box)) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(victims[0], 9)
        with pytest.raises(SandboxError, match="killed from outside"):
            running.result()
    finally:
        box.close()


def _program(box: Sandbox) -> list[int]:
    """The keeper's child."""
    assert box._process is not None  # pyright: ignore[reportPrivateUsage]
    keepers = psutil.Process(box._process.pid).children()  # pyright: ignore[reportPrivateUsage]
    return [child.pid for keeper in keepers for child in keeper.children()]
