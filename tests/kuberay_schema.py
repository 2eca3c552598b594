"""The fields of KubeRay's `ray.io/v1` resources that manifests here may use, and no others.

Written for these tests after the API reference of KubeRay 1.7. Pod templates are open here: they
are checked against Kubernetes' own schema.
"""

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
OPEN: Schema = {"type": "object"}


def closed(required: str = "", **fields: Schema) -> Schema:
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


def choice(*values: str) -> Schema:
    return {"enum": list(values)}


TEMPLATE = closed("spec", metadata=OPEN, spec=OPEN)
SECRET_VALUE = closed(value=TEXT, valueFrom=closed("secretKeyRef", secretKeyRef=OPEN))
GROUP: dict[str, Schema] = {"labels": TEXTS, "rayStartParams": TEXTS, "template": TEMPLATE}
CLUSTER = closed(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    authOptions=closed("mode secretName", mode=choice("token"), secretName=TEXT),
    gcsFaultToleranceOptions=closed(
        "redisAddress redisPassword",
        redisAddress=TEXT,
        redisPassword=SECRET_VALUE,
        redisUsername=SECRET_VALUE,
    ),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed(
        version=choice("v1", "v2"),
        upscalingMode=choice("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=COUNT,
        resources=OPEN,
        securityContext=OPEN,
    ),
    headGroupSpec=closed(
        "rayStartParams template",
        serviceType=choice("ClusterIP", "NodePort", "LoadBalancer"),
        **GROUP,
    ),
    workerGroupSpecs={
        "type": "array",
        "minItems": 1,
        "items": closed(
            "groupName minReplicas maxReplicas template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            **GROUP,
        ),
    },
)
JOB = closed(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    submissionMode=choice("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=COUNT,
    rayClusterSpec=CLUSTER,
)
SERVICE = closed(
    "serveConfigV2 rayClusterConfig",
    serviceUnhealthySecondThreshold=COUNT,
    deploymentUnhealthySecondThreshold=COUNT,
    excludeHeadPodFromServeSvc=FLAG,
    serveConfigV2=TEXT,
    rayClusterConfig=CLUSTER,
)
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}


def resource(kind: str) -> Schema:
    """Schema of a whole manifest of `kind`."""
    return closed(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=closed("name namespace", name=TEXT, namespace=TEXT, labels=TEXTS),
        spec=SPECS[kind],
    )
