"""Rewards with a graph, for algorithms that differentiate them."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from rlalign.scoring.protocol import Reward
from rlalign.types import Prompt


def reward_sum(rewards: Sequence[Reward]) -> Callable[[Tensor, Sequence[Prompt]], Tensor]:
    """Weighted sum [B] of the training rewards of pictures [B, (F,) 3, H, W] in [0, 1], with a graph.

    ValueError where one of them is not ``@differentiable``, or its answer turns out to have no graph.
    """
    trained = [reward for reward in rewards if reward.config.role == "train"]
    for reward in trained:
        if not reward.differentiable or reward.groupwise:
            raise ValueError(
                f"reward {reward.config.name!r} has no gradient, which this algorithm needs: mark it @differentiable "
                "if it is written in differentiable torch, give it role: monitor, or choose another algorithm"
            )

    def total(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        weighted = (reward.config.weight * scores_of(reward, images, prompts) for reward in trained)
        return sum(weighted, images.new_zeros(()))

    return total


def scores_of(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """[B] of one reward."""
    answer = reward.function(images, prompts)
    scores: object = answer["score"] if isinstance(answer, Mapping) else answer
    if not isinstance(scores, Tensor) or scores.shape != images.shape[:1]:
        raise ValueError(f"reward {reward.config.name!r} is @differentiable, so its scores have to be a tensor [B]")
    if images.requires_grad and not scores.requires_grad:
        raise ValueError(f"reward {reward.config.name!r} is marked @differentiable, but its scores have no gradient")
    return scores
