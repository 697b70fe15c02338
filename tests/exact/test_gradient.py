"""T1: policy gradients without bias, against ∇J in closed form; and that a penalised one is at rest at the optimum.

All seeds together are one estimate; each has n = 100 000 samples. The largest of all entries of the gradient is to be
within three standard errors.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import ddpo, dpok, flow_dppo, grpo
from rlalign.algorithms.advantages import center, loo
from rlalign.algorithms.base import Algorithm
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory
from tests.algorithms import test_spo as spo
from tests.algorithms.chains import WEIGHT, affine, batch_gradients, law, make_policy, off_by, sample, weight
from tests.algorithms.preferences import gradient, scores_of

from .conftest import Proof

GROUP = 4
BATCHES, ROWS = 50, 2000  # n = 1e5
FIRST_SEED = 1000
WIDE: dict[str, Any] = {"adv_clip": 1e9, "clip_range": 1.0}

SCORE = ddpo.Algorithm(ddpo.Config(mode="sf", adv_clip=1e9))
IMPORTANCE = ddpo.Algorithm(ddpo.Config(mode="is", **WIDE))
GRPO = grpo.Algorithm(grpo.Config(advantage="loo", **WIDE))
DPOK = dpok.Algorithm(dpok.Config(kl_weight=0.0, clip_range=1.0))
DPPO = flow_dppo.Algorithm(flow_dppo.Config(advantage="loo", adv_clip=1e9, threshold=1e9))


def reward(y: Tensor) -> Tensor:
    """q y - Q y² / 2 of [b, 1, 1, 1]."""
    y = y.flatten()
    return 0.9 * y - 1.3 * y.square() / 2


def grouped(baseline: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def advantages(rewards: Tensor) -> Tensor:
        r = rewards.reshape(-1, GROUP)
        return baseline(r, torch.ones_like(r, dtype=torch.bool)).flatten()

    return advantages


def loss_of(
    policy: Policy, algorithm: Algorithm, advantages: Callable[[Tensor], Tensor], rewards: Callable[[Tensor], Tensor]
) -> Callable[[Trajectory], Tensor]:
    """What the learner would back-propagate, as a sum over steps in place of the mean."""

    def loss(trajectory: Trajectory) -> Tensor:
        terms = algorithm.losses(policy, trajectory, advantages(rewards(trajectory.final)), Noise(0))
        return torch.stack([term.rows.mean() for term in terms]).sum() * trajectory.num_kept

    return loss


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Somewhere in the policy class, not at its start."""
    policy = make_policy()
    with torch.no_grad():
        weight(policy).copy_(torch.tensor([[[0.1, -0.2], [-0.15, 0.3], [0.05, 0.1]]]))
    return policy


def drawn(policy: Policy, seeds: tuple[int, ...]) -> list[Trajectory]:
    return [sample(policy, ROWS, FIRST_SEED * (1 + seed) + batch) for seed in seeds for batch in range(BATCHES)]


@pytest.fixture(scope="module")
def batches(policy: Policy, seeds: tuple[int, ...]) -> list[Trajectory]:
    return drawn(policy, seeds)


@pytest.fixture(scope="module")
def truth(policy: Policy) -> Tensor:
    """-∇J of the stochastic steps, J = q m - Q (m² + V) / 2."""
    mean, covariance = law(policy)
    value = 0.9 * mean.sum() - 1.3 * (mean.square().sum() + covariance.trace()) / 2
    (gradient,) = torch.autograd.grad(-value, policy.parameters[WEIGHT])
    return gradient.view_as(weight(policy))[:, :-1]


def test_the_law_is_that_of_the_samples(policy: Policy):
    mean, covariance = (part.item() for part in law(policy))
    final = sample(policy, 100_000, seed=1).final.flatten()
    assert final.mean().item() == pytest.approx(mean, abs=4 * covariance**0.5 / 300)
    assert final.var().item() == pytest.approx(covariance, rel=0.02)


