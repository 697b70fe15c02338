"""T2: Gaussian data and a linear reward. Trained from the reference, a policy comes to rest at the optimum of 3.2.

    u_k = (c_k²/β) G_{k+1}ᵀ q        mean shift of y_N = Cov(y_N | y_0) q/β

Twins: what breaks an algorithm is trained in the same way, misses the optimum, and lands where the theory says.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import dpok, flow_dppo, grpo, grpo_guard
from rlalign.algorithms.base import Algorithm
from rlalign.policy import Policy
from tests.algorithms.chains import make_policy

from .conftest import Proof
from .riccati import Chain, Controls, Outcome, Quadratic, distance, evaluate, solve, through
from .training import WIDE, Budget, Interval, Trained, chain_of, mean_of, train

BETA = 1.0
DIRECTION = torch.tensor([1.0, -0.5, 0.25, 0.75], dtype=torch.float64)
TOLERANCE = 0.03
GROUP = 8
KERNELS = [("flow_sde", 0.3), ("flow_sde", 0.7), ("dance_sde", 0.3), ("ddpm", 0.0), ("cps", 0.7)]
TABLE = [0.295589, 0.767308, 0.083377, 0.547013, 0.515602]  # EXACT_TESTS 3.2: Var(y_10 | y_0), last step ODE


@dataclass(frozen=True, slots=True)
class Problem:
    policy: Policy
    chain: Chain
    reward: Quadratic
    optimum: Controls
    outcome: Outcome

    @property
    def start(self) -> tuple[Tensor, Tensor]:
        dim = len(self.reward.q)
        return torch.zeros(dim).double(), torch.eye(dim).double()

    def outcome_of(self, controls: Controls) -> Outcome:
        return evaluate(self.chain, controls, self.reward, *self.start)

    def off(self, found: Controls, expected: Controls | None = None) -> float:
        expected = expected or self.optimum
        return distance(found, expected, self.outcome_of(expected).second_moments)


def problem(
    dim: int, num_steps: int, kernel: str, noise_level: float, betas: float | Tensor = BETA, reduction: str = "sum"
) -> Problem:
    policy = make_policy(dim, num_steps, kernel=kernel, noise_level=noise_level, logprob_reduction=reduction)
    chain, reward = chain_of(policy), Quadratic(torch.zeros(dim, dim).double(), DIRECTION[:dim])
    optimum = solve(chain, reward, betas, "to_go").controls
    start = torch.zeros(dim).double(), torch.eye(dim).double()
    return Problem(policy, chain, reward, optimum, evaluate(chain, optimum, reward, *start))


def algorithm(**config: Any) -> Algorithm:
    return grpo.Algorithm(grpo.Config(**{**WIDE, "kl_weight": BETA, **config}))


def trained(
    build: Callable[[], Problem], chosen: Algorithm, seeds: Sequence[int], budget: Budget, **options: Any
) -> list[Trained]:
    """From the reference anew for every seed."""
    beta = options.pop("beta", BETA)
    runs: list[Trained] = []
    for seed in seeds:
        at = build()
        runs.append(train(at.policy, chosen, at.reward, beta, seed, budget, **options))
    return runs


def shift(at: Problem, runs: Sequence[Trained]) -> Interval:
    """Of the mean of qᵀy_N."""
    base = at.outcome_of(Controls(torch.zeros_like(at.optimum.a), torch.zeros_like(at.optimum.b))).reward
    return Interval.between([torch.stack([at.outcome_of(u).reward - base for u in run.points]) for run in runs])


def worst(at: Problem, runs: Sequence[Trained], expected: Controls | None = None) -> float:
    return max(at.off(run.controls, expected) for run in runs)


def told(
    proves: Proof, name: str, case: str, at: Problem, runs: Sequence[Trained], expected: float | None = None
) -> None:
    """Distances of the seeds from the optimum, and where it is given the shift that is expected, on the pages."""
    for run in runs:
        proves(name, "T2", case, "distance to the optimum", at.off(run.controls), "below 3 %", percent=True)
    if expected is not None:
        quantity = "shift of the mean reward, over that of the optimum"
        proves(name, "T2", case, quantity, shift(at, runs).mean / expected, "1 inside its interval")


LONG = Budget(steps=24, groups=1000, samples=GROUP)
WIDE_BATCHES = Budget(steps=50, groups=2000, samples=GROUP)
SHORT = Budget(steps=24, groups=1000, samples=GROUP)
HALF = Budget(steps=24, groups=500, samples=GROUP)
DOUBLE = Budget(steps=24, groups=2000, samples=GROUP)


@pytest.mark.parametrize(
    ("kernel", "noise_level", "variance"), [(*kernel, v) for kernel, v in zip(KERNELS, TABLE, strict=True)]
)
def test_ten_steps_in_one_dimension(
    kernel: str,
    noise_level: float,
    variance: float,
    seeds: tuple[int, ...],
    measured: Callable[..., None],
    proves: Proof,
):
    at = problem(1, 10, kernel, noise_level)
    runs = trained(lambda: problem(1, 10, kernel, noise_level), algorithm(), seeds, LONG)
    found = shift(at, runs)
    measured(distance=worst(at, runs), shift=found.mean, half=found.half(), true=variance / BETA)
    measured(gradient=max(run.gradient for run in runs))
    told(proves, "grpo", f"{kernel} {noise_level:g}, ten steps, 1-D", at, runs, variance / BETA)
    assert worst(at, runs) < TOLERANCE
    assert found.covers(variance / BETA)  # q = 1


@pytest.mark.parametrize(("kernel", "noise_level"), KERNELS)
def test_four_steps_in_four_dimensions(
    kernel: str, noise_level: float, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    at = problem(4, 4, kernel, noise_level)
    runs = trained(lambda: problem(4, 4, kernel, noise_level), algorithm(), seeds, WIDE_BATCHES)
    found, (_, _, covariance) = shift(at, runs), through(at.chain)
    expected = float(at.reward.q @ covariance @ at.reward.q / BETA)
    measured(distance=worst(at, runs), shift=found.mean, half=found.half(), true=expected)
    measured(gradient=max(run.gradient for run in runs))
    told(proves, "grpo", f"{kernel} {noise_level:g}, four steps, 4-D", at, runs, expected)
    assert worst(at, runs) < TOLERANCE
    assert found.covers(expected)


# --- the same optimum by other means, and another one with a known weight


def flow(dim: int = 1, betas: float | Tensor = BETA, reduction: str = "sum") -> Problem:
    return problem(dim, 4, "flow_sde", 0.7, betas, reduction)


def own_reward_left_in(advantages: Tensor) -> Tensor:
    return advantages * GROUP / (GROUP - 1)


def test_center_needs_its_factor(seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    """A = (r - mean_g) G/(G - 1) is unbiased; without the factor it acts as a penalty of β G/(G - 1)."""
    center = algorithm(advantage="center")
    right = trained(flow, center, seeds, SHORT, advantages=own_reward_left_in)
    short = trained(flow, center, seeds, SHORT)
    weaker = flow(betas=BETA * GROUP / (GROUP - 1))
    measured(distance=worst(flow(), right), without=worst(flow(), short), own=worst(weaker, short))
    told(proves, "grpo", "advantage: center, times G/(G - 1)", flow(), right)
    assert worst(flow(), right) < TOLERANCE
    assert min(flow().off(run.controls) for run in short) > 0.09
    assert worst(weaker, short) < TOLERANCE


def test_mean_log_probs_with_a_mean_penalty_have_the_same_optimum(
    seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    at, runs = flow(2), trained(lambda: flow(2, reduction="mean"), algorithm(), seeds, WIDE_BATCHES)
    measured(distance=worst(at, runs))
    told(proves, "grpo", "mean log-probs, mean penalty", at, runs)
    assert worst(at, runs) < TOLERANCE


def test_divided_by_the_std_the_weight_is_that_of_beta_times_the_std(
    seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    """The optimum moves the mean and not the covariance, so the std of rewards stays what it is at the reference.

    Without G/(G - 1): this advantage leaves the own reward in its baseline.
    """
    outcome = flow().outcome
    spread = outcome.covariance[0, 0].sqrt().item()
    at = flow(betas=BETA * spread)
    divided = algorithm(advantage="global_std", std_delta=0.0)
    # independent starts: with shared ones the std of all rewards is the same, but the baseline is another
    budget = Budget(steps=24, groups=1000, samples=GROUP, shared=False)
    runs = trained(flow, divided, seeds, budget, advantages=own_reward_left_in)
    measured(distance=worst(at, runs), std=spread)
    told(proves, "grpo", "advantage: global_std, β times the std of rewards", at, runs)
    assert worst(at, runs) < TOLERANCE
    assert min(flow().off(run.controls) for run in runs) > 0.2


OTHERS: dict[str, Callable[[float], Any]] = {
    "dpok": lambda beta: dpok.Config(kl_weight=beta, clip_range=1.0),
    "dpok, to_go": lambda beta: dpok.Config(kl_weight=beta, clip_range=1.0, kl_credit="to_go"),
    "flow_dppo": lambda beta: flow_dppo.Config(advantage="loo", adv_clip=1e9, threshold=1e9, kl_weight=beta),
    "grpo_guard": lambda beta: grpo_guard.Config(**WIDE, kl_weight=beta),
}


@pytest.mark.parametrize(("kernel", "noise_level"), KERNELS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_trajectory_methods(
    name: str,
    kernel: str,
    noise_level: float,
    seeds: tuple[int, ...],
    measured: Callable[..., None],
    proves: Proof,
):
    """GRPO-Guard weights the policy term of step k by c_k/τ_k and not its KL: β_k = β τ_k/c_k (EXACT_TESTS 3.3)."""

    def build(betas: float | Tensor) -> Problem:
        return problem(1, 4, kernel, noise_level, betas)

    beta, plain = 3.0, build(3.0)
    guard = name == "grpo_guard"
    at = build(beta * taus(plain) / plain.chain.c.clamp(min=1e-9)) if guard else plain
    config = OTHERS[name](beta)
    chosen = import_module(f"rlalign.algorithms.{config.name}").Algorithm(config)
    runs = trained(lambda: build(beta), chosen, seeds, DOUBLE if guard else HALF, beta=beta)
    found, expected = shift(at, runs), float((at.outcome.mean * at.reward.q).sum())
    measured(distance=worst(at, runs), shift=found.mean, half=found.half(), true=expected)
    told(proves, config.name, f"{name}, {kernel} {noise_level:g}", at, runs, expected)
    assert worst(at, runs) < TOLERANCE
    assert found.covers(expected)
    if guard:
        assert min(plain.off(run.controls) for run in runs) > 5 * TOLERANCE


def taus(at: Problem) -> Tensor:
    """[N]: τ_k = σ_k - σ_{k+1}."""
    sigma = at.policy.schedule(at.policy.settings).sigma.double()
    return sigma[:-1] - sigma[1:]


# --- negative controls


def test_a_flipped_reward_lands_at_the_opposite_point(seeds: tuple[int, ...], measured: Callable[..., None]):
    at, runs = flow(), trained(flow, algorithm(), seeds, SHORT, advantages=torch.neg)
    opposite = Controls(-at.optimum.a, -at.optimum.b)
    measured(distance=worst(at, runs), opposite=worst(at, runs, opposite), shift=shift(at, runs).mean)
    assert shift(at, runs).mean + shift(at, runs).half() < 0  # the reward falls
    assert min(at.off(run.controls) for run in runs) > 1.9
    assert worst(at, runs, opposite) < TOLERANCE


def test_shuffled_advantages_lead_nowhere(seeds: tuple[int, ...], measured: Callable[..., None]):
    """A random permutation in each group. Not a rotation: another row's leave-one-out baseline holds this row."""
    generator = torch.Generator().manual_seed(0)

    def shuffled(advantages: Tensor) -> Tensor:
        groups = advantages.reshape(-1, GROUP)
        order = torch.rand(groups.shape, generator=generator).argsort(1)
        return groups.gather(1, order).flatten()

    at, runs = flow(), trained(flow, algorithm(), seeds, SHORT, advantages=shuffled)
    found = shift(at, runs)
    moved = max(1 - at.off(run.controls) for run in runs)
    measured(distance=worst(at, runs), moved=moved, shift=found.mean, half=found.half())
    assert found.covers(0.0)
    assert abs(worst(at, runs) - 1) < TOLERANCE


