from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rlalign.mdp.noise import Noise
from rlalign.mdp.prediction import Prediction, from_network
from rlalign.mdp.rollout import Chain, rollout
from rlalign.mdp.schedule import (
    ddim_schedule,
    diffusers_static_sigmas,
    flow_schedule,
    plain_sigmas,
    scaled_linear_alphas_cumprod,
)
from rlalign.mdp.solvers import SOLVERS
from rlalign.mdp.transition import KERNELS, Gaussian
from rlalign.types import Level, Schedule

LATENTS = {"image": (4, 6, 6), "video": (4, 3, 5, 5), "tokens": (9, 8)}
NOISE_LEVELS = {"dance_sde": 0.3, "ddim": 0.8, "precise": 0.9}
STOCHASTIC = [name for name in KERNELS if name != "ode"]
BATCH, STEPS = 6, 8

Predict = Callable[[Tensor, Tensor, Level], Prediction]


class Toy(nn.Module):
    """A small network of the latents' kind, told the time of each row."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        convolution = {3: nn.Conv2d, 4: nn.Conv3d}.get(len(shape))
        channels = shape[0] if convolution else shape[-1]
        self.body = convolution(channels, channels, 3, padding=1) if convolution else nn.Linear(channels, channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(self.body(x)) * (1 + time.to(x) / 1000).reshape(-1, *[1] * (x.ndim - 1))


def schedule_of(kernel: str, dtype: torch.dtype = torch.float32) -> Schedule:
    if kernel == "vp":
        return ddim_schedule(STEPS, scaled_linear_alphas_cumprod(), dtype=dtype)
    return flow_schedule(plain_sigmas(STEPS, 3.0), dtype)


def run(
    shape: tuple[int, ...],
    stochastic: Tensor,
    kept: Tensor,
    *,
    kernel: str = "flow_sde",
    solver: str = "euler",
    schedule: Schedule | None = None,
    dtype: torch.dtype = torch.float32,
    round_to: torch.dtype | None = None,
    net: nn.Module | None = None,
    rows: Tensor | None = None,
    asked: list[int] | None = None,
) -> Chain:
    """A rollout of rows of one batch; every number of a row is a function of its address."""
    schedule = schedule or schedule_of(kernel, dtype)
    rows = torch.arange(BATCH) if rows is None else rows
    address = torch.stack([torch.zeros_like(rows), rows // 2, rows % 2], 1)
    network = net or Toy(shape).to(dtype)

    def predict(x: Tensor, k: int) -> Prediction:
        time = schedule.time[k].expand(len(x))
        return from_network("velocity", network(x, time), x, schedule.level(k, x))

    def noise(k: int) -> Tensor:
        if asked is not None:
            asked.append(k)
        return Noise(0).normal("step", address, k, shape, dtype)

    start = Noise(0).normal("initial", address, 0, shape, dtype)
    return rollout(
        predict, start, schedule, stochastic, kept, kernel_of(kernel), SOLVERS[solver], noise, mean_log_prob, round_to
    )


def kernel_of(name: str) -> Callable[[Tensor, Prediction, Level, Level], Gaussian]:
    return lambda x, prediction, now, nxt: KERNELS[name](x, prediction, now, nxt, NOISE_LEVELS.get(name, 0.7))


def mean_log_prob(gaussian: Gaussian, x: Tensor) -> Tensor:
    return gaussian.log_prob(x, "mean")


def window(*starts: int, size: int = 3) -> tuple[Tensor, Tensor]:
    """Stochastic steps and kept steps of rows whose windows start there."""
    kept = torch.tensor(starts)[:, None] + torch.arange(size)
    return torch.zeros(len(starts), STEPS, dtype=torch.bool).scatter(1, kept, True), kept


MIXED = (0, 0, 2, 2, 4, 4)


def replay(chain: Chain, kept: Tensor, slot: int, schedule: Schedule, kernel: str, net: nn.Module) -> Tensor:
    """A learner's log-probability of a kept step: each row at its own step, as Policy.replay computes it."""
    x, at = chain.x[:, slot].contiguous(), kept[:, slot]
    now, nxt = schedule.level(at, x), schedule.level(at + 1, x)
    prediction = from_network("velocity", net(x, schedule.time[at]), x, now)
    return mean_log_prob(kernel_of(kernel)(x, prediction, now, nxt), chain.x_next[:, slot])


