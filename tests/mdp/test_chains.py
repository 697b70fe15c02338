"""Whole chains on N(0, 1) data with the exact predictor: linear, so propagated by their coefficients, not sampled."""

import math

import pytest
import torch
from torch import Tensor

from rlalign.mdp.prediction import Prediction
from rlalign.mdp.schedule import flow_schedule, plain_sigmas
from rlalign.mdp.transition import KERNELS, Gaussian, ode
from rlalign.types import Level

from .chains import Step, propagate

KNOBS = {
    "ode": ("ode", 0.0),
    "flow .3": ("flow_sde", 0.3),
    "flow .7": ("flow_sde", 0.7),
    "flow 1": ("flow_sde", 1.0),
    "flow root2": ("flow_sde", math.sqrt(2)),
    "memoryless": ("memoryless", 0.0),
    "dance .3": ("dance_sde", 0.3),
    "cps .7": ("cps", 0.7),
    "cps 1": ("cps", 1.0),
    "ddim 1": ("ddim", 1.0),
    "ddpm": ("ddpm", 0.0),
    "precise root2": ("precise", math.sqrt(2)),
    "ddim .5": ("ddim", 0.5),
    "precise 1": ("precise", 1.0),
}

GAINS = {  # EXACT_TESTS 3.2, N = 10: F, V, total with noise on the last step, and with an ODE there
    "ode": ((0.833024, 0, 0.693929), (0.833024, 0, 0.693929)),
    "flow .3": ((0.646589, 0.300141, 0.718219), (0.649839, 0.295589, 0.717880)),
    "flow .7": ((0.185025, 0.766934, 0.801169), (0.190203, 0.767308, 0.803485)),
    "flow 1": ((0.023495, 0.843795, 0.844347), (0.024877, 0.852559, 0.853178)),
    "flow root2": ((0.000082, 0.896351, 0.896351), (0.000092, 0.923507, 0.923507)),
    "memoryless": ((0.000082, 0.896351, 0.896351), (0.000092, 0.923507, 0.923507)),
    "dance .3": ((0.774692, 0.103395, 0.703542), (0.786489, 0.083377, 0.701942)),
    "cps .7": ((0.003866, 0.515602, 0.515617), (0.003866, 0.515602, 0.515617)),
    "cps 1": ((0, 0.362255, 0.362255), (0, 0.362255, 0.362255)),
    "ddim 1": ((0, 0.547013, 0.547013), (0, 0.547013, 0.547013)),
    "ddpm": ((0, 0.547013, 0.547013), (0, 0.547013, 0.547013)),
    "precise root2": ((0, 0.547013, 0.547013), (0, 0.547013, 0.547013)),
    "ddim .5": ((0.423933, 0.486399, 0.666119), (0.423933, 0.486399, 0.666119)),
    "precise 1": ((0, 0.611403, 0.611403), (0, 0.611403, 0.611403)),
}

MEMORY = {  # SPEC_KERNELS 10: kappa and terminal variance at N = 10, 40, 200
    "ode": ((0, 0, 0), (0.69, 0.91, 0.98)),
    "flow .3": ((0.42, 0.45, 0.52), (0.72, 0.92, 0.99)),
    "flow .7": ((0.96, 0.97, 0.98), (0.80, 0.95, 1.00)),
    "flow 1": ((1, 1, 1), (0.84, 0.96, 0.99)),
    "flow root2": ((1, 1, 1), (0.90, 0.97, 0.99)),
    "dance .3": ((0.15, 0.13, 0.13), (0.70, 0.92, 0.98)),
    "cps .7": ((1, 1, 1), (0.52, 0.65, 0.70)),
    "cps 1": ((1, 1, 1), (0.36, 0.44, 0.48)),
    "ddpm": ((1, 1, 1), (0.55, 0.82, 0.96)),
    "ddim .5": ((0.73,), (0.67,)),
}


def kernel(name: str) -> Step:
    kind, noise_level = KNOBS[name]
    return lambda x, prediction, now, nxt: KERNELS[kind](x, prediction, now, nxt, noise_level)


def still(x: Tensor, prediction: Prediction, now: Level, nxt: Level) -> Gaussian:
    return ode(x, prediction, now, nxt, 0.0)


@pytest.mark.parametrize("name", GAINS)
@pytest.mark.parametrize("last", ["noise", "ode"])
def test_gain_and_variance_of_ten_steps(name: str, last: str) -> None:
    schedule = flow_schedule(plain_sigmas(10, 3.0), torch.float64)
    found = propagate(schedule, lambda k: still if last == "ode" and k == 9 else kernel(name))
    assert found == pytest.approx(GAINS[name][last == "ode"], abs=6e-7)


@pytest.mark.parametrize("name", MEMORY)
def test_memory_and_terminal_variance(name: str) -> None:
    for num_steps, kappa, total in zip((10, 40, 200), *MEMORY[name], strict=False):
        _, variance, whole = propagate(
            flow_schedule(plain_sigmas(num_steps, 3.0), torch.float64), lambda _: kernel(name)
        )
        assert variance / whole == pytest.approx(kappa, abs=0.0051)
        assert whole == pytest.approx(total, abs=0.0051)


def test_fixed_noise_fraction_of_cps_never_vanishes() -> None:
    """Section 9b: CPS a = 0.7 ends at 0.72 of the variance after 1000 steps, where the others are exact."""
    schedule = flow_schedule(plain_sigmas(1000, 3.0), torch.float64)
    assert propagate(schedule, lambda _: kernel("cps .7"))[2] == pytest.approx(0.72, abs=0.0051)
    assert propagate(schedule, lambda _: kernel("ode"))[2] == pytest.approx(1.0, abs=0.01)
