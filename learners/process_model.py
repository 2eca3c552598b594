"""Training of a process reward model: the policy's decoder, a few layers more, a two-class head.

Invariant: a step without a known value has no part in any loss. The directory that `save` writes is
what the step scorer `classifier` reads. One process; called by `actors.process_training`.

Two losses: the cross entropy of each step to its value as a soft label, and that of writing the
steps, each token weighted by its step's value, in the policy's own layers. Right or wrong is a bit
a step, from which a small model learns the questions by heart before the matter; what right
steps say is far more. Reward models regularised by text generation: arXiv 2406.10216.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from cluster.errors import ConfigError, StageError
from learners.logprobs import token_outputs
from learners.optimizer import learning_rate

_WARMUP_FRACTION = 0.05
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class StepExample:
    """`token_ids` [T] of a question with marked steps; step i ends at `positions[i]` and is worth
    `values[i]` in 0..1, NaN where that is unknown. The first step begins at token `begin`.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    values: Sequence[float]
    begin: int = 0


@dataclass(frozen=True)
class ProcessModelSettings:
    """`new_layers` go on top of the policy's: a policy knows what it would have written only in
    its last layer, so that to compare this with what was written takes layers behind it.
    """

    new_layers: int = 2
    lm_weight: float = 1.0  # of the loss of writing; 0 leaves it out
    epochs: int = 8
    batch_size: int = 32
    lr: float = 3e-4
    seed: int = 0


@dataclass(frozen=True)
class EpochProgress:
    """`loss` in nats per step, on what was trained; `auc` on the held-out steps (NaN without)."""

    epoch: int
    epochs: int
    loss: float
    auc: float


class ProcessModel:
    """A token classifier that begins as the policy in `policy_dir` with `settings.new_layers`
    layers that pass on what they get; `tokenizer` may be larger than the policy's.
    """

    def __init__(
        self,
        policy_dir: Path,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        settings: ProcessModelSettings,
    ) -> None:
        disable_progress_bar()
        self._tokenizer = tokenizer
        self._device = device
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            model: Any = AutoModelForTokenClassification.from_pretrained(
                policy_dir,
                config=_deepened(policy_dir, settings.new_layers),
                dtype=torch.float32,
            )
            known = model.get_input_embeddings().num_embeddings
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        line_end = tokenizer.encode("\n", add_special_tokens=False)[-1]
        with torch.no_grad():  # to the policy a marker looks like a line's end
            embeddings = model.get_input_embeddings().weight
            embeddings[known:] = embeddings[line_end]
            for output in _outputs(model, settings.new_layers):
                for parameter in output.parameters():
                    parameter.zero_()
        self._model = model.to(device)
        self._settings = settings
        self._head: Tensor | None = None  # of the policy; None where it is the embedding
        if settings.lm_weight and not model.config.tie_word_embeddings:
            policy: Any = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32)
            self._head = policy.get_output_embeddings().weight.detach().to(device)

    def fit(
        self,
        examples: Sequence[StepExample],
        held_out: Sequence[StepExample],
        settings: ProcessModelSettings,
    ) -> Iterator[EpochProgress]:
        """Train epoch by epoch; the weights of the one with the best held-out AUC stay.

        Raises `ConfigError` where all steps have the same value.
        """
        known = [value for e in examples for value in e.values if math.isfinite(value)]
        if len(known) < 2 or np.ptp(known) == 0:
            raise ConfigError(
                f"{len(known)} steps with a known value, all alike: nothing to tell apart "
                "(sample more traces or completions, or take another checkpoint)"
            )
        optimizer = torch.optim.AdamW(self._model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
        rng = np.random.default_rng(settings.seed)
        num_batches = -(-len(examples) // settings.batch_size)
        total_steps = settings.epochs * num_batches
        step, best, weights = 0, -1.0, self._model.state_dict()
        for epoch in range(settings.epochs):
            self._model.train()
            losses: list[float] = []
            for batch in np.array_split(rng.permutation(len(examples)), num_batches):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(
                        step,
                        peak=settings.lr,
                        schedule="cosine",
                        warmup_steps=int(total_steps * _WARMUP_FRACTION),
                        total_steps=total_steps,
                    )
                loss = self._loss([examples[i] for i in batch])
                if loss is not None:
                    loss.backward()
                    norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), _MAX_GRAD_NORM)
                    if not torch.isfinite(norm):
                        raise StageError("train-process", f"gradient norm is {norm} (--lr)")
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    losses.append(loss.item())
                step += 1
            score = self._held_out_auc(held_out)
            if not score <= best:  # also where nothing is held out
                best, weights = score, copy.deepcopy(self._model.state_dict())
            yield EpochProgress(epoch + 1, settings.epochs, float(np.mean(losses)), score)
        self._model.load_state_dict(weights)

    def save(self, directory: Path) -> None:
        """A Hugging Face directory: token classifier and tokenizer."""
        self._model.save_pretrained(directory)
        self._tokenizer.save_pretrained(directory)

    @torch.no_grad()
    def score(self, examples: Sequence[StepExample], batch_size: int = 64) -> list[np.ndarray]:
        """P(right) of each step [S], per example."""
        self._model.eval()
        scores: list[np.ndarray] = []
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            output = self._model.base_model(input_ids=self._tokens(batch), use_cache=False)
            logits = self._logits(batch, output.last_hidden_state)
            values = logits.softmax(-1)[:, 1].cpu().numpy()
            ends = np.cumsum([len(e.positions) for e in batch])
            scores += np.split(values, ends[:-1])
        return scores

    def _loss(self, batch: Sequence[StepExample]) -> Tensor | None:
        values = torch.tensor([v for e in batch for v in e.values], device=self._device)
        is_known = values.isfinite()
        if not is_known.any():
            return None
        tokens = self._tokens(batch)
        output = self._model.base_model(
            input_ids=tokens, use_cache=False, output_hidden_states=bool(self._settings.lm_weight)
        )
        logits = self._logits(batch, output.last_hidden_state)[is_known]
        values = values[is_known]
        loss = functional.cross_entropy(logits, torch.stack([1 - values, values], dim=-1))
        if self._settings.lm_weight:
            loss = loss + self._settings.lm_weight * self._writing_loss(batch, tokens, output)
        return loss

    def _writing_loss(self, batch: Sequence[StepExample], tokens: Tensor, output: Any) -> Tensor:
        """Nats per token of the steps [N], each weighted by its step's value."""
        rows, places, weights = list[int](), list[int](), list[float]()
        for i, example in enumerate(batch):
            begin = max(1, example.begin)
            for position, value in zip(example.positions, example.values, strict=True):
                if value > 0:  # not where it is unknown
                    places += range(begin, position + 1)
                    rows += [i] * (position + 1 - begin)
                    weights += [value] * (position + 1 - begin)
                begin = position + 1
        if not rows:
            return tokens.new_zeros((), dtype=torch.float32)
        hidden = output.last_hidden_state
        if new := self._settings.new_layers:  # states before the final norm, which is for both
            hidden = self._model.base_model.norm(output.hidden_states[-1 - new])
        at = torch.tensor(places, device=self._device)
        weight = torch.tensor(weights, device=self._device)
        head = self._model.get_input_embeddings().weight if self._head is None else self._head
        written = token_outputs(
            hidden[rows, at - 1], head, tokens[rows, at], torch.ones_like(weight)
        )
        return -(written.logprobs * weight).sum() / weight.sum()

    def _tokens(self, batch: Sequence[StepExample]) -> Tensor:
        """[B, T]; padding on the right is never looked at."""
        longest = max(len(example.token_ids) for example in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)
        for i, example in enumerate(batch):
            tokens[i, : len(example.token_ids)] = torch.as_tensor(example.token_ids)
        return tokens.to(self._device)

    def _logits(self, batch: Sequence[StepExample], hidden: Tensor) -> Tensor:
        """[N, 2] float32 at the steps of all rows."""
        rows = [i for i, example in enumerate(batch) for _ in example.positions]
        places = [position for example in batch for position in example.positions]
        return self._model.score(hidden[rows, places]).float()

    def _held_out_auc(self, held_out: Sequence[StepExample]) -> float:
        if not held_out:
            return float("nan")
        scores = np.concatenate(self.score(held_out))
        values = np.array([value for example in held_out for value in example.values])
        is_known = np.isfinite(values)
        return auc(scores[is_known], values[is_known] > 0)


