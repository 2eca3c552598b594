"""LoRA (arXiv 2106.09685): low-rank adapters learn beside frozen weights, by `peft`.

Invariant: adapters begin with no effect (B = 0) and equal on every rank; they lie in the decoder's
layers, so they are sharded with them, and embeddings and head stay as they are. What leaves the
learner is merged (`learners.weight_source`): engines and exports know nothing of adapters.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.config import Config
from cluster.errors import ConfigError
from cluster.plugins import check_settings

KNOB = "learner.lora"
_IN_A_LAYER = re.compile(r"\.layers\.\d+\..*\.lora_[AB]\.default\.weight$")


@dataclass(frozen=True)
class Lora:
    """W + alpha / rank * B A for the linear layers named by `targets`, or "all-linear" but the
    head; `seed` draws A.
    """

    rank: int = 16
    alpha: int = 32
    targets: list[str] | str = "all-linear"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 1:
            raise ValueError(f"rank and alpha must be at least 1, got {self.rank}, {self.alpha}")

    @classmethod
    def of(cls, config: Config) -> "Lora | None":
        settings = config.learner.lora
        if settings is None:
            return None
        check_settings(cls, settings, KNOB)
        try:
            return cls(**{"seed": config.run.seed, **settings})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{KNOB}: {error}") from error

    def add_to(self, causal_lm: Any) -> None:
        """Freeze a Hugging Face decoder and put adapters beside its target layers."""
        from peft import LoraConfig, inject_adapter_in_model  # seconds that only LoRA runs spend

        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self.targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            try:
                inject_adapter_in_model(config, causal_lm)
            except ValueError as error:
                raise ConfigError(f"{KNOB}.targets: {error}") from error
        learning = [name for name, p in causal_lm.named_parameters() if p.requires_grad]
        if outside := [name for name in learning if not _IN_A_LAYER.search(name)]:
            raise ConfigError(
                f"{KNOB}.targets: must name linear layers of the decoder's blocks, got {outside[0]}"
            )


@contextmanager
def without_adapters(module: nn.Module) -> Generator[None]:
    """`module` as it was before its adapters learned, for as long as this lasts."""
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "lora_A")]
    scales: list[dict[str, float]] = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling.update(scale)
