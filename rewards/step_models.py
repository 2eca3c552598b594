"""Process reward models with transformers: separator-token classifiers and token probabilities.

Invariant: all completions of a call are scored in batches of bounded size, off the event loop and
one call at a time; a completion longer than the model can read carries an error. The model is
loaded when the verifier is built, so a broken one never goes live. Used as `classifier` and
`token_probability` in `process` verifiers.
"""

import asyncio
import hashlib
import importlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.types import Task
from rewards.step_format import DEFAULT_MARKER, StepFormat, StepTokens
from rewards.step_scorer import StepScores

CHUNK = 1 << 20
_TWO_LAYER_HEAD = "Qwen2ForProcessRewardModel"


class _StepModel(ABC):
    """Batches, and what a batch needs; subclasses turn the model's output into scores."""

    def __init__(
        self, model: str, form: StepFormat, dtype: str, device: str, batch_tokens: int
    ) -> None:
        if batch_tokens < 1:
            raise ConfigError(f"batch_tokens must be at least 1, got {batch_tokens}")
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError(f"dtype must be one of torch's, as bfloat16, got {dtype!r}")
        self._torch = torch
        self._form = form
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._batch_tokens = batch_tokens
        self._lock = threading.Lock()
        transformers.utils.logging.disable_progress_bar()
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
            loaded = self._load(transformers, model, getattr(torch, dtype))
        except OSError as error:
            raise ConfigError(f"model: {model!r} cannot be loaded: {error}") from error
        self._model: Any = loaded.to(self._device).eval()
        text_config = self._model.config.get_text_config()
        self._max_length: int = getattr(text_config, "max_position_embeddings", 1 << 30)

    @staticmethod
    def fingerprint(settings: Mapping[str, Any]) -> str:
        """A hash over the files of a local model; another model, another reward version."""
        digest = hashlib.sha256()
        place = Path(str(settings.get("model", "")))
        for path in sorted(place.glob("*")) if place.is_dir() else []:
            if path.suffix in (".json", ".safetensors", ".jinja", ".model"):
                digest.update(path.name.encode())
                with path.open("rb") as file:
                    while chunk := file.read(CHUNK):
                        digest.update(chunk)
        return digest.hexdigest()

    async def score(self, task: Task, completions: list[list[str]]) -> list[StepScores]:
        return await asyncio.to_thread(self._score, task, completions)

    def _score(self, task: Task, completions: list[list[str]]) -> list[StepScores]:
        with self._lock, self._torch.inference_mode():
            rows = [self._form.encode(self._tokenizer, task, steps) for steps in completions]
            results = [self._too_long(row) for row in rows]
            order = sorted(
                (i for i, result in enumerate(results) if result is None),
                key=lambda i: len(rows[i].token_ids),
            )
            for batch in self._batches(order, rows):
                scores = self._scores_of([rows[i] for i in batch])
                for i, values in zip(batch, scores, strict=True):
                    results[i] = StepScores(scores=values)
            return [result for result in results if result is not None]

    def _too_long(self, row: StepTokens) -> StepScores | None:
        if len(row.token_ids) <= self._max_length:
            return None
        length = len(row.token_ids)
        return StepScores(error=f"{length} tokens, the model reads at most {self._max_length}")

    def _batches(self, order: list[int], rows: list[StepTokens]) -> list[list[int]]:
        """Rows of like length together, at most `batch_tokens` with padding."""
        batches: list[list[int]] = []
        for i in order:
            if batches and (len(batches[-1]) + 1) * len(rows[i].token_ids) <= self._batch_tokens:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _hidden(self, decoder: Any, batch: list[StepTokens]) -> Any:
        """Hidden states [N, D] at the asked positions of all rows; padding stands on the right,
        where a causal model never looks.
        """
        torch = self._torch
        longest = max(len(row.token_ids) for row in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)
        for i, row in enumerate(batch):
            tokens[i, : len(row.token_ids)] = torch.tensor(row.token_ids)
        hidden = decoder(input_ids=tokens.to(self._device), use_cache=False).last_hidden_state
        rows = [i for i, row in enumerate(batch) for _ in row.positions]
        places = [position for row in batch for position in row.positions]
        return hidden[rows, places]

    def _split(self, values: Any, batch: list[StepTokens]) -> list[list[float]]:
        parts = values.float().cpu().split([len(row.positions) for row in batch])
        return [part.tolist() for part in parts]

    def _token_of(self, knob: str, text: str) -> int:
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise ConfigError(f"{knob} must be one token of the model's tokenizer, got {text!r}")
        return tokens[0]

    @abstractmethod
    def _load(self, transformers: Any, model: str, dtype: Any) -> Any:
        """The model; an `OSError` is reported as its absence."""

    @abstractmethod
    def _scores_of(self, batch: list[StepTokens]) -> list[list[float]]:
        """The step scores of each row."""


