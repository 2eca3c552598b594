"""Weights from the learner to engines that share its GPUs: each engine copies them out of memory
that the rank on the same GPU has filled.

Invariant: every call ends, and tells for each engine whether it has the weights; no memory stays
shared, except by a learner that is lost, whose memory ends with it. Called by `actors.weight_sync`,
which sees to the engines that came away without.
"""

import asyncio
from collections.abc import Sequence

from actors.fleet import EventSink
from actors.fleet_worker import Worker
from actors.stages import within
from cluster.config import SyncSection
from cluster.errors import LearnerLostError, StageError
from learners.group import LearnerGroup


class WeightSharing:
    """Nothing is held from one sync to the next."""

    def __init__(self, config: SyncSection, learner: LearnerGroup, on_event: EventSink) -> None:
        self._timeout_s = config.timeout_s
        self._learner = learner
        self._on_event = on_event

    async def send(
        self, workers: Sequence[Worker], policy_version: int
    ) -> list[float | StageError]:
        """For each worker the seconds of its pause, or why it has not got the weights: a
        `DeadlineError` if it hangs. Raises `LearnerLostError`.
        """
        try:
            results = await self._send(workers, policy_version)
        except LearnerLostError:
            raise  # a rank that hangs would hang once more
        except StageError as error:
            results: list[float | StageError] = [error] * len(workers)
        except asyncio.CancelledError:
            await self._learner.call("share_weights", False)
            raise
        await self._learner.call("share_weights", False)
        if failures := [result for result in results if isinstance(result, StageError)]:
            cause = str(failures[0])
            self._on_event("sharing_failed", policy_version=policy_version, cause=cause)
        return results

    async def _send(
        self, workers: Sequence[Worker], policy_version: int
    ) -> list[float | StageError]:
        shares = await self._learner.call("share_weights", True)
        update = {
            "manifest": shares[0]["manifest"],
            "handles": {share["device"]: share["handle"] for share in shares},
        }
        return await asyncio.gather(*[self._load(w, update, policy_version) for w in workers])

    async def _load(
        self, worker: Worker, update: dict[str, object], policy_version: int
    ) -> float | StageError:
        try:
            return await within(
                worker.handle.load_weights.remote(update, policy_version),
                stage="sync",
                what=f"{worker.name} to load shared weights",
                deadline_s=self._timeout_s,
                knob="sync.timeout_s",
            )
        except StageError as error:
            return error
