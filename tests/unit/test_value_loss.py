"""The critic's loss: published values, where its gradient goes, and what must be configured."""

from dataclasses import replace

import pytest
import torch

from cluster.config import CriticSection, Plugin
from cluster.errors import ConfigError
from learners.credit import GroupNormalized, check_critic
from learners.gae import GeneralizedAdvantage
from learners.value_loss import ClippedValue, build_value_loss
from tests.loss_cases import gradient, rows_of


def _loss(
    loss: ClippedValue,
    values: list[float],
    before: list[float],
    returns: list[float],
    guided: bool = False,
) -> tuple[float, list[float], float]:
    """(loss, its gradient, number of clipped tokens) of one sequence."""
    rows = replace(
        rows_of([[0.0] * len(values)], guided=[guided]),
        values=torch.tensor(before, dtype=torch.float64),
        returns=torch.tensor(returns, dtype=torch.float64),
    )
    leaf = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    term = loss.loss(rows, leaf)
    term.total.backward()
    return term.total.item(), gradient(leaf), term.metrics["value/clip_fraction"].total.item()


@pytest.mark.parametrize(("target", "expected", "slope"), [(0.2, 0.245, 0.7), (1.0, 0.08, 0.0)])
def test_published_values(target: float, expected: float, slope: float) -> None:
    """Towards .2 the unclipped error is the larger; towards 1 the clipped one, without gradient."""
    value, slopes, num_clipped = _loss(ClippedValue(clip=0.5), [0.9], [0.1], [target])
    assert value == pytest.approx(expected)
    assert slopes == pytest.approx([slope])
    assert num_clipped == (slope == 0)


def test_a_value_in_its_range_is_not_clipped_for_rounding() -> None:
    torch.manual_seed(0)
    before, values, returns = 0.1 * torch.randn(1000), 0.01 * torch.randn(1000), torch.zeros(1000)
    near = before + (values - before)
    assert ((near - returns).square() > (values - returns).square()).any(), "what to tell apart"
    rows = replace(rows_of([[0.0] * 1000]), values=before, returns=returns)
    assert ClippedValue(clip=0.5).loss(rows, values).metrics["value/clip_fraction"].total == 0


def test_without_clip_it_is_the_squared_error() -> None:
    value, slopes, num_clipped = _loss(ClippedValue(clip=None), [0.9, 0.0], [0.1, 0.0], [1.0, 2.0])
    assert value == pytest.approx((0.01 + 4.0) / 2)
    assert slopes == pytest.approx([-0.1, -2.0])
    assert num_clipped == 0


def test_hinted_rows_teach_the_critic_nothing() -> None:
    assert _loss(ClippedValue(), [0.9], [0.1], [1.0], guided=True) == (0.0, [0.0], 0.0)


def test_critic_and_credit_are_configured_together() -> None:
    section = CriticSection()
    check_critic(section, GeneralizedAdvantage())
    check_critic(None, GroupNormalized())
    with pytest.raises(ConfigError, match=r"critic: objective\.credit needs values"):
        check_critic(None, GeneralizedAdvantage())
    with pytest.raises(ConfigError, match=r"critic: objective\.credit needs no values"):
        check_critic(section, GroupNormalized())
    with pytest.raises(ConfigError, match=r"critic\.loss: clip must be positive, got 0"):
        build_value_loss(CriticSection(loss=Plugin(use="value", settings={"clip": 0})))
