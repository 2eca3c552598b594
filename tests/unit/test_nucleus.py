"""Nucleus entropy: published values of both rules, exact chunked gradients, large vocabularies."""

import pytest
import torch
from torch import Tensor

from learners.logprobs import token_outputs
from learners.nucleus import Nucleus, NucleusRule

HIDDEN = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]  # TV-G1 of the algorithms sheet
HEAD = [[2.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 0.5], [0.0, -1.0]]


def _of_distribution(p: list[float], rule: NucleusRule) -> tuple[float, list[float]]:
    """Nucleus entropy and its gradient in the logits, of one row whose logits are log p."""
    logits = torch.tensor([p], dtype=torch.float64).log().requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    head = torch.eye(len(p), dtype=torch.float64)
    outputs = token_outputs(logits, head, torch.tensor([0]), one, Nucleus(0.8, rule))
    outputs.nucleus_entropy.sum().backward()
    assert logits.grad is not None
    return outputs.nucleus_entropy.item(), logits.grad[0].tolist()


# TV-A1
@pytest.mark.parametrize(
    ("p", "rule", "entropy", "gradient"),
    [
        ([0.5, 0.25, 0.15, 0.07, 0.03], "crossing_out", 0.636514, [-0.154033, 0.154033, 0, 0, 0]),
        ([0.5, 0.25, 0.15, 0.07, 0.03], "crossing_in", 0.980990,
         [-0.218446, 0.083318, 0.135128, 0, 0]),
        ([0.6, 0.25, 0.10, 0.03, 0.02], "crossing_out", 0.0, [0, 0, 0, 0, 0]),
        ([0.6, 0.25, 0.10, 0.03, 0.02], "crossing_in", 0.605797, [-0.181758, 0.181758, 0, 0, 0]),
        ([0.85, 0.05, 0.05, 0.03, 0.02], "crossing_out", 0.0, [0, 0, 0, 0, 0]),
        ([0.85, 0.05, 0.05, 0.03, 0.02], "crossing_in", 0.0, [0, 0, 0, 0, 0]),
        ([0.6, 0.4], "crossing_out", 0.0, [0, 0]),
        ([0.6, 0.4], "crossing_in", 0.673012, [-0.097312, 0.097312]),
    ],
)  # fmt: skip
def test_published_values_of_both_rules(
    p: list[float], rule: NucleusRule, entropy: float, gradient: list[float]
) -> None:
    value, slope = _of_distribution(p, rule)
    assert value == pytest.approx(entropy, abs=1e-6)
    assert slope == pytest.approx(gradient, abs=1e-6)


def _case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.tensor(HIDDEN, dtype=torch.float64, requires_grad=True)
    head = torch.tensor(HEAD, dtype=torch.float64, requires_grad=True)
    return hidden, head, torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.float64)


# TV-G1
@pytest.mark.parametrize("chunk_rows", [1, 2, 3])
def test_published_values_and_gradients_for_any_chunk(chunk_rows: int) -> None:
    hidden, head, labels, temperature = _case()
    outputs = token_outputs(hidden, head, labels, temperature, Nucleus(0.8), chunk_rows)
    assert outputs.logprobs.tolist() == pytest.approx([-0.523744, -1.574438, -1.141631], abs=1e-6)
    assert outputs.entropy.tolist() == pytest.approx([1.150741, 1.206489, 1.254846], abs=1e-6)
    assert outputs.nucleus_entropy.tolist() == pytest.approx(
        [0.582203, 0.905959, 1.098612], abs=1e-6
    )
    outputs.nucleus_entropy.sum().backward()
    assert hidden.grad is not None
    assert head.grad is not None
    assert hidden.grad.flatten().tolist() == pytest.approx(
        [-0.196612, 0.196612, -0.019318, -0.351772, 0, 0], abs=1e-6
    )
    assert head.grad.flatten().tolist() == pytest.approx(
        [-0.196612, 0, 0.196612, 0.129118, 0, -0.277554, 0, 0.148436, 0, 0], abs=1e-6
    )


