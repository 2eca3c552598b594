"""Process reward models with transformers: separator-token classifiers and token probabilities.

Invariant: the model is loaded when the verifier is built, so a broken one never goes live; a step's
score is a probability read at the marker behind it. Used as `classifier` and `token_probability` in
`process` verifiers.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.types import Task
from rewards.local_model import Asked, LocalModel, ModelSettings, fingerprint
from rewards.step_format import DEFAULT_MARKER, StepFormat
from rewards.step_scorer import StepScores

_TWO_LAYER_HEAD = "Qwen2ForProcessRewardModel"


class _MarkerScorer(ABC):
    """A model that is asked at the marker behind each step; what is read there is its subclass's
    matter.
    """

    def __init__(self, form: StepFormat, local: LocalModel) -> None:
        self._form = form
        self._local = local

    @staticmethod
    def fingerprint(settings: Mapping[str, Any]) -> str:
        return fingerprint(settings)

    async def score(self, task: Task, completions: list[list[str]]) -> list[StepScores]:
        rows = [self._form.encode(self._local.tokenizer, task, steps) for steps in completions]
        values = await self._local.ask(rows, self._probabilities)
        limit = self._local.max_length
        return [
            StepScores(scores=scores)
            if scores is not None
            else StepScores(error=f"{len(row.token_ids)} tokens, the model reads at most {limit}")
            for row, scores in zip(rows, values, strict=True)
        ]

    @abstractmethod
    def _probabilities(self, hidden: Any, rows: list[Asked]) -> Any:
        """[M] from `hidden` [M, D], the states at the M markers of all `rows`."""


class StepClassifier(_MarkerScorer):
    """P(class 1) at a separator token after each step: softmax over labels, or sigmoid of one.

    Reads token-classification checkpoints (those that `hone rewards train-process` writes) and
    Qwen2.5-Math-PRM (`marker: <extra_0>`; its two-layer head is built here, no code of the
    checkpoint runs).
    """

    def __init__(
        self,
        model: str,
        marker: str = DEFAULT_MARKER,
        joiner: str = "",
        question_format: str = "",
        system: str = "",
        dtype: str = "float32",
        device: str = "",
        batch_tokens: int = 16384,
    ) -> None:
        super().__init__(
            StepFormat(marker, joiner, question_format, system),
            LocalModel(ModelSettings(model, dtype, device, batch_tokens), _classifier),
        )
        self._local.token_of("marker", marker)

    def _probabilities(self, hidden: Any, rows: list[Asked]) -> Any:
        logits = self._local.model.score(hidden).float()
        return logits.softmax(-1)[:, 1] if logits.shape[-1] > 1 else logits[:, 0].sigmoid()


class StepTokenProbability(_MarkerScorer):
    """P(`good`) against `bad` as the next token at a marker after each step.

    Math-Shepherd (arXiv 2312.08935) has `marker: " ки"`, `joiner: "\\n"`, `good: "+"`, `bad: "-"`
    and `question_format: "{question} "`.
    """

    def __init__(
        self,
        model: str,
        marker: str,
        good: str = "+",
        bad: str = "-",
        joiner: str = "",
        question_format: str = "",
        system: str = "",
        dtype: str = "float32",
        device: str = "",
        batch_tokens: int = 16384,
    ) -> None:
        super().__init__(
            StepFormat(marker, joiner, question_format, system),
            LocalModel(ModelSettings(model, dtype, device, batch_tokens), causal_lm),
        )
        self._choices = [self._local.token_of("good", good), self._local.token_of("bad", bad)]

    def _probabilities(self, hidden: Any, rows: list[Asked]) -> Any:
        head = self._local.model.get_output_embeddings()
        return head(hidden)[:, self._choices].float().softmax(-1)[:, 0]


def causal_lm(transformers: Any, model: str, dtype: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def _classifier(transformers: Any, model: str, dtype: Any) -> Any:
    config = transformers.AutoConfig.from_pretrained(model)
    if _TWO_LAYER_HEAD in (config.architectures or []):
        return _two_layer(transformers, model, config, dtype)
    loaded, report = transformers.AutoModelForTokenClassification.from_pretrained(
        model, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(f"model: {model!r} is no trained step classifier, it lacks {missing}")
    return loaded


def _two_layer(transformers: Any, model: str, config: Any, dtype: Any) -> Any:
    """Qwen2.5-Math-PRM: a decoder with the head Linear, ReLU, Linear; no weight may be missing."""
    nn: Any = importlib.import_module("torch").nn
    load_file: Any = importlib.import_module("safetensors.torch").load_file
    place = Path(model)
    if not place.is_dir():
        snapshot: Any = importlib.import_module("huggingface_hub").snapshot_download
        place = Path(snapshot(model, allow_patterns=["*.json", "*.safetensors"]))
    loaded = transformers.AutoModelForTokenClassification.from_config(config, dtype=dtype)
    size, labels = config.hidden_size, config.num_labels
    head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, labels))
    loaded.score = head.to(dtype)
    weights: dict[str, Any] = {}
    for path in sorted(place.glob("*.safetensors")):
        weights |= load_file(path)
    weights.pop("lm_head.weight", None)
    try:
        loaded.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"model: {model!r}: {' '.join(str(error).split())[:300]}") from error
    return loaded
