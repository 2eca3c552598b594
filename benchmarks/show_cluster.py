"""`make show AREA=cluster`: several real nodes, deploy files, metrics, doors."""

import os
import shutil
from collections.abc import Iterator

from benchmarks import simulation
from benchmarks.proofs import ROOT, Tested, proven, run_tests
from benchmarks.show import Part, Row, judged

CLUSTER = "tests/e2e/test_cluster.py"
DEPLOY = "tests/unit/test_deploy.py"
ENDPOINT = "tests/integration/test_endpoint.py::test_the_serve_row_of_the_dashboard_has_data"
ORIGINALS = f"{DEPLOY}::test_ray_manifests_fit_the_operators_own_definitions"
PROMTOOL = f"{DEPLOY}::test_prometheus_own_checker_accepts_the_rules"
REAL_PROMETHEUS = "test_a_real_prometheus"
RECOVER_S = 120.0


def rows(quick: bool) -> Iterator[Row | Part]:
    """Cheap rows first. QUICK simulates fewer GPUs; all nodes live on this machine anyway."""
    yield from deploy_files()
    yield placement()
    yield from live_cluster()
    yield serve_metrics()
    yield Part("GPUs are split by simulation", lambda: scaling(quick))
    yield from absent()


def deploy_files() -> Iterator[Row]:
    yield proven(
        "manifests fit the schemas of Kubernetes 1.33 and our list of KubeRay's fields; Ray's own "
        "autoscaler reads them; no pod has more rights than it needs; the image recipe lints clean",
        [DEPLOY, f"--deselect={ORIGINALS}", f"--deselect={PROMTOOL}"],
        "hadolint, kubernetes-validate strict, Ray: no complaint",
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
    claim = "alert rules and scrape configuration pass promtool"
    if shutil.which("promtool"):
        yield proven(claim, [PROMTOOL], "promtool check: success")
    else:
        why = "promtool is not on PATH (Debian: the package prometheus)"
        yield Row(claim, "", "promtool check: success", "not shown here", why)


def placement() -> Row:
    return proven(
        "impossible layouts are refused with what is missing; token files are private",
        ["tests/unit/test_capacity.py", "tests/unit/test_ray_token.py",
         "tests/unit/test_environment.py"],
        "all pass",
    )  # fmt: skip


def live_cluster() -> Iterator[Row]:
    """One reduced quickstart on three Ray nodes of this machine; several claims look at it."""
    has_server = shutil.which("prometheus") is not None
    nodes = [CLUSTER] if has_server else [CLUSTER, f"-k=not {REAL_PROMETHEUS}"]
    result = run_tests(nodes)
    yield judged(
        "three nodes (head, rollout, reward) run the quickstart, reduced, through `hone submit`; "
        "the rollout node is killed, a new one joins, the run goes on and no group counts twice",
        _figures(result, "seconds_to_notice", "seconds_to_recover_after_joining"),
        f"recovers within {RECOVER_S:.0f} s of joining (an engine load included)",
        result.is_green
        and result.figures.get("seconds_to_recover_after_joining", RECOVER_S + 1) <= RECOVER_S,
    )
    yield judged(
        "every panel and alert on training has data, scraped from the three exporters of that run"
        + (", and a real Prometheus evaluates them" if has_server else ""),
        _figures(result),
        "no selector without a series",
        result.is_green,
    )
    ports = {name: result.figures.get(f"ports_{name}", -1) for name in ("refused", "metrics")}
    others = sum(result.figures.get(f"ports_{name}", 0) for name in ("open", "silent"))
    yield judged(
        "every port of that run refuses a stranger without the token",
        f"{ports['refused']:.0f} ports refuse, {ports['metrics']:.0f} metrics exporters answer, "
        f"{others:.0f} others",
        "all refuse",
        result.is_green and ports["metrics"] == 0 and others == 0,
        "Ray's metrics exporters know no token: a network policy or a firewall has to keep them",
    )


def serve_metrics() -> Row:
    return proven(
        "every panel and alert on the endpoint has data, scraped from a live endpoint",
        [ENDPOINT],
        "no selector without a series",
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
    if shutil.which("nvidia-smi") is None:
        yield Row(
            "one GPU: bfloat16 engine and learner rank share it, agree, resume",
            "", "benchmarks/gpu_smoke.sh passes", "not shown here", "no GPU on this machine",
        )  # fmt: skip
    else:
        yield proven(
            "one GPU: bfloat16 engine and learner rank share it, agree, resume",
            [str(ROOT / "tests" / "gpu")],
            "all pass",
        )


def _figures(result: Tested, *names: str) -> str:
    counted = f"{result.num_passed} tests passed, {result.num_not_passed} not"
    measured = [f"{name} {result.figures.get(name, float('nan')):.3g}" for name in names]
    return "; ".join([counted, *measured])
