"""Changes of the live rubric while a run trains: list, try, shadow, promote, rollback, swap.

Invariant: a version goes live only after the workers that will be live have paid gold answers and
golden sets in full, a rollback's too, and after `rewards.json` names it; whatever fails before that
changes nothing but a line `reward_refused` in events.jsonl. One change at a time. Requests come
through `actors.door`. Owned by the controller's parts.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from pydantic import ValidationError

from actors.door import Door
from actors.reward_buffered import BufferedGroups, Treated
from actors.reward_candidate import Candidate
from actors.reward_pool import RewardPool
from actors.reward_trial import trial
from cluster import reward_state
from cluster.config import RewardsSection, VerifierConfig
from cluster.control import ControlServer, Request
from cluster.errors import ActorLostError, ConfigError, HoneError, StageError, boundary
from cluster.redis_client import connect
from cluster.reward_state import RewardState, RubricVersion
from cluster.types import Task

REPORT_EVERY_GROUPS = 20
log = logging.getLogger(__name__)


class RewardAdmin:
    """Serves requests `rewards.<command>` for one run."""

    def __init__(self, pool: RewardPool, buffered: BufferedGroups) -> None:
        home = pool.home
        self._pool = pool
        self._run = home.run
        self._tasks: list[Task] = []  # of training: what rubrics check themselves on
        self._buffered = buffered
        self._on_event = home.on_event
        self._origin = _plain(home.placement.config.rewards.verifiers)
        self._state = RewardState(origin=self._origin)
        server = ControlServer(connect(home.buffer_url), home.run.buffer_id)
        self.door = Door(server, home.on_event)
        self.door.serve("rewards", self._carry_out, refusal="reward_refused")
        self.door.on_poll = self._watch_shadow
        self._change = asyncio.Lock()
        self._trial = asyncio.Lock()  # of its own: a trial changes nothing, a rollback is urgent
        self._shadowed: RubricVersion | None = None
        self._num_reported = 0
        self._commands: dict[str, Callable[[dict[str, Any]], Awaitable[Any]]] = {
            "rewards.try": self._try,
            "rewards.shadow": self._start_shadow,
            "rewards.promote": self._promote,
            "rewards.rollback": self._rollback,
            "rewards.swap": self._swap,
        }

    async def start(self, tasks: list[Task]) -> None:
        """Bring the rubric up that was last live, or the config's, and open the door."""
        self._tasks = tasks
        known = await asyncio.to_thread(reward_state.load, self._run.path)
        if known is not None and known.origin == self._origin:
            self._state = known
        last = self._state.get(self._state.active)
        state, workers = self._state, None
        if last is not None:
            try:
                workers = await self._pool.prepare(last, self._tasks)
            except ActorLostError as error:  # or its code has changed since
                self._on_event("worker_died", actor="reward", pid=0, cause=error.reason[:300])
        if workers is None:
            verifiers = _parsed(last.verifiers if last else self._origin)
            candidate = Candidate(self._pool.home, verifiers)
            try:
                state, version = self._registered(await candidate.start(), verifiers)
            finally:
                candidate.close()
            workers = await self._pool.prepare(version, self._tasks)
        self._pool.cut_over(workers)
        await self._save(state.activate(workers.version.label))
        if last is not None and last.label != workers.version.label:
            self._tell("resume", last.label, workers.version, "its code has changed since")
        await self.door.open()

    @property
    def versions(self) -> dict[str, str]:
        """What `RunState.reward_versions` of a checkpoint holds."""
        live = self._pool.live
        return {reward_state.RUBRIC: live.label, **live.signals}

    async def stop(self) -> None:
        """Close the door; the pool is stopped by its owner."""
        self._buffered.stop()
        await self.door.close()

    async def _carry_out(self, request: Request) -> Any:
        if request.command == "rewards.list":
            return self._listing()
        command = self._commands.get(request.command)
        if command is None:
            raise ConfigError(f"unknown request {request.command!r}")
        async with self._trial if command == self._try else self._change:
            await self.door.require_in_time(request)
            return await command(request.arguments)

    def _listing(self) -> dict[str, Any]:
        shadow, version = self._pool.shadow, self._shadowed
        report = shadow.tally.result() if shadow else None
        return {
            "state": msgspec.to_builtins(self._state),
            "shadow": version.label if shadow and version else "",
            "report": msgspec.to_builtins(report),
        }

    async def _try(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Score stored groups with a candidate; nothing in the run changes."""
        groups = await self._buffered.sample(int(arguments.get("groups", 16)))
        if not groups:
            raise StageError("try", "no group is stored yet: ask again after the first step")
        candidate, verifiers = self._candidate(arguments)
        found = await trial(candidate, self._pool.live.full_reward, groups, self._tasks)
        self._on_event("reward_tried", hash=found["hash"], gold=found["gold"], **found["report"])
        return found | {"verifiers": _plain(verifiers)}

    async def _start_shadow(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments.get("stop"):
            return {"report": msgspec.to_builtins(self._end_shadow("stopped"))}
        if self._pool.shadow is not None:
            raise StageError("shadow", "another candidate is in the shadow: promote or stop it")
        candidate, verifiers = self._candidate(arguments)
        try:
            facts = await candidate.start()
            warnings = await candidate.self_check(self._tasks)
            state, version = self._registered(facts, verifiers)
            await self._save(state)
        except BaseException:
            candidate.close()
            raise
        candidate.follow(self._pool.live.full_reward)
        self._shadowed, self._pool.shadow, self._num_reported = version, candidate, 0
        self._on_event("reward_shadow_started", version=version.label, live=self._state.active)
        return {"version": version.label, "warnings": warnings}

    async def _promote(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self._pool.shadow is None or self._shadowed is None:
            raise StageError("promote", "no candidate is in the shadow: start one, or use swap")
        answer = await self._go_live("promote", self._shadowed, arguments)
        if self._pool.shadow is not None:  # it may have died since
            self._end_shadow("promoted")
        return answer

    async def _rollback(self, arguments: dict[str, Any]) -> dict[str, Any]:
        version = self._state.get(self._state.previous)
        if version is None:
            raise StageError("rollback", "no version was live before this one")
        return await self._go_live("rollback", version, arguments)

    async def _swap(self, arguments: dict[str, Any]) -> dict[str, Any]:
        candidate, verifiers = self._candidate(arguments)
        try:
            _, version = self._registered(await candidate.start(), verifiers)
            if version.label == self._state.active:
                raise StageError("swap", f"{version.label} is live already")
            warnings = await candidate.self_check(self._tasks)
        finally:
            candidate.close()
        answer = await self._go_live("swap", version, arguments)
        return answer | {"warnings": warnings + answer["warnings"]}

    async def _go_live(
        self, action: str, version: RubricVersion, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """Start its workers, write it down, cut over, treat the groups that wait in the buffer."""
        choice = self._buffered.choice(arguments)
        workers = await self._pool.prepare(version, self._tasks)
        before = self._state.active
        try:
            state, _ = self._state.register(version.hash, version.verifiers, version.signals)
            await self._save(state.activate(version.label))
        except BaseException:
            self._pool.discard(workers)
            raise
        started = time.perf_counter()
        old = self._pool.cut_over(workers)
        if self._pool.shadow is not None:
            self._pool.shadow.follow(version.full_reward)
        cutover_ms = (time.perf_counter() - started) * 1000
        self._tell(action, before, version, f"buffered groups: {choice}", cutover_ms)
        treated, warnings = Treated(), list[str]()
        try:
            with boundary("buffered groups"):
                treated = await self._buffered.treat(choice, version.label, self._pool)
        except HoneError as error:  # the version is live all the same
            warnings.append(f"{version.label} is live, but --buffered {choice} failed: {error}")
            self._on_event("reward_buffered", version=version.label, error=str(error)[:1000])
        if treated.num_unscored:
            warnings.append(
                f"{treated.num_unscored} buffered groups stay as they were: checks of "
                f"{version.label} abstained"
            )
            self._on_event(
                "reward_buffered", version=version.label, num_unscored=treated.num_unscored
            )
        if old is not None:
            self._buffered.treat_late(choice, version.label, self._pool, old)
        return {
            "from": before, "to": version.label, "buffered": treated.num_groups, "choice": choice,
            "warnings": warnings,
        }  # fmt: skip

    def _tell(
        self, action: str, before: str, version: RubricVersion, note: str, cutover_ms: float = 0.0
    ) -> None:
        signals = " ".join(f"{name}={value}" for name, value in version.signals.items())
        self._on_event(
            "reward_swapped",
            action=action,
            before=before,
            after=version.label,
            signals=signals,
            note=note,
            cutover_ms=round(cutover_ms, 3),
        )

    def _candidate(self, arguments: dict[str, Any]) -> tuple[Candidate, dict[str, VerifierConfig]]:
        verifiers = _parsed(arguments.get("verifiers"))
        return Candidate(self._pool.home, verifiers), verifiers

    def _registered(
        self, facts: Any, verifiers: dict[str, VerifierConfig]
    ) -> tuple[RewardState, RubricVersion]:
        """The state with this version in it; nothing is kept before it is saved."""
        return self._state.register(facts.hash, _plain(verifiers), facts.signals)

    async def _save(self, state: RewardState) -> None:
        await asyncio.to_thread(reward_state.save, self._run.path, state)
        self._state = state

    def _watch_shadow(self) -> None:
        shadow = self._pool.shadow
        if shadow is None:
            return
        if shadow.is_lost:
            self._end_shadow("failed")
        elif shadow.tally.num_groups >= self._num_reported + REPORT_EVERY_GROUPS:
            self._report_shadow("reward_shadow_report")

    def _end_shadow(self, reason: str) -> Any:
        if self._pool.shadow is None:
            raise StageError("shadow", "no candidate is in the shadow")
        report = self._report_shadow(f"reward_shadow_{reason}")
        self._pool.shadow.close()
        self._pool.shadow, self._shadowed = None, None
        return report

    def _report_shadow(self, kind: str) -> Any:
        assert self._pool.shadow
        assert self._shadowed
        report = self._pool.shadow.tally.result()
        self._num_reported = report.num_groups
        self._on_event(kind, version=self._shadowed.label, **msgspec.to_builtins(report))
        return report


def _plain(verifiers: dict[str, VerifierConfig]) -> dict[str, dict[str, Any]]:
    return {name: v.model_dump(mode="json") for name, v in verifiers.items()}


def _parsed(verifiers: Any) -> dict[str, VerifierConfig]:
    try:
        return RewardsSection.model_validate({"verifiers": verifiers}).verifiers
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"rewards.{'; rewards.'.join(lines)}") from None