@pytest.mark.parametrize("rule", ["crossing_in", "crossing_out"])
@pytest.mark.parametrize("sharpness", [0.02, 0.5, 3.0])
def test_a_large_vocabulary_equals_the_sorted_dense_computation(
    rule: NucleusRule, sharpness: float
) -> None:
    """Flat distributions need several looks, sharp ones one; both give what a full sort gives."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator, dtype=torch.float64) * sharpness
    head = torch.randn(3000, 16, generator=generator, dtype=torch.float64)
    weights = torch.linspace(-1, 1, 7).double()
    labels, temperature = torch.zeros(7).long(), torch.full((7,), 0.8, dtype=torch.float64)

    def run(dense: bool) -> tuple[Tensor, Tensor, Tensor]:
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if not dense:
            outputs = token_outputs(h, w, labels, temperature, Nucleus(0.8, rule), 3)
            entropy = outputs.nucleus_entropy
        else:
            p = (h @ w.T / temperature[:, None]).softmax(-1)
            ordered = p.sort(descending=True).values
            reached = ordered.cumsum(-1)
            kept = (reached if rule == "crossing_out" else reached - ordered) < 0.8
            q = torch.where(kept, ordered, 0.0)
            q = q / q.sum(-1, keepdim=True).clamp(min=1e-300)
            entropy = -torch.where(q > 0, q * q.clamp(min=1e-300).log(), 0.0).sum(-1)
        return entropy.detach(), *torch.autograd.grad(weights @ entropy, (h, w))

    for ours, theirs in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_gradcheck_of_all_three_outputs() -> None:
    hidden, head, labels, temperature = _case()
    hidden = (hidden.detach() + torch.tensor([[0.0, 0.1]])).requires_grad_()  # away from ties

    def run(hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        return tuple(token_outputs(hidden, head, labels, temperature, Nucleus(0.8), 2))

    assert torch.autograd.gradcheck(run, (hidden, head))


def test_a_nucleus_of_one_token_has_exactly_no_entropy_and_no_gradient() -> None:
    """In float32 the exact 0 is a difference of two rounded numbers."""
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = torch.linspace(7, 14, 64)  # from 9 in 10 on
    logits.requires_grad_()
    labels, temperature = torch.zeros(64).long(), torch.ones(64)
    entropy = token_outputs(
        logits, torch.eye(50), labels, temperature, Nucleus(0.8)
    ).nucleus_entropy
    assert entropy.tolist() == [0.0] * 64
    [slope] = torch.autograd.grad(entropy.sum(), logits)
    assert not slope.any()


@pytest.mark.parametrize("settings", [{"mass": 0.0}, {"mass": 1.5}, {"rule": "both"}])
def test_wrong_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="nucleus"):
        Nucleus(**settings)


@pytest.mark.parametrize("mass", [1.0, 0.9999999])
@pytest.mark.parametrize("rule", ["crossing_in", "crossing_out"])
def test_a_nucleus_of_all_mass_has_the_full_entropy_in_chunks_of_any_size(
    mass: float, rule: NucleusRule
) -> None:
    """Sums of float32 may end below 1, so that no bin crosses the mass."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(1 + 128 * (seed % 2), 8, generator=generator)
        head = 0.1 * torch.randn(259 + 741 * (seed % 3), 8, generator=generator)
        labels, temperature = torch.zeros(len(hidden)).long(), torch.ones(len(hidden))
        outputs = token_outputs(hidden, head, labels, temperature, Nucleus(mass, rule))
        torch.testing.assert_close(outputs.nucleus_entropy, outputs.entropy, rtol=0, atol=1e-2)
    even = torch.full((2, 1000), 1e-3)
    assert Nucleus(mass, rule).thresholds(even).tolist() == pytest.approx([1e-3] * 2)
