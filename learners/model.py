"""The networks: a Hugging Face decoder that answers with log-probs (policy) or values (critic).

Invariant: its answer for a token does not depend on the other sequences in the micro-batch, which
lie end to end: flash attention or `learners.packed_attention` keeps them apart. Each model is an
FSDP2 root, so its head is whole while `forward` uses it. Called by the learner, warm start and the
weight probe.
"""

# ruff: noqa: F722 (shapes in annotations)

from abc import ABC, abstractmethod
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from cluster.errors import ConfigError
from learners import packed_attention
from learners.batch import MicroBatch, Row
from learners.logprobs import TokenOutputs, token_outputs
from learners.lora import Lora
from learners.nucleus import Nucleus

_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_soft_cap")
_SOFTCAP = "attn_logit_softcapping"
# What is tried of a decoder, on a CPU: its first layers have one of each kind.
PROBE_LAYERS, PROBE_TOKENS, MAX_WINDOW = 8, 12, 1024
SAME = 1e-3  # of the largest hidden state, for float32 in another order of summation


class DecoderModel(nn.Module, ABC):
    """Runs packed sequences through a decoder as one row of [1, T]."""

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The Hugging Face decoder, without a head."""

    def hidden(self, rows: MicroBatch) -> Float[Tensor, "N D"]:
        """Hidden state from which each loss token is predicted: it has seen what came before."""
        if self.decoder.config._attn_implementation == packed_attention.NAME:
            blocks = packed_attention.blocks(rows.lengths, rows.token_ids.device)
            apart: dict[str, Any] = {"packed_blocks": blocks}
        else:
            apart = {
                "cu_seq_lens_q": rows.cu_seqlens,
                "cu_seq_lens_k": rows.cu_seqlens,
                "max_length_q": max(rows.lengths),
                "max_length_k": max(rows.lengths),
            }
        output = self.decoder(
            input_ids=rows.token_ids[None],
            position_ids=rows.position_ids[None],
            use_cache=False,
            **apart,
        )
        return output.last_hidden_state[0, rows.loss_index]


class PolicyModel(DecoderModel):
    """Decoder and output head."""

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        self.causal_lm: Any = causal_lm

    @property
    def decoder(self) -> Any:
        return self.causal_lm.base_model

    def forward(self, rows: MicroBatch, nucleus: Nucleus | None = None) -> TokenOutputs:
        """Log-prob and entropies, float32, of each loss token at its own temperature."""
        head: Tensor = self.causal_lm.get_output_embeddings().weight
        return token_outputs(self.hidden(rows), head, rows.labels, rows.temperature, nucleus)


class ValueModel(DecoderModel):
    """The decoder of a policy and a linear value head, which starts at 0."""

    def __init__(self, policy: PolicyModel) -> None:
        super().__init__()
        self.backbone: Any = policy.decoder
        width = self.backbone.config.get_text_config().hidden_size
        weight = next(self.backbone.parameters())
        self.head = nn.Linear(width, 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def decoder(self) -> Any:
        return self.backbone

    def forward(self, rows: MicroBatch) -> Float[Tensor, " N"]:
        """Expected return before each loss token is written, summed in at least float32: bfloat16
        would keep two digits of it.
        """
        hidden = self.hidden(rows)
        kind = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(kind) @ self.head.weight[0].to(kind) + self.head.bias.to(kind)


def attention_on(device: torch.device, compute_dtype: torch.dtype) -> str:
    """Flash attention where it can run: on a GPU, in half precision, if installed."""
    is_fit = device.type == "cuda" and compute_dtype in (torch.bfloat16, torch.float16)
    has_flash = is_fit and find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash else packed_attention.NAME


def load_policy(
    policy_dir: Path,
    activation_checkpointing: bool,
    attention: str = packed_attention.NAME,
    lora: Lora | None = None,
) -> PolicyModel:
    """The policy with float32 weights in host memory, from where `shard` moves them layer by layer;
    `attention` as by `attention_on`. With `lora` its adapters learn and its own weights do not.
    Raises `ConfigError` for a decoder that does more than the
    learner knows of: to its logits, or to the sequences of a pack.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    causal_lm: Any = AutoModelForCausalLM.from_pretrained(
        policy_dir,
        dtype=torch.float32,
        attn_implementation=packed_attention.NAME,
    )
    _check_head(causal_lm, policy_dir)
    if attention == packed_attention.NAME or not _has_softcap(causal_lm):  # which flash can do
        _check_packing(causal_lm, policy_dir)
    causal_lm.set_attn_implementation(attention)
    _drop_nothing(causal_lm)
    if lora is not None:
        lora.add_to(causal_lm)
    if activation_checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    # Training mode is only checkpointing's switch.
    causal_lm.train(activation_checkpointing)
    return PolicyModel(causal_lm)


