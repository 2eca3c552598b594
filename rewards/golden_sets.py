"""Golden sets of the built-in verifiers: right, wrong and hostile completions.

Invariant: they hold for every setting of the verifier, so answers stand in a box and code in a
fence. Read by `rewards.math_verifier` and `rewards.code_verifier`; checked by `rewards.golden`.
"""

from typing import Any

from rewards.base import GoldenPair


def _boxed(reference: str, right: list[str], wrong: list[str]) -> list[GoldenPair]:
    return [
        GoldenPair(reference=reference, completion=rf"So \boxed{{{answer}}}.", score=score)
        for score, answers in ((1.0, right), (0.0, wrong))
        for answer in answers
    ]


MATH = [
    *_boxed("42", ["42", "42.0", r"\frac{84}{2}", "x = 42", r"\text{42}"],
            ["-42", "24", "41, 42", "x", "", r"9^{9^{9^9}}", "10^8!", "__import__('os')", "NaN"]),
    *_boxed("1/2", ["0.5", r"\frac12", r"\dfrac{2}{4}", "1/2"], ["2", "1/2, 1/3", "-1/2"]),
    *_boxed(r"\{1,2\}", [r"\{2, 1\}", "1, 2"], ["1", r"\{1,3\}", "[1,2]"]),
    *_boxed("(1,2)", ["(1, 2)", r"\left(1,2\right)"], ["(2,1)", r"\{1,2\}", "1"]),
    *_boxed(r"[0,\infty)", [r"[0, \infty)"], ["x > 0", "0"]),
    *_boxed("x^2+1", ["1+x^2", r"x \cdot x + 1"], ["x^2-1", "x", "(x+1)^{99999}"]),
]  # fmt: skip


def _code(tests: Any, right: list[str], wrong: list[str]) -> list[GoldenPair]:
    return [
        GoldenPair(tests=tests, completion=f"```python\n{code}\n```", score=score)
        for score, codes in ((1.0, right), (0.0, wrong))
        for code in codes
    ]


CODE = [
    *_code(
        {"function": "add", "cases": [{"args": [1, 2], "expected": 3}]},
        ["def add(a, b): return a + b", "class Solution:\n  def add(self, a, b): return a + b"],
        ["def add(a, b): return a - b", "def add(a, b): return '3'", "import os; os._exit(0)",
         "class Any:\n  def __eq__(self, other): return True\ndef add(a, b): return Any()",
         "import os\nos.write(3, b'{\"value\": 3}\\n{\"value\": 3}\\n')\ndef add(a, b): return 3"],
    ),
    *_code(
        [{"input": "2 3", "output": "5"}],
        ["print(sum(map(int, input().split())))"],
        ["print(6)", "raise SystemExit(0)", "print(open('/etc/passwd').read())"],
    ),
]  # fmt: skip
