"""Decay rules against their published values; the blend in place."""

import pytest
import torch

from rlalign.ema import blend_, cosine, power, ramp, warmup_cosine


def test_power_is_the_warm_up_of_flow_grpo():
    assert [power(t, 0.9) for t in (0, 7, 15)] == pytest.approx([0.1, 8 / 17, 16 / 25])
    assert power(1000, 0.9) == 0.9


def test_ramp_covers_the_types_of_diffusion_nft_and_the_start_values_of_crd():
    assert [ramp(t, 0, 0.001, 0.5) for t in (0, 10, 499, 501)] == pytest.approx([0, 0.01, 0.499, 0.5])
    assert [ramp(t, 75, 0.0075, 0.999) for t in (0, 74, 75, 85, 300)] == pytest.approx([0, 0, 0, 0.075, 0.999])
    assert [ramp(t, 10, 0.1, 0.9, start=0.25) for t in (0, 10, 12, 99)] == pytest.approx([0.25, 0.25, 0.45, 0.9])


def test_cosine_rises_from_start_to_top():
    assert [cosine(t, 0.1, 0.9, 100) for t in (0, 50, 100, 999)] == pytest.approx([0.1, 0.5, 0.9, 0.9])
    assert [warmup_cosine(t, 0.4, 0.9, 10, 110) for t in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.2, 0.4, 0.65, 0.9])


def test_blending_is_in_place_and_in_the_copys_precision():
    copy = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    held = copy["w"]
    blend_(copy, {"w": torch.tensor([3.0, 4.0], requires_grad=True)}, 0.75)
    assert held.tolist() == [1.5, 2.5]
    blend_(copy, {"w": torch.tensor([0.1, 0.2], dtype=torch.float64)}, 0.0)
    assert held.tolist() == [0.1, 0.2]  # decay 0 is a copy, to the last bit
