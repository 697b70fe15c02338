"""JSON schemas of the Kubernetes objects in cluster/kuberay: the fields in use and no other; a typo is an error.

RayJob and RayCluster after KubeRay's ray.io/v1 (1.6 and newer, for `authOptions.secretName`), the rest after
Kubernetes 1.3x. Own and small on purpose: the real ones are megabytes, and let unknown fields pass.
"""

from typing import Any

Schema = dict[str, Any]

NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
LABEL: Schema = {"type": "string", "pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", "maxLength": 63}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TRUTH: Schema = {"type": "boolean"}
TEXT: Schema = {"type": "string", "minLength": 1}


def obj(required: str = "", /, **properties: Schema) -> Schema:
    """An object with these properties and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def items(of: Schema, at_least: int = 1) -> Schema:
    return {"type": "array", "items": of, "minItems": at_least}


def mapping(of: Schema) -> Schema:
    return {"type": "object", "additionalProperties": of}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


METADATA = obj("name", name=NAME, labels=mapping(LABEL))
SELECTOR = obj(matchLabels=mapping(LABEL))
POD_SECURITY = obj(
    "runAsNonRoot seccompProfile",
    runAsNonRoot=one_of(True),
    runAsUser=COUNT,
    fsGroup=COUNT,
    seccompProfile=obj("type", type=one_of("RuntimeDefault")),
)
CONTAINER = obj(
    "name image resources securityContext",
    name=NAME,
    image={"type": "string", "pattern": r"^[\w.-]+(/[\w.-]+)+:[\w.-]+$"},
    env=items(obj("name value", name=TEXT, value={"type": "string"})),
    ports=items(obj("containerPort name", containerPort=COUNT, name=NAME)),
    resources=obj("requests limits", requests=mapping(QUANTITY), limits=mapping(QUANTITY)),
    securityContext=obj(
        "allowPrivilegeEscalation capabilities",
        allowPrivilegeEscalation=one_of(False),
        capabilities=obj("drop", drop=one_of(["ALL"])),
    ),
    volumeMounts=items(obj("name mountPath", name=NAME, mountPath=TEXT, readOnly=TRUTH)),
)
VOLUME = obj(
    "name",
    name=NAME,
    persistentVolumeClaim=obj("claimName", claimName=NAME),
    configMap=obj("name", name=NAME),
)
POD = obj(
    "containers securityContext automountServiceAccountToken",
    containers=items(CONTAINER),
    volumes=items(VOLUME),
    restartPolicy=one_of("Never"),
    automountServiceAccountToken=one_of(False),
    terminationGracePeriodSeconds=COUNT,
    securityContext=POD_SECURITY,
)
TEMPLATE = obj("metadata spec", metadata=obj("labels", labels=mapping(LABEL)), spec=POD)

RAY_START = mapping({"type": "string"})  # KubeRay takes strings only
CLUSTER_SPEC = obj(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=obj("mode secretName", mode=one_of("token"), secretName=NAME),
    headGroupSpec=obj("rayStartParams template", rayStartParams=RAY_START, template=TEMPLATE),
    workerGroupSpecs=items(
        obj(
            "groupName replicas minReplicas maxReplicas rayStartParams template",
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=RAY_START,
            template=TEMPLATE,
        )
    ),
)
RAY_JOB = obj(
    "apiVersion kind metadata spec",
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayJob"),
    metadata=METADATA,
    spec=obj(
        "entrypoint backoffLimit rayClusterSpec",
        entrypoint=TEXT,
        backoffLimit=COUNT,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "SidecarMode"),
        shutdownAfterJobFinishes=TRUTH,
        ttlSecondsAfterFinished=COUNT,
        submitterPodTemplate=TEMPLATE,
        rayClusterSpec=CLUSTER_SPEC,
    ),
)
RAY_CLUSTER = obj(
    "apiVersion kind metadata spec",
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayCluster"),
    metadata=METADATA,
    spec=CLUSTER_SPEC,
)
PEER = obj(podSelector=SELECTOR, namespaceSelector=SELECTOR)
NETWORK_POLICY = obj(
    "apiVersion kind metadata spec",
    apiVersion=one_of("networking.k8s.io/v1"),
    kind=one_of("NetworkPolicy"),
    metadata=METADATA,
    spec=obj(
        "podSelector policyTypes ingress",
        podSelector=SELECTOR,
        policyTypes=items(one_of("Ingress", "Egress")),
        ingress=items(
            obj(
                "from",
                **{"from": items(PEER)},
                ports=items(obj("protocol port", protocol=one_of("TCP", "UDP"), port=COUNT)),
            )
        ),
    ),
)
VOLUME_CLAIM = obj(
    "apiVersion kind metadata spec",
    apiVersion=one_of("v1"),
    kind=one_of("PersistentVolumeClaim"),
    metadata=METADATA,
    spec=obj(
        "accessModes resources",
        accessModes=items(one_of("ReadWriteMany")),
        storageClassName=NAME,
        resources=obj("requests", requests=obj("storage", storage=QUANTITY)),
    ),
)
BY_KIND = {
    "RayJob": RAY_JOB,
    "RayCluster": RAY_CLUSTER,
    "NetworkPolicy": NETWORK_POLICY,
    "PersistentVolumeClaim": VOLUME_CLAIM,
}
