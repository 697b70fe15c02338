"""The benchmark runs and says what it promises; its numbers on a network of no size mean nothing."""

import json
from pathlib import Path

import pytest

from rlalign.plugins import module_from_file

ROOT = Path(__file__).parents[2]
KEYS = {"rollout_over_floor", "update_over_floor", "total_over_floor", "images_per_cpu_s", "floor_images_per_cpu_s"}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    module_from_file(ROOT / "benchmarks" / "overhead.py").main(["--tiny", "--rounds", "1", *arguments])
    return capsys.readouterr().out.splitlines()


def test_json_is_one_line_of_consistent_numbers(capsys: pytest.CaptureFixture[str]):
    (line,) = printed(capsys, "--json", "--rows", "8")
    result = json.loads(line)
    assert result.keys() >= KEYS and result["rows_per_pass"] == 8 and result["rounds"] == 1
    total = result["rlalign_rollout_s"] + result["rlalign_update_s"]
    floor = result["floor_rollout_s"] + result["floor_update_s"]
    assert result["total_over_floor"] == pytest.approx(total / floor)
    assert result["images_per_cpu_s"] == pytest.approx(32 / total)
    assert result["detached_total_over_floor"] > 0


def test_table_chooses_rows_itself(capsys: pytest.CaptureFixture[str]):
    lines = printed(capsys)
    assert [line.split()[0] for line in lines[:5]] == ["CPU", "rollout", "update", "total", "images"]
    assert "rows a pass" in lines[5]
