"""One trace a group, over several processes, as a collector gets it."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import traces
from tests.trace_collector import Collector, attributes, collecting


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
        yield server
        traces.close()


def live(run: Path, group_ids: tuple[str, ...]) -> None:
    """Groups as three processes have them; each knows the run and the group, and nothing else."""
    traces.setup("rollout-0", run)
    for group_id in group_ids:
        with traces.span("rollout", group_id, hint_level=0):
            pass
    traces.setup("learner-0", run)
    with pytest.raises(ZeroDivisionError), traces.span("gradients", *group_ids):
        _ = 1 / 0
    traces.setup("controller", run)
    for group_id in group_ids:
        traces.begin(group_id)
    traces.end(group_ids[0], step=3, policy_version=3)
    traces.end(group_ids[1], dropped="uniform")
    traces.end("never begun", dropped="uniform")
    traces.close()


def test_spans_of_all_actors_are_in_one_trace_below_one_root(
    collector: Collector, tmp_path: Path
) -> None:
    live(tmp_path, ("a", "b"))
    roots = {attributes(s)["hone.group_id"]: s for _, s in collector.spans if s.name == "group"}
    assert set(roots) == {"a", "b"}
    assert attributes(roots["a"])["step"] == 3
    assert attributes(roots["b"])["dropped"] == "uniform"
    others = [(role, span) for role, span in collector.spans if span.name != "group"]
    assert sorted((role, span.name) for role, span in others) == [
        ("learner-0", "gradients"), ("learner-0", "gradients"),
        ("rollout-0", "rollout"), ("rollout-0", "rollout"),
    ]  # fmt: skip
    for _, span in others:
        root = roots[str(attributes(span)["hone.group_id"])]
        assert (span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id)
        assert span.span_id != root.span_id
        assert not root.parent_span_id
        if span.name == "gradients":
            assert attributes(span)["error.type"] == "ZeroDivisionError"


def test_the_same_group_of_another_run_is_another_trace(
    collector: Collector, tmp_path: Path
) -> None:
    for place in ("one/run", "other/run"):
        (tmp_path / place).mkdir(parents=True)
        live(tmp_path / place, ("a", "b"))
    assert len({span.trace_id for _, span in collector.spans}) == 4


def test_a_sampler_chooses_whole_traces(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    group_ids = tuple(f"group {i}" for i in range(40))
    traces.setup("rollout-0", tmp_path)
    for group_id in group_ids:
        with traces.span("rollout", group_id):
            pass
    traces.setup("controller", tmp_path)
    for group_id in group_ids:
        traces.begin(group_id)
        traces.end(group_id)
    traces.close()
    rolled, ended = (
        {attributes(span)["hone.group_id"] for _, span in collector.spans if span.name == name}
        for name in ("rollout", "group")
    )
    assert rolled == ended
    assert 5 < len(rolled) < 35


def test_nothing_is_made_without_an_endpoint_and_nothing_waits_for_a_dead_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in traces.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    traces.setup("rollout-0", tmp_path)
    assert traces._traces is None
    with traces.span("rollout", "a"):
        traces.begin("a")
        traces.end("a")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    traces.setup("rollout-0", tmp_path)
    started = time.monotonic()
    with traces.span("rollout", "a"):
        pass
    assert time.monotonic() - started < 0.5
    traces.close()
    assert time.monotonic() - started < traces.CLOSE_S + 2