def test_without_a_penalty_it_never_stops(seeds: tuple[int, ...], measured: Callable[..., None]):
    """Path KL grows at least linearly; the same loop with the penalty stays at the optimum's KL.

    That is quadratic in the controls, so within 2 TOLERANCE of it where they are within TOLERANCE.
    """
    budget = Budget(steps=60, groups=300, samples=GROUP, burn_in=0.5, first=0.15)
    at = flow()
    for seed in seeds:
        free, held = (trained(flow, algorithm(kl_weight=weight), [seed], budget)[0] for weight in (0.0, BETA))
        kl = [float(at.outcome_of(free.path[t]).kl.sum()) for t in (15, 30, 60)]
        optimum, penalised = float(at.outcome.kl.sum()), float(at.outcome_of(held.controls).kl.sum())
        measured(kl15=kl[0], kl30=kl[1], kl60=kl[2], optimum=optimum, penalised=penalised)
        # steps fall as 1/√t and their sum grows as √t: constants alone would give a KL linear in t
        assert kl[1] > 1.9 * kl[0] and kl[2] > 1.9 * kl[1]
        assert kl[2] > 10 * optimum
        assert penalised == pytest.approx(optimum, rel=2 * TOLERANCE)


def test_a_penalty_without_tau_is_too_weak_by_it(seeds: tuple[int, ...], measured: Callable[..., None]):
    """kl_form: no_tau with the weight of the true divergence: each step's control is 1/τ_k times too large."""
    beta = 6.0  # large, since a tenth of it is what acts in the first step
    at = flow(betas=beta)
    tau = taus(at)
    weaker = flow(betas=beta * tau)
    budget = Budget(steps=40, groups=2000, samples=GROUP)
    chosen = algorithm(kl_form="no_tau", kl_weight=beta)
    runs = trained(flow, chosen, seeds, budget, beta=beta * float(tau[:-1].max()))
    controls = mean_of([run.controls for run in runs])
    factors = (controls.b / at.optimum.b)[:-1].flatten()
    measured(distance=worst(at, runs), own=worst(weaker, runs))
    measured(**{f"factor{k}": float(factor) for k, factor in enumerate(factors)})
    measured(**{f"expected{k}": float(1 / t) for k, t in enumerate(tau[:-1])})
    assert min(at.off(run.controls) for run in runs) > 3
    assert worst(weaker, runs) < TOLERANCE


def test_a_mean_ratio_under_a_sum_penalty_moves_too_little(seeds: tuple[int, ...], measured: Callable[..., None]):
    """A sum penalty is D times a mean one: the shift is D times too small."""
    dim = 4
    at = flow(dim)
    runs = trained(
        lambda: flow(dim, reduction="mean"), algorithm(kl_weight=BETA * dim), seeds, WIDE_BATCHES, beta=BETA * dim
    )
    found, (_, _, covariance) = shift(at, runs), through(at.chain)
    expected = float(at.reward.q @ covariance @ at.reward.q / BETA) / dim
    measured(distance=worst(at, runs), shift=found.mean, half=found.half(), expected=expected)
    assert min(at.off(run.controls) for run in runs) > 0.7
    assert found.covers(expected)
