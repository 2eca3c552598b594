"""Step scores from a language model's own probabilities: no reward model has to be trained.

Invariant: a score is the geometric mean of token probabilities, in 0..1, of one stated piece of
text in its context; nothing is sampled. A stand-in, with its measured AUC in docs/rewards.md, not a
good process reward model. Used as `likelihood` in `process` verifiers.
"""

import math
from collections.abc import Mapping
from itertools import accumulate
from statistics import fmean
from typing import Any, Literal

from cluster.errors import ConfigError
from cluster.types import Task
from rewards.local_model import Asked, LocalModel, ModelSettings, fingerprint
from rewards.step_format import StepFormat
from rewards.step_models import causal_lm
from rewards.step_scorer import StepScores

ROWS_AT_ONCE = 256  # of logits, each as wide as the vocabulary


class StepLikelihood:
    """How likely a causal LM finds the reference after each step (`target: answer`), or the least
    likely step so far, each after those before it (`target: step`).

    The reference is put as `answer_format` on a line after the steps; "The answer is {answer}" may
    suit a model better than the bare answer. Example: an answer of two tokens with probabilities
    0.9 and 0.4 after step 1 scores it 0.6.
    """

    def __init__(
        self,
        model: str,
        target: Literal["answer", "step"] = "answer",
        answer_format: str = "{answer}",
        question_format: str = "",
        system: str = "",
        dtype: str = "float32",
        device: str = "",
        batch_tokens: int = 16384,
    ) -> None:
        if target not in ("answer", "step"):
            raise ConfigError(f"target must be answer or step, got {target!r}")
        if "{answer}" not in answer_format:
            raise ConfigError(f"answer_format must contain {{answer}}, got {answer_format!r}")
        self._form = StepFormat(question_format=question_format, system=system)
        self._local = LocalModel(ModelSettings(model, dtype, device, batch_tokens), causal_lm)
        self._target = target
        self._answer_format = answer_format

    @staticmethod
    def fingerprint(settings: Mapping[str, Any]) -> str:
        return fingerprint(settings)

    async def score(self, task: Task, completions: list[list[str]]) -> list[StepScores]:
        if self._target == "answer" and not task.reference:
            error = f"task {task.task_id} has no reference whose likelihood could be taken"
            return [StepScores(error=error) for _ in completions]
        question, is_plain = self._form.question(self._local.tokenizer, task)
        pieces = [self._pieces(task, question, steps) for steps in completions]
        flat = [self._asked(before, text, is_plain) for one in pieces for before, text in one]
        distinct = {tuple(row.token_ids + row.positions): row for row in flat}
        values = await self._local.ask(list(distinct.values()), self._logprobs)
        known = dict(zip(distinct, values, strict=True))
        found = iter([known[tuple(row.token_ids + row.positions)] for row in flat])
        return [self._scores([next(found) for _ in one]) for one in pieces]

    def _pieces(self, task: Task, question: str, steps: list[str]) -> list[tuple[str, str]]:
        """For each step a context, and the text whose likelihood is its score."""
        pieces: list[tuple[str, str]] = []
        before = question
        for step in steps:
            after = before + step
            if self._target == "step":
                pieces.append((before, step))
            else:
                line = after if after[-1:].isspace() else f"{after}\n"
                pieces.append((line, self._answer_format.replace("{answer}", task.reference)))
            before = after
        return pieces

    def _asked(self, before: str, text: str, is_plain: bool) -> Asked:
        """The positions that predict the tokens with a letter of `text`."""
        encoded = self._local.tokenizer(
            before + text, return_offsets_mapping=True, add_special_tokens=is_plain
        )
        spans: list[tuple[int, int]] = encoded["offset_mapping"]
        predicted = [i for i, (_, end) in enumerate(spans) if end > len(before) and i > 0]
        return Asked(list(encoded["input_ids"]), [i - 1 for i in predicted])

    def _logprobs(self, hidden: Any, rows: list[Asked]) -> Any:
        torch = self._local.torch
        head = self._local.model.get_output_embeddings()
        labels = torch.tensor([r.token_ids[p + 1] for r in rows for p in r.positions])
        labels = labels.to(hidden.device)
        parts = [
            head(hidden[start : start + ROWS_AT_ONCE])
            .float()
            .log_softmax(-1)
            .gather(-1, labels[start : start + ROWS_AT_ONCE, None])[:, 0]
            for start in range(0, len(labels), ROWS_AT_ONCE)
        ]
        return torch.cat(parts)

    def _scores(self, logprobs: list[list[float] | None]) -> StepScores:
        if any(not values for values in logprobs):
            limit = self._local.max_length
            return StepScores(error=f"a step has no tokens, or the model reads only {limit}")
        scores = [math.exp(fmean(values)) for values in logprobs if values]
        if self._target == "step":
            scores = list(accumulate(scores, min))
        return StepScores(scores=scores)
