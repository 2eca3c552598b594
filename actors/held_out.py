"""The evaluations of a run that trains: all samples of one by one policy and one reward version.

Invariant: an evaluation ends at once when the run is to stop, and then says nothing. Owned by the
controller.
"""

import asyncio

from actors.bring_up import Parts
from actors.evaluate import evaluate
from actors.observer import Observer
from actors.stages import Stages
from cluster.config import Config


class HeldOut:
    """Example: `await held_out.measure(parts, step=20, policy_version=20)["eval/pass@1"]`."""

    def __init__(
        self, config: Config, stages: Stages, observer: Observer, stopping: asyncio.Event
    ) -> None:
        self._config = config
        self._stages = stages
        self._observer = observer
        self._stopping = stopping

    async def measure(self, parts: Parts, step: int, policy_version: int) -> dict[str, float]:
        """Metrics of the present policy, NaN without any verdict; none when the run stops first."""
        self._observer.phase("evaluating", f"held-out pass@1 at step {step}", 0.0)
        with self._stages.busy("eval"), parts.rewards.one_version() as score:
            running = asyncio.create_task(
                evaluate(
                    parts.fleet,
                    score,
                    parts.eval_tasks,
                    self._config.eval,
                    parts.sampling,
                    policy_version,
                    self._config.max_groups_in_flight,
                )
            )
            stopping = asyncio.create_task(self._stopping.wait())
            try:
                await asyncio.wait([running, stopping], return_when=asyncio.FIRST_COMPLETED)
                if not running.done():
                    return {}
                result = await running
                return {
                    "eval/pass@1": result.pass_at_1.value,
                    "eval/pass@k": result.pass_at_k.value,
                }
            finally:
                running.cancel()
                stopping.cancel()
                if not self._stopping.is_set():
                    self._observer.phase("training", "", 0.0)
