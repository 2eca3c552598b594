"""The replay buffer: scored trajectory groups between reward workers and learner, kept in Redis.

Invariant: every group that was added is in exactly one place: ready, leased, consumed (its payload
kept until a durable checkpoint covers the step), or finished (acknowledged, dropped with a reason,
dead-lettered). Called by reward workers (`add`) and the learner side (all else), from any thread.

```
 add -> ready -> claim -> leased -> consume -> consumed -> acknowledge -> gone
          ^---- release, expire ------'   ^--- restore ---'
```
"""

# pyright: reportUnknownMemberType=false

import logging
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, cast

import redis

from cluster import wire
from cluster.errors import BufferFullError, GroupsVanishedError, StageError, WireError
from cluster.redis_client import translated_errors
from cluster.replay_reader import BufferReader, decoded
from cluster.replay_records import AddResult
from cluster.replay_scripts import Script
from cluster.types import GroupHeader, TrajectoryGroup

_STAGE = "replay buffer"
_REMEMBERED, _MIN_REMEMBERED = 8, 1024  # ids that left: so many buffers full, but not fewer
_BATCH = 256  # groups that one script call moves, so that the server stays responsive
_FETCH_BATCH = 16
_WAIT_SLICE_S = 1.0  # bounds the delay when a woken waiter died before it claimed

_log = logging.getLogger(__name__)


