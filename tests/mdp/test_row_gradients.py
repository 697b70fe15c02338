"""Gradients row by row: of any linear layers against autograd, of adapters in a real net, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlalign.mdp.noise import Noise
from rlalign.mdp.row_gradients import linear_layers, stored, watched
from rlalign.policy import Policy
from rlalign.types import Graph, Prompt, Unit
from rlalign.workers.sampler import Sampler
from tests.tiny import sd3_folder, sd3_policy


class Net(nn.Module):
    """Tokens [b, T, 3] and a vector [b, 2] -> one number a row; the first layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.vector = nn.Linear(3, 3), nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        inner = self.tokens(x.sin()) * self.vector(vector)[:, None]
        return self.tokens(inner).square().sum((1, 2))


def net() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    return Net().double(), torch.randn(5, 4, 3).double(), torch.randn(5, 2).double()


def test_each_row_has_the_gradient_that_autograd_gives_it_alone():
    module, x, vector = net()
    layers = linear_layers([module], module.parameters())
    rows = torch.tensor([3, 0, 4])
    with watched(layers) as passes:
        graph = Graph(module(x, vector)[rows], rows, torch.zeros(3, dtype=torch.int64))
    kept = stored(graph, passes, 5, doubled=False)
    for place, row in enumerate(rows):
        expected = torch.autograd.grad(module(x, vector)[row], list(module.parameters()))
        found = torch.autograd.grad(kept.log_probs, list(module.parameters()), torch.eye(3).double()[place])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_halves_of_guidance_belong_to_the_same_samples():
    module, x, vector = net()
    both, vectors = torch.cat([x, x.cos()]), torch.cat([vector, vector.cos()])

    def guided() -> Tensor:
        negative, positive = module(both, vectors).chunk(2)
        return negative + 4.5 * (positive - negative)

    with watched(linear_layers([module], module.parameters())) as passes:
        graph = Graph(guided(), torch.arange(5), torch.zeros(5, dtype=torch.int64))
    kept = stored(graph, passes, 5, doubled=True)
    slopes = torch.randn(5).double()
    expected = torch.autograd.grad(guided(), list(module.parameters()), slopes)
    found = torch.autograd.grad(kept.log_probs, list(module.parameters()), slopes)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("num_rows", [2, 10])
def test_inputs_that_belong_to_no_known_sample_are_refused(num_rows: int):
    module, x, vector = net()
    with watched(linear_layers([module], module.parameters())) as passes:
        graph = Graph(module(x, vector), torch.arange(5), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="is not known which belongs to which"):
        stored(graph, passes, num_rows, doubled=True)


def test_weights_of_other_layers_are_refused():
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(2, 2))
    assert linear_layers([module], module[1].parameters()) == [module[1]]
    with pytest.raises(ValueError, match="train adapters, or set retain: true"):
        linear_layers([module], module.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_folder(tmp_path_factory.mktemp("sd3") / "model")


def gradient(folder: Path, slopes: Tensor, **settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Of Σ slopes log π over kept steps, from the rollout and from its replay, where the adapters are not 0."""
    window = {"size": 2, "range": (0, 3)}
    policy = sd3_policy(folder, shake=0.05, num_steps=4, window=window, retain="gradients", **settings)
    unit = Unit(0, (0,), (Prompt("one red cat", negative="blurred"),), 4)
    trajectory, _ = Sampler(policy, Noise(0), "policy", keep_steps=True, shares=True).sample(unit)
    return _kept(policy, trajectory.graphs, slopes), _again(policy, trajectory.take(torch.arange(4)), slopes)


def _kept(policy: Policy, graphs: tuple[Graph, ...], slopes: Tensor) -> list[Tensor]:
    for graph in graphs:
        graph.log_probs.backward(slopes[graph.rows, graph.slots])
    return _taken(policy)


def _again(policy: Policy, sample: Any, slopes: Tensor) -> list[Tensor]:
    for slot in range(sample.num_kept):
        step = policy.replay(sample, slot)
        policy.log_prob(step.gaussian, sample.x_next[:, slot]).backward(slopes[:, slot])
    return _taken(policy)


def _taken(policy: Policy) -> list[Tensor]:
    found = [parameter.grad for parameter in policy.parameters.values()]
    for parameter in policy.parameters.values():
        parameter.grad = None
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize(
    "settings",
    [{"guidance_scale": 1.0}, {"guidance_scale": 4.5}, {"guidance_scale": 4.5, "uncond_grad": False}],
    ids=["plain", "guided", "detached"],
)
def test_adapters_of_a_transformer_get_the_gradient_of_the_replay(folder: Path, settings: dict[str, Any]):
    slopes = torch.tensor([[1.0, -2.0], [0.0, 0.5], [-1.0, 0.3], [0.2, 0.1]])
    kept, again = gradient(folder, slopes, **settings)
    assert len(kept) == len(again) > 10
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))
    whole, plain = (torch.cat([g.flatten().double() for g in part]) for part in (kept, again))
    assert torch.cosine_similarity(whole, plain, 0) > 0.9999


def test_a_whole_net_with_other_layers_is_refused_before_it_samples(folder: Path):
    with pytest.raises(ValueError, match="train adapters, or set retain: true"):
        sd3_policy(folder, lora=False, retain="gradients")