def require_layers(policy_dir: Path, new_layers: int) -> None:
    """Raise `ConfigError` where the policy's decoder is not of a kind that can get new layers."""
    with torch.device("meta"):
        model = AutoModelForTokenClassification.from_config(_deepened(policy_dir, new_layers))
    _outputs(model, new_layers)


def _outputs(model: Any, new_layers: int) -> list[nn.Module]:
    """The modules through which the new layers add to what they get."""
    if not new_layers:
        return []
    try:
        layers = model.base_model.layers[-new_layers:]
        return [part for one in layers for part in (one.self_attn.o_proj, one.mlp.down_proj)]
    except AttributeError as error:
        kind = type(model.base_model).__name__
        raise ConfigError(f"--new-layers must be 0 for {kind}: {error}") from error


def _deepened(policy_dir: Path, new_layers: int) -> Any:
    """The policy's config with two labels and `new_layers` layers more, of its last one's kind."""
    config = AutoConfig.from_pretrained(policy_dir, num_labels=2)
    config.num_hidden_layers += new_layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = [*kinds, *[kinds[-1]] * new_layers]
    return config


def auc(scores: np.ndarray, is_right: np.ndarray) -> float:
    """Area under the ROC curve: how often a right one scores above a wrong one, ties count half.

    Scores [.9, .8, .3] of right, wrong, right give 0.5; NaN without both kinds.
    """
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    if not 0 < np.sum(is_right) < len(scores) or len(values) == 0:
        return float("nan")
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    num_right = int(np.sum(is_right))
    excess = ranks[np.asarray(is_right)].sum() - num_right * (num_right + 1) / 2
    return float(excess / (num_right * (len(scores) - num_right)))
