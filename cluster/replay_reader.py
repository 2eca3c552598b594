"""Looking into the replay buffer of a run: counts, places, stored groups, dead letters.

Invariant: reading changes nothing, so it is safe beside a run that trains. The base of
`cluster.replay_buffer.ReplayBuffer`; used alone by `hone replay`.
"""

# pyright: reportUnknownMemberType=false

from collections.abc import Iterator
from typing import Any, cast

import msgspec
import redis

from cluster import wire
from cluster.errors import WireError
from cluster.redis_client import translated_errors
from cluster.replay_keys import Keys
from cluster.replay_records import BufferStats, DeadLetter
from cluster.types import GroupHeader, TrajectoryGroup

_LETTERS = 16  # dead letters of one reply


class BufferReader:
    """The buffer of one run, to look at."""

    def __init__(self, client: redis.Redis, run_id: str) -> None:
        self._client = client
        self._keys = Keys(run_id)

    def places(self) -> dict[str, str]:
        """Every group that the buffer holds: its id -> ready, leased or consumed."""
        keys = self._keys
        with translated_errors("places"), self._client.pipeline(transaction=True) as pipeline:
            for key in (keys.ready, keys.leased, keys.consumed):
                pipeline.zrange(key, 0, -1)
            ready, leased, consumed = cast(list[list[bytes]], pipeline.execute())
        places = {member[16:].decode(): "ready" for member in ready}
        places |= {member.decode(): "leased" for member in leased}
        return places | {member.decode(): "consumed" for member in consumed}

    def ready(self) -> list[GroupHeader]:
        """Headers of the ready groups, in the order in which they would be claimed."""
        keys = self._keys
        with translated_errors("ready"):
            members = cast(list[bytes], self._client.zrange(keys.ready, 0, -1))
            ids = [member[16:].decode() for member in members]
            found = cast(list[bytes | None], self._client.hmget(keys.headers, ids) if ids else [])
        return [wire.decode(header, GroupHeader) for header in found if header is not None]

    def versions(self) -> dict[str, int]:
        """The lowest policy version that sampled each group that the buffer holds."""
        with translated_errors("versions"):
            packed = cast(dict[bytes, bytes], self._client.hgetall(self._keys.entries))
        return {
            group_id.decode(): int(msgspec.msgpack.decode(entry)["version"])
            for group_id, entry in packed.items()
        }

    def holds(self, group_id: str) -> bool:
        with translated_errors("holds"):
            return bool(self._client.hexists(self._keys.entries, group_id))

    def find(self, group_id: str) -> TrajectoryGroup | None:
        """The stored group, in whatever state; None when the buffer does not hold it."""
        with translated_errors("find"):
            payload = cast(bytes | None, self._client.hget(self._keys.payloads, group_id))
        return None if payload is None else decoded(group_id, payload)

    def sample(self, count: int) -> list[TrajectoryGroup]:
        """Up to `count` groups at random, in whatever state; those that leave meanwhile are not
        among them.
        """
        with translated_errors("sample"):
            pairs = cast(
                list[bytes],
                self._client.hrandfield(self._keys.payloads, count, withvalues=True) or [],
            )
        return [
            decoded(group_id.decode(), payload)
            for group_id, payload in zip(pairs[::2], pairs[1::2], strict=True)
        ]

    def stats(self) -> BufferStats:
        """All counts at one instant."""
        keys = self._keys
        with translated_errors("stats"), self._client.pipeline(transaction=True) as pipeline:
            for key in (keys.ready, keys.leased, keys.consumed):
                pipeline.zcard(key)
            pipeline.hgetall(keys.counters)
            ready, leased, consumed, raw = pipeline.execute()
        counters: dict[str, int] = {name.decode(): int(value) for name, value in raw.items()}
        return BufferStats(
            ready=ready,
            leased=leased,
            consumed=consumed,
            added=counters.get("added", 0),
            duplicates=counters.get("duplicates", 0),
            acknowledged=counters.get("acknowledged", 0),
            dropped={
                name.removeprefix("dropped:"): value
                for name, value in counters.items()
                if name.startswith("dropped:")
            },
            dead_lettered=counters.get("dead_lettered", 0),
            payload_bytes=counters.get("payload_bytes", 0),
        )

    def dead_letters(self, limit: int) -> list[DeadLetter]:
        """The newest `limit` dead letters, newest first; the last 10,000 or so are kept."""
        with translated_errors("dead_letters"):
            return _letters(self._client.xrevrange(self._keys.dead, count=limit))

    def dead_letters_after(self, letter_id: str) -> Iterator[DeadLetter]:
        """The dead letters that came after the one of this id (`0-0`: all), oldest first; a few at
        a time, since they hold payloads.
        """
        while True:
            with translated_errors("dead_letters"):
                rows = self._client.xrange(self._keys.dead, min=f"({letter_id}", count=_LETTERS)
                letters = _letters(rows)
            yield from letters
            if len(letters) < _LETTERS:
                return
            letter_id = letters[-1].id


def _letters(rows: Any) -> list[DeadLetter]:
    return [
        DeadLetter(
            id=entry_id.decode(),
            group_id=row[b"group_id"].decode(),
            reason=row[b"reason"].decode(),
            deliveries=int(row[b"deliveries"]),
            died_at=int(entry_id.split(b"-")[0]) / 1000,
            payload=row[b"payload"],
        )
        for entry_id, row in cast(list[tuple[bytes, dict[bytes, bytes]]], rows)
    ]


def decoded(group_id: str, payload: bytes | None) -> TrajectoryGroup:
    if payload is None:
        raise WireError("no payload in the buffer")
    group = wire.decode(payload, TrajectoryGroup)
    if group.group_id != group_id:
        raise WireError(f"payload is of group {group.group_id}")
    return group
