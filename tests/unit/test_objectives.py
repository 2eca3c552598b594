"""Objectives: published values, aggregation, and the loss that does not depend on micro-batches."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.config import LossConfig, ObjectiveSection
from cluster.errors import ConfigError
from learners.batch import MicroBatch, Row
from learners.logprobs import TokenOutputs
from learners.mismatch import WEIGHT, WEIGHT_SQUARE
from learners.objectives import LossTerm, WeightedLosses
from learners.surrogates import PolicyGradient


def _rows(advantages: list[list[float]]) -> MicroBatch:
    """Sequences of one context token whose rollout log-probs are 0."""
    return MicroBatch.pack(
        [
            Row(
                context=np.zeros(1, dtype=np.int32),
                completion=np.zeros(len(values), dtype=np.int32),
                loss_mask=np.ones(len(values), dtype=bool),
                rollout_logprobs=np.zeros(len(values), dtype=np.float32),
                advantages=np.array(values, dtype=np.float32),
            )
            for values in advantages
        ]
    )


def _at_ratios(ratios: list[float]) -> Tensor:
    return torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()


def _loss(objective: PolicyGradient, rows: MicroBatch, logprobs: Tensor) -> LossTerm:
    return objective.loss(rows, _outputs(logprobs))


def _outputs(logprobs: Tensor, entropy: Tensor | None = None) -> TokenOutputs:
    zeros = torch.zeros_like(logprobs)
    return TokenOutputs(logprobs, zeros if entropy is None else entropy, zeros)


# TV-C3
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.35, 1.0, -1.28, 0.0),
        (0.7, -1.0, 0.8, 0.0),
        (5.0, -1.0, 3.0, 0.0),  # dual clip
        (1.35, -1.0, 1.35, 1.35),
        (0.7, 1.0, -0.7, -0.7),
    ],
)
def test_published_clip_values(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    logprobs = _at_ratios([ratio])
    term = _loss(PolicyGradient(dual_clip=3.0), _rows([[advantage]]), logprobs)
    term.total.backward()
    assert term.total.item() == pytest.approx(loss)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(gradient)


# TV-AGG
@pytest.mark.parametrize(
    ("objective", "mean"),
    [
        (PolicyGradient(), 10 / 6),
        (PolicyGradient(aggregation="seq_mean_token_mean"), 1.5),
        (PolicyGradient(aggregation="constant", constant=8), 0.625),
    ],
)
def test_published_aggregation_values(objective: PolicyGradient, mean: float) -> None:
    rows = _rows(
        [[-1.0, -1.0], [-2.0, -2.0, -2.0, -2.0]]
    )  # at ratio 1 the token loss is -advantage
    total = _loss(objective, rows, _at_ratios([1.0] * 6)).total.item()
    count = rows.num_loss_tokens if objective.denominator == "tokens" else rows.num_sequences
    assert total / count == pytest.approx(mean)


# TV-G2
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_splitting_into_microbatches_changes_nothing(aggregation: str) -> None:
    """Two tokens of loss 1 and eight of loss 3: exact 2.6; the mean of means would be 2.0."""
    losses = WeightedLosses(
        ObjectiveSection(
            losses={
                "policy": LossConfig(use="policy_gradient", settings={"aggregation": aggregation})
            }
        )
    )
    parts = [[[-1.0, -1.0]], [[-3.0] * 8]]
    sums, counts = 0.0, 0
    for part in parts:
        rows = _rows(part)
        logprobs = _at_ratios([1.0] * rows.num_loss_tokens)
        sums += losses.sums(rows, _outputs(logprobs)).total.item()
        counts += (
            rows.num_loss_tokens if losses.common_denominator == "tokens" else rows.num_sequences
        )
    assert sums / counts == pytest.approx(2.6 if aggregation == "token_mean" else 2.0)


def test_losses_add_up_with_weights_and_mismatch_is_measured() -> None:
    section = ObjectiveSection(
        losses={
            "main": LossConfig(use="policy_gradient"),
            "other": LossConfig(use="policy_gradient", settings={"clip_high": 0.0}, weight=0.5),
        }
    )
    logprobs = _at_ratios([1.2, 0.9])
    entropy = torch.tensor([0.4, 0.6])
    found = WeightedLosses(section).sums(_rows([[1.0, 1.0]]), _outputs(logprobs, entropy))
    assert found.losses["main"].item() == pytest.approx(-2.1)
    assert found.losses["other"].item() == pytest.approx(-1.9)
    assert found.total.item() == found.losses["total"].item() == pytest.approx(-2.1 - 0.95)
    gaps = np.log([1.2, 0.9])
    sums = {name: mean.total.item() for name, mean in found.means.items()}
    assert sums["ratio/mismatch_abs_mean"] == pytest.approx(np.abs(gaps).sum())
    assert sums["ratio/mismatch_kl"] == pytest.approx((np.exp(gaps) - 1 - gaps).sum())
    assert sums["policy/entropy"] == pytest.approx(1.0)
    assert sums["ratio/clip_fraction"] == 0
    assert sums["ratio/clip_fraction/other"] == 1, "1.2 is above 1"
    tensors = [*found.losses.values(), *(mean.total for mean in found.means.values())]
    assert not any(value.requires_grad for value in tensors)


def test_mismatch_of_three_tokens() -> None:
    """TV-D5: log-ratios .1, -.2, .05 of proximal to rollout."""
    logprobs = _at_ratios([math.exp(gap) for gap in (0.1, -0.2, 0.05)])
    found = WeightedLosses(ObjectiveSection()).sums(_rows([[1.0] * 3]), _outputs(logprobs))
    mean = {name: (mean.total / mean.count).item() for name, mean in found.means.items()}
    assert mean["ratio/mismatch_k1"] == pytest.approx(0.016667, abs=1e-6)
    assert math.exp(mean["ratio/mismatch_k1"]) == pytest.approx(1.016806, abs=1e-6)
    assert mean["ratio/mismatch_kl"] == pytest.approx(0.008391, abs=1e-6)
    assert mean["ratio/mismatch_probability_error"] == pytest.approx(1.125948, abs=1e-6)
    assert mean[WEIGHT_SQUARE] - 1 == pytest.approx(-0.001035, abs=1e-6)  # chi2
    ess = mean[WEIGHT] ** 2 / mean[WEIGHT_SQUARE]
    assert ess == pytest.approx(0.984536, abs=1e-6)


def test_no_tokens_give_zero_with_a_graph() -> None:
    logprobs = torch.zeros(0, requires_grad=True)
    found = WeightedLosses(ObjectiveSection()).sums(_rows([]), _outputs(logprobs))
    found.total.backward()
    assert found.total.item() == found.largest_gap.item() == 0.0
    assert {float(value) for value in found.losses.values()} == {0.0}
    assert {float(number) for mean in found.means.values() for number in mean} == {0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_low": 1.5}, r"clip_low must be in \[0, 1\)"),
        ({"dual_clip": 0.5}, "dual_clip must be above 1"),
        ({"aggregation": "mean"}, "aggregation must be one of"),
        ({"aggregation": "constant"}, "constant must be a positive number"),
        ({"constant": 8}, "constant must be a positive number"),
        ({"clip_hi": 0.2}, "did you mean 'clip_high'"),
    ],
)
def test_wrong_settings_name_the_knob(settings: dict[str, object], message: str) -> None:
    section = ObjectiveSection(
        losses={"policy": LossConfig(use="policy_gradient", settings=settings)}
    )
    with pytest.raises(ConfigError, match=rf"objective\.losses\.policy.*{message}"):
        WeightedLosses(section)


def test_losses_with_different_denominators_are_each_divided_by_their_own() -> None:
    section = ObjectiveSection(
        losses={
            "a": LossConfig(use="policy_gradient"),
            "b": LossConfig(use="policy_gradient", settings={"aggregation": "seq_mean_token_mean"}),
        }
    )
    losses = WeightedLosses(section)
    assert losses.common_denominator is None
    rows = _rows([[-1.0, -1.0], [-2.0, -2.0, -2.0, -2.0]])
    found = losses.sums(rows, _outputs(_at_ratios([1.0] * 6)), {"tokens": 6, "sequences": 2})
    assert found.total.item() == pytest.approx(10 / 6 + 1.5)
    assert found.losses["b"].item() == pytest.approx(1.5)