class StepClassifier(_StepModel):
    """P(class 1) at a separator token after each step: softmax over labels, or sigmoid of one.

    Reads token-classification checkpoints (those that `hone rewards train-process` writes) and
    Qwen2.5-Math-PRM (`marker: <extra_0>`; its two-layer head is built here, no code of the
    checkpoint runs). `device` is "cuda" where the worker sees a GPU.
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
        form = StepFormat(marker, joiner, question_format, system)
        super().__init__(model, form, dtype, device, batch_tokens)
        self._token_of("marker", marker)

    def _load(self, transformers: Any, model: str, dtype: Any) -> Any:
        config = transformers.AutoConfig.from_pretrained(model)
        if _TWO_LAYER_HEAD in (config.architectures or []):
            return _two_layer(self._torch, transformers, model, config, dtype)
        loaded, report = transformers.AutoModelForTokenClassification.from_pretrained(
            model, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(f"model: {model!r} is no trained step classifier, it lacks {missing}")
        return loaded

    def _scores_of(self, batch: list[StepTokens]) -> list[list[float]]:
        logits = self._model.score(self._hidden(self._model.base_model, batch)).float()
        if logits.shape[-1] == 1:
            return self._split(logits[:, 0].sigmoid(), batch)
        return self._split(logits.softmax(-1)[:, 1], batch)


class StepTokenProbability(_StepModel):
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
        form = StepFormat(marker, joiner, question_format, system)
        super().__init__(model, form, dtype, device, batch_tokens)
        self._choices = [self._token_of("good", good), self._token_of("bad", bad)]

    def _load(self, transformers: Any, model: str, dtype: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)

    def _scores_of(self, batch: list[StepTokens]) -> list[list[float]]:
        hidden = self._hidden(self._model.base_model, batch)
        logits = self._model.get_output_embeddings()(hidden)[:, self._choices].float()
        return self._split(logits.softmax(-1)[:, 0], batch)


def _two_layer(torch: Any, transformers: Any, model: str, config: Any, dtype: Any) -> Any:
    """Qwen2.5-Math-PRM: a decoder with the head Linear, ReLU, Linear; no weight may be missing."""
    load_file: Any = importlib.import_module("safetensors.torch").load_file
    place = Path(model)
    if not place.is_dir():
        snapshot: Any = importlib.import_module("huggingface_hub").snapshot_download
        place = Path(snapshot(model, allow_patterns=["*.json", "*.safetensors"]))
    loaded = transformers.AutoModelForTokenClassification.from_config(config, dtype=dtype)
    size, labels = config.hidden_size, config.num_labels
    loaded.score = torch.nn.Sequential(
        torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, labels)
    ).to(dtype)
    weights: dict[str, Any] = {}
    for path in sorted(place.glob("*.safetensors")):
        weights |= load_file(path)
    weights = {key: value for key, value in weights.items() if key != "lm_head.weight"}
    try:
        loaded.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"model: {model!r}: {' '.join(str(error).split())[:300]}") from error
    return loaded
