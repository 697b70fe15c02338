"""Manifests fit their schemas, and agree with each other and with the image. None ran on Kubernetes."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.cluster.files import CLUSTER, KUBERAY, documents
from tests.cluster.schemas import BY_KIND

MANIFESTS = sorted(KUBERAY.glob("*.yaml"))
PART_OF = {"app.kubernetes.io/part-of": "rlalign"}


def only(name: str) -> dict[str, Any]:
    (document,) = documents(KUBERAY / name)
    return document


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


def templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_of(document)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    submitter = document["spec"].get("submitterPodTemplate")
    return [group["template"] for group in groups] + ([submitter] if submitter else [])


RAY = [only("rayjob.yaml"), only("raycluster.yaml")]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_fits_its_schema(path: Path):
    for document in documents(path):
        jsonschema.validate(document, BY_KIND[document["kind"]], jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("spec", "backofLimit"), 3),
        (("spec", "backoffLimit"), "3"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "disabled"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "hostNetwork"), True),
    ],
)
def test_the_schema_is_strict(keys: tuple[str, ...], value: Any):
    document = copy.deepcopy(only("rayjob.yaml"))
    holder = document
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, BY_KIND["RayJob"], jsonschema.Draft202012Validator)


def test_a_dead_driver_is_started_again_by_the_same_command():
    spec = only("rayjob.yaml")["spec"]
    assert spec["backoffLimit"] >= 3
    assert "--run-dir /shared/" in spec["entrypoint"] and "--fresh" not in spec["entrypoint"]


@pytest.mark.parametrize("document", RAY, ids=lambda document: document["kind"])
def test_what_a_manifest_names_is_there(document: dict[str, Any]):
    claim = only("storage.yaml")["metadata"]["name"]
    secrets = {cluster_of(document)["authOptions"]["secretName"]}
    readme = (CLUSTER / "README.md").read_text()
    assert secrets == set(re.findall(r"create secret generic (\S+)", readme))
    configs: set[str] = set()
    for template in templates(document):
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for container in spec["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes)
            assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()
        assert {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "configMap" not in v} <= {claim}
        configs |= {v["configMap"]["name"] for v in volumes.values() if "configMap" in v}
    assert configs <= set(re.findall(r"create configmap (\S+)", readme))


@pytest.mark.parametrize("document", RAY, ids=lambda document: document["kind"])
def test_all_machines_run_one_image_with_the_ray_of_the_dockerfile(document: dict[str, Any]):
    images = {container["image"] for template in templates(document) for container in template["spec"]["containers"]}
    assert images == {"registry.example.com/rlalign:0.1.0"}
    dockerfile = (CLUSTER / "docker" / "Dockerfile").read_text()
    assert f'"ray[default]=={cluster_of(document)["rayVersion"]}"' in dockerfile


@pytest.mark.parametrize("document", RAY, ids=lambda document: document["kind"])
def test_a_cluster_has_three_nodes(document: dict[str, Any]):
    groups = cluster_of(document)["workerGroupSpecs"]
    assert 1 + sum(group["replicas"] for group in groups) == 3
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups)


@pytest.mark.parametrize("document", RAY, ids=lambda document: document["kind"])
def test_the_network_policy_is_about_these_pods(document: dict[str, Any]):
    policy = only("networkpolicy.yaml")["spec"]
    assert policy["podSelector"]["matchLabels"] == PART_OF
    assert policy["policyTypes"] == ["Ingress"]
    assert all(PART_OF.items() <= template["metadata"]["labels"].items() for template in templates(document))


def test_from_outside_only_the_operator_comes_in_and_only_to_the_dashboard():
    own, operator = only("networkpolicy.yaml")["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": PART_OF}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert operator["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}
