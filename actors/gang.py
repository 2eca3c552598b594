"""The reserved places of a run: one placement group per role, all of them or none.

Invariant: what raises or is cancelled leaves nothing reserved that was not before. Groups are asked
for one after the other; a run that holds some, and waits for what others hold, gives all back after
`HOLD_S`, longer each time, and asks again, so two runs that want the same cluster do not keep half
of it each; one that is too large for the nodes there are keeps what it has and says so. A bundle
whose node dies is rescheduled by Ray once a node has room; the actor that is started again then
waits for it. Called by `actors.bring_up` and `actors.scaling`.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.capacity import cluster_nodes, shortages
from actors.placement import BundleRequest
from cluster.errors import DeadlineError

POLL_S = 0.5
# Without the rest; drawn anew each time, so that one of two gives way first, and doubled each time,
# up to so many times the first.
HOLD_S = (4.0, 12.0)
MOST_HOLDS = 5
YIELD_S = 3.0  # Ray looks every second for what fits

Report = Callable[[str], None]


class Gang:
    """Placement groups by role."""

    def __init__(self) -> None:
        self._groups: dict[str, PlacementGroup] = {}

    @classmethod
    async def reserve(
        cls, run_id: str, requests: Sequence[BundleRequest], deadline_s: float, report: Report
    ) -> "Gang":
        """Wait until every request has its place; `report` gets a line whenever another
        role is waited for: after giving way, one that it has had before.

        Raises `DeadlineError` naming what is missing when `resources.start_timeout_s` runs out.
        """
        gang = cls()
        wait = _Wait(deadline_s, "resources.start_timeout_s")
        try:
            while not await gang._add_all(run_id, requests, wait, report):
                gang.release()
                wait.num_given_way += 1
                await asyncio.sleep(YIELD_S)
        except BaseException:
            gang.release()
            raise
        return gang

    async def extend(
        self, run_id: str, request: BundleRequest, deadline_s: float, report: Report
    ) -> None:
        """Wait for one more place while the run trains; raises `DeadlineError` as `reserve` does,
        and then only this place is given back.
        """
        try:
            wait = _Wait(deadline_s, request.knobs)
            await self._add(run_id, request, [request], wait, report, math.inf)
        except BaseException:
            self.give_back(request.role)
            raise

    def give_back(self, role: str) -> None:
        """Actors that still run there are ended by Ray."""
        if role in self._groups:
            remove_placement_group(self._groups.pop(role))

    def strategy(self, role: str, index: int = -1) -> PlacementGroupSchedulingStrategy:
        """Where an actor of `role` goes: bundle `index`, or any with room (-1)."""
        return PlacementGroupSchedulingStrategy(
            self._groups[role],
            placement_group_bundle_index=index,
            placement_group_capture_child_tasks=False,
        )

    def nodes(self) -> dict[str, list[str]]:
        """Node id of each bundle, by role."""
        tables: dict[str, dict[str, Any]] = {
            role: ray.util.placement_group_table(group) for role, group in self._groups.items()
        }
        return {
            role: [node for _, node in sorted(table["bundles_to_node_id"].items())]
            for role, table in tables.items()
        }

    def release(self) -> None:
        """Give everything back."""
        for role in list(self._groups):
            self.give_back(role)

    async def _add_all(
        self, run_id: str, requests: Sequence[BundleRequest], wait: "_Wait", report: Report
    ) -> bool:
        """False when others may want what is held while the rest is waited for."""
        for index, request in enumerate(requests):
            patience_s = wait.hold_s() if index else math.inf
            if not await self._add(run_id, request, requests, wait, report, patience_s):
                return False
        return True

    async def _add(
        self,
        run_id: str,
        request: BundleRequest,
        requests: Sequence[BundleRequest],
        wait: "_Wait",
        report: Report,
        patience_s: float,
    ) -> bool:
        """False when others have held its place for `patience_s`; it is still asked for then.

        `requests` is what must fit in all: this one and those that are held or asked for with it.
        """
        name = f"hone/{run_id}/{request.role}"
        await asyncio.to_thread(_remove_left_over, name)
        group = placement_group(
            [dict(request.resources) for _ in range(request.count)],
            strategy=request.strategy,
            name=name,
            bundle_label_selector=[dict(request.labels) for _ in range(request.count)],
        )
        self._groups[request.role] = group
        started = time.monotonic()
        while not await asyncio.to_thread(group.wait, POLL_S):
            missing = shortages(requests, cluster_nodes())
            wanted = missing[0] if missing else f"resources: {request.role} waits for {request}"
            if wait.is_over:
                raise DeadlineError(
                    "resources", f"{wanted}; waited {wait.seconds:.0f} s ({wait.knob})"
                )
            if request.role != wait.role:
                report(wanted)
                wait.role = request.role
            if not missing and time.monotonic() - started > patience_s:
                return False  # what is missing nobody else holds: there is none to give way to
        return True


@dataclass
class _Wait:
    seconds: float
    knob: str
    role: str = ""  # that the last line was about
    num_given_way: int = 0

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds

    def hold_s(self) -> float:
        return random.uniform(*HOLD_S) * min(2**self.num_given_way, MOST_HOLDS)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._end


def _remove_left_over(name: str) -> None:
    """The group of a controller that died, and those by which it was extended: Ray keeps them, and
    their resources, until the job ends.
    """
    names = [t["name"] for t in placement_group_table().values() if t["state"] != "REMOVED"]
    for left_over in names:
        if left_over == name or left_over.startswith(f"{name}/"):
            with suppress(ValueError):
                remove_placement_group(ray.util.get_placement_group(left_over))
