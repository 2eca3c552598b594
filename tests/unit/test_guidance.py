"""Guided rows: published values of the shaped ratio, and plain rows left alone."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.config import LossConfig, ObjectiveSection
from cluster.errors import ConfigError
from learners.guidance import Factors, GuidedPolicyGradient
from learners.objectives import WeightedLosses
from tests.loss_cases import gradient, outputs_of, rows_of


# TV-B2
def test_published_gamma_loss_and_gradient_over_split_batches() -> None:
    objective = GuidedPolicyGradient()
    outputs = outputs_of([-1.0, -3.0, -0.5])
    rows = rows_of([[1.0] * 3], [[-0.5, -0.7, -0.6]], guided=[True])
    tables = [
        objective.survey(rows_of([[1.0]], [[rollout]], guided=[True]), outputs_of([value]))
        for rollout, value in ((-0.5, -1.0), (-0.7, -3.0), (-0.6, -0.5))
    ]
    plain = objective.survey(rows_of([[1.0]], [[-9.0]]), outputs_of([-1.0]))
    metrics = objective.begin(torch.cat([*tables, plain]))
    assert metrics["guide/gamma"] == pytest.approx(1.005443, abs=1e-6)
    term = objective.loss(rows, outputs)
    term.total.backward()
    assert term.total.item() == pytest.approx(-0.330189, abs=1e-6)
    assert gradient(outputs.logprobs) == pytest.approx([-0.078230, -0.027484, -0.083147], abs=1e-6)


# TV-B4
@pytest.mark.parametrize(
    ("ratio", "slope"), [(0.05, 0.045351), (0.5, 0.222222), (1.0, 0.25), (3.0, 0.1875)]
)
def test_a_guided_token_counts_at_most_a_quarter(ratio: float, slope: float) -> None:
    outputs = outputs_of([math.log(ratio)])
    GuidedPolicyGradient(gamma=1.0).loss(rows_of([[1.0]], guided=[True]), outputs).total.backward()
    assert gradient(outputs.logprobs) == pytest.approx([-slope], abs=1e-6)


# TV-F1
@pytest.mark.parametrize(
    ("logprob", "weight", "slope"),
    [
        (math.log(0.1), 0.5, 0.25),
        (-0.1, 0.900481, 0.089615),
        (-2.0, 0.575074, 0.244364),
        (-5.0, 0.063126, 0.059141),
    ],
)
def test_a_trace_whose_sampler_is_taken_for_certain(
    logprob: float, weight: float, slope: float
) -> None:
    """LUFFY's pi / (pi + .1) is the shaped ratio to a policy of probability 1."""
    outputs = outputs_of([logprob])
    term = GuidedPolicyGradient(gamma=0.1).loss(rows_of([[1.0]], guided=[True]), outputs)
    term.total.backward()
    assert term.total.item() == pytest.approx(-weight, abs=1e-6)
    assert gradient(outputs.logprobs) == pytest.approx([-slope], abs=1e-6)


def test_truncated_weights_and_plain_rows() -> None:
    objective = GuidedPolicyGradient(shaping="truncate", cap=1.0)
    outputs = outputs_of([math.log(r) for r in (0.5, 3.0, 1.35)])
    rows = rows_of([[1.0, 1.0], [1.0]], guided=[True, False])
    term = objective.loss(rows, outputs)
    term.total.backward()
    assert gradient(outputs.logprobs) == pytest.approx([-0.25, -0.5, 0.0])
    assert term.metrics["ratio/clip_fraction"].total.item() == 1, "the plain row alone is clipped"


def test_the_published_factors_of_one_ratio_are_logged_and_corrected_apart() -> None:
    """-1.0, -1.1, -0.6, -0.65 are 1.105171 x 0.606531 x 1.051271 = 0.704688."""
    rows = rows_of([[1.0]], [[-0.65]], guided=[True], proximal=[-1.1], sampled=[-0.6])
    logs = {"policy_step": 0.1, "context_shift": -0.5, "engine_age": 0.05}
    for factors, gamma in (("joint", math.exp(-0.35)), ("apart", math.exp(-0.5))):
        objective = GuidedPolicyGradient(factors=factors)
        metrics = objective.begin(objective.survey(rows, outputs_of([-1.0])))
        assert metrics == {"guide/gamma": pytest.approx(gamma, abs=1e-6)}
        term = objective.loss(rows, outputs_of([-1.0]))
        for name, value in logs.items():
            assert term.metrics[f"guide/log_{name}"].total.item() == pytest.approx(value, abs=1e-6)
    outputs = outputs_of([-1.0])
    objective.loss(rows, outputs).total.backward()
    weight = 0.5 * math.exp(0.05)  # f(shift) at gamma = shift, and the engine's factor
    assert gradient(outputs.logprobs) == pytest.approx([-weight * math.exp(0.1)], abs=1e-6)


