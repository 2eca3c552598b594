"""A policy of random tokens behind the interface that rollout programs see."""

import numpy as np

from actors.rollout import Completion, Sampling
from cluster.types import Message, Segment, TrajectoryStatus, VersionSpan
from learners.tokenizer import render, train_tokenizer

TOKENIZER = train_tokenizer(["1 + 2 = 3", "Hint: think"] * 5, 300)


class RandomPolicy:
    """`contexts` are those it was asked to continue."""

    def __init__(self, sampling: Sampling, context_length: int = 4096) -> None:
        self.sampling = sampling
        self.context_length = context_length
        self.contexts: list[np.ndarray] = []

    def render(self, messages: list[Message]) -> np.ndarray:
        return np.array(render(TOKENIZER, messages), dtype=np.int32)

    def decode(self, token_ids: np.ndarray) -> str:
        return str(TOKENIZER.decode(token_ids.tolist(), skip_special_tokens=True))

    def encode(self, text: str) -> np.ndarray:
        return np.array(TOKENIZER.encode(text, add_special_tokens=False), dtype=np.int32)

    async def generate(self, context: np.ndarray, n: int) -> list[Completion]:
        self.contexts.append(context)
        rng = np.random.default_rng(self.sampling.seed)
        lengths = rng.integers(1, self.sampling.max_new_tokens + 1, n)
        return [
            Completion(
                Segment(
                    token_ids=rng.integers(2, 290, length).astype(np.int32),
                    logprobs=-rng.random(length).astype(np.float32),
                    version_spans=[VersionSpan(3, 0, 1), VersionSpan(4, 1, int(length))],
                ),
                TrajectoryStatus.COMPLETED,
            )
            for length in lengths
        ]