METHODS: dict[str, tuple[Any, Algorithm, Callable[[Tensor], Tensor]]] = {
    "mode: sf": (("ddpo", "reinforce"), SCORE, lambda r: r),
    "mode: is": ("ddpo", IMPORTANCE, lambda r: r - 0.5),
    "advantage: center, times G/(G - 1)": (
        "grpo",
        GRPO,
        grouped(lambda r, v: center(r, v) * GROUP / (GROUP - 1)),
    ),
    "advantage: loo": ("grpo", GRPO, grouped(loo)),
    "dpok, without a penalty": ("dpok", DPOK, grouped(loo)),
    "flow_dppo, inside its bound": ("flow_dppo", DPPO, grouped(loo)),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_has_no_bias(
    policy: Policy, batches: list[Trajectory], truth: Tensor, name: str, measured: Callable[..., None], proves: Proof
):
    names, algorithm, advantages = METHODS[name]
    off = off_by(batch_gradients(policy, loss_of(policy, algorithm, advantages, reward), batches), truth)
    measured(off=off)
    proves(names, "T1", name, "largest bias of the gradient, in standard errors", off, "below 3")
    assert off < 3


@pytest.mark.parametrize(
    "advantages",
    [
        pytest.param(lambda r: -grouped(loo)(r), id="sign flipped"),
        pytest.param(grouped(center), id="own reward in the baseline, without G/(G-1)"),
        pytest.param(lambda r: grouped(loo)(r).roll(1), id="another sample's advantage"),
    ],
)
def test_the_detector_fires(
    policy: Policy,
    batches: list[Trajectory],
    truth: Tensor,
    advantages: Callable[[Tensor], Tensor],
    measured: Callable[..., None],
):
    off = off_by(batch_gradients(policy, loss_of(policy, GRPO, advantages, reward), batches[:20]), truth)
    measured(off=off)
    assert off > 6


BETA = 0.7
DIRECTION = torch.tensor([1.0, -0.5], dtype=torch.float64)


@pytest.fixture(scope="module")
def optimum() -> Policy:
    """Linear reward: u_k = (c_k²/β) G_{k+1}ᵀ q (EXACT_TESTS 3.2), as constants of the residual velocity."""
    policy = make_policy(dim=2)
    gain, shifts = torch.eye(2).double(), list[Tensor]()
    for k in reversed(range(3)):
        step_gain, _, std = (part.detach() for part in affine(policy, k))
        shifts.append(std.square() / BETA * gain.T @ DIRECTION)
        gain = gain @ step_gain
    for k, shift in enumerate(reversed(shifts)):
        if k < 2:
            with torch.no_grad():
                before = affine(policy, k)[1]
                weight(policy)[:, k, -1] = 1.0  # the mean is linear in the residual: one unit shows the slope
                weight(policy)[:, k, -1] = shift / (affine(policy, k)[1] - before)
    return policy


@pytest.fixture(scope="module")
def at_the_optimum(optimum: Policy) -> list[Trajectory]:
    return drawn(optimum, (0,))[:20]


def linear(y: Tensor) -> Tensor:
    return y.flatten(1) @ DIRECTION


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_penalised_gradient_rests_at_the_optimum(
    optimum: Policy, reduction: str, seeds: tuple[int, ...], measured: Callable[..., None]
):
    policy = at(optimum, reduction)
    algorithm = grpo.Algorithm(grpo.Config(advantage="loo", kl_weight=BETA, **WIDE))
    off = off_by(batch_gradients(policy, loss_of(policy, algorithm, grouped(loo), linear), drawn(policy, seeds)), 0.0)
    measured(off=off)
    assert off < 3


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"kl_form": "no_tau", "kl_weight": BETA}, id="divergence without tau"),
        pytest.param({"kl_weight": 0.0}, id="no penalty"),
        pytest.param({"kl_weight": 1.1 * BETA}, id="another weight"),
    ],
)
def test_the_optimum_of_another_objective_is_elsewhere(
    optimum: Policy, at_the_optimum: list[Trajectory], config: dict[str, Any]
):
    algorithm = grpo.Algorithm(grpo.Config(advantage="loo", **WIDE, **config))
    gradients = batch_gradients(optimum, loss_of(optimum, algorithm, grouped(loo), linear), at_the_optimum)
    assert off_by(gradients, 0.0) > 6


def at(policy: Policy, reduction: str) -> Policy:
    """The same weights under another reduction of the log-probs."""
    other = make_policy(dim=2, logprob_reduction=reduction)
    other.load("policy", policy.weights("policy"))
    return other


# --- SPO: of four candidates of a step the best is preferred to the worst

MOST = 1.0293753730  # E max of four standard normal numbers


def of_spo(policy: Policy) -> Tensor:
    """[D, K] E ∇_b L = -β/2 s/(c D) E[z_w - z_l] at the reference, z along Aᵀq.

    The best and the worst are ± MOST from the mean. b is the constant of a step's residual, s = ∂μ/∂b, A the clean
    latent's slope in x' and q the reward.
    """
    schedule, truth = policy.schedule(policy.settings), torch.zeros(2, 2, dtype=torch.float64)
    for k in range(2):
        _, at_zero, std = (part.detach() for part in affine(policy, k))
        with torch.no_grad():
            weight(policy)[:, k, -1] = 1.0
            slope = float((affine(policy, k)[1] - at_zero)[0])
            weight(policy)[:, k, -1] = 0.0
        points = torch.cat([torch.zeros(1, 2), torch.eye(2)]).double().reshape(-1, *policy.latent_shape)
        at, cond = torch.full((3,), k + 1), {"log_weights": torch.zeros(3, 1, dtype=torch.float64)}
        clean = policy.predict(points, schedule.time[at], schedule.level(at, points), cond, None, 1.0).x0
        seen = clean.detach().flatten(1)
        along = (seen[1:] - seen[0]) @ DIRECTION
        truth[:, k] = (
            -spo.BETA * slope / (float(std) * 2) * MOST * along / along.norm() / 2
        )  # half of the states are k's
    return truth


def test_the_expected_gradient_of_preferred_steps(seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    policy, found = spo.exact_policy(), list[Tensor]()
    truth = of_spo(policy)
    for seed in range(30 * len(seeds)):
        batch = spo.exact_groups(policy, 60, seed)
        given = spo.Algorithm(spo.Config()).advantages(scores_of(linear(batch.final).view(60, 8))).flatten().double()
        found.append(gradient(policy, spo.losses(policy, batch, given)).view(2, 3, 3)[:, :2, -1])
    gradients = torch.stack(found)
    off = off_by(gradients, truth)
    measured(off=off)
    proves("spo", "T1", "at the reference", "largest bias of the gradient, in standard errors", off, "below 3")
    assert off < 3
    assert off_by(gradients, 0.95 * truth) > 4
    assert off_by(gradients, 0.0) > 50
