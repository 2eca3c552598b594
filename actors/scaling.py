"""More or fewer rollout workers while a run trains: what `hone scale` asks for.

Invariant: a new worker serves only after it has a reserved place, the current weights and a passed
probe; one that leaves loses no group; at least one stays. One change at a time, and each is a line
`fleet_scaled` in events.jsonl, also when it ended halfway. Slots, and with them the bound on policy
age, do not depend on the number of workers. Owned by the controller's parts.
"""

import asyncio
from dataclasses import replace
from typing import Any

from actors.door import Door
from actors.fleet import EventSink, RolloutFleet
from actors.placement import Placement
from cluster.control import Request
from cluster.errors import ConfigError, HoneError, StageError

ROOM_S = 60.0
KNOBS = "hone scale; a Ray of the run's own has resources.cpus CPUs"


class FleetScaling:
    """Serves requests `fleet.scale` with `rollout_workers`, the number to have."""

    def __init__(
        self,
        run_id: str,
        fleet: RolloutFleet,
        placement: Placement,
        door: Door,
        on_event: EventSink,
    ) -> None:
        self._run_id = run_id
        self._fleet = fleet
        self._placement = placement
        self._door = door
        self._on_event = on_event
        self._change = asyncio.Lock()
        self._num_extensions = 0

    async def carry_out(self, request: Request) -> dict[str, Any]:
        if request.command != "fleet.scale":
            raise ConfigError(f"unknown request {request.command!r}")
        async with self._change:
            await self._door.require_in_time(request)
            return await self._scale(_wanted(request))

    async def _scale(self, wanted: int) -> dict[str, Any]:
        fleet = self._fleet
        if not fleet.is_started:
            raise StageError("scale", "the run still loads its first engines: ask when it trains")
        before = len(fleet.staying)
        if wanted > before and self._placement.is_colocated:
            raise StageError(
                "scale",
                f"rollout workers must stay at most {before} with resources.layout "
                f"{self._placement.config.resources.layout}: each shares the GPU of a learner rank",
            )
        error = ""
        try:
            if wanted > before:
                await self._grow(wanted - before)
            else:
                await asyncio.gather(*[self._shrink() for _ in range(before - wanted)])
        except HoneError as failure:
            error = str(failure)
            raise
        finally:
            workers = [worker.name for worker in fleet.staying]
            self._on_event(
                "fleet_scaled", before=before, after=len(workers), wanted=wanted,
                workers=" ".join(workers), **({"error": error[:1000]} if error else {}),
            )  # fmt: skip
        return {"before": before, "after": len(workers), "workers": workers}

    async def _grow(self, count: int) -> None:
        """Raises the first failure once all are settled; those that came up stay."""
        results = await asyncio.gather(
            *[self._add(place) for place in await self._places(count)], return_exceptions=True
        )
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            raise failures[0]

    async def _add(self, place: str) -> None:
        try:
            await self._fleet.add(place)
        except BaseException:
            self._give_back(place)
            raise

    async def _shrink(self) -> None:
        self._give_back((await self._fleet.remove()).place)

    async def _places(self, count: int) -> list[str]:
        """Reserved room for `count` workers: what others have left first. All of it or none."""
        gang = self._placement.gang
        if gang is None:
            return ["rollout"] * count
        [whole] = [r for r in self._placement.requests() if r.role == "rollout"]
        num_left = whole.count - sum(w.place == whole.role for w in self._fleet.workers)
        places = [whole.role] * min(count, num_left)
        try:
            while len(places) < count:
                self._num_extensions += 1
                role = f"{whole.role}/{self._num_extensions}"
                one = replace(whole, role=role, count=1, knobs=KNOBS)
                await gang.extend(self._run_id, one, ROOM_S, self._report)
                places.append(role)
        except BaseException:
            for place in places:
                self._give_back(place)
            raise
        return places

    def _give_back(self, place: str) -> None:
        """Bundles that the run reserved at its start stay its own."""
        if self._placement.gang is not None and place != "rollout":
            self._placement.gang.give_back(place)

    def _report(self, wanted: str) -> None:
        self._on_event("waiting_for_resources", wanted=wanted)


def _wanted(request: Request) -> int:
    wanted = request.arguments.get("rollout_workers")
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise ConfigError(f"--rollout-workers must be a number from 1, got {wanted!r}")
    return wanted
