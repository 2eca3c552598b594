"""`make show AREA=cluster`: several real nodes, deploy files, metrics, doors."""

import os
import shutil
from collections.abc import Iterator

from benchmarks import simulation
from benchmarks.proofs import ROOT, proven, put_on_path, row_of, run_tests
from benchmarks.show import Part, Row, judged

CLUSTER = "tests/e2e/test_cluster.py"
DEPLOY = "tests/unit/test_deploy.py"
ENDPOINT = [
    f"tests/integration/test_endpoint.py::{name}"
    for name in (
        "test_the_serve_row_of_the_dashboard_has_data",
        "test_no_port_and_no_route_opens_without_a_key",
    )
]
ORIGINALS = f"{DEPLOY}::test_ray_manifests_fit_the_operators_own_definitions"
MONITORING = "tests/unit/test_monitoring.py"
PROMTOOL = f"{MONITORING}::test_prometheus_own_checker_accepts_the_rules"
EXPORTERS = f"{DEPLOY}::test_only_prometheus_reaches_the_exporters_from_outside"
REAL_PROMETHEUS = "test_a_real_prometheus"
BROADCAST = [
    "tests/integration/test_weight_broadcast.py",
    "tests/unit/test_transfer_group.py",
    "tests/unit/test_weight_stream.py",
    "tests/unit/test_weight_share.py",
]
BROADCAST_NATS = 1e-5
TURNS = "tests/integration/test_weight_sync.py::test_engine_and_learner_take_turns"
NO_TURNS = "tests/integration/test_check.py::test_engines_cannot_give_memory_back_without_gpus"
RECOVER_S = 120.0
STOP_S = 60.0  # serve.submit tells Ray to wait that long
ROLES = ("controller", "learner", "rollout", "reward")
MIN_PORTS = 10  # a cluster that opens fewer was not looked at
ONE_GPU = "one GPU: bfloat16 engine and learner rank share it, also by turns; agree, resume"


def rows(quick: bool) -> Iterator[Row | Part]:
    """Cheap rows first. QUICK simulates fewer GPUs; all nodes live on this machine anyway."""
    yield from deploy_files(put_on_path("prometheus", "prometheus", "promtool"))
    yield placement()
    yield weight_broadcast()
    yield turns()
    yield from live_cluster()
    yield from live_endpoint()
    yield Part("GPUs are split by simulation", lambda: scaling(quick))
    yield from absent()


def deploy_files(why_no_promtool: str) -> Iterator[Row]:
    yield proven(
        "manifests fit the schemas of Kubernetes 1.33 and our list of KubeRay's fields; Ray's own "
        "autoscaler reads them; no pod has more rights than it needs; the image recipe lints clean",
        [DEPLOY, f"--deselect={ORIGINALS}"],
        "hadolint, kubernetes-validate strict, Ray: no complaint",
    )
    yield proven(
        "panels and alerts parse and name series that the code exports; a run that is still "
        "starting has not stalled",
        [MONITORING, "tests/unit/test_live_gauges.py", f"--deselect={PROMTOOL}"],
        "no unknown name, no alert without a series to fire it",
    )
    yield proven(
        "OpenTelemetry: a group is one trace over all actors, sent over OTLP; logs carry run, "
        "actor, rank, step and version",
        ["tests/unit/test_traces.py", "tests/unit/test_run_dir.py"],
        "all pass",
    )
    claim = "manifests fit KubeRay's own CustomResourceDefinitions"
    if os.environ.get("KUBERAY_CRDS"):
        yield proven(claim, [ORIGINALS], "no error, unknown fields refused")
    else:
        why = "no registry package ships them; KUBERAY_CRDS=<kuberay>/ray-operator/config/crd/bases"
        yield Row(claim, "", "no error, unknown fields refused", "not shown here", why)
    yield proven(
        "docs/deploy.md followed: steps without a cluster run as typed, the rest exists as typed",
        ["tests/integration/test_deploy_docs.py"],
        "every step ends with 0",
    )
    claim = (
        "rules and scrape configuration pass promtool; synthetic series fire each alert, and none "
        "at the wrong moment"
    )
    bound = "promtool check and test: success"
    if why_no_promtool:
        yield Row(claim, "", bound, "not shown here", why_no_promtool)
    else:
        yield proven(claim, [PROMTOOL], bound)


def placement() -> Row:
    return proven(
        "impossible layouts are refused with what is missing; places are reserved all or none, a "
        "wait for them is bounded and can be cancelled; token files are private",
        ["tests/unit/test_capacity.py", "tests/unit/test_preflight.py",
         "tests/unit/test_ray_token.py", "tests/unit/test_environment.py",
         "tests/integration/test_gang.py"],
        "all pass",
    )  # fmt: skip


def weight_broadcast() -> Row:
    return proven(
        "weights in one broadcast from the learner to two real engines (gloo; NCCL on GPUs is the "
        "same code, not run yet): equal to the file's; an engine killed amid it costs one sync by "
        "file; what was not declared is not sent. Weights through memory that learner and engines "
        "share (the host's; CUDA IPC on GPUs is not run yet)",
        BROADCAST,
        f"engines within {BROADCAST_NATS:g} nat of the learner, and equal bits by file",
        {"probe_error_after_broadcast": BROADCAST_NATS},
    )


