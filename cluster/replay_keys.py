"""Every Redis key of a run, spelled here and nowhere else.

Invariant: all keys of a run share the hash tag `{hone:<run_id>}`, so they live in one cluster slot
and one Lua script may touch them together. Used by `cluster.replay_buffer`
and `cluster.control`.
"""

import re

from cluster.errors import ConfigError

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


class Keys:
    """Keys of one run. Example: `Keys("math-1").ready == "{hone:math-1}:ready"`."""

    def __init__(self, run_id: str) -> None:
        if not _RUN_ID.fullmatch(run_id):
            raise ConfigError(
                "run.name must be 1 to 128 letters, digits or . _ : - and start with a letter or "
                f"digit, got {run_id!r}"
            )
        self._prefix = f"{{hone:{run_id}}}"
        self.ready = self._key("ready")  # ZSET: arrival number + group_id, by -priority
        self.leased = self._key("leased")  # ZSET: group_id, by lease end (server ms)
        self.consumed = self._key("consumed")  # ZSET: group_id, by step
        self.entries = self._key("entries")  # HASH: group_id -> scheduling state
        self.headers = self._key("headers")  # HASH: group_id -> GroupHeader
        self.payloads = self._key("payloads")  # HASH: group_id -> TrajectoryGroup
        self.counters = self._key("counters")  # HASH: name -> count since the run began
        self.finished = self._key("finished")  # ZSET: group_id that left, by time (server ms)
        self.dead = self._key("dead")  # STREAM of dead letters
        self.wake = self._key("wake")  # LIST: one token while something is ready
        self.epoch = self._key("epoch")  # STRING: number of the newest writer
        self.last_take_over = self._key("last_take_over")  # STRING: so that a retry counts once
        self.requests = self._key("requests")  # LIST of control requests
        self.alive = self._key("alive")  # STRING that expires unless the run renews it

    @property
    def state(self) -> list[str]:
        """KEYS[1..11] of every script, in the order its prelude unpacks them."""
        return [
            self.ready,
            self.leased,
            self.consumed,
            self.entries,
            self.headers,
            self.payloads,
            self.counters,
            self.finished,
            self.dead,
            self.wake,
            self.epoch,
        ]

    def last_claim(self, owner: str) -> str:
        """STRING: an owner's latest claim, so that a retried claim gets the same groups."""
        return self._key(f"claim:{owner}")

    def reply(self, request_id: str) -> str:
        """LIST: the one reply to a control request; expires."""
        return self._key(f"reply:{request_id}")

    def _key(self, name: str) -> str:
        return f"{self._prefix}:{name}"
