"""T13: samples of older weights. With the ratio the optimum of T2 stays the fixed point; without it the bias is known.

Samplers that lag by some versions only delay: as steps shrink, old and new weights agree. A bias that lasts needs
samples that never become new, so the twin is the sampler that gets no new weights (EXACT_TESTS 7). With samples of the
reference alone:

    with ρ         u*, exactly: a linear reward sees a control through the mean of y_{k+1} alone
    without it     a_k = -g_k b_k v_k / (β s_k²),   b_k (β - (g_k v_k)² / (β s_k²)) = c_k² g_{k+1}

in one dimension, g_k = q G_k the gain from y_k to the reward, s_k² = E y_k², v_k = Var(y_k | what the baseline knows).
"""

from collections.abc import Callable

import pytest
import torch

from rlalign.mdp.noise import Noise
from tests.algorithms.chains import WEIGHT, weight

from .riccati import Controls, evaluate
from .test_linear import BETA, GROUP, TOLERANCE, Problem, algorithm, flow, problem, shift, trained, worst
from .training import Budget, held, natural, roll_out, scores_of, train

QUICK = Budget(steps=60, groups=1000, samples=GROUP, first=0.4, burn_in=0.5)
# starts of their own: the baseline knows nothing, and v_k = s_k²
APART = Budget(steps=40, groups=3000, samples=GROUP, shared=False, first=0.9, burn_in=0.5)
STRONG = 1.5  # little noise a step and this penalty: a large bias, and no ratio above 2, the widest clip range


def quiet() -> Problem:
    return problem(1, 4, "flow_sde", 0.3, STRONG)


@pytest.mark.parametrize("delay", [0, 1, 4])
def test_a_lagging_sampler_has_the_same_fixed_point(delay: int, seeds: tuple[int, ...], measured: Callable[..., None]):
    at, runs = flow(), trained(flow, algorithm(), seeds, QUICK, delay=delay)
    found, expected = shift(at, runs), float((at.outcome.mean * at.reward.q).sum())
    measured(distance=worst(at, runs), shift=found.mean, half=found.half(), true=expected)
    assert worst(at, runs) < TOLERANCE
    assert found.covers(expected)


def test_no_delay_is_the_synchronous_run_to_the_last_bit():
    """Against the loop written out: sample, score, update, and again."""
    at, chosen, budget = flow(), algorithm(), Budget(steps=4, groups=50, samples=GROUP)
    queued = train(at.policy, chosen, at.reward, BETA, 3, budget, delay=0).path
    late = train(flow().policy, chosen, at.reward, BETA, 3, budget, delay=1).path
    plain = synchronous(flow(), budget, seed=3)
    assert all(torch.equal(u.b, v) for u, v in zip(queued, plain, strict=True))
    assert not torch.equal(late[-1].b, plain[-1])


def synchronous(at: Problem, budget: Budget, seed: int) -> list[torch.Tensor]:
    chosen, generator = algorithm(), torch.Generator().manual_seed(seed)
    parameter, unit, found = at.policy.parameters[WEIGHT], natural(at.policy, BETA), [held(at.policy).b]
    for step in range(budget.steps):
        sample = roll_out(at.policy, budget.groups, budget.samples, generator, budget.shared)
        given = chosen.advantages(scores_of(at.reward(sample.final), budget.samples)).flatten().double()
        for loss in chosen.losses(at.policy, sample, given, Noise(seed)):
            loss.rows.mean().backward()
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.add_(
                (parameter.grad.view_as(weight(at.policy)) * unit).view_as(parameter), alpha=-budget.length(step)
            )
        parameter.grad = None
        found.append(held(at.policy).b)
    return found


def biased(at: Problem, beta: float) -> Controls:
    """Where ratios of 1 on samples of the reference come to rest."""
    still = Controls(torch.zeros_like(at.optimum.a), torch.zeros_like(at.optimum.b))
    moments = evaluate(at.chain, still, at.reward, *at.start).second_moments
    a, b, gain = torch.zeros_like(still.a), torch.zeros_like(still.b), at.reward.q
    for k in reversed(range(len(b))):
        after, gain = gain, gain * at.chain.F[k, 0, 0]
        if at.chain.c[k] == 0:
            continue
        s2 = moments[k, 0, 0]
        b[k] = at.chain.c[k] ** 2 * after / (beta - (gain * s2) ** 2 / (beta * s2))
        a[k] = -gain * b[k] / beta
    return Controls(a, b)


def test_a_sampler_that_never_learns_is_corrected_by_the_ratio(seeds: tuple[int, ...], measured: Callable[..., None]):
    at, chosen = quiet(), algorithm(kl_weight=STRONG)
    runs = trained(quiet, chosen, seeds, APART, beta=STRONG, frozen=True)
    measured(distance=worst(at, runs))
    assert worst(at, runs) < TOLERANCE


def test_without_the_ratio_it_comes_to_rest_elsewhere(seeds: tuple[int, ...], measured: Callable[..., None]):
    at, chosen = quiet(), algorithm(kl_weight=STRONG)
    expected = biased(at, STRONG)
    runs = trained(quiet, chosen, seeds, APART, beta=STRONG, frozen=True, corrected=False)
    measured(distance=worst(at, runs), own=worst(at, runs, expected), apart=at.off(expected))
    assert min(at.off(run.controls) for run in runs) > 0.15
    assert worst(at, runs, expected) < TOLERANCE
