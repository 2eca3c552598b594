"""Chunked log-probs and entropies: published values, exact gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from learners.logprobs import token_outputs
from learners.model import attention_on
from learners.packed_attention import NAME

# Three rows, five words; values worked out by hand elsewhere (TV-G1 of the algorithms sheet).
HIDDEN = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
HEAD = [[2.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 0.5], [0.0, -1.0]]


def _case(temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.tensor(HIDDEN, dtype=torch.float64, requires_grad=True)
    head = torch.tensor(HEAD, dtype=torch.float64, requires_grad=True)
    return hidden, head, torch.tensor([0, 1, 2]), torch.full((3,), temperature, dtype=torch.float64)


def test_published_values() -> None:
    logprobs, entropy, _ = token_outputs(*_case())
    assert logprobs.tolist() == pytest.approx([-0.523744, -1.574438, -1.141631], abs=1e-6)
    assert entropy.tolist() == pytest.approx([1.150741, 1.206489, 1.254846], abs=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_equal_dense_ones_for_any_chunk(
    chunk_rows: int | None, temperature: float
) -> None:
    hidden, head, labels, temperatures = _case(temperature)
    weights = torch.tensor([0.3, -1.0, 2.0]).double()
    logprobs, entropy, _ = token_outputs(hidden, head, labels, temperatures, None, chunk_rows)
    (weights @ logprobs + weights.square() @ entropy).backward()

    dense_hidden, dense_head, _, _ = _case()
    dense = (dense_hidden @ dense_head.T / temperature).log_softmax(-1)
    dense_entropy = -(dense.exp() * dense).sum(-1)
    (weights @ dense[torch.arange(3), labels] + weights.square() @ dense_entropy).backward()
    for ours, theirs in ((hidden, dense_hidden), (head, dense_head)):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-14)


def test_gradcheck() -> None:
    hidden, head, labels, temperatures = _case(0.8)

    def run(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        return token_outputs(hidden, head, labels, temperatures, None, 2)[:2]

    assert torch.autograd.gradcheck(run, (hidden, head))


def test_bfloat16_inputs_give_float32_results() -> None:
    hidden, head, labels, temperatures = _case()
    logprobs, entropy, _ = token_outputs(
        hidden.bfloat16(), head.bfloat16(), labels, temperatures.float()
    )
    assert logprobs.dtype == entropy.dtype == torch.float32


def test_no_rows_still_reach_the_graph() -> None:
    hidden, head, labels, temperatures = _case()
    logprobs = token_outputs(hidden[:0], head, labels[:0], temperatures[:0]).logprobs
    logprobs.sum().backward()
    assert head.grad is not None
    assert not head.grad.any()


@pytest.mark.parametrize(
    ("device", "dtype", "attention"),
    [
        ("cuda", torch.bfloat16, "flash_attention_2"),
        ("cuda", torch.float16, "flash_attention_2"),
        ("cuda", torch.float32, NAME),
        ("cpu", torch.bfloat16, NAME),
    ],
)
def test_flash_attention_is_for_half_precision_on_a_gpu(
    device: str, dtype: torch.dtype, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attention_on(torch.device("cuda"), torch.bfloat16) == NAME, "it is not installed here"
    (tmp_path / "flash_attn.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert attention_on(torch.device(device), dtype) == attention
