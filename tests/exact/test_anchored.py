"""T4: Gaussian data, a linear reward and an anchor β ‖v - v_ref‖², weighted in t as the policy term is (4.1).

    v* - v_ref = Cov(r, u | x_t) / β = -C_t a / (t β),     C_t = (S⁻¹ + ((1 - t)/t)² I)⁻¹

It is also the velocity of the exact tilt N(m + S a/β, S). The policy has an affine residual at every level of the
rollout's grid; samples come from its own deterministic sampler, at a std of the data at which that keeps the variance.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import awm, epg, nft, ram, rvm
from rlalign.mdp.schedule import plain_sigmas
from rlalign.models import analytic
from rlalign.models.lora import full
from rlalign.policy import Policy, RolloutConfig
from rlalign.types import Trajectory
from tests.algorithms.chains import SHIFT, WEIGHT, weight

from .conftest import Proof
from .mixture import Plain, backward, pushed, sample
from .training import Budget

BETA, STD, LEVELS, TOLERANCE = 2.0, 0.9225, 16, 0.03
A = torch.tensor([1.0, -0.5]).double()
BUDGET = Budget(steps=70, groups=500, samples=8, first=0.8, burn_in=0.2)
SHORT = Budget(steps=16, groups=300, samples=8, first=0.8, burn_in=0.5)

OPEN: dict[str, Any] = {"advantage": "loo", "adv_clip": 1e9, "weighting": "uniform", "num_times": 8, "times": "grid"}
NO_OLD = awm.Ramp(rate=0.0, max=0.0)
METHODS: dict[str, Callable[[float], Any]] = {
    "rvm": lambda beta: rvm.Config(**OPEN, adv_scale=1.0, kl_weight=beta),
    "awm": lambda beta: awm.Config(**OPEN, adv_max=None, clip_range=1e9, teacher_weight=0.0, kl_weight=beta),
    "epg": lambda beta: epg.Config(**OPEN, importance=False, clip_range=None, old_decay=NO_OLD, kl_weight=beta),
    "ram": lambda beta: ram.Config(**OPEN, kappa=1 / beta, baseline="policy"),
    "ram-old": lambda beta: ram.Config(**OPEN, kappa=1 / beta, old_decay=NO_OLD),
    "nft": lambda beta: nft.Config(
        advantage="loo", adv_clip=8.0, weighting="uniform", num_times=8, old_decay=0, kl_weight=beta
    ),
}


def make() -> Policy:
    grid = plain_sigmas(LEVELS, SHIFT)[:-1]
    config = analytic.Config(means=[[0.0, 0.0]], stds=[[STD, STD]], knots=grid.tolist(), shift=SHIFT)
    family = analytic.Family.load(config, "", torch.float64, "cpu")
    rollout = RolloutConfig(size=(1, 2), num_steps=LEVELS, solver="dpmpp_2m", kernel="ddim")
    policy = Policy(family, rollout, full(family.nets, ["velocity"]), lora=False)
    policy.keep("old")
    return policy


def levels() -> Tensor:
    return plain_sigmas(LEVELS, SHIFT)[:-1]


def tilt(beta: float) -> Tensor:
    """[N, D] v* - v_ref."""
    t = levels()
    return -(A / beta) * (1 / (t * (1 / STD**2 + ((1 - t) / t).square())))[:, None]


def moments() -> Tensor:
    """[N, D + 1]: E x_t² of each axis, and 1."""
    t = levels()
    axis = ((1 - t) * STD).square() + t.square()
    return torch.stack([axis, axis, torch.ones_like(t)], 1)


def error(weights: Tensor, beta: float) -> float:
    """‖v_θ - v*‖ / ‖v* - v_ref‖ over levels and x_t of the data; weights [D, N, D + 1]."""
    off = weights.transpose(0, 1).clone()  # [N, D, D + 1]
    off[..., -1] -= tilt(beta)
    square = (off.square() * moments()[:, None]).sum()
    return float((square / tilt(beta).square().sum()).sqrt())


def trained(config: Any, seed: int, budget: Budget, curvature: float, sign: float = 1.0) -> Tensor:
    """Mean over the last steps of where a whole natural step would have led [D, N, D + 1].

    ``curvature``: of a row's loss in v, halved: β of the anchor, or 1 in RAM, whose κ = 1/β stands in the target.
    """
    policy, generator = make(), torch.Generator().manual_seed(seed)
    algorithm = import_module(f"rlalign.algorithms.{config.name}").Algorithm(config)
    parameter, rows = policy.parameters[WEIGHT], budget.groups * budget.samples
    unit = LEVELS * 2 / (2 * curvature * moments())  # [N, D + 1]; errors are means over the two axes
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    points: list[Tensor] = []
    for step in range(budget.steps):
        with policy.using(algorithm.sample_with):
            batch = drawn(policy, rows, generator)
        backward(policy, algorithm, batch, lambda x: sign * x.flatten(1) @ A, 8, Plain(seed, step))
        assert parameter.grad is not None
        parameter.grad.view_as(weight(policy)).mul_(unit)
        if step >= budget.burn_in * budget.steps:
            points.append((parameter.detach() - parameter.grad).view_as(weight(policy)).clone())
        optimizer.param_groups[0]["lr"] = budget.length(step)
        optimizer.step()
        optimizer.zero_grad()
        algorithm.after_step(policy, step + 1)
    return torch.stack(points).mean(0)


def drawn(policy: Policy, rows: int, generator: torch.Generator) -> Trajectory:
    return sample(policy, rows, 8, generator, {"log_weights": torch.zeros(rows, 1).double()})


def test_the_sampler_keeps_the_variance():
    final = drawn(make(), 80, torch.Generator().manual_seed(0)).final
    noise = torch.randn(final.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (final / noise).mean().item() == pytest.approx(STD, rel=1e-3)


def test_it_rests_at_the_velocity_of_the_exact_tilt(
    seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    for seed in seeds:
        found = trained(METHODS["rvm"](BETA), seed, BUDGET, BETA)
        measured(error=error(found, BETA))
        proves(
            "rvm", "T4", "linear reward", "distance to the exact tilt", error(found, BETA), "below 3 %", percent=True
        )
        assert error(found, BETA) < TOLERANCE


@pytest.mark.parametrize("name", METHODS)
def test_on_its_own_samples_every_method_has_this_gradient(name: str, measured: Callable[..., None], proves: Proof):
    """So that they rest at the same point. RAM's is 1/β of it; two policies, one far from the reference."""
    for shift in (0.0, 0.7):
        gradients: dict[str, Tensor] = {}
        for method in (name, "rvm"):
            policy, config = make(), METHODS[method](BETA)
            away = torch.randn(weight(policy).shape, generator=torch.Generator().manual_seed(5))
            with torch.no_grad():
                weight(policy).add_(shift * away)
            policy.keep("old")
            algorithm = import_module(f"rlalign.algorithms.{config.name}").Algorithm(config)
            batch = drawn(policy, 400, torch.Generator().manual_seed(1))
            backward(policy, algorithm, batch, lambda x: x.flatten(1) @ A, 8, Plain(1))
            gradient = policy.parameters[WEIGHT].grad
            assert gradient is not None
            gradients[method] = gradient * (BETA if config.name == "ram" else 1)
        off = (gradients[name] - gradients["rvm"]).abs().max() / gradients["rvm"].abs().max()
        measured(off=float(off))
        if name != "rvm":
            proves(
                config_name(name), "T4", name, "gradient against RVM's, on its own samples", float(off), "below 1e-12"
            )
        assert off < 1e-12


