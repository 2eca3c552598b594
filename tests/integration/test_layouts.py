"""Hugging Face decoders as policies: packed = padded = each sequence alone, and who is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cluster.errors import ConfigError
from learners.batch import MicroBatch, Row
from learners.model import PolicyModel, load_policy


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
