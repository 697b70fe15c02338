import pytest
import torch
from torch import Tensor

from rlalign.scoring import RewardConfig
from rlalign.scoring.gradients import reward_sum
from rlalign.scoring.protocol import Reward


def reward(name: str, function: object, role: str = "train", weight: float = 1.0, mark: bool = True) -> Reward:
    return Reward(RewardConfig(use=f"file.py:{name}", role=role, weight=weight), function, differentiable=mark)


def mean(images: Tensor, prompts: object) -> Tensor:
    return images.flatten(1).mean(1)


def test_it_is_the_weighted_sum_with_a_graph() -> None:
    total = reward_sum(
        [
            reward("mean", mean, weight=2.0),
            reward("dict", lambda images, prompts: {"score": images[:, 0].flatten(1).sum(1)}, weight=0.5),
            reward("watched", lambda images, prompts: [0.0], role="monitor", mark=False),
        ]
    )
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = 2 * images.flatten(1).mean(1) + 0.5 * images[:, 0].flatten(1).sum(1)
    torch.testing.assert_close(total(images, []), expected)
    (gradient,) = torch.autograd.grad(total(images, []).sum(), images)
    assert gradient[0, 1, 0, 0].item() == pytest.approx(2 / 48)


def test_one_without_a_gradient_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'mean' has no gradient"):
        reward_sum([reward("mean", mean, mark=False)])


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda images, prompts: [0.0, 0.0], "have to be a tensor"),
        (lambda images, prompts: images.mean(), "have to be a tensor"),
        (lambda images, prompts: images.detach().flatten(1).mean(1), "have no gradient"),
    ],
)
def test_an_answer_without_a_graph_is_refused(function: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reward_sum([reward("mean", function)])(torch.rand(2, 3, 4, 4, requires_grad=True), [])
