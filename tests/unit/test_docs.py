"""What the docs tell users to write: every YAML block of these pages is valid and builds."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.hints import SOURCES
from cluster import plugins
from cluster.config import Plugin, VerifierConfig
from cluster.config_file import parse
from learners.credit import CREDITS
from learners.objectives import OBJECTIVES
from learners.token_filters import FILTERS
from learners.value_loss import LOSSES
from rewards.process_reward import SCORERS
from rewards.rubric import Rubric
from serve.check import CheckReport, _build_plugins
from tests.conftest import TINY
from tests.loss_cases import gradient, outputs_of, rows_of

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "algorithms.md").read_text()
BASE: dict[str, dict[str, Any]] = TINY | {"rollout": TINY["rollout"] | {"max_policy_age": 1}}


def blocks(page: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page}-{i}")
        for page in ("algorithms.md", "rewards.md", "durability.md", "gpu.md")
        for i, block in enumerate(blocks(page))
    ],
)
def test_a_block_builds(page: str, block: str) -> None:
    given: dict[str, Any] = yaml.safe_load(block)
    # An indented block shows verifiers alone.
    override = {"rewards": {"verifiers": given}} if block.startswith(" ") else given
    merged = {
        section: BASE.get(section, {}) | override.get(section, {})
        for section in BASE.keys() | override.keys()
    }
    config = parse(merged, page)
    report = CheckReport()
    _build_plugins(config, report)
    assert report.problems == []
    Rubric({name: v for name, v in config.rewards.verifiers.items() if _is_here(v)})


def _is_here(verifier: VerifierConfig) -> bool:
    """Whether it can be built: the reader's own cannot, nor those whose model must be there."""
    if verifier.use == "process":
        scorer = Plugin.model_validate(verifier.settings["scorer"])
        target = plugins.resolve(scorer.use, SCORERS, "scorer")
        plugins.check_settings(target, scorer.settings, "scorer")
    return verifier.use != "process" and not verifier.use.startswith("my_")


@pytest.mark.parametrize("name", [*CREDITS, *OBJECTIVES, *FILTERS, *LOSSES, *SOURCES])
def test_every_built_in_method_has_a_block(name: str) -> None:
    shown = any(re.search(rf"use: {name}\b", block) for block in blocks("algorithms.md"))
    assert shown or f"{name}` (" in PAGE, name


def test_the_loss_of_ones_own_is_one() -> None:
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    outputs = outputs_of([-1.0, -2.0, -3.0], entropy=[0.1, 0.6, 0.9])
    term = names["Unsure"](0.5).loss(rows_of([[1.0, 1.0], [-2.0]]), outputs)
    term.total.backward()
    assert gradient(outputs.logprobs) == [0.0, -1.0, 2.0]
    assert term.metrics["policy/unsure_fraction"] == (2, 3)


@pytest.mark.parametrize("name", ["entropy_study.svg", "guide_study.svg"])
def test_a_figure_is_shown_when_it_has_been_drawn(name: str) -> None:
    shown = re.sub(r"<!--.*?-->", "", PAGE, flags=re.DOTALL)
    assert (f"]({name})" in shown) == (DOCS / name).is_file()
