"""What lies in deploy/: manifests against schemas, and the image recipe."""

import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster import config_file
from serve import ray_service, submit
from tests import kuberay_schema

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERAY = DEPLOY / "kuberay"
KUBERNETES = "1.33.0"
Manifest = dict[str, Any]


def manifests(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text()))


def one(name: str) -> Manifest:
    [manifest] = manifests(name)
    return manifest


def cluster_spec(manifest: Manifest) -> Manifest:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(spec: Manifest) -> Iterator[tuple[str, Manifest]]:
    """(group, pod) of each group of a cluster spec, as Kubernetes would get them."""
    groups = [("head", spec["headGroupSpec"])]
    groups += [(group["groupName"], group) for group in spec["workerGroupSpecs"]]
    for name, group in groups:
        yield (
            name,
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}} | group["template"],
        )


RAY_FILES = ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"]


@pytest.mark.parametrize("index", range(len(manifests("base.yaml"))))
def test_core_manifests_fit_kubernetes(index: int) -> None:
    kubernetes_validate.validate(manifests("base.yaml")[index], KUBERNETES, strict=True)


@pytest.mark.parametrize("name", RAY_FILES)
def test_ray_manifests_fit_their_schema(name: str) -> None:
    manifest = one(name)
    jsonschema.validate(manifest, kuberay_schema.resource(manifest["kind"]))
    for _, pod in pods(cluster_spec(manifest)):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", RAY_FILES)
def test_ray_manifests_fit_the_operators_own_definitions(name: str) -> None:
    """Needs the operator's files: `KUBERAY_CRDS=<kuberay>/ray-operator/config/crd/bases`."""
    place = os.environ.get("KUBERAY_CRDS")
    if place is None:
        pytest.skip("KUBERAY_CRDS names no directory of CustomResourceDefinitions")
    manifest = one(name)
    definition = yaml.safe_load(
        (Path(place) / f"ray.io_{manifest['kind'].lower()}s.yaml").read_text()
    )
    [version] = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = closed_objects(version["schema"]["openAPIV3Schema"])
    jsonschema.validate({k: v for k, v in manifest.items() if k != "metadata"}, schema)


