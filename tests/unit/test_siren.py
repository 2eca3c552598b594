"""SIREN: published values, the anchor, and a gradient that splitting does not change."""

import math
from dataclasses import replace

import pytest
import torch

from learners.logprobs import token_outputs
from learners.nucleus import Nucleus
from learners.siren import Siren
from tests.loss_cases import gradient, outputs_of, rows_of

FIRST, SECOND = [0.1, 0.9, 0.3, 0.7, 0.2], [0.4, 0.6, 0.0, 0.2]


def _run(siren: Siren, sequences: list[list[float]], guided: list[bool] | None = None):
    """(total / B, reported / B, gradient * B) after a survey of all sequences together."""
    rows = rows_of([[0.0] * len(values) for values in sequences], guided=guided)
    flat = [value for values in sequences for value in values]
    outputs = outputs_of([0.0] * len(flat), nucleus_entropy=flat)
    metrics = siren.begin(siren.survey(rows, outputs))
    term = siren.loss(rows, outputs)
    (term.total / rows.num_sequences).backward()
    assert term.reported is not None
    return metrics, term.reported.item() / rows.num_sequences, gradient(outputs.nucleus_entropy)


# TV-A3
def test_published_loss_and_gradient() -> None:
    metrics, penalty, slope = _run(Siren(anchor=0.5), [FIRST, SECOND])
    assert metrics == pytest.approx({"siren/peak_entropy": 0.75, "siren/anchor": 0.5})
    assert penalty == pytest.approx(3.125e-4)
    assert slope == pytest.approx([0, 0.00125, 0, 0, 0, 0, 0.00125, 0, 0])


# TV-A3
def test_a_sequence_without_peaks_counts_as_zero() -> None:
    _, penalty, slope = _run(Siren(anchor=0.5), [FIRST, SECOND, [0.3, 0.3, 0.3]])
    assert penalty == pytest.approx(0.0, abs=1e-12)
    assert slope == pytest.approx([0.0] * 12, abs=1e-12)


# TV-A2
@pytest.mark.parametrize(
    ("entropies", "peaks"),
    [
        (FIRST, [1]),
        (SECOND, [1]),
        ([0, 0, 0, 0, 0.5, 0], [4]),
        ([0.3, 0.3, 0.3], []),
        ([0.4], []),
        ([float(i % 36) for i in range(36)], [29, 30, 31, 32, 33, 34, 35]),  # .8 * 35 = 28 exactly
    ],
)
def test_published_peaks(entropies: list[float], peaks: list[int]) -> None:
    rows = rows_of([[0.0] * 2, [0.0] * len(entropies), [0.0]])
    outputs = outputs_of([0.0] * (3 + len(entropies)), nucleus_entropy=[9.0, 9.0, *entropies, 9.0])
    siren = Siren(anchor=0.0)
    siren.begin(siren.survey(rows, outputs))
    siren.loss(rows, outputs).total.backward()
    inner = gradient(outputs.nucleus_entropy)[2:-1]
    assert [i for i, slope in enumerate(inner) if slope != 0] == peaks


def test_peaks_of_a_nearly_certain_sequence_are_its_forks() -> None:
    """All other tokens tie at exactly 0, rounding included; without a fork there is no peak."""
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = torch.linspace(8, 12, 20)
    labels, temperature = torch.zeros(20).long(), torch.ones(20)
    for forks in ([4, 11], []):
        for fork in forks:
            logits[fork, 5] = logits[fork, 3]
        outputs = token_outputs(logits, torch.eye(30), labels, temperature, Nucleus())
        peaks = Siren().is_peak(rows_of([[0.0] * 20]), outputs)
        assert peaks.nonzero().flatten().tolist() == forks
        logits[:, 5] = 0.0


# TV-G3
def test_gradient_of_split_batches_is_that_of_the_square_of_the_whole() -> None:
    """Three sequences with entropies sin 2w + .5, cos 1.5w, w^2 + .1 at w = .3."""
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    entropies = [torch.sin(2 * w) + 0.5, torch.cos(1.5 * w), w.square() + 0.1]
    siren = Siren(beta=0.005, anchor=0.6, peak_quantile=0.0)
    parts = [
        (rows_of([[0.0]]), outputs_of([0.0])._replace(nucleus_entropy=entropy[None]))
        for entropy in entropies
    ]
    siren.begin(torch.cat([siren.survey(rows, outputs) for rows, outputs in parts]))
    for rows, outputs in parts:
        (siren.loss(rows, outputs).total / 3).backward(retain_graph=True)
    assert w.grad is not None
    assert w.grad.item() == pytest.approx(6.305692e-4, rel=1e-6)


def test_the_anchor_is_the_first_updates_plain_entropy_and_stays() -> None:
    siren = Siren()
    assert math.isnan(siren.state()[0])
    metrics, penalty, _ = _run(siren, [FIRST, SECOND], guided=[False, True])
    assert metrics["siren/anchor"] == pytest.approx(0.9)
    assert penalty == pytest.approx(0.005 * (0.75 - 0.9) ** 2)
    metrics, _, _ = _run(siren, [SECOND])
    assert metrics["siren/anchor"] == pytest.approx(0.9)
    resumed = Siren()
    resumed.restore(siren.state())
    assert _run(resumed, [SECOND])[0] == metrics


def test_the_anchor_of_a_step_of_several_updates_is_that_of_all_of_them() -> None:
    siren = Siren()
    parts = [rows_of([[0.0] * len(values)]) for values in (FIRST, SECOND)]
    outputs = [outputs_of([0.0] * len(v), nucleus_entropy=v) for v in (FIRST, SECOND)]
    tables = [siren.survey(*part) for part in zip(parts, outputs, strict=True)]
    assert siren.needs_anchor
    siren.anchor(torch.cat(tables))
    assert not siren.needs_anchor
    for table, entropy in zip(tables, (0.9, 0.6), strict=True):
        expected = {"siren/peak_entropy": entropy, "siren/anchor": 0.75}
        assert siren.begin(table) == pytest.approx(expected)


def test_an_entropy_that_is_no_number_is_no_anchor() -> None:
    siren = Siren()
    _run(siren, [[math.nan] * 5])
    assert siren.needs_anchor
    assert _run(siren, [FIRST])[0]["siren/anchor"] == pytest.approx(0.9)


def test_a_hint_that_the_learner_still_sees_is_not_in_the_anchor() -> None:
    rows = rows_of([[0.0] * len(values) for values in (FIRST, SECOND)])
    rows = replace(rows, is_hinted=rows.sequence_ids == 1)
    outputs = outputs_of([0.0] * 9, nucleus_entropy=[*FIRST, *SECOND])
    siren = Siren()
    metrics = siren.begin(siren.survey(rows, outputs))
    assert metrics == pytest.approx({"siren/peak_entropy": 0.75, "siren/anchor": 0.9})


def test_only_guided_rows_leave_the_anchor_open_and_no_rows_give_zero() -> None:
    siren = Siren()
    metrics, penalty, slope = _run(siren, [FIRST], guided=[True])
    assert "siren/anchor" not in metrics
    assert penalty == 0.0
    assert slope == [0.0] * 5
    rows, outputs = rows_of([]), outputs_of([])
    assert siren.begin(siren.survey(rows, outputs)) == {}
    term = siren.loss(rows, outputs)
    term.total.backward()
    assert term.total.item() == 0.0
