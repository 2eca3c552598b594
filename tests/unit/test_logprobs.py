"""Chunked log-probs and entropies: published values, exact gradients, packed = padded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cluster.errors import ConfigError
from learners.batch import MicroBatch, Row
from learners.logprobs import token_outputs
from learners.model import PolicyModel, layout_on, load_policy

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


@pytest.fixture(scope="module")
def causal_lm() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).double().eval()


def _rows() -> list[Row]:
    rng = np.random.default_rng(1)
    rows: list[Row] = []
    for context, completion in ((3, 7), (1, 1), (9, 2), (4, 4), (2, 12)):
        zeros = np.zeros(completion, dtype=np.float32)
        rows.append(
            Row(
                context=rng.integers(0, 50, context).astype(np.int32),
                completion=rng.integers(0, 50, completion).astype(np.int32),
                loss_mask=rng.random(completion) < 0.7,
                rollout_logprobs=zeros,
                advantages=zeros,
                temperature=float(rng.choice([0.7, 1.0])),
            )
        )
    return rows


def _reference(causal_lm: Qwen3ForCausalLM, rows: list[Row]) -> Tensor:
    """Each sequence alone, from its full logits."""
    values: list[Tensor] = []
    for row in rows:
        tokens = torch.tensor([*row.context.tolist(), *row.completion.tolist()])
        logits = causal_lm(input_ids=tokens[None], use_cache=False).logits[0]
        logprobs = (logits / row.temperature).log_softmax(-1)
        for t in np.flatnonzero(row.loss_mask):
            place = len(row.context) + int(t)
            values.append(logprobs[place - 1, tokens[place]])
    return torch.stack(values)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_layouts_equal_the_reference_in_value_and_gradient(
    causal_lm: Qwen3ForCausalLM, layout: str
) -> None:
    rows = _rows()
    policy = PolicyModel(causal_lm, "packed" if layout == "packed" else "padded")
    logprobs = policy(MicroBatch.pack(rows)).logprobs
    reference = _reference(causal_lm, rows)
    torch.testing.assert_close(logprobs, reference, rtol=0, atol=1e-6)

    weights = torch.linspace(-1, 1, len(reference)).double()
    parameters = list(causal_lm.parameters())
    ours = torch.autograd.grad(weights @ logprobs, parameters)
    theirs = torch.autograd.grad(weights @ reference, parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_neighbour_in_the_pack_changes_nothing(causal_lm: Qwen3ForCausalLM, layout: str) -> None:
    rows = _rows()
    policy = PolicyModel(causal_lm, "packed" if layout == "packed" else "padded")
    with torch.no_grad():
        together = policy(MicroBatch.pack(rows)).logprobs
        apart = torch.cat([policy(MicroBatch.pack([row]))[0] for row in rows])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "dtype", "layout"),
    [
        ("cuda", torch.bfloat16, "packed"),
        ("cuda", torch.float16, "packed"),
        ("cuda", torch.float32, "padded"),
        ("cpu", torch.bfloat16, "padded"),
    ],
)
def test_flash_attention_is_for_half_precision_on_a_gpu(
    device: str, dtype: torch.dtype, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layout_on(torch.device("cuda"), torch.bfloat16) == "padded", "it is not installed here"
    (tmp_path / "flash_attn.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert layout_on(torch.device(device), dtype) == layout


def test_models_with_more_than_a_linear_head_are_refused(tmp_path: Path) -> None:
    config = CohereConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logit_scale=0.06,
    )
    CohereForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="logit_scale"):
        load_policy(tmp_path, torch.device("cpu"), activation_checkpointing=False)