def shard(
    model: DecoderModel, mesh: DeviceMesh, compute_dtype: torch.dtype, is_offloaded: bool = False
) -> None:
    """FSDP2 over `mesh`, one unit per decoder layer; gradients are reduced in float32. FSDP moves a
    unit to its device and shards it before the next, so a device never holds the whole model.

    `is_offloaded` keeps shards, gradients and so the optimizer in host memory: a layer is copied to
    its device for as long as it runs.
    """
    is_pinned = mesh.device_type == "cuda"
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    settings: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy(is_pinned) if is_offloaded else OffloadPolicy(),
    }
    for layer in model.decoder.layers:
        fully_shard(layer, mp_policy=precision, **settings)
    # The root's inputs are rows: FSDP2 would round their temperatures to `compute_dtype`.
    fully_shard(model, mp_policy=replace(precision, cast_forward_inputs=False), **settings)


def _check_head(causal_lm: Any, policy_dir: Path) -> None:
    """Log-probs are taken from `hidden @ head.T`, so refuse models that do more than that."""
    text_config = causal_lm.config.get_text_config()
    transforms = [
        name for name in _LOGIT_TRANSFORMS if getattr(text_config, name, None) not in (None, 1, 1.0)
    ]
    if getattr(causal_lm.get_output_embeddings(), "bias", None) is not None:
        transforms.append("a bias on the output head")
    if transforms or not hasattr(causal_lm.base_model, "layers"):
        what = ", ".join(transforms) or f"{type(causal_lm.base_model).__name__} without .layers"
        raise ConfigError(
            f"policy: {policy_dir} must be a decoder with `layers` and a plain linear head, "
            f"got {what}"
        )


def _drop_nothing(causal_lm: Any) -> None:
    """Dropout would part the learner from the engine."""
    for module in causal_lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith(("dropout", "_pdrop")) and isinstance(value, float):
                setattr(module, name, 0.0)


def _has_softcap(causal_lm: Any) -> bool:
    return bool(getattr(causal_lm.config.get_text_config(), _SOFTCAP, None))


@torch.no_grad()
def _check_packing(causal_lm: Any, policy_dir: Path) -> None:
    """Sequences of a pack are kept apart by attention alone, so refuse decoders that mix them in
    another way or whose attention is more than that: what they make of two sequences, the first
    longer than a window, must be what `transformers` makes of each by itself.
    """
    text_config = causal_lm.config.get_text_config()
    window: int | None = getattr(text_config, "sliding_window", None)
    length = PROBE_TOKENS if window is None or window > MAX_WINDOW else window + PROBE_TOKENS
    tokens = torch.arange(length + PROBE_TOKENS) * 7919 % text_config.vocab_size
    parts = tokens.split([length, PROBE_TOKENS])
    rows = [Row.plain(part[:1].numpy(), part[1:].numpy()) for part in parts]
    causal_lm.eval()
    decoder, layers = causal_lm.base_model, causal_lm.base_model.layers
    decoder.layers = layers[:PROBE_LAYERS]
    reason = _SOFTCAP if _has_softcap(causal_lm) else ""
    try:
        found = PolicyModel(causal_lm).hidden(MicroBatch.pack(rows))
        causal_lm.set_attn_implementation("eager")
        outputs = [decoder(part[None], use_cache=False) for part in parts]
        expected = torch.cat([output.last_hidden_state[0, :-1] for output in outputs])
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        reason = reason or ("" if error < SAME else f"its hidden states are {error:.1%} away")
    except (KeyError, TypeError, ValueError) as refusal:
        reason = str(refusal)
    finally:
        decoder.layers = layers
    if reason:
        raise ConfigError(
            f"policy: {policy_dir} must be a decoder that keeps packed sequences apart by causal "
            f"attention (of a window, if it has one) and nothing else, which "
            f"{text_config.model_type} is not: {reason}"
        )
    causal_lm.set_attn_implementation(packed_attention.NAME)
