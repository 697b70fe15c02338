"""T2 and T3 where few steps are stochastic: the papers' presets of GRPO, with their own rollouts made short.

    u_k = (c_k² w_k / β) G_{k+1} q,   G over what follows in the windows that hold k: kernels inside, solvers outside

One window, windows drawn by group (Fast, TempFlow, Flash), windows that go on (MixGRPO), and a share of the steps drawn
(DanceGRPO). Rows of a group start from one noise, so that a group branches where its window begins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import grpo
from rlalign.policy import Policy
from tests.algorithms.chains import make_policy

from .conftest import Proof
from .riccati import Controls, Quadratic, distance, solve
from .training import WIDE, Budget, Trained, chain_of, roll_out, slopes, train
from .windows import Windowed, multistep_gain

BETA = 1.0
REWARD = Quadratic(torch.zeros(1, 1).double(), torch.ones(1).double())
BENT = Quadratic(1.3 * torch.ones(1, 1).double(), 0.9 * torch.ones(1).double())
BUDGET = Budget(steps=36, groups=500, samples=16, first=0.8)
IN_TURN = Budget(steps=70, groups=400, samples=16, burn_in=0.5)  # windows that go on: half of the batches for a step
TOLERANCE = 0.03  # a twin lands more than three of these away
GOES_ON: dict[str, Any] = {"size": 2, "range": "all", "schedule": "progressive", "hold": 1, "stride": 2}
RESTARTS = {**GOES_ON, "at_end": "restart"}


@dataclass(frozen=True, slots=True)
class Case:
    """A preset, and what is changed of it so that seconds are enough."""

    preset: str
    windows: Sequence[Sequence[int]]
    rollout: dict[str, Any]
    algorithm: dict[str, Any] = field(default_factory=dict[str, Any])
    weights: str = "none"

    def policy(self) -> Policy:
        published = grpo.PRESETS[self.preset]["rollout"]
        return make_policy(**{**published, "num_steps": 5, **self.rollout})

    def config(self, **changes: Any) -> grpo.Config:
        return grpo.Config(
            **{**grpo.PRESETS[self.preset]["algorithm"], **WIDE, "kl_weight": BETA, **self.algorithm, **changes}
        )

    @property
    def budget(self) -> Budget:
        return IN_TURN if self.preset.startswith("mix_grpo") else BUDGET

    def step_weights(self) -> Tensor:
        """w [N], by hand: mean 1 over the steps that some window holds."""
        policy = self.policy()
        c, s = chain_of(policy).c, slopes(policy).abs()
        held = sorted({k for window in self.windows for k in window})
        w = {"none": torch.ones_like(c), "tempflow": c, "flash": c / s}[self.weights]
        return w / w[held].mean()


FIVE = [[0], [1], [2], [3]]
CASES = {
    "flow_grpo_fast": Case("flow_grpo_fast", [[0, 1, 2], [1, 2, 3]], {"num_steps": 8, "cps_logprob": "gaussian"}),
    # published log-probs lack 1/(2c²), and so does this penalty: the same point
    "flow_grpo_fast, unscaled log-probs": Case(
        "flow_grpo_fast", [[0, 1, 2], [1, 2, 3]], {"num_steps": 8}, {"kl_form": "mean_sq"}
    ),
    "dance_grpo": Case("dance_grpo", [[0, 1, 2, 3]], {}),
    "mix_grpo": Case("mix_grpo", [[0, 1], [2, 3]], {"window": RESTARTS}),
    "tempflow_grpo": Case("tempflow_grpo", FIVE, {}, weights="tempflow"),
    "flash_grpo": Case("flash_grpo", FIVE, {"num_steps": 8}, weights="flash"),
}


def trained(case: Case, seed: int, reward: Quadratic = REWARD, budget: Budget | None = None, **changes: Any) -> Trained:
    return train(case.policy(), grpo.Algorithm(case.config(**changes)), reward, BETA, seed, budget or case.budget)


AT_REST = ("distance to the optimum", "below 3 %")


@pytest.mark.parametrize("name", CASES)
def test_presets_rest_at_the_optimum_of_their_windows(
    name: str, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    case = CASES[name]
    expected, moments = Windowed(case.policy(), case.windows).rest(REWARD, BETA, case.step_weights())
    everywhere = solve(chain_of(case.policy()), REWARD, BETA, "to_go").controls
    measured(without_windows=distance(everywhere, expected, moments))
    for seed in seeds:
        off = distance(trained(case, seed).controls, expected, moments)
        measured(distance=off)
        proves(case.preset, "T2", name, AT_REST[0], off, AT_REST[1], percent=True)
        assert off < TOLERANCE


def test_a_bent_reward_rests_at_the_windows_own_point(
    seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    """T3 with windows drawn by group: what steps have learnt moves them outside of the window, too."""
    case = CASES["flow_grpo_fast"]
    expected, moments = Windowed(case.policy(), case.windows).rest(BENT, BETA)
    for seed in seeds:
        off = distance(trained(case, seed, BENT).controls, expected, moments)
        measured(distance=off)
        proves("flow_grpo_fast", "T3", "quadratic reward", "distance to its own point", off, "below 5 %", percent=True)
        assert off < 0.05


def test_a_multistep_solver_around_the_window(seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    """MixGRPO-Flash: DPM-Solver++ begins anew behind the window, and its gain is another than Euler's."""
    case = Case("mix_grpo_flash", [[0, 1], [2, 3]], {"num_steps": 7, "window": {**RESTARTS, "range": (0, 4)}})
    policy = case.policy()
    chain, sigma = chain_of(policy), policy.schedule(policy.settings).sigma
    b, behind = torch.zeros_like(chain.f), {1: multistep_gain(sigma, 2), 3: multistep_gain(sigma, 4)}
    for last, gain in behind.items():
        b[last] = chain.c[last] ** 2 / BETA * gain
        b[last - 1] = chain.c[last - 1] ** 2 / BETA * gain * chain.F[last, 0]
    expected = Controls(torch.zeros_like(chain.F), b)
    euler, moments = Windowed(policy, case.windows).rest(REWARD, BETA)
    measured(of_euler=distance(euler, expected, moments))
    assert distance(euler, expected, moments) > 3 * TOLERANCE
    for seed in seeds:
        off = distance(trained(case, seed).controls, expected, moments)
        measured(distance=off)
        proves(case.preset, "T2", case.preset, AT_REST[0], off, AT_REST[1], percent=True)
        assert off < TOLERANCE


