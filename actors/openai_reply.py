"""What the endpoint's engine makes of one request: the reply, and what it cost and who sampled it.

Invariant: a trace is filled while its request runs, and what it counts is charged however that
ends. Made by `actors.openai_engine`, read by the endpoint; nothing here needs vLLM.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.types import VersionSpan

Api = Literal["chat", "completion"]


@dataclass
class Trace:
    """What one request cost and which versions answered it; filled while it runs."""

    spans: dict[int, list[VersionSpan]] = field(default_factory=dict)  # by choice index
    num_choices: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_owed_tokens: int = 0  # at most, of whole answers that are not there yet
    has_failed: bool = False  # the engine broke off

    @property
    def num_tokens(self) -> int:
        """What is charged. A whole answer that is given up counts as if it had come: nothing tells
        how far it was, and its client could have read it as a stream.
        """
        return self.num_prompt_tokens + self.num_output_tokens + self.num_owed_tokens

    @property
    def policy_versions(self) -> list[int]:
        """Versions that sampled at least one token, in ascending order."""
        return sorted({span.policy_version for spans in self.spans.values() for span in spans})

    def as_json(self) -> list[dict[str, int]]:
        """Spans of all finished choices: `[{choice, policy_version, start, end}]`."""
        return [
            {
                "choice": choice,
                "policy_version": span.policy_version,
                "start": span.start,
                "end": span.end,
            }
            for choice, spans in sorted(self.spans.items())
            for span in spans
        ]


@dataclass(frozen=True)
class Reply:
    """An answer in OpenAI's format: a whole body, or the events of a stream."""

    status: int
    body: dict[str, Any] = field(default_factory=dict)
    events: AsyncIterator[str] | None = None