def test_where_nothing_is_preferred_the_penalty_is_felt():
    """Groups of equal rewards are not left out: the gradient is that of the anchor alone, which is the learner's."""
    policy = make()
    policy.keep("old")
    with torch.no_grad():
        weight(policy).add_(0.1)
    batch = drawn(policy, 40, torch.Generator().manual_seed(1))
    total, _ = pushed(policy, rvm.Algorithm(METHODS["rvm"](BETA)), batch, torch.zeros(40).double(), Plain(1))
    gradient = policy.parameters[WEIGHT].grad
    assert total > 0 and gradient is not None and gradient.any()


def config_name(method: str) -> str:
    return METHODS[method](BETA).name


@pytest.mark.parametrize(
    ("config", "sign"),
    [
        pytest.param(METHODS["rvm"](BETA), -1.0, id="sign flipped"),
        pytest.param(METHODS["rvm"](1.25 * BETA), 1.0, id="another weight"),
        pytest.param(rvm.Config(**OPEN, adv_scale=1.0, kl_weight=BETA, kl_weighting="elbo"), 1.0, id="unequal weights"),
        pytest.param(ram.Config(**OPEN, kappa=1 / BETA, baseline="policy", kl_weight=0.3), 1.0, id="two anchors"),
    ],
)
def test_another_objective_rests_elsewhere(config: Any, sign: float, measured: Callable[..., None]):
    found = trained(config, 0, SHORT, 1.0 if config.name == "ram" else 3 * BETA, sign)
    measured(error=error(found, BETA))
    assert error(found, BETA) > 0.15
