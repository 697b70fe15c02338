"""The solver that the other rungs lean on: the worked example, the chains of the repository's kernels, and refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.policy import Policy
from tests.algorithms.chains import make_policy, step

from .riccati import Chain, Controls, Quadratic, distance, evaluate, solve, through
from .training import chain_of


def numbers(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


EXAMPLE = Chain(numbers(0.8, 0.9, 1.1)[:, None, None], numbers(0.1, -0.2, 0.3)[:, None], numbers(0.6, 0.5, 0.4))
REWARD = Quadratic(numbers([1.3]), numbers(0.9))
BETA, START = 0.7, (numbers(0.5), numbers([0.0]))

CONTROLS = {  # EXACT_TESTS 3.4: a, b of each step
    "to_go": ((-0.208501487, 0.135133103), (-0.271988473, 0.168222863), (-0.251982379, 0.089867841)),
    "direct": ((-0.143659929, 0.093108266), (-0.225278452, 0.139333060), (-0.251982379, 0.089867841)),
}
OUTCOMES = {  # mean y_3, var y_3, E r, Σ KL, E r - β Σ KL
    "base": (0.575, 0.815336, -0.227375, 0.0, -0.227375),
    "to_go": (0.645649548, 0.441888583, 0.022895844, 0.134103124, -0.070976343),
    "direct": (0.636684016, 0.457642108, 0.012059995, 0.121106976, -0.072714888),
}


def controls(name: Any) -> Controls:
    if name == "base":
        return Controls(torch.zeros_like(EXAMPLE.F), torch.zeros_like(EXAMPLE.f))
    return solve(EXAMPLE, REWARD, BETA, name).controls


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_of_the_worked_example(name: str):
    found = controls(name)
    assert [(a.item(), b.item()) for a, b in zip(found.a, found.b, strict=True)] == [
        pytest.approx(pair, abs=1e-9) for pair in CONTROLS[name]
    ]


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes_of_the_worked_example(name: str):
    out = evaluate(EXAMPLE, controls(name), REWARD, *START)
    kl = out.kl.sum()
    found = [x.item() for x in (out.mean, out.covariance, out.reward, kl, out.reward - BETA * kl)]
    assert found == pytest.approx(OUTCOMES[name], abs=1.1e-6 if name == "base" else 1e-9)


def test_the_value_function_of_the_worked_example():
    found = solve(EXAMPLE, REWARD, BETA, "to_go")
    assert found.P.flatten().tolist() == pytest.approx([0.324335647, 0.685410951, 1.212665198, 1.3], abs=1e-9)
    assert found.p.flatten().tolist() == pytest.approx([0.210207048, 0.423921614, 0.432488987, 0.9], abs=1e-9)
    assert found.gamma.item() == pytest.approx(-0.135537911, abs=1e-9)


def test_the_optimum_has_the_mean_of_the_exact_tilt_but_not_its_variance():
    base, best = (evaluate(EXAMPLE, controls(name), REWARD, *START) for name in ("base", "to_go"))
    tilted = 1 / (1 / base.covariance + REWARD.Q / BETA)
    assert tilted.item() == pytest.approx(0.324293009, abs=1e-9)
    assert best.mean.item() == pytest.approx((tilted * (base.mean / base.covariance + REWARD.q / BETA)).item())
    assert best.covariance.item() > 1.3 * tilted.item()


# --- two dimensions, random chains: J*, and of what each answer is the fixed point


@pytest.fixture
def chain() -> Chain:
    generator = torch.Generator().manual_seed(3)
    F = 0.8 * torch.eye(2).double() + 0.2 * torch.randn(4, 2, 2, generator=generator, dtype=torch.float64)
    f = 0.3 * torch.randn(4, 2, generator=generator, dtype=torch.float64)
    return Chain(F, f, numbers(0.6, 0.5, 0.4, 0.0))


PLANE = Quadratic(numbers([1.3, 0.4], [0.4, 0.9]), numbers(0.9, -0.6))
STANDARD = (torch.zeros(2).double(), torch.eye(2).double())
BETAS = numbers(0.5, 0.9, 0.7, 1.0)


def slopes_at(chain: Chain, u: Controls, betas: Tensor, credit: str) -> float:
    """The largest derivative of J by a control; for ``direct`` with states that KL terms see as given."""
    u = Controls(u.a.clone().requires_grad_(), u.b.clone().requires_grad_())
    out = evaluate(chain, u, PLANE, *STANDARD)
    joined = torch.cat([u.a, u.b[..., None]], -1)
    moments = out.second_moments.detach() if credit == "direct" else out.second_moments
    sizes = (joined @ moments @ joined.mT).diagonal(dim1=1, dim2=2).sum(1)
    noisy = chain.c > 0
    value = out.reward - (betas[noisy] * sizes[noisy] / (2 * chain.c[noisy].square())).sum()
    return max(float(g[noisy].abs().max()) for g in torch.autograd.grad(value, [u.a, u.b]))


@pytest.mark.parametrize("credit", ["to_go", "direct"])
def test_each_answer_is_at_rest_under_its_own_derivative_alone(chain: Chain, credit: Any):
    other = {"to_go": "direct", "direct": "to_go"}[credit]
    found = solve(chain, PLANE, BETAS, credit).controls
    assert slopes_at(chain, found, BETAS, credit) < 1e-12
    assert slopes_at(chain, found, BETAS, other) > 0.05


def test_the_value_at_the_start_is_the_objective(chain: Chain):
    found = solve(chain, PLANE, 0.6, "to_go")
    out = evaluate(chain, found.controls, PLANE, *STANDARD)
    assert (out.reward - 0.6 * out.kl.sum()).item() == pytest.approx((-found.P[0].trace() / 2 + found.gamma).item())
    direct = evaluate(chain, solve(chain, PLANE, 0.6, "direct").controls, PLANE, *STANDARD)
    assert (direct.reward - 0.6 * direct.kl.sum()).item() < (out.reward - 0.6 * out.kl.sum()).item() - 1e-3


def test_a_linear_reward_has_one_answer_in_closed_form(chain: Chain):
    reward = Quadratic(torch.zeros(2, 2).double(), PLANE.q)
    to_go, direct = (solve(chain, reward, BETA, credit).controls for credit in ("to_go", "direct"))
    gains, _, covariance = through(chain)
    assert torch.equal(to_go.a, torch.zeros_like(to_go.a)) and torch.allclose(to_go.b, direct.b)
    assert torch.allclose(to_go.b, chain.c.square()[:, None] / BETA * (gains.mT @ reward.q))
    still = Controls(torch.zeros_like(to_go.a), torch.zeros_like(to_go.b))
    base, out = (evaluate(chain, u, reward, *STANDARD) for u in (still, to_go))
    assert torch.allclose(out.mean - base.mean, covariance @ reward.q / BETA)
    assert torch.allclose(out.covariance, base.covariance)
    assert out.kl.sum().item() == pytest.approx((reward.q @ covariance @ reward.q / (2 * BETA**2)).item())


def test_another_penalty_in_a_step_moves_its_control(chain: Chain):
    """A loss that weights the policy term of step k by w_k, and not its KL: β_k = β / w_k."""
    reward = Quadratic(torch.zeros(2, 2).double(), PLANE.q)
    found, gains = solve(chain, reward, BETAS, "direct").controls, through(chain)[0]
    assert torch.allclose(found.b, (chain.c.square() / BETAS)[:, None] * (gains.mT @ reward.q))


@pytest.mark.parametrize("credit", ["to_go", "direct"])
def test_a_reward_that_grows_faster_than_the_penalty_is_refused(chain: Chain, credit: Any):
    """The last stochastic step has β/c² = 0.6 / 0.16 = 3.75, and its successor is deterministic with gain F."""
    gain = torch.linalg.svdvals(chain.F[3]).max().item()
    bound = 0.6 / 0.16 / gain**2

    def growing(share: float) -> Quadratic:
        return Quadratic(-share * bound * torch.eye(2).double(), PLANE.q)

    with pytest.raises(ValueError, match=r"step 2: .* not positive definite"):
        solve(chain, growing(1.01), 0.6, credit)
    solve(Chain(chain.F[2:], chain.f[2:], chain.c[2:]), growing(0.99), 0.6, credit)  # just below it there is one


def test_the_distance_is_zero_at_the_same_controls_alone(chain: Chain):
    u, v = (solve(chain, PLANE, 0.6, credit).controls for credit in ("to_go", "direct"))
    moments = evaluate(chain, u, PLANE, *STANDARD).second_moments
    assert distance(u, u, moments) == 0
    assert distance(Controls(2 * u.a, 2 * u.b), u, moments) == pytest.approx(1)
    assert distance(v, u, moments) > 0.1


# --- the repository's kernels on N(0, 1), N = 10, shift 3: EXACT_TESTS 3.2

ROOT2 = math.sqrt(2)
KERNELS = {  # F, V, variance of y_N with noise in the last step; and with an ODE there
    ("flow_sde", 0.0): ((0.833024, 0, 0.693929), (0.833024, 0, 0.693929)),
    ("flow_sde", 0.3): ((0.646589, 0.300141, 0.718219), (0.649839, 0.295589, 0.717880)),
    ("flow_sde", 0.7): ((0.185025, 0.766934, 0.801169), (0.190203, 0.767308, 0.803485)),
    ("flow_sde", 1.0): ((0.023495, 0.843795, 0.844347), (0.024877, 0.852559, 0.853178)),
    ("flow_sde", ROOT2): ((0.000082, 0.896351, 0.896351), (0.000092, 0.923507, 0.923507)),
    ("memoryless", 0.0): ((0.000082, 0.896351, 0.896351), (0.000092, 0.923507, 0.923507)),
    ("dance_sde", 0.3): ((0.774692, 0.103395, 0.703542), (0.786489, 0.083377, 0.701942)),
    ("cps", 0.7): ((0.003866, 0.515602, 0.515617), (0.003866, 0.515602, 0.515617)),
    ("cps", 1.0): ((0, 0.362255, 0.362255), (0, 0.362255, 0.362255)),
    ("ddim", 1.0): ((0, 0.547013, 0.547013), (0, 0.547013, 0.547013)),
    ("ddpm", 0.0): ((0, 0.547013, 0.547013), (0, 0.547013, 0.547013)),
    ("precise", ROOT2): ((0, 0.547013, 0.547013), (0, 0.547013, 0.547013)),
    ("ddim", 0.5): ((0.423933, 0.486399, 0.666119), (0.423933, 0.486399, 0.666119)),
    ("precise", 1.0): ((0, 0.611403, 0.611403), (0, 0.611403, 0.611403)),
}


def noisy_to_the_end(policy: Policy) -> Chain:
    """As ``chain_of``, with the kernel in the last step too."""
    chain, number = chain_of(policy), policy.settings.num_steps
    schedule = policy.schedule(policy.settings)
    points, at = torch.tensor([0.0, 1.0]).double().reshape(-1, 1, 1, 1), torch.full((2,), number - 1)
    now, nxt = schedule.level(at, points), schedule.level(at + 1, points)
    gaussian = step(policy, points, now, nxt, schedule.time[at], last=False)
    F = chain.F.clone()
    F[-1] = gaussian.mean.flatten()[1] - gaussian.mean.flatten()[0]
    return Chain(F, chain.f, torch.cat([chain.c[:-1], gaussian.std.flatten()[:1]]))


@pytest.mark.parametrize(("kernel", "noise_level"), KERNELS)
@pytest.mark.parametrize("last", ["noise", "ode"])
def test_gain_and_variances_of_the_policys_own_chain(kernel: str, noise_level: float, last: str):
    policy = make_policy(num_steps=10, kernel=kernel, noise_level=noise_level)
    chain = noisy_to_the_end(policy) if last == "noise" else chain_of(policy)
    _, gain, variance = through(chain)
    found = gain.item(), variance.item(), (gain.square() + variance).item()
    assert found == pytest.approx(KERNELS[kernel, noise_level][last == "ode"], abs=6e-7)


def test_a_wrong_table_is_noticed():
    """Its columns differ by more than the tolerance, and so do neighbouring noise levels."""
    policy = make_policy(num_steps=10, kernel="flow_sde", noise_level=0.7001)
    _, gain, variance = through(chain_of(policy))
    assert gain.item() != pytest.approx(0.190203, abs=6e-7)
    assert variance.item() != pytest.approx(0.767308, abs=6e-7)
