"""The benchmark runs and says what it promises; its numbers on a network of no size mean nothing."""

import json
from pathlib import Path

import pytest

from rlalign.models.lora import LoraConfig, attach
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


def test_both_sides_evaluate_the_same_rows():
    """With and without gradient; counted at the network."""
    benchmark = module_from_file(ROOT / "benchmarks" / "overhead.py")
    work = benchmark.Workload(layers=1, heads=2, head_dim=8, channels=4, side=4, tokens=4, steps=4)
    family = benchmark.Family(work)
    parameters = attach(family.nets, ["transformer"], LoraConfig(rank=2), family.lora_targets, seed=0)
    sides = (benchmark.Floor(family, list(parameters.values()), 8), benchmark.Ours(family, parameters, 8))
    seen: list[tuple[int, bool]] = []
    family.net.proj_out.register_forward_hook(lambda _, __, output: seen.append((len(output), output.requires_grad)))
    counts = []
    for side in sides:
        seen.clear()
        side.rollout()
        side.update()
        counts.append(sorted(seen))
    assert counts[0] == counts[1] == [(16, False)] * 16 + [(16, True)] * 8


def test_table_chooses_rows_itself(capsys: pytest.CaptureFixture[str]):
    lines = printed(capsys)
    assert [line.split()[0] for line in lines[:5]] == ["CPU", "rollout", "update", "total", "images"]
    assert "rows a pass" in lines[5]
