"""Guided rows: published values of the shaped ratio, and plain rows left alone."""

import math

import pytest
import torch

from learners.guidance import GuidedPolicyGradient
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
    metrics = objective.begin(torch.cat([t for t in [*tables, plain] if t is not None]))
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


def test_truncated_weights_and_plain_rows() -> None:
    objective = GuidedPolicyGradient(shaping="truncate", cap=1.0)
    assert not objective.needs_survey
    outputs = outputs_of([math.log(r) for r in (0.5, 3.0, 1.35)])
    rows = rows_of([[1.0, 1.0], [1.0]], guided=[True, False])
    term = objective.loss(rows, outputs)
    term.total.backward()
    assert gradient(outputs.logprobs) == pytest.approx([-0.25, -0.5, 0.0])
    assert term.metrics["ratio/clip_fraction"].item() == 1, "the plain row alone is clipped"
