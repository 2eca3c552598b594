"""How a question and its steps are written down for a process reward model.

Invariant: training and scoring use the same tokens, and each step has one position at which the
model is asked, whatever the candidate writes. Called by `rewards.step_models`,
`rewards.step_likelihood` and the training of such models.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from cluster.types import Task
from rewards.local_model import Asked

DEFAULT_MARKER = "<|step|>"


@dataclass(frozen=True)
class StepFormat:
    """Question, then for each step its stripped text, `marker` and, before the next, `joiner`.

    The question is `question_format` with `{question}` replaced by the last message, or by default
    the tokenizer's chat template; `system` is put before it as a message. Qwen2.5-Math-PRM has
    marker "<extra_0>"; Math-Shepherd has " ки", joiner "\\n" and "{question} ".
    """

    marker: str = DEFAULT_MARKER
    joiner: str = ""
    question_format: str = ""
    system: str = ""

    def question(self, tokenizer: Any, task: Task) -> tuple[str, bool]:
        """The text before the steps, and whether the tokenizer still adds its first token."""
        question = task.messages[-1].content if task.messages else ""
        if self.question_format:
            return self.question_format.replace("{question}", question), True
        if tokenizer.chat_template is None:
            return "".join(f"{message.content}\n" for message in task.messages), True
        turns = [{"role": m.role, "content": m.content} for m in task.messages]
        if self.system:
            rest = [turn for turn in turns if turn["role"] != "system"]
            turns = [{"role": "system", "content": self.system}, *rest]
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        ), False

    def encode(self, tokenizer: Any, task: Task, steps: list[str]) -> Asked:
        """A step is asked about at the last token that holds a piece of its marker.

        Markers in the candidate's own text are taken out: they would be questions of its choosing.
        """
        text, is_plain = self.question(tokenizer, task)
        ends: list[int] = []
        for step in steps:
            text += self.joiner if ends else ""
            text += step.replace(self.marker.strip(), "").strip() + self.marker
            ends.append(len(text))
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=is_plain)
        starts: list[int] = [start for start, _ in encoded["offset_mapping"]]
        positions = [bisect_left(starts, end) - 1 for end in ends]
        return Asked(list(encoded["input_ids"]), positions)
