"""How much of a solution rollouts begin with: as much as keeps the accuracy where it was.

Invariant: the length changes between two steps only, by the groups that were settled until then, in
whatever order; what is saved with a run counts no group that a resumed one may count again. Owned
by `actors.curriculum`, which writes it into every request of the program `prefix`. G2RPO-A: arXiv
2508.13023.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from cluster.errors import ConfigError
from cluster.run_state import PrefixState
from cluster.types import Passes

_PERIOD = 3  # steps: two to compare with, and the one that is compared


@dataclass(frozen=True)
class PrefixRule:
    """`tokens` to begin with and `max_tokens` at most; `adapts` False leaves it at `tokens`."""

    tokens: int
    max_tokens: int
    adapts: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= self.max_tokens:
            raise ConfigError(
                f"tokens must lie in 1 .. max_tokens ({self.max_tokens}), got {self.tokens}"
            )

    def next(self, tokens: int, accuracies: Sequence[float]) -> int:
        """`tokens` * mean of the two earlier accuracies / the last one, within 1 .. `max_tokens`;
        unchanged where one of the two is 0. `next(1000, [.4, .5, .3]) == 1500`.
        """
        *earlier, last = accuracies
        before = sum(earlier) / len(earlier)
        if min(before, last) <= 0:
            return tokens
        return max(1, min(self.max_tokens, round(tokens * before / last)))


class PrefixLength:
    """The present length, and the accuracies that will move it."""

    def __init__(self, rule: PrefixRule) -> None:
        self._rule = rule
        self._state = PrefixState(tokens=rule.tokens)

    @property
    def tokens(self) -> int:
        return self._state.tokens

    def settle(self, passes: Passes) -> None:
        """Count a group that was consumed or dropped, with all its rollouts."""
        passes = self._state.passes + passes
        self._state = msgspec.structs.replace(self._state, passes=passes)

    def end_step(self) -> None:
        """Every third step moves the length, or where all solutions were shorter than what was
        asked for the longest of their beginnings; a step without any verdict does not count.
        """
        state = self._state
        if not self._rule.adapts or state.passes.num_judged == 0:
            return
        passes = state.passes
        accuracies = [*state.accuracies, passes.num_passed / passes.num_judged]
        if len(accuracies) < _PERIOD:
            lengths = msgspec.structs.replace(passes, num_passed=0, num_judged=0)
            self._state = PrefixState(tokens=state.tokens, accuracies=accuracies, passes=lengths)
            return
        given = state.tokens
        if 0 < passes.longest_prefix < passes.asked_prefix:  # groups may be of an earlier length
            given = min(given, passes.longest_prefix)
        self._state = PrefixState(tokens=self._rule.next(given, accuracies))

    def state(self) -> PrefixState:
        return self._state

    def restore(self, state: PrefixState | None) -> None:
        """Go back to `state`; to the beginning without one."""
        self._state = state or PrefixState(tokens=self._rule.tokens)