def test_apart_the_policy_step_is_clipped_and_the_engine_factor_bounded() -> None:
    objective = GuidedPolicyGradient("truncate", "apart", cap=1.0, engine_cap=2.0)
    rows = rows_of(
        [[1.0, 1.0, -1.0]],
        [[-3.0, -3.0, -3.0]],
        guided=[True],
        proximal=[-1.0, -1.0, -1.0],
        sampled=[-0.5, -0.5, -0.5],
    )
    outputs = outputs_of([-1.0, -0.5, -0.5])
    term = objective.loss(rows, outputs)
    term.total.backward()
    weight = math.exp(-0.5) * 2.0 / 3  # shift . engine_cap / tokens of the sequence
    expected = [-weight, 0.0, weight * math.exp(0.5)]
    assert gradient(outputs.logprobs) == pytest.approx(expected, abs=1e-6)
    assert term.metrics["ratio/clip_fraction"].total.item() == 1


@pytest.mark.parametrize("factors", ["joint", "apart"])
def test_old_plain_rollouts_are_corrected_and_guided_ones_have_factors_of_their_own(
    factors: Factors,
) -> None:
    """TV-D1 on the plain row: w = e^.3 and the clip lies around the proximal policy."""
    rows = rows_of([[1.0], [1.0]], [[-1.3], [-1.3]], [True, False], None, None, [-1.0, -1.0])
    correction = {"level": "token", "action": "truncate", "high": 2.0}
    settings: list[dict[str, Any]] = [{}, {"ratio_to": "proximal", "correction": correction}]
    gradients: list[list[float]] = []
    for values in settings:
        outputs = outputs_of([-0.9, -0.9])
        objective = GuidedPolicyGradient("truncate", factors, **values)
        term = objective.loss(rows, outputs)
        term.total.backward()
        gradients.append(gradient(outputs.logprobs))
    assert term.metrics["ratio/rollout_weight_mean"] == (pytest.approx(math.exp(0.3)), 1)
    (guided, naive), (still, corrected) = gradients
    assert naive == 0.0
    assert corrected == pytest.approx(-1.491825, abs=1e-6)
    assert still == guided != 0.0


def test_the_shift_of_context_is_no_mismatch_of_the_engine() -> None:
    rows = rows_of([[1.0], [1.0]], [[-0.65], [-0.5]], guided=[True, False], sampled=[-0.6, 0.0])
    section = ObjectiveSection(losses={"policy": LossConfig(use="guide")})
    name = "ratio/mismatch_abs_mean"
    known = WeightedLosses(section).sums(rows, outputs_of([-3.0, -0.4])).means[name]
    assert known == (pytest.approx(0.05 + 0.1, abs=1e-6), 2)
    unknown = replace(rows, sampled_logprobs=None)
    found = WeightedLosses(ObjectiveSection()).sums(unknown, outputs_of([-3.0, -0.4])).means[name]
    assert found == (pytest.approx(0.1, abs=1e-6), 1), "what is not known dilutes no mean"


@pytest.mark.parametrize("factors", ["joint", "apart"])
@pytest.mark.parametrize(
    ("values", "is_surveyed"),
    [({}, True), ({"gamma": 1.0}, False), ({"shaping": "truncate"}, False)],
)
def test_only_a_quantile_takes_a_pass_over_the_whole_update(
    values: dict[str, Any], is_surveyed: bool, factors: Factors
) -> None:
    settings = {"factors": factors, **values}
    section = ObjectiveSection(losses={"policy": LossConfig(use="guide", settings=settings)})
    losses = WeightedLosses(section)
    assert losses.needs_survey is is_surveyed
    tables = losses.survey(rows_of([[1.0]], guided=[True]), outputs_of([-1.0]))
    assert tables.keys() == ({"policy"} if is_surveyed else set())


@pytest.mark.parametrize("values", [{"factors": "both"}, {"engine_cap": 0.0}, {"gamma": -1.0}])
def test_wrong_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        GuidedPolicyGradient(**values)


def test_losses_that_misread_a_stripped_hint_are_refused_by_name() -> None:
    uses = {"a": "cispo", "b": "guide", "c": "siren", "d": "kl", "e": "entropy_advantage"}
    section = ObjectiveSection(losses={name: LossConfig(use=use) for name, use in uses.items()})
    with pytest.raises(ConfigError) as refused:
        WeightedLosses(section).require_guided()
    named = [line.partition(" would")[0] for line in str(refused.value).splitlines()]
    assert named == ["objective.losses.a: cispo", "objective.losses.e: entropy_advantage"]
