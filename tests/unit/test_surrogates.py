"""Surrogates and off-policy corrections: the published values, and what may not change them."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import LossConfig, ObjectiveSection
from cluster.errors import ConfigError
from learners.objectives import WeightedLosses
from learners.off_policy import RolloutCorrection, base_logprobs
from learners.surrogates import (
    ClippedImportance,
    GeometricMean,
    PolicyGradient,
    SequencePolicyGradient,
    SoftAdaptive,
)
from tests.loss_cases import gradient, outputs_of, rows_of


# TV-C4
@pytest.mark.parametrize(
    ("logs", "advantage", "loss", "slope"),
    [
        ([0.02, -0.01, 0.005], 1.0, -1.0004, 0.0),
        ([0.02, -0.01, 0.005], -1.0, 1.0050125, 1.0050125 / 3),
        ([0.002, -0.001, -0.0001], 1.0, -1.0003000, -0.333433),
    ],
)
def test_gspo(logs: list[float], advantage: float, loss: float, slope: float) -> None:
    outputs = outputs_of(logs)
    term = SequencePolicyGradient(ratio_to="rollout").loss(rows_of([[advantage] * 3]), outputs)
    term.total.backward()
    assert term.total.item() == pytest.approx(loss, abs=1e-6)
    assert gradient(outputs.logprobs) == pytest.approx([slope] * 3, abs=1e-6)


# TV-G4
def test_gspo_counts_each_sequence_once() -> None:
    """Lengths 2 and 8, s = 1, A = +1 and -1: 0; a token mean would give .6."""
    rows = rows_of([[1.0] * 2, [-1.0] * 8])
    objective = SequencePolicyGradient()
    assert objective.denominator == "sequences"
    assert objective.loss(rows, outputs_of([0.0] * 10)).total.item() == pytest.approx(0.0)


# TV-C5
@pytest.mark.parametrize(
    ("settings", "mean"), [({"cap": 5.0}, 5.833333), ({"cap": 1.2, "floor": 0.8}, 2.133333)]
)
def test_cispo(settings: dict[str, float], mean: float) -> None:
    logprobs = [-1.0, -2.0, -3.0]
    rollout = [value - math.log(r) for value, r in zip(logprobs, [0.5, 1.0, 6.0], strict=True)]
    outputs = outputs_of(logprobs)
    term = ClippedImportance(**settings).loss(rows_of([[1.0] * 3], [rollout]), outputs)
    term.total.backward()
    assert term.total.item() / 3 == pytest.approx(mean, abs=1e-5)
    weights = [min(max(r, settings.get("floor", 0)), settings["cap"]) for r in (0.5, 1.0, 6.0)]
    assert gradient(outputs.logprobs) == pytest.approx([-w for w in weights], abs=1e-5)


# TV-C6
@pytest.mark.parametrize(
    ("logs", "advantage", "loss"),
    [
        ([0.5, -0.1], 1.0, -1.161834),
        ([0.5, -0.1], -1.0, 1.221403),
        ([0.5, -0.5], 1.0, -0.951229),
        ([0.5, -0.5], -1.0, 1.051271),
    ],
)
def test_gmpo(logs: list[float], advantage: float, loss: float) -> None:
    outputs = outputs_of(logs)
    term = GeometricMean().loss(rows_of([[advantage] * 2]), outputs)
    term.total.backward()
    assert term.total.item() == pytest.approx(loss, abs=1e-6)
    is_clipped = [log > 0.4 if advantage > 0 else log < -0.4 for log in logs]
    assert gradient(outputs.logprobs) == pytest.approx(
        [0.0 if clipped else loss / 2 for clipped in is_clipped], abs=1e-6
    )


# TV of C.7
@pytest.mark.parametrize(
    ("ratio", "advantage", "gate"),
    [(1.3, 1.0, 2.297770), (1.3, -1.0, 2.202306), (1.0, 1.0, 2.0), (1.0, -1.0, 2 / 1.05)],
)
def test_sapo(ratio: float, advantage: float, gate: float) -> None:
    outputs = outputs_of([math.log(ratio)])
    term = SoftAdaptive().loss(rows_of([[advantage]]), outputs)
    term.total.backward()
    assert term.total.item() == pytest.approx(-gate * advantage, abs=1e-6)
    [slope] = gradient(outputs.logprobs)
    if ratio == 1.0:
        assert slope == pytest.approx(-advantage, abs=1e-6), "that of the plain policy gradient"
    else:
        assert 0 < -slope * advantage < ratio, "it fades"


# TV-D1
def test_decoupled_and_naive_ppo() -> None:
    """l = -.9, proximal -1, rollout -1.3: decoupled keeps its gradient, naive is clipped."""
    rows = dataclasses.replace(
        rows_of([[1.0]], [[-1.3]]), proximal_logprobs=torch.tensor([-1.0], dtype=torch.float64)
    )
    outputs = outputs_of([-0.9])
    decoupled = PolicyGradient(
        0.2, 0.2, ratio_to="proximal", correction={"action": "truncate", "high": 5.0}
    )
    term = decoupled.loss(rows, outputs)
    term.total.backward()
    assert term.total.item() == pytest.approx(-1.491825, abs=1e-6)
    assert gradient(outputs.logprobs) == pytest.approx([-1.491825], abs=1e-6)
    outputs = outputs_of([-0.9])
    term = PolicyGradient(0.2, 0.2).loss(rows, outputs)
    term.total.backward()
    assert term.total.item() == pytest.approx(-1.2)
    assert gradient(outputs.logprobs) == [0.0]


# TV-D3
def test_interpolated_proximal_policy() -> None:
    """l = -.9, rollout -1.3, two versions old: proximal -1.033333, r = e^.133333, w = e^.266667."""
    rows = rows_of([[1.0]], [[-1.3]], ages=[2.0])
    outputs = outputs_of([-0.9])
    [base] = base_logprobs(rows, outputs, "interpolated").tolist()
    assert base == pytest.approx(-1.033333, abs=1e-6)
    correction = {"action": "truncate", "high": 5.0}
    for clip_high, loss, slope in [
        (0.2, -math.exp(0.4), -math.exp(0.4)),
        (0.1, -1.1 * math.exp(0.4 * 2 / 3), 0.0),
    ]:
        outputs = outputs_of([-0.9])
        objective = PolicyGradient(0.2, clip_high, ratio_to="interpolated", correction=correction)
        assert not objective.needs_proximal
        term = objective.loss(rows, outputs)
        term.total.backward()
        assert term.total.item() == pytest.approx(loss, abs=1e-6)
        assert gradient(outputs.logprobs) == pytest.approx([slope], abs=1e-6)


@given(st.floats(-5, 0), st.floats(-5, 0), st.integers(0, 1000))
def test_the_interpolated_policy_lies_between_rollout_and_learner(
    rollout: float, learner: float, age: int
) -> None:
    """It is the rollout policy at age 0, and one part in age + 1 from the learner."""
    outputs = outputs_of([learner])
    base = base_logprobs(rows_of([[1.0]], [[rollout]], ages=[age]), outputs, "interpolated").item()
    assert not base_logprobs(rows_of([[1.0]]), outputs, "interpolated").requires_grad
    assert base == pytest.approx(learner + (rollout - learner) / (age + 1), abs=1e-5)


def test_what_needs_the_proximal_policy_says_so() -> None:
    """And one that did not cannot read it after the first update of a step."""
    assert not PolicyGradient().needs_proximal
    assert PolicyGradient(ratio_to="proximal").needs_proximal
    assert PolicyGradient(token_filter={"use": "second_moment"}).needs_proximal
    assert not PolicyGradient(token_filter={"use": "forking_tokens"}).needs_proximal
    rows = dataclasses.replace(rows_of([[1.0]]), is_later_update=True)
    with pytest.raises(ValueError, match="needs_proximal"):
        PolicyGradient(ratio_to="proximal").loss(rows, outputs_of([0.0]))


def _weights(correction: RolloutCorrection, logs: list[list[float]]) -> list[float]:
    rows = rows_of([[1.0] * len(row) for row in logs], [[-value for value in row] for row in logs])
    outputs = outputs_of([0.0] * sum(len(row) for row in logs))
    base = outputs.logprobs.detach()
    weights, metrics = correction.weights(rows, base, torch.ones_like(rows.is_guided))
    assert not weights.requires_grad
    assert set(metrics) == {"ratio/rollout_weight_mean", "ratio/corrected_fraction"}
    return weights.tolist()


# TV-D4, TV-D5, TV-D6
@pytest.mark.parametrize(
    ("correction", "logs", "expected"),
    [
        (RolloutCorrection(high=2.0), [[1.0, -1.0, 0.5]], [2.0, 0.367879, 1.648721]),
        (RolloutCorrection(action="mask", low=0.5, high=5.0), [[1.0, -1.0, 0.5, 2.0]],
         [2.718282, 0.0, 1.648721, 0.0]),
        (RolloutCorrection(action="mask", low=0.5, high=5.0),
         [[math.log(w) for w in (0.3, 0.6, 1.5, 1.9, 3.0)]], [0.0, 0.6, 1.5, 1.9, 3.0]),
        (RolloutCorrection(level="sequence", high=2.0), [[0.1, -0.2, 0.05], [2.0]],
         [0.951229, 0.951229, 0.951229, 2.0]),
        (RolloutCorrection(level="sequence", action="mask", high=3.0), [[1.0, 1.0], [0.5]],
         [0.0, 0.0, 1.648721]),
        (RolloutCorrection(level="geometric", action="mask", low=0.999, high=1.002),
         [[0.004, -0.002, 0.001], [0.1, -0.2, 0.05]],
         [1.004008, 0.998002, 1.0010005, 0.0, 0.0, 0.0]),
    ],
)  # fmt: skip
def test_weights(
    correction: RolloutCorrection, logs: list[list[float]], expected: list[float]
) -> None:
    assert _weights(correction, logs) == pytest.approx(expected, abs=1e-5)


# TV-D6
def test_a_rejected_token_stays_in_the_denominator() -> None:
    """Token losses 1, 2, 3, 4 with the third rejected: 7 / 4 and not 7 / 3."""
    rows = rows_of([[-1.0, -2.0, -3.0, -4.0]], [[0.0, 0.0, -5.0, 0.0]])
    objective = PolicyGradient(
        ratio_to="proximal", correction={"action": "mask", "low": 0.5, "high": 5.0}
    )
    assert objective.loss(rows, outputs_of([0.0] * 4)).total.item() == pytest.approx(7.0)
    assert objective.denominator == "tokens"


def test_old_tokens_count_less() -> None:
    rows = rows_of([[1.0], [1.0]], ages=[0.0, 4.0])
    everywhere = torch.ones_like(rows.is_guided)
    correction = RolloutCorrection(age_halflife=2.0)
    weights, _ = correction.weights(rows, torch.zeros(2), everywhere)
    assert weights.tolist() == pytest.approx([1.0, 0.25])


@pytest.mark.parametrize(
    ("use", "settings", "message"),
    [
        ("policy_gradient", {"ratio_to": "old"}, "ratio_to must be"),
        ("policy_gradient", {"correction": {}}, "needs ratio_to=proximal"),
        ("policy_gradient", {"ratio_to": "proximal", "correction": {"level": "row"}},
         "correction.level must be"),
        ("policy_gradient", {"ratio_to": "proximal", "correction": {"cap": 2}}, "cap"),
        ("gspo", {"aggregation": "token_mean"}, "unknown setting"),
        ("gspo", {"clip_low": -1}, "clip_low must be"),
        ("cispo", {"cap": 0.5}, "floor <= 1 <= cap"),
        ("gmpo", {"clip_high": -0.4}, "must be >= 0"),
        ("sapo", {"tau_negative": 0.0}, "must be positive"),
        ("kl", {"estimator": "k1"}, "zero expected gradient"),
        ("siren", {"peak_quantile": 1.0}, "peak_quantile must be"),
        ("siren", {"nucleus_rule": "both"}, "nucleus rule must be"),
        ("policy_gradient", {"token_filter": {"use": "forking"}}, "did you mean 'forking_tokens'"),
        ("guide", {"shaping": "none"}, "shaping must be"),
        ("kl", {"coefficient": "much"}, "settings.coefficient: must be a number, got 'much'"),
        ("siren", {"beta": -0.1}, "beta must be >= 0"),
    ],
)  # fmt: skip
def test_wrong_settings_name_the_knob(use: str, settings: dict, message: str) -> None:
    section = ObjectiveSection(losses={"policy": LossConfig(use=use, settings=settings)})
    with pytest.raises(ConfigError, match=message):
        WeightedLosses(section)
