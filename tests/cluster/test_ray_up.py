"""The files for `ray up` fit Ray's own schema. None ran in a cloud."""

import copy
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.files import CLUSTER

FILES = sorted((CLUSTER / "ray-up").glob("*.yaml"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(request.param.read_text())


def test_ray_accepts_it(config: dict[str, Any]):
    validate_config(prepare_config(copy.deepcopy(config)))


def test_ray_would_not_accept_a_typo(config: dict[str, Any]):
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**config, "max_worker": 2})


def test_both_clouds_have_a_file():
    assert [path.stem for path in FILES] == ["aws", "gcp"]


def test_three_machines_and_a_head_that_stays(config: dict[str, Any]):
    head, worker = config["available_node_types"]["head"], config["available_node_types"]["worker"]
    assert config["head_node_type"] == "head" and worker["min_workers"] == worker["max_workers"] == 2
    assert "spot" in str(worker) or "preemptible" in str(worker)
    assert "spot" not in str(head) and "preemptible" not in str(head)


def test_token_mode_is_set_by_whatever_starts_ray(config: dict[str, Any]):
    starts = [line for key in ("head", "worker") for line in config[f"{key}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2
    for line in starts:
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.rlalign/ray_token" in line
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"]["~/.rlalign/ray_token"] == "~/.rlalign/ray_token"


def test_nothing_but_ssh_from_a_named_network_reaches_aws():
    (rule,) = yaml.safe_load((CLUSTER / "ray-up" / "aws.yaml").read_text())["provider"]["security_group"][
        "IpPermissions"
    ]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert [entry["CidrIp"] for entry in rule["IpRanges"]] == ["203.0.113.0/24"]  # an address range for documentation


def test_the_ray_is_that_of_the_image(config: dict[str, Any]):
    (install,) = [line for line in config["setup_commands"] if "pip install" in line]
    pin = install.split('"')[1]
    assert f'"{pin}"' in (CLUSTER / "docker" / "Dockerfile").read_text()


def test_the_wheel_comes_from_the_folder_that_the_readme_builds_it_in(config: dict[str, Any]):
    built = config["file_mounts"]["~/rlalign-wheel"]
    assert f"--wheel-dir {built} " in (CLUSTER / "README.md").read_text()