def closed_objects(schema: Any) -> Any:
    """As the API server reads it: unknown fields refused, `int-or-string` understood."""
    if isinstance(schema, list):
        return [closed_objects(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: closed_objects(value) for key, value in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields")
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and not is_open
    ):
        result.setdefault("additionalProperties", False)
    return result


def test_a_wrong_field_is_found() -> None:
    manifest = deepcopy(one("raycluster.yaml"))
    manifest["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(manifest, kuberay_schema.resource("RayCluster"))
    [(_, pod), *_] = pods(manifest["spec"])
    pod["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_job_brings_the_same_cluster() -> None:
    assert one("rayjob.yaml")["spec"]["rayClusterSpec"] == one("raycluster.yaml")["spec"]


def test_rays_autoscaler_reads_the_groups() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    config = _derive_autoscaling_config_from_ray_cr(one("raycluster.yaml"))
    groups = config["available_node_types"]
    assert groups["headgroup"]["resources"]["CPU"] == 0
    assert groups["rollout"]["resources"]["GPU"] == 4
    assert "GPU" not in groups["reward"]["resources"]
    assert (groups["rollout"]["min_workers"], groups["rollout"]["max_workers"]) == (1, 8)
    assert {name: groups[name]["labels"]["pool"] for name in ("learner", "rollout", "reward")} == {
        "learner": "learner", "rollout": "rollout", "reward": "reward",
    }  # fmt: skip


@pytest.mark.parametrize("name", RAY_FILES)
def test_pods_have_no_more_rights_than_they_need(name: str) -> None:
    spec = cluster_spec(one(name))
    assert spec["authOptions"] == {"mode": "token", "secretName": "hone-ray-token"}
    assert spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    for group, pod in pods(spec):
        inside = pod["spec"]
        assert inside["securityContext"]["runAsNonRoot"], group
        assert inside["automountServiceAccountToken"] is (group == "head")
        for container in inside["containers"]:
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
        if inside["securityContext"]["seccompProfile"]["type"] != "RuntimeDefault":
            assert inside["hostUsers"] is False, "a user namespace around the sandbox's freedom"
    text = (KUBERAY / name).read_text() + (KUBERAY / "base.yaml").read_text()
    assert "kind: Secret" not in text, "secrets are made by hand, not written into files"


def test_every_pod_is_behind_a_policy_and_those_that_are_missed_behind_a_budget() -> None:
    """Over pods of a RayCluster, which has no scale subresource, only a number in `minAvailable`
    lets a pod ever be evicted.
    """
    base = manifests("base.yaml")
    policies = {m["metadata"]["name"]: m["spec"] for m in base if m["kind"] == "NetworkPolicy"}
    assert policies["hone-closed"]["podSelector"] == {}
    assert policies["hone-closed"]["policyTypes"] == ["Ingress", "Egress"]
    budgets = [m["spec"] for m in base if m["kind"] == "PodDisruptionBudget"]
    specs = [cluster_spec(one(name)) for name in RAY_FILES]
    for group, pod in [pod for spec in specs for pod in pods(spec)]:
        labels = pod["metadata"]["labels"]
        over = [budget for budget in budgets if selects(budget["selector"], labels)]
        survives = labels["hone.dev/pool"] in ("rollout", "reward")
        assert len(over) == (0 if survives else 1), group
        for budget in over:
            assert set(budget) == {"minAvailable", "selector"}, group
            assert type(budget["minAvailable"]) is int, group
    redis = [m for m in base if m["kind"] == "StatefulSet"]
    assert len(redis) == 2
    for server in redis:
        labels = server["spec"]["template"]["metadata"]["labels"]
        assert sum(selects(budget["selector"], labels) for budget in budgets) == 1


def test_only_prometheus_reaches_the_exporters_from_outside() -> None:
    """Ray's exporters know no token, so that the policies are their lock."""
    reachable: dict[str, set[int]] = {}
    for policy in [m["spec"] for m in manifests("base.yaml") if m["kind"] == "NetworkPolicy"]:
        for rule in policy.get("ingress", []):
            [peer] = rule["from"]
            if peer != {"podSelector": {}}:  # the namespace's own pods
                [(label, value)] = peer["namespaceSelector"]["matchLabels"].items()
                reachable.setdefault(f"{label}={value}", set()).update(
                    port["port"] for port in rule["ports"]
                )
    assert reachable == {
        "kubernetes.io/metadata.name=monitoring": {8080},
        "kubernetes.io/metadata.name=kuberay-operator": {8265, 52365},
        "hone.dev/may-use-endpoint=true": {8000},
    }
    for spec in [cluster_spec(one(name)) for name in RAY_FILES]:
        for group, pod in pods(spec):
            ports = [port for c in pod["spec"]["containers"] for port in c.get("ports", [])]
            assert {"name": "metrics", "containerPort": 8080} in ports, group


@pytest.mark.parametrize("name", RAY_FILES)
def test_the_operator_alone_connects_the_head_to_its_redis(name: str) -> None:
    """It refuses heads that bring these variables, and names what a head keeps after its cluster:
    a name of ours would give a retried job, or an upgraded service, the dead actors of the last.
    """
    spec = cluster_spec(one(name))
    assert set(spec["gcsFaultToleranceOptions"]) == {"redisAddress", "redisPassword"}
    [head] = spec["headGroupSpec"]["template"]["spec"]["containers"]
    own = {"REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS", "RAY_enable_autoscaler_v2"}
    assert not own & {variable["name"] for variable in head["env"]}


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    plain = all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())
    return plain and all(
        labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", [])
    )


def test_the_jobs_command_line_is_one_that_hone_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    program, command, config, *rest = shlex.split(one("rayjob.yaml")["spec"]["entrypoint"])
    assert (program, command) == ("hone", "train")
    overrides = [word for word in rest if "=" in word and not word.startswith("--")]
    assert [w for w in rest if w not in overrides] == ["--address", "auto", "--resume"]
    settings = config_file.load(ROOT / Path(config).relative_to("/opt/hone"), overrides)
    assert settings.run.dir == "/runs"
    pools = {
        group["groupName"]: group for group in cluster_spec(one("rayjob.yaml"))["workerGroupSpecs"]
    }
    for role, labels in settings.resources.labels.items():
        assert pools[role]["labels"] == labels


def test_the_service_builds_what_its_manifest_names() -> None:
    from ray.serve.schema import ServeDeploySchema

    [manifest] = manifests("rayservice.yaml")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    [application] = schema.applications
    assert application.import_path == f"{ray_service.__name__}:{ray_service.build.__name__}"
    with pytest.raises(Exception, match="no run"):
        ray_service.build(application.args)


def test_the_image_recipe_lints_clean() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    lint = subprocess.run(
        [hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (lint.returncode, lint.stdout) == (0, "")


def test_the_image_gets_what_the_packages_need() -> None:
    """Everything that the recipe copies is let through by .dockerignore, and is there."""
    allowed = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    for line in (DEPLOY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY") and "--from" not in line:
            sources = [word for word in line.split()[1:-1] if not word.startswith("--")]
            for source in sources:
                assert source in allowed, source
                assert (ROOT / source).exists(), source


def test_the_static_cluster_keeps_its_secrets_and_ports_inside() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert compose["networks"]["inside"]["internal"] is True
    for name, service in compose["services"].items():
        assert "ports" not in service, name
        assert service["cap_drop"] == ["ALL"]
        assert service["user"].split(":")[0] not in ("0", "root")
        assert "no-new-privileges:true" in service["security_opt"]
    assert set(compose["secrets"]) == {"ray_token", "redis_password"}
    words = yaml.safe_dump(compose)
    assert "--dashboard-host=127.0.0.1" in words


def test_two_redis_configurations_agree() -> None:
    [config] = [m for m in manifests("base.yaml") if m["kind"] == "ConfigMap"]
    inside = set(config["data"]["redis.conf"].split("\n")) - {""}
    outside = {
        line
        for line in (DEPLOY / "redis.conf").read_text().splitlines()
        if line[:1] not in ("#", "")
    }
    assert inside - outside == {"maxmemory 5gb"}
    assert outside <= inside


def test_a_submission_that_would_lose_its_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    quickstart = Path("deploy/configs/quickstart.yaml")
    with pytest.raises(Exception, match=r"run\.dir: must be an absolute path"):
        submit._arguments(quickstart, [], None, False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="travels with the job"):
        submit._arguments(ROOT / quickstart, ["run.dir=/runs"], None, False)
