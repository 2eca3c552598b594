"""A few sequences by which an engine proves that it computes the learner's policy.

Invariant: sequences and the learner's log-probs of them change together, so that whoever catches up
during a sync is not measured by those of others. Owned by `actors.weight_sync`.
"""

from collections.abc import Sequence

import numpy as np

from cluster.types import TrajectoryGroup
from learners.group import LearnerGroup
from learners.records import ScoreRequest

# Weights that differ show at any few tokens. The mismatch metrics of a step compare
# engine and learner on all that was sampled.
NUM_SEQUENCES, NUM_TOKENS = 4, 64


class Probes:
    """`sequences` are in force: beginnings of `prompts` at first, of real trajectories later."""

    def __init__(self, prompts: Sequence[Sequence[int]], context_length: int) -> None:
        self._max_tokens = min(NUM_TOKENS, context_length - 1)  # an engine adds one
        self.sequences: list[np.ndarray] = []
        self._expected: list[np.ndarray] = []
        self._before = self.sequences, self._expected
        self._next: list[np.ndarray] = []
        self._take([np.asarray(prompt) for prompt in prompts])

    def choose(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Take beginnings of these trajectories at the next `renew`; those that are in force where
        there are none.
        """
        trajectories = [t for group in groups for t in group.trajectories if len(t.token_ids)]
        self._take([np.concatenate([t.context_tokens, t.token_ids]) for t in trajectories])

    def _take(self, sequences: list[np.ndarray]) -> None:
        chosen = sequences[:: max(1, len(sequences) // NUM_SEQUENCES)][:NUM_SEQUENCES]
        if chosen:
            self._next = [tokens[: self._max_tokens] for tokens in chosen]

    async def renew(self, learner: LearnerGroup) -> None:
        """Put what was chosen in force, with what the learner says of it now."""
        self._before = self.sequences, self._expected
        if self._next:
            requests = [ScoreRequest(tokens.tolist(), num_context=1) for tokens in self._next]
            self.sequences, self._expected = self._next, await learner.score(requests)

    def restore(self) -> None:
        """As before the last `renew`: its weights will not be published."""
        self.sequences, self._expected = self._before

    def error(self, measured: Sequence[np.ndarray]) -> float:
        """Mean |engine - learner| log-prob over all tokens, in nats, from the engine's log-probs
        of `sequences`.
        """
        return float(np.abs(np.concatenate(measured) - np.concatenate(self._expected)).mean())