@pytest.mark.parametrize("kind", LATENTS)
@pytest.mark.parametrize("kernel", STOCHASTIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replay_equals_rollout_bit_for_bit(kind: str, kernel: str, dtype: torch.dtype) -> None:
    """Mixed windows, the first step (sigma = 1) among them."""
    shape = LATENTS[kind]
    stochastic, kept = window(*MIXED)
    net, schedule = Toy(shape).to(dtype), schedule_of(kernel, dtype)
    chain = run(shape, stochastic, kept, kernel=kernel, dtype=dtype, net=net)
    assert chain.log_probs.dtype == dtype and chain.log_probs.isfinite().all()
    for slot in range(kept.shape[1]):
        assert torch.equal(replay(chain, kept, slot, schedule, kernel, net), chain.log_probs[:, slot])


def test_replay_under_a_gradient() -> None:
    shape = LATENTS["image"]
    stochastic, kept = window(*MIXED)
    net, schedule = Toy(shape), schedule_of("flow_sde")
    density = replay(chain := run(shape, stochastic, kept, net=net), kept, 1, schedule, "flow_sde", net)
    assert density.requires_grad and torch.equal(density, chain.log_probs[:, 1])


@pytest.mark.parametrize("stochastic", [True, False])
def test_states_are_contiguous_whatever_the_network_returns(stochastic: bool) -> None:
    """As a learner will meet them: a net may give other bits for another memory format."""
    shape, schedule = LATENTS["image"], schedule_of("ddim")
    met: list[bool] = []

    def predict(x: Tensor, k: int) -> Prediction:
        met.append(x.is_contiguous())
        x0 = torch.tanh(x).to(memory_format=torch.channels_last)
        return from_network("sample", x0, x, schedule.level(k, x))

    steps = torch.full((2, STEPS), stochastic)
    start = torch.ones(2, *shape).to(memory_format=torch.channels_last)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    chain = rollout(
        predict,
        start,
        schedule,
        steps,
        nothing,
        kernel_of("ddim"),
        SOLVERS["euler"],
        lambda k: torch.ones(2, *shape),
        mean_log_prob,
    )
    assert all(met) and chain.final.is_contiguous()


@pytest.mark.parametrize("store", [torch.bfloat16, torch.float16])
def test_states_are_rounded_before_they_are_scored(store: torch.dtype) -> None:
    shape = LATENTS["image"]
    stochastic, kept = window(*MIXED)
    net, schedule = Toy(shape), schedule_of("flow_sde")
    chain = run(shape, stochastic, kept, net=net, round_to=store)
    for state in (chain.x, chain.x_next, chain.final):
        assert state.dtype == torch.float32 and torch.equal(state.to(store).float(), state)
    for slot in range(3):
        assert torch.equal(replay(chain, kept, slot, schedule, "flow_sde", net), chain.log_probs[:, slot])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", LATENTS)
def test_rows_with_their_own_windows_are_what_they_are_alone(kind: str, solver: str) -> None:
    """Each row rolled out in a batch that shares its window: the same states, so the solver restarts row by row."""
    shape = LATENTS[kind]
    mixed = run(shape, *window(*MIXED), solver=solver)
    for row, start in enumerate(MIXED):
        shared = run(shape, *window(*[start] * BATCH), solver=solver)
        for name in ("x", "x_next", "log_probs", "final"):
            assert torch.equal(getattr(mixed, name)[row], getattr(shared, name)[row]), (name, row)


def test_history_restarts_after_noise() -> None:
    """With noise around every deterministic step 2M is Euler's method; with two in a row it is not."""
    shape, every = LATENTS["tokens"], torch.ones(BATCH, STEPS, dtype=torch.bool)
    for still, same in (([1, 3, 5], True), ([1, 3, 4], False)):
        every[:] = True
        every[:, still] = False
        kept = torch.zeros(BATCH, 1, dtype=torch.int64)
        second, first = (run(shape, every, kept, solver=solver).final for solver in ("dpmpp_2m", "euler"))
        assert torch.allclose(second, first, rtol=0, atol=1e-5) is same


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", LATENTS)
def test_deterministic_rollout_draws_nothing_and_is_the_solver(kind: str, solver: str) -> None:
    shape, schedule, asked = LATENTS[kind], schedule_of("flow_sde"), []
    nothing = torch.zeros(BATCH, STEPS, dtype=torch.bool), torch.zeros(BATCH, 0, dtype=torch.int64)
    net = Toy(shape)
    chain = run(shape, *nothing, solver=solver, net=net, asked=asked)
    assert not asked
    assert chain.x.shape == chain.x_next.shape == (BATCH, 0, *shape) and chain.log_probs.shape == (BATCH, 0)
    address = torch.stack([torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH) // 2, torch.arange(BATCH) % 2], 1)
    x, history = Noise(0).normal("initial", address, 0, shape), None
    for k in range(STEPS):
        now, nxt = schedule.level(k, x), schedule.level(k + 1, x)
        prediction = from_network("velocity", net(x, schedule.time[k].expand(BATCH)), x, now)
        x, history = SOLVERS[solver](x, prediction, now, nxt, history)
    assert torch.equal(chain.final, x.detach())


def test_noise_is_asked_for_where_a_row_needs_it() -> None:
    asked: list[int] = []
    run(LATENTS["tokens"], *window(0, 0, 0, 0, 4, 4, size=2), asked=asked)
    assert asked == [0, 1, 4, 5]


def test_kept_steps_may_be_some_of_the_stochastic_ones() -> None:
    shape = LATENTS["tokens"]
    every = torch.ones(BATCH, STEPS, dtype=torch.bool)
    whole = run(shape, every, torch.arange(STEPS).expand(BATCH, -1))
    some = run(shape, every, torch.tensor([[1, 5]]).expand(BATCH, -1))
    assert torch.equal(some.final, whole.final)
    assert torch.equal(some.x, whole.x[:, [1, 5]]) and torch.equal(some.log_probs, whole.log_probs[:, [1, 5]])
    assert torch.equal(whole.x[:, 1:], whole.x_next[:, :-1]) and torch.equal(whole.x_next[:, -1], whole.final)


def test_a_step_is_the_kernels_gaussian() -> None:
    shape, net, schedule = LATENTS["image"], Toy(LATENTS["image"]), schedule_of("flow_sde")
    stochastic, kept = window(*[2] * BATCH)
    chain = run(shape, stochastic, kept, net=net)
    address = torch.stack([torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH) // 2, torch.arange(BATCH) % 2], 1)
    x = chain.x[:, 0]
    now, nxt = schedule.level(2, x), schedule.level(3, x)
    prediction = from_network("velocity", net(x, schedule.time[2].expand(BATCH)), x, now)
    gaussian = kernel_of("flow_sde")(x, prediction, now, nxt)
    assert torch.equal(chain.x_next[:, 0], gaussian.sample(Noise(0).normal("step", address, 2, shape)).detach())


def test_rows_of_an_elementwise_predictor_do_not_know_their_batch() -> None:
    """The loop itself mixes no rows; a network's own bits may still depend on the size of its batch."""

    class Elementwise(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return x * 0.3 - 0.1

    shape, (stochastic, kept) = LATENTS["video"], window(*MIXED)
    whole = run(shape, stochastic, kept, net=Elementwise(), solver="dpmpp_2m")
    rows = torch.tensor([4, 1, 3])
    part = run(shape, stochastic[rows], kept[rows], net=Elementwise(), solver="dpmpp_2m", rows=rows)
    for name in ("x", "x_next", "log_probs", "final"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows])


def test_vp_rollout_with_ddim() -> None:
    shape, schedule, net = LATENTS["image"], schedule_of("vp", torch.float64), Toy(LATENTS["image"]).double()

    def predict(x: Tensor, k: int) -> Prediction:
        return from_network("epsilon", net(x, schedule.time[k].expand(len(x))), x, schedule.level(k, x))

    every, kept = torch.ones(2, STEPS, dtype=torch.bool), torch.arange(STEPS).expand(2, -1)
    start = torch.ones(2, *shape, dtype=torch.float64)
    chain = rollout(
        predict,
        start,
        schedule,
        every,
        kept,
        kernel_of("ddim"),
        SOLVERS["euler"],
        lambda k: start / (k + 1),
        mean_log_prob,
    )
    assert chain.final.isfinite().all() and chain.log_probs.isfinite().all()


def test_float32_against_float64() -> None:
    """Prints the gap of a whole chain under the same network and noise."""
    shape, (stochastic, kept) = LATENTS["image"], window(*MIXED)
    net = Toy(shape)

    class Single(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return net.double()(x, time)

    double = run(shape, stochastic, kept, dtype=torch.float64, net=Single())
    schedule = flow_schedule(plain_sigmas(STEPS, 3.0))
    address = torch.stack([torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH) // 2, torch.arange(BATCH) % 2], 1)

    def predict(x: Tensor, k: int) -> Prediction:
        return from_network("velocity", net.float()(x, schedule.time[k].expand(len(x))), x, schedule.level(k, x))

    single = rollout(
        predict,
        Noise(0).normal("initial", address, 0, shape, torch.float64).float(),
        schedule,
        stochastic,
        kept,
        kernel_of("flow_sde"),
        SOLVERS["euler"],
        lambda k: Noise(0).normal("step", address, k, shape, torch.float64).float(),
        mean_log_prob,
    )
    latents = (single.final - double.final).abs().max().item()
    densities = (single.log_probs - double.log_probs).abs().max().item()
    print(f"float32 against float64 after {STEPS} steps: latents {latents:.1e}, mean log-probabilities {densities:.1e}")
    assert latents < 1e-4 and densities < 1e-4


def test_no_graph_is_left() -> None:
    chain = run(LATENTS["tokens"], *window(*MIXED))
    assert not any(tensor.requires_grad for tensor in (chain.x, chain.x_next, chain.log_probs, chain.final))


def test_nonsense_is_refused() -> None:
    shape, (stochastic, kept) = LATENTS["tokens"], window(*MIXED)
    with pytest.raises(ValueError, match="only stochastic steps"):
        run(shape, stochastic, kept + 1)
    with pytest.raises(ValueError, match="stochastic is"):
        run(shape, stochastic[:, 1:], kept)
    with pytest.raises(ValueError, match="kept is"):
        run(shape, stochastic, kept[1:])


def test_a_kept_last_step_without_noise_is_refused() -> None:
    every = torch.ones(BATCH, STEPS, dtype=torch.bool)
    last = torch.full((BATCH, 1), STEPS - 1)
    with pytest.raises(ValueError, match="without noise"):
        run(LATENTS["tokens"], every, last, kernel="cps")
    assert run(LATENTS["tokens"], every, last, kernel="flow_sde").log_probs.isfinite().all()


def test_deterministic_last_step_of_a_flow_grid_with_a_long_jump() -> None:
    every = torch.ones(BATCH, STEPS, dtype=torch.bool)
    every[:, -1] = False
    kept = torch.arange(STEPS - 1).expand(BATCH, -1)
    chain = run(LATENTS["tokens"], every, kept, schedule=flow_schedule(diffusers_static_sigmas(STEPS, 3.0)))
    assert chain.log_probs.shape == (BATCH, STEPS - 1) and chain.log_probs.isfinite().all()
