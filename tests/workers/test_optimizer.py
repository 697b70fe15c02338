"""Steps of weights: of those in half precision by float32 masters, with moments in 8 bits, and after a checkpoint."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlalign import checkpoint
from rlalign.checkpoint import LEARNER
from rlalign.mdp.noise import Noise
from rlalign.types import State
from rlalign.workers.learner import Learner
from rlalign.workers.optimizer import Optimizer, OptimizerConfig
from tests.models.stable_diffusion import sd_folder, sd_policy
from tests.small import algorithm, sample, scored, workers

ABSENT = importlib.util.find_spec("bitsandbytes") is None
SIZES = {"matrix": (64, 128), "bias": (10,)}
"""Of weights that have moments in 8 bits, and of some that are too few for it."""


class StandIn(torch.optim.Optimizer):
    """Keeps what bitsandbytes' AdamW8bit keeps, the way it does, where that is not installed: its steps are cruder."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.qmap = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state and p.numel() < 4096:
                    state |= {"step": 0, "state1": torch.zeros_like(p), "state2": torch.zeros_like(p)}
                elif not state:
                    zero = torch.full_like(p, 128, dtype=torch.uint8)
                    scales = {f"absmax{n}": torch.ones(1) for n in (1, 2)}
                    maps = {f"qmap{n}": self.qmap for n in (1, 2)}
                    state |= {"step": 0, "state1": zero, "state2": zero.clone(), **maps, **scales}
                state["step"] += 1
                for n, value in ((1, p.grad), (2, p.grad.square())):
                    self._average(state, n, value, group["betas"][n - 1])
                p -= group["lr"] * self._held(state, 1) / (self._held(state, 2).abs().sqrt() + 1e-8) * state["step"]

    def _held(self, state: dict[str, Any], n: int) -> Tensor:
        held = state[f"state{n}"]
        return held if held.dtype != torch.uint8 else state[f"qmap{n}"][held.int()] * state[f"absmax{n}"]

    def _average(self, state: dict[str, Any], n: int, value: Tensor, beta: float) -> None:
        mean = beta * self._held(state, n) + (1 - beta) * value
        if state[f"state{n}"].dtype == torch.uint8:
            scale = mean.abs().max().reshape(1)
            state[f"absmax{n}"] = scale
            mean = ((mean / scale + 1) * 127.5).round().to(torch.uint8)
        state[f"state{n}"] = mean


@pytest.fixture
def eight_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one where it is installed."""
    if ABSENT:
        package, optim = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
        vars(optim)["AdamW8bit"] = StandIn
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for name, size in SIZES.items()}


def steps(optimizer: Optimizer, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for weight in optimizer.weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.with_gradients()
        optimizer.step()
        optimizer.zero_grad()


def written(optimizer: Optimizer, folder: Path) -> State:
    """Through the files of a checkpoint."""
    tensors = {f"policy/{key}": weight.data for key, weight in optimizer.weights.items()} | optimizer.tensors()
    folder.mkdir()
    checkpoint.write_part(folder, LEARNER, State(tensors, {}))
    return checkpoint.read_part(folder, LEARNER, {})


@pytest.mark.usefixtures("eight_bit")
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_a_checkpoint_bit_for_bit(kind: Any, dtype: torch.dtype, tmp_path: Path):
    config = OptimizerConfig(kind=kind, lr=1e-2)
    unbroken = Optimizer(config, weights(dtype))
    steps(unbroken, range(2))
    state = written(unbroken, tmp_path / "step")
    restored = Optimizer(config, {key: nn.Parameter(state.part("policy").tensors[key]) for key in SIZES})
    restored.load(state.part("master").tensors, state.part("optimizer").tensors)
    for optimizer in (unbroken, restored):
        steps(optimizer, range(2, 4))
    one, other = unbroken.tensors(), restored.tensors()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(weight, restored.weights[key]) for key, weight in unbroken.weights.items())
    assert any(t.dtype == torch.uint8 for t in one.values()) == (kind == "adamw8bit")


@pytest.mark.usefixtures("eight_bit")
def test_moments_in_8_bits_take_a_quarter(tmp_path: Path):
    def size(kind: Any) -> int:
        optimizer = Optimizer(OptimizerConfig(kind=kind), weights())
        steps(optimizer, range(1))
        tensors = {key: t for key, t in optimizer.tensors().items() if "matrix" in key and "qmap" not in key}
        return sum(tensor.nbytes for tensor in tensors.values())

    assert 0.25 <= size("adamw8bit") / size("adamw") < 0.28


@pytest.mark.usefixtures("eight_bit")
def test_a_learner_learns_and_resumes_with_8_bits():
    def run(break_at: int | None) -> dict[str, Tensor]:
        chosen = algorithm()
        sampler, learner = workers(chosen, kind="adamw8bit")
        for step in range(3):
            if step == break_at:
                state = learner.state_dict()
                sampler, learner = workers(chosen, kind="adamw8bit")
                learner.load_state_dict(state)
            trajectories = sample(sampler, step)
            learner.update(trajectories, chosen.advantages(scored(trajectories)), step)
        return learner.state_dict().tensors

    whole, broken = run(None), run(2)
    assert whole.keys() == broken.keys() and all(torch.equal(whole[key], broken[key]) for key in whole)


def test_a_package_that_is_missing_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"adamw8bit needs bitsandbytes: pip install 'rlalign\[eight-bit\]'"):
        Optimizer(OptimizerConfig(kind="adamw8bit"), weights())


# --- half precision


def test_small_steps_of_half_precision_weights_add_up():
    """Each is a thousandth of what bfloat16 can tell from 1; without masters nothing would ever move."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer(OptimizerConfig(lr=1e-5, weight_decay=0), {"weight": weight})
    for number in range(800):
        weight.grad = torch.ones_like(weight)
        optimizer.with_gradients()
        optimizer.step()
        if number == 0:
            assert (weight == 1).all() and (optimizer.masters["weight"] < 1).all()
    torch.testing.assert_close(weight, torch.full_like(weight, 1 - 8e-3))
    assert weight.dtype == torch.bfloat16 and weight.grad is None


def test_whole_weights_have_no_masters():
    optimizer = Optimizer(OptimizerConfig(), weights())
    assert not optimizer.masters and optimizer.with_gradients() == [*optimizer.weights.values()]


def test_masters_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="0 float32 masters, and 2 are needed"):
        Optimizer(OptimizerConfig(), weights(torch.bfloat16)).load({}, {})


def test_full_fine_tuning_in_half_precision_updates_the_masters(tmp_path: Path):
    """A real net: what the learner saves has them, and a fresh learner goes on with them."""

    def made() -> Learner:
        policy = sd_policy(sd_folder(tmp_path / "sd"), lora=False, dtype=torch.bfloat16)
        return Learner(policy, algorithm(), Noise(0), OptimizerConfig(lr=1e-6), None)

    learner, other = made(), made()
    for parameter in learner.policy.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    learner._apply_gradient()
    state = learner.state_dict()
    masters = state.part("master").tensors
    assert masters.keys() == learner.policy.parameters.keys()
    unmoved = [key for key, master in masters.items() if torch.equal(master, other.optimizer.masters[key])]
    swallowed = [key for key, p in learner.policy.parameters.items() if torch.equal(p, other.policy.parameters[key])]
    assert not unmoved and swallowed  # what bfloat16 cannot show yet is not lost
    other.load_state_dict(state)
    assert all(torch.equal(other.optimizer.masters[key], master) for key, master in masters.items())
