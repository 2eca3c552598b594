"""What the docs tell users to write: every YAML block of docs/algorithms.md builds."""

import re
from pathlib import Path

import pytest
import yaml

from actors.hints import SOURCES
from actors.programs import PROGRAMS
from cluster import plugins
from cluster.config_file import parse
from learners.credit import CREDITS, build_credit, check_critic
from learners.objectives import OBJECTIVES, WeightedLosses
from learners.token_filters import FILTERS
from learners.value_loss import LOSSES, build_value_loss
from tests.conftest import TINY

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "algorithms.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_builds(block: str) -> None:
    override = yaml.safe_load(block)
    merged = {
        section: {**TINY.get(section, {}), **override.get(section, {})}
        for section in TINY.keys() | override.keys()
    }
    config = parse(merged, "docs/algorithms.md")
    check_critic(config.critic, build_credit(config.objective.credit))
    if config.critic is not None:
        build_value_loss(config.critic)
    WeightedLosses(config.objective)
    program = config.rollout.program
    plugins.build(program.use, program.settings, PROGRAMS, "rollout.program")


@pytest.mark.parametrize("name", [*CREDITS, *OBJECTIVES, *FILTERS, *LOSSES, *SOURCES])
def test_every_built_in_method_has_a_block(name: str) -> None:
    assert any(re.search(rf"use: {name}\b", block) for block in BLOCKS) or f"{name}` (" in PAGE, (
        name
    )


@pytest.mark.parametrize("name", ["entropy_study.svg", "guide_study.svg"])
def test_a_figure_is_shown_when_it_has_been_drawn(name: str) -> None:
    shown = re.sub(r"<!--.*?-->", "", PAGE, flags=re.DOTALL)
    assert (f"]({name})" in shown) == (DOCS / name).is_file()
