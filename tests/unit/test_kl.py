"""KL estimators: published values and gradients, and whose KL their expected gradient is."""

import dataclasses

import pytest
import torch

from learners.batch import MicroBatch
from learners.kl import Estimator, KLPenalty
from learners.logprobs import TokenOutputs
from tests.loss_cases import gradient, outputs_of, rows_of


def _with_reference(rows: MicroBatch, ref: list[float]) -> MicroBatch:
    return dataclasses.replace(rows, ref_logprobs=torch.tensor(ref, dtype=torch.float64))


# TV-C8
@pytest.mark.parametrize(
    ("estimator", "x", "value", "slope"),
    [
        ("k2", 0.2, 0.02, 0.2),
        ("k2", -0.2, 0.02, -0.2),
        ("k3", 0.2, 0.018731, 0.181269),
        ("k3", -0.2, 0.021403, -0.221403),
        ("k3_plus", 0.2, 0.018731, 0.2),
        ("k3_plus", -0.2, 0.021403, -0.2),
    ],
)
def test_published_values(estimator: Estimator, x: float, value: float, slope: float) -> None:
    outputs = outputs_of([x])
    rows = _with_reference(rows_of([[0.0]]), [0.0])
    term = KLPenalty(estimator, coefficient=1.0).loss(rows, outputs)
    term.total.backward()
    assert term.total.item() == pytest.approx(value, abs=1e-6)
    assert gradient(outputs.logprobs) == pytest.approx([slope], abs=1e-6)


# TV-C8b
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k2", [0.230323, -0.214500, -0.015823]),
        ("k3_plus", [0.230323, -0.214500, -0.015823]),
        ("k1_reward", [0.230323, -0.214500, -0.015823]),
        ("k3", [0.212327, -0.249911, 0.037585]),  # that of the forward KL
    ],
)
def test_expected_gradient_over_all_tokens(estimator: Estimator, expected: list[float]) -> None:
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(-1)
    rows = _with_reference(rows_of([[0.0]] * 3), torch.tensor([0.2, 0.5, 0.3]).log().tolist())
    objective = KLPenalty(estimator, coefficient=1.0)
    total = torch.zeros((), dtype=torch.float64)
    for token in range(3):
        row = dataclasses.replace(
            _with_reference(rows_of([[0.0]]), []), ref_logprobs=rows.ref_logprobs[token][None]
        )
        zero = torch.zeros(1, dtype=torch.float64)
        outputs = TokenOutputs(logprobs[token][None], zero, zero)
        total = total + logprobs[token].exp().detach() * objective.loss(row, outputs).total
    total.backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx(expected, abs=1e-6)


def test_in_the_reward_a_token_answers_for_the_later_ones() -> None:
    outputs = outputs_of([0.1, 0.2, 0.3, 0.5])
    rows = _with_reference(rows_of([[0.0] * 3, [0.0]]), [0.0] * 4)
    KLPenalty("k1_reward", coefficient=1.0).loss(rows, outputs).total.backward()
    assert gradient(outputs.logprobs) == pytest.approx([0.6, 0.5, 0.3, 0.5])


@pytest.mark.parametrize("estimator", ["k2", "k3_plus", "k1_reward"])
def test_guided_tokens_have_no_part_in_it(estimator: Estimator) -> None:
    outputs = outputs_of([0.2, 0.4])
    rows = _with_reference(rows_of([[0.0], [0.0]], guided=[False, True]), [0.0, 0.0])
    term = KLPenalty(estimator, coefficient=1.0).loss(rows, outputs)
    term.total.backward()
    assert gradient(outputs.logprobs) == pytest.approx([0.2, 0.0])
    assert term.metrics["policy/reference_kl"].total.item() == pytest.approx(0.018731, abs=1e-6)