class ReplayBuffer(BufferReader):
    """The buffer of one run. Capacity counts ready and leased groups, except those that the last
    `restore` brought back: what the run needs besides them still has room.

    Example: `buffer.add(group); [header] = buffer.claim(1, owner="learner/0", wait_s=5.0);
    buffer.consume([header.group_id], step=1); buffer.acknowledge(1)`.
    Every method raises `BufferUnavailableError` when Redis does not answer.
    """

    def __init__(
        self,
        client: redis.Redis,
        run_id: str,
        *,
        capacity_groups: int,
        lease_s: float,
        max_deliveries: int,
    ) -> None:
        super().__init__(client, run_id)
        self.epoch = -1  # of the controller this client writes for; -1 is not fenced
        self._scripts = {script: client.register_script(script) for script in Script}
        self._capacity_groups = capacity_groups
        self._lease_ms = max(1, round(lease_s * 1000))
        self._max_deliveries = max_deliveries
        self._num_remembered = max(_MIN_REMEMBERED, _REMEMBERED * capacity_groups)

    def take_over(self) -> int:
        """Become the newest writer of the run; whoever writes with an older epoch gets
        `FencedError`, and so does this client when it was overtaken: it cannot take the run back.
        """
        self.epoch = self._run(
            Script.TAKE_OVER,
            self.epoch,
            uuid.uuid4().hex,
            extra_key=self._keys.last_take_over,
            epoch=-1,
        )
        return self.epoch

    def let_expire(self, after_s: float) -> None:
        """Have Redis delete all of it after `after_s`, unless a writer takes over before."""
        with translated_errors("expire"), self._client.pipeline(transaction=True) as pipeline:
            for key in (*self._keys.state, self._keys.last_take_over):
                pipeline.expire(key, round(after_s))
            pipeline.execute()

    def add(self, group: TrajectoryGroup, *, epoch: int | None = None) -> AddResult:
        """Make `group` ready, unless its id is in the buffer or among the last to leave it: eight
        times its capacity, at least 1024. One that comes later still is nothing the run waits for.

        `epoch` is that of the controller which asked for the group, if it is not the client's.

        Raises `BufferFullError` at capacity, and `WireError` when the priority is not finite.
        """
        answer = self._run(
            Script.ADD,
            group.group_id,
            _score(group),
            group.min_policy_version,
            wire.encode(GroupHeader.of(group)),
            wire.encode(group),
            self._capacity_groups,
            self._num_remembered,
            epoch=epoch,
        )
        if answer == b"full":
            raise BufferFullError(
                f"ready and leased groups must stay below {self._capacity_groups} "
                "(buffer.capacity_groups): add again when the learner has consumed some"
            )
        return AddResult(answer.decode())

    def claim(self, max_groups: int, *, owner: str, wait_s: float) -> list[GroupHeader]:
        """Lease up to `max_groups` groups to `owner`: higher priority first, then first come.

        Groups with a damaged header go to the dead letters. Waits up to `wait_s` while nothing is
        ready.
        """
        deadline = time.monotonic() + wait_s
        while True:
            headers = self._claim_ready(max_groups, owner)
            remaining_s = deadline - time.monotonic()
            if headers or remaining_s <= 0 or max_groups <= 0:
                return headers
            with translated_errors("claim"):
                timeout_s = min(max(remaining_s, 0.01), _WAIT_SLICE_S)  # 0 would be for ever
                self._client.blpop([self._keys.wake], timeout=timeout_s)

    def fetch(self, group_ids: Sequence[str]) -> list[TrajectoryGroup]:
        """The groups in the order of `group_ids`.

        Raises `WireError` naming the ids that are damaged (now dead letters) or not in the buffer.
        """
        groups: list[TrajectoryGroup] = []
        faults: dict[str, str] = {}
        for start in range(0, len(group_ids), _FETCH_BATCH):
            batch = list(group_ids[start : start + _FETCH_BATCH])
            with translated_errors("fetch"):
                payloads = cast(list[bytes | None], self._client.hmget(self._keys.payloads, batch))
            for group_id, payload in zip(batch, payloads, strict=True):
                try:
                    groups.append(decoded(group_id, payload))
                except WireError as error:
                    faults[group_id] = str(error)
        if faults:
            self._bury(faults)
            reasons = "; ".join(f"{group_id}: {reason}" for group_id, reason in faults.items())
            raise WireError(f"groups must be in the buffer and undamaged: {reasons}")
        return groups

    def take(self, group_ids: Sequence[str], owner: str) -> list[str]:
        """Lease those of `group_ids` that are ready to `owner`; returns those it then has."""
        taken = self._run(Script.TAKE, owner, self._lease_ms, *group_ids)
        return [group_id.decode() for group_id in taken]

    def replace(self, group: TrajectoryGroup, owner: str) -> bool:
        """New contents and priority for a group that `owner` holds a lease on; False when it holds
        none.
        """
        header, payload = wire.encode(GroupHeader.of(group)), wire.encode(group)
        return bool(
            self._run(Script.REPLACE, owner, group.group_id, header, payload, _score(group))
        )

    def renew(self, owner: str, group_ids: Sequence[str] | None = None) -> int:
        """Extend leases of `owner` to `lease_s` from now, those of `group_ids` or all that Redis
        knows of; returns how many there are.
        """
        if group_ids is None:
            group_ids = [g for g, place in self.places().items() if place == "leased"]
        return self._run(Script.RENEW, owner, self._lease_ms, *group_ids)

    def release(self, group_ids: Sequence[str], owner: str) -> int:
        """Give leases of `owner` back, uncounted as deliveries; returns how many it held."""
        return self._run(Script.RELEASE, owner, *group_ids)

    def consume(self, group_ids: Sequence[str], *, step: int) -> None:
        """Record that optimizer step `step` used these groups. All or nothing; repeatable.

        A group whose lease ran out is taken back from ready: it has moved the weights. Call before
        the checkpoint of `step` is committed. Raises `StageError` when another step has consumed
        one of them, `GroupsVanishedError` when the buffer does not hold it.
        """
        answer = self._run(Script.CONSUME, step, *group_ids)
        if answer:
            texts = [item.decode() for item in answer]
            reasons = dict(zip(texts[::2], texts[1::2], strict=True))
            if set(reasons.values()) == {"not in the buffer"}:
                lost = ", ".join(reasons)
                raise GroupsVanishedError(_STAGE, f"Redis has lost groups of step {step}: {lost}")
            conflicts = (f"{g} is {r}" for g, r in reasons.items())
            raise StageError(
                _STAGE,
                f"step {step} must consume groups that it alone holds (a lease not renewed ends "
                f"after buffer.lease_s = {self._lease_ms / 1000:g}): {'; '.join(conflicts)}",
            )

    def acknowledge(self, durable_step: int) -> int:
        """Delete the groups that steps up to `durable_step` consumed; returns how many."""
        total = 0
        while True:
            deleted = self._run(Script.ACKNOWLEDGE, durable_step, _BATCH)
            total += deleted
            if deleted < _BATCH:
                return total

    def restore(self, durable_step: int) -> int:
        """After a crash: undo the steps after `durable_step` and end all leases.

        Returns how many groups are ready again. `acknowledge(durable_step)` completes the recovery.
        """
        return self._return_all(Script.RESTORE, durable_step, self._max_deliveries)

    def discard_newer(self, policy_version: int) -> list[str]:
        """Take back ready groups that weights after `policy_version` sampled, and return their ids.

        Counted as dropped for `lost_weights`; the same ids may be added again.
        """
        return [group_id.decode() for group_id in self._run(Script.DISCARD, policy_version)]

    def readmit(self, group_ids: Sequence[str]) -> None:
        """Let ids that left be added again: what the groups did to the weights is undone."""
        for start in range(0, len(group_ids), _BATCH):
            self._run(Script.READMIT, *group_ids[start : start + _BATCH])

    def expire(self) -> int:
        """End leases that ran out; returns how many groups are ready again.

        A group delivered more than `max_deliveries` times goes to the dead letters instead.
        """
        return self._return_all(Script.EXPIRE, self._max_deliveries)

    def drop(self, group_id: str, reason: str, owner: str = "") -> bool:
        """Remove a ready or leased group, counted under `reason`; an unknown group is no error.

        With an `owner` only what it holds a lease on; returns False where it holds none. Without
        one, raises `StageError` for a consumed group: it has moved the weights.
        """
        answer = self._run(Script.DROP, group_id, reason, owner)
        if answer == b"consumed":
            raise StageError(_STAGE, f"{group_id} must not be dropped: a step has consumed it")
        return answer != b"not held"

    def _claim_ready(self, max_groups: int, owner: str) -> list[GroupHeader]:
        answer = self._run(
            Script.CLAIM,
            owner,
            max_groups,
            self._lease_ms,
            uuid.uuid4().hex,
            extra_key=self._keys.last_claim(owner),
        )
        headers: list[GroupHeader] = []
        faults: dict[str, str] = {}
        for group_id, header in zip(answer[::2], answer[1::2], strict=True):
            try:
                headers.append(wire.decode(header or b"", GroupHeader))
            except WireError as error:
                faults[group_id.decode()] = f"header: {error}"
        if faults:
            self._bury(faults)
        return headers

    def _bury(self, faults: dict[str, str]) -> None:
        _log.error("groups to the dead letters: %s", faults)
        self._run(Script.BURY, *(part for fault in faults.items() for part in fault))

    def _return_all(self, script: Script, *arguments: int) -> int:
        total = 0
        while True:
            num_seen, num_ready = self._run(script, *arguments, _BATCH)
            total += num_ready
            if num_seen == 0:
                return total

    def _run(
        self,
        script: Script,
        *arguments: str | bytes | float,
        extra_key: str = "",
        epoch: int | None = None,
    ) -> Any:
        writer = self.epoch if epoch is None else epoch
        keys = [*self._keys.state, extra_key] if extra_key else self._keys.state
        with translated_errors(script.name.lower()):
            return self._scripts[script](keys=keys, args=[writer, *arguments])


def _score(group: TrajectoryGroup) -> str:
    if not math.isfinite(group.priority):
        raise WireError(f"priority of {group.group_id} must be finite, got {group.priority}")
    return repr(-group.priority)
