"""What alerts read between two steps: only a run that trains can be said to stall."""

from collections.abc import Mapping

import pytest

from actors import live_gauges
from cluster.config import Config
from cluster.status import ActorStatus, RunStatus, StageStatus


class Gauge:
    """In place of Ray's, which can be read through an exporter only."""

    values: dict[tuple[str, str], float] = {}

    def __init__(self, name: str, **_: object) -> None:
        self._name = name

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        self.values[self._name, tags.get("stage") or tags.get("state", "")] = value


@pytest.mark.parametrize(
    ("phase", "waited_s"), [("starting", 0.0), ("evaluating", 0.0), ("training", 900.0)]
)
def test_a_learner_that_waits_while_the_run_starts_has_not_stalled(
    phase: str, waited_s: float, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_gauges, "Gauge", lambda name, description, tag_keys: Gauge(name))
    gauges = live_gauges.LiveGauges(tiny_config, "demo")
    learn = StageStatus(name="learn", waiting_for="work", since_s=900.0, busy_fraction=0.0)
    engine = ActorStatus(name="rollout/0", state="quarantined", pid=1)
    gauges.publish(RunStatus(run="demo", phase=phase, stages=[learn], actors=[engine]), {})
    assert Gauge.values["hone_stage_waiting_s", "learn"] == waited_s
    assert Gauge.values["hone_actors", "quarantined"] == 1
    Gauge.values.clear()  # as Ray forgets what is not set again
    gauges.publish(RunStatus(run="demo", phase=phase, stages=[learn], actors=[engine]), {})
    assert ("hone_bound", "") in Gauge.values
