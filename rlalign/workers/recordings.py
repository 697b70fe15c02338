"""Recorded images in place of samples: what a learner and scorers get is the same, but for denoising steps."""

import torch
from torch import Tensor

from rlalign.mdp.rollout import in_micro_batches
from rlalign.policy import Policy
from rlalign.prompts import read_image
from rlalign.types import Cond, Trajectory, Unit


@torch.no_grad()
def recorded(
    policy: Policy, unit: Unit, address: Tensor, cond: Cond, uncond: Cond | None, version: int
) -> tuple[Trajectory, Tensor]:
    """As ``Sampler.sample``: the images that the unit's prompts record, as latents and as pictures.

    They are nobody's samples; ``version`` is that of the weights in use, so that nothing counts as stale.
    """
    settings = policy.settings
    paths = [path for prompt in unit.prompts for path in prompt.metadata["images"]]
    assert len(paths) == len(address)
    pictures = torch.stack([read_image(path, policy.size) for path in paths])  # [B, 3, H, W]

    def encode(rows: Tensor) -> Tensor:
        return policy.encode_images((pictures[rows].float() / 255).to(policy.device)).float()

    parts = in_micro_batches(encode, len(pictures), settings.micro_batch)
    final = torch.cat([latents[:n] for latents, n in parts])
    nothing = final.new_zeros(len(final), 0, *policy.latent_shape)
    trajectory = Trajectory(
        cond=cond,
        uncond=uncond,
        schedule=policy.schedule(settings),
        steps=torch.zeros(len(unit.groups), 0, dtype=torch.int64),
        x=nothing,
        x_next=nothing,
        log_probs=final.new_zeros(len(final), 0, dtype=torch.float32),
        final=final,
        version=torch.full((len(final),), version),
        address=address,
        prompts=unit.prompts,
    )
    return trajectory, pictures
