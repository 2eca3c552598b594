"""What the README promises of a verifier: short, no edit of the core, from any place."""

import re
from pathlib import Path

import pytest
import yaml

from cluster.config import VerifierConfig
from cluster.types import Message, Task
from rewards.rubric import Rubric
from rewards.self_check import group_of

README = (Path(__file__).parents[2] / "README.md").read_text()
MAX_LINES = 30


def block(language: str) -> str:
    """The README's only block of a language below "A reward in 15 lines"."""
    section = README.partition("## A reward in 15 lines")[2].partition("\n## ")[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return found


async def test_the_verifier_of_the_readme_runs_from_outside_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = block("python")
    assert code.count("\n") + block("yaml").count("\n") < MAX_LINES
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    section = yaml.safe_load(block("yaml"))["rewards"]["verifiers"]
    rubric = Rubric({name: VerifierConfig.model_validate(v) for name, v in section.items()})
    task = Task(task_id="t", taskset="x", reference="42",
                messages=[Message(role="user", content="?")])  # fmt: skip
    scored = await rubric.score(group_of(task, ["42", "43", "42" + " " * 3, "the answer is 42"]))
    await rubric.close()
    assert scored.rewards == [1.0, 0.0, 1.0, 0.0]
    assert len(rubric.versions["brief"]) == 8
