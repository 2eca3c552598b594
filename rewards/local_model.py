"""A transformers model inside a reward worker: loaded once, asked in batches, off the event loop.

Invariant: one forward pass at a time and at most `batch_tokens` tokens in it; a text longer than
the model can read has no values. Imports torch only when a model is built. Owned by the step
scorers that need a model.
"""

import asyncio
import hashlib
import importlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError

CHUNK = 1 << 20


@dataclass(frozen=True)
class Asked:
    """`token_ids` [T], and the `positions` [S] at which the model is asked something."""

    token_ids: list[int]
    positions: list[int]


@dataclass(frozen=True)
class ModelSettings:
    """`model` is a directory or hub id; `device` "" is a GPU where the worker sees one."""

    model: str
    dtype: str = "float32"
    device: str = ""
    batch_tokens: int = 16384


class LocalModel:
    """`load(transformers, model, dtype)` makes the model; an `OSError` of it names the setting."""

    def __init__(self, settings: ModelSettings, load: Callable[[Any, str, Any], Any]) -> None:
        if settings.batch_tokens < 1:
            raise ConfigError(f"batch_tokens must be at least 1, got {settings.batch_tokens}")
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        dtype = getattr(torch, settings.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"dtype must be one of torch's, as bfloat16, got {settings.dtype!r}")
        transformers.utils.logging.disable_progress_bar()
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(settings.model)
            loaded = load(transformers, settings.model, dtype)
        except OSError as error:
            raise ConfigError(f"model: {settings.model!r} cannot be loaded: {error}") from error
        self.torch = torch
        self._device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = loaded.to(self._device).eval()
        self._batch_tokens = settings.batch_tokens
        text_config = self.model.config.get_text_config()
        self.max_length: int = getattr(text_config, "max_position_embeddings", 1 << 30)
        self._lock = threading.Lock()

    async def ask(
        self, rows: list[Asked], head: Callable[[Any, list[Asked]], Any]
    ) -> list[list[float] | None]:
        """Values [S] of each row. `head` gets hidden states [N, D] at the positions of all rows of
        a batch and gives [N] values.
        """
        return await asyncio.to_thread(self._ask, rows, head)

    def token_of(self, knob: str, text: str) -> int:
        """The one token of `text`. Raises `ConfigError` naming the knob."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if len(tokens) != 1:
            raise ConfigError(f"{knob} must be one token of the model's tokenizer, got {text!r}")
        return tokens[0]

    def _ask(
        self, rows: list[Asked], head: Callable[[Any, list[Asked]], Any]
    ) -> list[list[float] | None]:
        values: list[list[float] | None] = [None] * len(rows)
        with self._lock, self.torch.inference_mode():
            for batch in self._batches(rows):
                asked = [rows[i] for i in batch]
                parts = head(self._hidden(asked), asked).float().cpu()
                sizes = [len(row.positions) for row in asked]
                for i, part in zip(batch, parts.split(sizes), strict=True):
                    values[i] = part.tolist()
        return values

    def _batches(self, rows: list[Asked]) -> list[list[int]]:
        """Rows of like length together, padding counted; those too long in none."""
        lengths = [len(row.token_ids) for row in rows]
        batches: list[list[int]] = []
        for i in sorted(range(len(rows)), key=lengths.__getitem__):
            if lengths[i] > self.max_length:
                break
            if batches and (len(batches[-1]) + 1) * lengths[i] <= self._batch_tokens:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _hidden(self, rows: list[Asked]) -> Any:
        """[N, D]; padding stands on the right, where a causal model never looks."""
        longest = max(len(row.token_ids) for row in rows)
        tokens = self.torch.zeros(len(rows), longest, dtype=self.torch.long)
        for i, row in enumerate(rows):
            tokens[i, : len(row.token_ids)] = self.torch.tensor(row.token_ids)
        output = self.model.base_model(input_ids=tokens.to(self._device), use_cache=False)
        indices = [i for i, row in enumerate(rows) for _ in row.positions]
        places = [position for row in rows for position in row.positions]
        return output.last_hidden_state[indices, places]


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A hash over the files of a local model: other weights are another reward version."""
    digest = hashlib.sha256()
    place = Path(str(settings.get("model", "")))
    for path in sorted(place.glob("*")) if place.is_dir() else []:
        if path.suffix in (".json", ".safetensors", ".jinja", ".model"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()