# --- branching


def within_groups(policy: Policy, shared: bool) -> tuple[Tensor, Tensor]:
    """[N - 1]: variance of rewards in a group by the step that was stochastic, and (c_k G_{k+1})²."""
    sample = roll_out(policy, 4000, 4, torch.Generator().manual_seed(0), shared)
    spread, at = sample.final.view(-1, 4).var(1), sample.steps[::4, 0]
    found = torch.stack([spread[at == k].mean() for k in range(4)])
    chain, tails = Windowed(policy, FIVE), list[Tensor]()
    gain = torch.ones(()).double()
    for F in chain.solver.F[:, 0, 0].flip(0):
        tails.insert(0, gain)
        gain = gain * F
    return found, (chain.kernel.c * torch.stack(tails)).square()[:4]


def test_a_group_branches_where_its_step_is(measured: Callable[..., None], proves: Proof):
    """TempFlow-GRPO: before that step its rows are one, to the last bit; what differs is what the step did."""
    policy = CASES["tempflow_grpo"].policy()
    sample = roll_out(policy, 50, 4, torch.Generator().manual_seed(1), shared=True)
    before = sample.x[:, 0].view(50, 4)
    assert torch.equal(before, before[:, :1].expand(-1, 4))
    assert (sample.final.view(50, 4).var(1) > 0).all()
    found, expected = within_groups(policy, shared=True)
    off = float((found / expected - 1).abs().max())
    measured(off=off)
    bound = 4 * (2 / (3 * 1000)) ** 0.5  # four standard errors of a variance with 3 degrees of freedom in 1000 groups
    proves("tempflow_grpo", "T2", "branching", "variance in a group over that of its step, off 1", off, "below 0.10")
    assert off < bound
    apart, _ = within_groups(policy, shared=False)
    measured(own_starts=float((apart / expected).min()))
    assert (apart / expected - 1).min() > bound


# --- negative controls


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("tempflow_grpo", {"step_weight": "none"}, id="steps without weights"),
        pytest.param("flow_grpo_fast", {"kl_form": "mean_sq"}, id="a penalty without 1/(2c²) alone"),
        pytest.param("mix_grpo", {"kl_weight": 1.3 * BETA}, id="another weight"),
    ],
)
def test_another_objective_rests_elsewhere(name: str, changes: dict[str, Any], measured: Callable[..., None]):
    case = CASES[name]
    expected, moments = Windowed(case.policy(), case.windows).rest(REWARD, BETA, case.step_weights())
    short = Budget(steps=16, groups=300, samples=16, first=0.3, burn_in=0.5)
    off = distance(trained(case, 0, budget=short, **changes).controls, expected, moments)
    measured(distance=off)
    assert off > 3 * TOLERANCE


def test_noise_outside_of_the_window_is_noticed(measured: Callable[..., None]):
    """Trained in a window, but sampled with noise in every step: another chain, and another optimum."""
    case = CASES["tempflow_grpo"]
    expected, moments = Windowed(case.policy(), case.windows).rest(REWARD, BETA, case.step_weights())
    noisy = Case("tempflow_grpo", FIVE, {"window": None, "train_fraction": 0.25})
    policy = noisy.policy()
    config = case.config(step_weight="none")
    short = Budget(steps=16, groups=300, samples=16, burn_in=0.5)
    run = train(policy, grpo.Algorithm(config), REWARD, BETA, 0, short)
    weighted = Controls(run.controls.a, run.controls.b * case.step_weights()[:, None])
    off = distance(weighted, expected, moments)
    measured(distance=off)
    assert off > 3 * TOLERANCE


def test_with_one_window_of_all_steps_it_is_the_chain_that_riccati_solves():
    policy = make_policy(2, 4, kernel="flow_sde", noise_level=0.7, logprob_reduction="sum")
    reward = Quadratic(torch.tensor([[1.3, 0.4], [0.4, 0.9]]).double(), torch.tensor([0.9, -0.6]).double())
    found, _ = Windowed(policy, [[0, 1, 2]]).rest(reward, 0.5)
    expected = solve(chain_of(policy), reward, 0.5, "direct").controls
    assert torch.allclose(found.a, expected.a, atol=1e-9) and torch.allclose(found.b, expected.b, atol=1e-9)
