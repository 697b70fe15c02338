"""The GPU benchmark runs on a CPU at no size; what does not depend on the size has to be right there, too."""

import json
from pathlib import Path

import pytest
import torch

from rlalign.plugins import module_from_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def numbers(tmp_path: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    small = ["--tiny", "--device", "cpu", "--dtype", "float32", "--prompts", "2", "--samples", "2", "--rows", "2"]
    benchmark = module_from_file(ROOT / "benchmarks" / "large.py")
    benchmark.main([*small, "--rounds", "1", "--peak-tflops", "1", "--to", str(tmp_path / "numbers.json")])
    return json.loads((tmp_path / "numbers.json").read_text())


def test_the_ratio_is_one_where_micro_batches_agree(numbers: dict[str, float]):
    assert numbers["ratio_deviation"] == 0
    assert 0 <= numbers["ratio_deviation_half_micro_batch"] < 1e-4


def test_throughput_and_mfu_speak_of_the_same_seconds(numbers: dict[str, float]):
    """Both count four images; a pass with a gradient is worth two, and half as many steps have one."""
    for part in ("rollout", "update"):
        assert numbers[f"{part}_images_per_s"] == pytest.approx(4 / numbers[f"{part}_s"])
    work = [numbers[f"{part}_mfu"] * numbers[f"{part}_s"] for part in ("rollout", "update")]
    assert work[0] == pytest.approx(work[1]) and work[0] > 0


def test_the_default_is_as_large_as_the_published_model():
    """Counted without memory for the weights."""
    benchmark = module_from_file(ROOT / "benchmarks" / "large.py")
    family = benchmark.Family(benchmark.Shape(), torch.bfloat16, torch.device("meta"))
    assert sum(p.numel() for p in family.net.parameters()) == pytest.approx(2.2e9, rel=0.15)
