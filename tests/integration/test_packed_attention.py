"""Hugging Face decoders as policies: packed = each sequence alone, and who is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from cluster.errors import ConfigError
from learners import packed_attention
from learners.batch import MicroBatch, Row
from learners.model import PolicyModel, load_policy
from learners.packed_attention import blocks

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
SLIDING = ["sliding_attention", "full_attention"]
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)),
    "window in one layer": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=SLIDING)
    ),
}


@pytest.fixture(scope="module", params=list(MODELS))
def causal_lm(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().double().eval()


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


def _reference(causal_lm: Any, rows: list[Row]) -> Tensor:
    """Each sequence alone, from its full logits."""
    causal_lm.set_attn_implementation("sdpa")
    values: list[Tensor] = []
    for row in rows:
        tokens = torch.tensor([*row.context.tolist(), *row.completion.tolist()])
        logits = causal_lm(input_ids=tokens[None], use_cache=False).logits[0]
        logprobs = (logits / row.temperature).log_softmax(-1)
        for t in np.flatnonzero(row.loss_mask):
            place = len(row.context) + int(t)
            values.append(logprobs[place - 1, tokens[place]])
    return torch.stack(values)


def _policy(causal_lm: Any, attention: str) -> PolicyModel:
    causal_lm.set_attn_implementation(attention)
    return PolicyModel(causal_lm)


@pytest.mark.parametrize("attention", ["sdpa", packed_attention.NAME])
def test_a_pack_equals_the_reference_in_value_and_gradient(causal_lm: Any, attention: str) -> None:
    """With `sdpa` it is `transformers` that tells the sequences of a pack from each other."""
    rows = _rows()
    reference = _reference(causal_lm, rows)
    logprobs = _policy(causal_lm, attention)(MicroBatch.pack(rows)).logprobs
    torch.testing.assert_close(logprobs, reference, rtol=0, atol=1e-6)

    weights = torch.linspace(-1, 1, len(reference)).double()
    parameters = list(causal_lm.parameters())
    ours = torch.autograd.grad(weights @ logprobs, parameters)
    theirs = torch.autograd.grad(weights @ reference, parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_neighbour_in_the_pack_changes_nothing(causal_lm: Any) -> None:
    rows = _rows()
    policy = _policy(causal_lm, packed_attention.NAME)
    with torch.no_grad():
        together = policy(MicroBatch.pack(rows)).logprobs
        apart = torch.cat([policy(MicroBatch.pack([row]))[0] for row in rows])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_blocks_hold_each_token_once_and_are_at_most_half_padding(lengths: list[int]) -> None:
    found = blocks(lengths, torch.device("cpu"))
    rows = iter(lengths)
    stop = 0
    for block in found:
        assert block.start == stop
        stop = block.stop
        places: list[int] = []
        for row in range(block.num_rows):
            length = next(rows)
            places += range(row * block.longest, row * block.longest + length)
        assert len(places) == block.stop - block.start
        assert 2 * len(places) >= block.num_rows * block.longest
        if block.places is None:
            assert places == [*range(len(places))]
        else:
            assert block.places.tolist() == places
    assert stop == sum(lengths)


def test_the_documented_example() -> None:
    first, second = blocks([8, 5, 4, 1], torch.device("cpu"))
    assert (first.start, first.stop, first.num_rows, first.longest) == (0, 17, 3, 8)
    assert (second.start, second.stop, second.places) == (17, 18, None)


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
        load_policy(tmp_path, activation_checkpointing=False)


REFUSED: dict[str, Callable[[], Any]] = {
    "linear layers": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SIZES, layer_types=["linear_attention", "full_attention"], num_experts=2,
            num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8,
            linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8,
        )
    ),
    "a window that attention is not told of": lambda: PhimoeForCausalLM(
        PhimoeConfig(**SIZES, sliding_window=3, num_local_experts=2)
    ),
    "arguments that get lost on the way": lambda: NemotronForCausalLM(NemotronConfig(**SIZES)),
    "attention of its own": lambda: StableLmForCausalLM(
        StableLmConfig(**(SIZES | {"head_dim": None}))
    ),
    "soft caps": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=None)),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(REFUSED))
def test_models_that_mix_a_pack_other_than_by_attention_are_refused(
    kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    REFUSED[kind]().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="keeps packed sequences apart by causal attention"):
        load_policy(tmp_path, activation_checkpointing=False)


def test_recomputed_activations_switch_no_dropout_on(tmp_path: Path) -> None:
    dropouts = {"attention_dropout": 0.5, "residual_dropout": 0.5, "embedding_dropout": 0.5}
    torch.manual_seed(0)
    Starcoder2ForCausalLM(Starcoder2Config(**SIZES, **dropouts)).save_pretrained(tmp_path)
    policy = load_policy(tmp_path, activation_checkpointing=True)
    pack = MicroBatch.pack([Row.plain(np.arange(3, dtype=np.int32), np.arange(9, dtype=np.int32))])
    with torch.no_grad():
        assert torch.equal(policy(pack).logprobs, policy(pack).logprobs)


def test_models_whose_attention_is_causal_or_of_a_window_are_taken(
    causal_lm: Any, tmp_path: Path
) -> None:
    causal_lm.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, activation_checkpointing=False)
    assert policy.decoder.config._attn_implementation == packed_attention.NAME
