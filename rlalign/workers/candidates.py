"""Several candidates for each trained step of a chain, which goes on from one of them: SPO, arXiv 2406.04314.

    row = (chain, trained step, candidate): x, x' ~ N(μ(x), c²) and the clean latent that the net sees in x'

Which candidate is gone on from is drawn beforehand, and noise has addresses: so a chain is rolled out like any other,
along candidates that have not been made yet. All of them are made afterwards, from the Gaussians that the chain met, in
full micro-batches. A row's noise is that of its own address, whatever else is rolled out with it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlalign.mdp.noise import Noise
from rlalign.mdp.rollout import Chain, in_micro_batches, rounded, step_noise
from rlalign.mdp.transition import Gaussian
from rlalign.policy import Policy, RolloutConfig
from rlalign.types import Cond, Trajectory


@dataclass(frozen=True, slots=True)
class Tree:
    """The rows of a unit by chain, kept step and candidate."""

    address: Tensor  # [C, K, k, 3] int64
    kept: Tensor  # [C, K] int64
    chosen: Tensor  # [C, K] int64   the candidate that the chain goes on from

    @staticmethod
    def drawn(address: Tensor, kept: Tensor, candidates: int, noise: Noise, purpose: str) -> "Tree":
        """Of rows [B, 3], with the kept steps of their chains [C, K]."""
        places = address.reshape(*kept.shape, candidates, 3)
        first: list[tuple[int, int, int]] = [tuple(place) for place in places[:, :, 0].reshape(-1, 3).tolist()]
        chosen = torch.tensor([noise.integer(f"{purpose}/chosen", place, candidates) for place in first])
        return Tree(places, kept, chosen.reshape(kept.shape))

    @property
    def heads(self) -> Tensor:
        """[C, 3]: where the chains have their noise, but for kept steps."""
        return self.address[:, 0, 0]

    def followed(self, rows: Tensor, step: int) -> Tensor:
        """[b, 3]: whose noise those chains draw in that step, in a kept one that of the chosen candidate."""
        chosen = self.address[rows[:, None], torch.arange(self.kept.shape[1]), self.chosen[rows]]  # [b, K, 3]
        here = self.kept[rows] == step  # [b, K]
        return torch.where(here.any(1, keepdim=True), (chosen * here[:, :, None]).sum(1), self.heads[rows])


@torch.no_grad()
def candidates(
    policy: Policy, noise: Noise, purpose: str, chains: Trajectory, gaussians: Gaussian, tree: Tree, plan: RolloutConfig
) -> Trajectory:
    """All rows. For this trajectory every state is a prompt of its own, P = C K: it has its own step."""
    count, num_kept = tree.address.shape[2], chains.num_kept
    state = torch.arange(chains.num_rows * num_kept)
    prompt = state // num_kept // (chains.num_rows // len(chains.steps))  # [C K]
    cond = _repeated(chains.cond, prompt)
    uncond = None if chains.uncond is None else _repeated(chains.uncond, prompt)
    steps, address = tree.kept.flatten(), tree.address.reshape(-1, 3)
    x, mean, std = (part.flatten(0, 1) for part in (chains.x, gaussians.mean, gaussians.std))

    def made(rows: Tensor) -> Chain:
        states = rows // count
        gaussian, at = Gaussian(mean[states], std[states]), steps[states]
        drawn = rounded(gaussian.sample(step_noise(noise, purpose, address[rows], at, gaussian.mean)), policy.stored_in)
        level, time = chains.schedule.level(at + 1, drawn), chains.schedule.time[at + 1].to(drawn.device)
        told = _repeated(cond, states), None if uncond is None else _repeated(uncond, states)
        clean = policy.predict(drawn, time, level, *told, plan.guidance_scale).x0
        return Chain(x[states], drawn, policy.log_prob(gaussian, drawn), clean)

    parts = in_micro_batches(made, len(address), plan.micro_batch)
    return replace(
        chains,
        cond=cond,
        uncond=uncond,
        steps=steps[:, None],
        x=torch.cat([part.x[:n] for part, n in parts])[:, None],
        x_next=torch.cat([part.x_next[:n] for part, n in parts])[:, None],
        log_probs=torch.cat([part.log_probs[:n] for part, n in parts])[:, None],
        final=torch.cat([part.final[:n] for part, n in parts]),
        version=chains.version.repeat_interleave(num_kept * count),
        address=address,
        prompts=tuple(chains.prompts[int(index)] for index in prompt),
    )


def _repeated(cond: Cond, index: Tensor) -> Cond:
    return {name: value[index] for name, value in cond.items()}
