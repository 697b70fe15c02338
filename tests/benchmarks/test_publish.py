"""The benchmark runs and says what it promises; its numbers on a megabyte mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIDES = ("one_pass", "pass_each", "object_store", "collective")


@pytest.mark.xdist_group("ray")
def test_json_is_one_line_of_consistent_numbers() -> None:
    """In a process of its own, since it connects to Ray."""
    command = [sys.executable, str(ROOT / "benchmarks" / "publish.py"), "--json", "--rounds", "1"]
    ran = subprocess.run(
        [*command, "--sizes", "1", "--samplers", "2"],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        check=True,
    )
    (line,) = ran.stdout.splitlines()
    result = json.loads(line)["1 MB"]
    assert all(result[f"{side}_median_s"] == result[f"{side}_best_s"] > 0 for side in SIDES)
    for transport in SIDES[2:]:
        bare = result["one_pass_best_s"]
        assert result[f"{transport}_over_one_pass"] == pytest.approx(result[f"{transport}_best_s"] / bare)