def turns() -> Row:
    return proven(
        "learner and engines by turns (resources.layout alternating): engines finish what runs, "
        "sleep while gradients are made, wake with the weights they had; on CPUs, which have no "
        "memory to give back: `hone check` refuses the layout there",
        [TURNS, NO_TURNS],
        "all pass",
    )


def live_cluster() -> Iterator[Row]:
    """One reduced quickstart on three Ray nodes of this machine; several claims look at it, each
    judged by what its own test has recorded.
    """
    has_server = shutil.which("prometheus") is not None
    result = run_tests([CLUSTER] if has_server else [CLUSTER, f"-k=not {REAL_PROMETHEUS}"])
    why = "" if result.is_green else f"{result}: {result.why}"

    def figure(name: str) -> float:
        return result.figures.get(name, float("nan"))

    recover_s = figure("seconds_to_recover_after_joining")
    yield judged(
        "three nodes (head, rollout, reward) run the quickstart, reduced, through `hone submit`; "
        "the rollout node is killed, a new one joins, the run goes on and no group counts twice",
        f"{figure('roles_on_their_nodes'):.0f} roles on their nodes; loss noticed after "
        f"{figure('seconds_to_notice'):.1f} s; the next engine served {recover_s:.1f} s after its "
        "node was started",
        f"recovers within {RECOVER_S:.0f} s of joining (an engine load included)",
        figure("roles_on_their_nodes") == len(ROLES) and recover_s <= RECOVER_S,
        why,
    )
    refusals = figure("refusals_from_outside")
    yield judged(
        "`hone check --address ray://...` joins that cluster and says what it lacks for a run",
        f"{refusals:.0f} run that cannot fit refused",
        "exit code 2, what is missing named",
        refusals == 1,
        why,
    )
    stop_s = figure("seconds_to_stop_with_state_saved")
    yield judged(
        "`ray job stop` ends the submitted run, and the step it had reached is saved",
        f"{stop_s:.1f} s",
        f"state saved, before Ray kills the job after {STOP_S:.0f} s",
        stop_s <= STOP_S,
        why,
    )
    yield judged(
        "every panel and alert on training has data, scraped from the three exporters of that run"
        + (", and a real Prometheus evaluates them" if has_server else ""),
        f"{figure('queries_with_data'):.0f} queries with data"
        + (f", {figure('rules_evaluated'):.0f} rules evaluated" if has_server else ""),
        "no selector without a series",
        figure("queries_with_data") > 0 and (not has_server or figure("rules_evaluated") > 0),
        why,
    )
    ports = {name: figure(f"ports_{name}") for name in ("refused", "metrics", "silent", "open")}
    yield judged(
        "every port of that run refuses a stranger without the token; Ray's metrics exporters, "
        "which know none, hand out numbers and no secret",
        f"{ports['refused']:.0f} refuse, {ports['open']:.0f} open, {ports['metrics']:.0f} metrics "
        f"exporters, {ports['silent']:.0f} of no known protocol on 127.0.0.1",
        "none open; no unknown protocol at the address of a node (127.0.0.2 and up here)",
        ports["refused"] >= MIN_PORTS
        and ports["open"] == 0
        and figure("exporters_without_secrets") > 0,
        why,
    )
    yield row_of(
        "no test of that cluster fails: a failure that no row above has a figure for shows here",
        result,
        str(result),
        "all pass",
        is_within=True,
    )
    yield proven(
        "the exporters are behind a lock of another kind: loopback on a machine of one's own, on "
        "Kubernetes a policy by which Prometheus alone reaches them (a static cluster needs a "
        "firewall)",
        ["tests/integration/test_local_doors.py", EXPORTERS],
        "no local port beyond loopback; no other namespace reaches port 8080",
    )


def live_endpoint() -> Iterator[Row]:
    result = run_tests(ENDPOINT)
    ports = result.figures.get("endpoint_ports", float("nan"))
    yield row_of(
        "a live `hone serve`: every panel and alert on it has data; its ports and those of its Ray "
        "refuse a stranger, and so does every route but the health check",
        result,
        f"{result}; {ports:.0f} ports",
        "no selector without a series; no port open, no unknown protocol beyond loopback",
        ports >= MIN_PORTS // 2,
    )


def scaling(quick: bool) -> Iterator[Row]:
    yield proven(
        "`hone plan` tries the splits of GPUs between rollout and learner, recommends one, names "
        "its knobs",
        ["tests/unit/test_scaling.py"],
        "all pass",
    )
    yield simulation.scale_row(quick)


def absent() -> Iterator[Row]:
    yield Row(
        "the image builds; the dashboard loads in Grafana; a RayCluster starts under KubeRay",
        "", "they do", "not shown here",
        "no container engine, Grafana or Kubernetes in the registries",
    )  # fmt: skip
    yield Row(
        "nodes in network namespaces of their own, or on hosts of their own",
        "", "as on one machine", "not shown here",
        "the three nodes of tests/e2e/test_cluster.py have addresses of their own (127.0.0.2 to "
        "127.0.0.4), but share the loopback, the ports and the file system of one machine",
    )  # fmt: skip
    if shutil.which("nvidia-smi") is None:
        yield Row(
            ONE_GPU,
            "", "benchmarks/gpu_smoke.sh passes", "not shown here", "no GPU on this machine",
        )  # fmt: skip
    else:
        yield proven(
            ONE_GPU,
            [str(ROOT / "tests" / "gpu")],
            "all pass",
        )
