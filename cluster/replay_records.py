"""What the replay buffer answers: outcome of an add, counts, dead letters.

Invariant: `BufferStats.num_unaccounted` is 0 in a healthy buffer, because every group that was
added is in one place. Made by `cluster.replay_buffer`; read by the controller and `hone replay`.
"""

from enum import StrEnum

import msgspec


class AddResult(StrEnum):
    ADDED = "added"
    DUPLICATE = "duplicate"


class BufferStats(msgspec.Struct, frozen=True, kw_only=True):
    """Groups in `ready`, `leased` and `consumed` now; the counts are since the run began."""

    ready: int
    leased: int
    consumed: int
    added: int
    duplicates: int
    acknowledged: int
    dropped: dict[str, int]  # by reason
    dead_lettered: int
    payload_bytes: int

    @property
    def num_unaccounted(self) -> int:
        """Groups that were added and are nowhere: 0, or Redis lost data."""
        present = self.ready + self.leased + self.consumed
        gone = self.acknowledged + sum(self.dropped.values()) + self.dead_lettered
        return self.added - present - gone


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A group taken out of circulation; `payload` is what the buffer held, damaged or not."""

    id: str  # of the stream: later letters have greater ids
    group_id: str
    reason: str
    deliveries: int
    died_at: float  # unix seconds, server time
    payload: bytes
