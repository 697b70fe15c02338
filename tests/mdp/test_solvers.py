import math

import pytest
import torch
from torch import Tensor

from rlalign.mdp.prediction import Prediction, from_network
from rlalign.mdp.schedule import ddim_schedule, flow_schedule, scaled_linear_alphas_cumprod
from rlalign.mdp.solvers import SOLVERS, History, dpmpp_2m, euler, extrapolate, restart
from rlalign.types import Level, Schedule

from .chains import flow_level, unit_gaussian

LATENTS = [(3, 4, 4), (3, 2, 4, 4), (7, 5)]


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_golden_second_order_step() -> None:
    x, before, clean = (torch.full((1, 1), value, dtype=torch.float64) for value in (0.5, 0.6, 0.74))
    earlier, now, nxt = flow_level(0.9), flow_level(0.8), flow_level(0.7)
    history = History(before, earlier, torch.tensor(True))
    x_next, remembered = dpmpp_2m(x, from_network("sample", clean, x, now), now, nxt, history)
    assert x_next.item() == pytest.approx(0.535815814, abs=6e-10)
    assert remembered is not None and torch.equal(remembered.x0, clean) and remembered.level is now
    slope = (extrapolate(from_network("sample", clean, x, now), now, nxt, history) - clean).item() / 0.14
    assert 1 / (2 * slope) == pytest.approx(1.504518517, abs=6e-10)


@pytest.mark.parametrize("shape", LATENTS)
@pytest.mark.parametrize("name", SOLVERS)
def test_first_order_steps_are_one_step(name: str, shape: tuple[int, ...]) -> None:
    """Euler, DDIM with eta = 0 and DPM-Solver++ 1 are the same on the flow path, first and last step included."""
    x, v = some(2, 2, *shape)
    for sigma, after in ((1.0, 0.9), (0.8, 0.7), (0.3, 0.0)):
        now, nxt = flow_level(sigma), flow_level(after)
        prediction = from_network("velocity", v, x, now)
        x_next, _ = SOLVERS[name](x, prediction, now, nxt, None)
        torch.testing.assert_close(x_next, x - (sigma - after) * v, rtol=0, atol=1e-12)
        coefficients = nxt.sigma / now.sigma * x + (nxt.alpha - now.alpha * nxt.sigma / now.sigma) * prediction.x0
        torch.testing.assert_close(x_next, coefficients, rtol=0, atol=1e-12)


def test_history_is_ignored_at_the_last_step_and_after_pure_noise() -> None:
    x, v = some(2, 2, 5)
    for earlier, now, nxt in ((0.5, 0.3, 0.0), (1.0, 0.9, 0.8)):
        levels = [flow_level(sigma) for sigma in (earlier, now, nxt)]
        prediction = from_network("velocity", v, x, levels[1])
        history = History(x, levels[0], torch.tensor(True))
        assert torch.equal(extrapolate(prediction, levels[1], levels[2], history), prediction.x0)


def test_restarted_rows_are_first_order_and_the_others_are_not() -> None:
    x, v = some(2, 3, 5)
    earlier, now, nxt = flow_level(0.9), flow_level(0.8), flow_level(0.7)
    prediction = from_network("velocity", v, x, now)
    whole = History(x, earlier, torch.tensor(True))
    rows = torch.tensor([[True], [False], [True]])
    clean = extrapolate(prediction, now, nxt, restart(whole, rows))
    assert torch.equal(clean[[0, 2]], prediction.x0[[0, 2]])
    assert torch.equal(clean[1], extrapolate(prediction, now, nxt, whole)[1])
    assert restart(None, rows) is None


def terminal_gain(solver: str, schedule: Schedule) -> float:
    x, history = torch.ones(1, 1, dtype=torch.float64), None
    for k in range(schedule.num_steps):
        now, nxt = schedule.level(k, x), schedule.level(k + 1, x)
        x, history = SOLVERS[solver](x, unit_gaussian(x, now), now, nxt, history)
    return x.item()


def vp_schedule(num_steps: int) -> Schedule:
    return ddim_schedule(num_steps, scaled_linear_alphas_cumprod(), dtype=torch.float64)


def test_orders_of_convergence_on_the_flow_path() -> None:
    """For N(0, 1) data the flow scales x by the marginal's std: sqrt((1 - sigma)^2 + sigma^2)."""
    exact = math.sqrt((0.95**2 + 0.05**2) / (0.6**2 + 0.4**2))
    for solver, order in (("euler", 1), ("dpmpp_2m", 2)):
        grids = [torch.linspace(0.6, 0.05, n + 1, dtype=torch.float64) for n in (40, 80)]
        coarse, fine = (abs(exact - terminal_gain(solver, flow_schedule(grid, torch.float64))) for grid in grids)
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_work_on_the_vp_path(solver: str) -> None:
    """N(0, 1) data: every marginal is N(0, 1), so the gain tends to 1."""
    coarse, fine = (abs(1 - terminal_gain(solver, vp_schedule(n))) for n in (10, 50))
    assert fine < coarse / 3 and fine < 0.1


def test_euler_is_ddim_on_the_vp_path() -> None:
    x, eps = some(2, 2, 5)
    schedule = vp_schedule(10)
    now, nxt = schedule.level(3, x), schedule.level(4, x)
    x0 = (x - now.sigma * eps) / now.alpha
    x_next, history = euler(x, Prediction(x0, eps), now, nxt, None)
    torch.testing.assert_close(x_next, nxt.alpha * x0 + nxt.sigma * eps)
    assert history is None


def test_rows_at_their_own_levels() -> None:
    x, v = some(2, 2, 5)
    sigmas = [torch.tensor([[0.9], [0.7]], dtype=torch.float64), torch.tensor([[0.8], [0.4]], dtype=torch.float64)]
    now, nxt = (flow_level(sigma) for sigma in sigmas)
    together, _ = dpmpp_2m(x, from_network("velocity", v, x, now), now, nxt, None)
    for b in range(2):
        here, there = (Level(1 - sigma[b], sigma[b], now.interior) for sigma in sigmas)
        alone, _ = dpmpp_2m(x[b, None], from_network("velocity", v[b, None], x[b, None], here), here, there, None)
        torch.testing.assert_close(together[b], alone[0])
