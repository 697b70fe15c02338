"""The canary: one prediction that learner and sampler both make, after the sampler has loaded what it was sent.

Checksums tell that the bytes arrived. This tells that they reached a network that is otherwise the same: base model,
text encoder, precision, adapter scale.
"""

import torch
from torch import Tensor

from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, Variant
from rlalign.prompts import stand_in
from rlalign.workers.encoder import Encoder

TEXT = "a canary in a cage, watercolour"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the relative RMS difference; 0 on equal machines.

Two kinds of machine differ by rounding. A random Stable Diffusion 3 transformer of 24 layers differs from its exact
self by 0.014 in bfloat16, by 0.002 in float16, and by 0.0004 in float32 with the products of TF32, which GPUs may use;
these are three to five times as much. Another text makes 0.15. Weights that are 2% off make 0.03, seen in all but
bfloat16.
"""


class Mismatch(Exception):
    """The sampler's network is not the learner's, though it was sent the same weights."""


class Canary:
    """A fixed latent, prompt and time, in the run's own micro-batch shape: the same kernels as in a rollout."""

    def __init__(self, policy: Policy, noise: Noise) -> None:
        self.policy, self.noise = policy, noise
        self.encoder = Encoder(policy)

    @torch.no_grad()
    def predict(self, variant: Variant) -> Tensor:
        """[*L] on the CPU: the velocity of the first row, half way through the chain. Draws from no generator."""
        policy, plan = self.policy, self.policy.settings
        rows = torch.arange(plan.micro_batch)
        address = torch.stack([torch.zeros_like(rows), torch.zeros_like(rows), rows], 1)
        x = self.noise.normal("canary", address, 0, policy.latent_shape).to(policy.device)  # [b, *L]
        schedule, middle = policy.schedule(plan), plan.num_steps // 2
        time = schedule.time[middle].to(policy.device).expand(len(rows))
        with policy.using(variant):  # without guidance, which would amplify rounding
            ((text, _),) = self.encoder([stand_in(TEXT, policy.size)])
            cond = {name: value[torch.zeros_like(rows)] for name, value in text.items()}
            return policy.predict(x, time, schedule.level(middle, x), cond, None, 1.0).velocity[0].cpu()

    def check(self, expected: Tensor, variant: Variant) -> None:
        """Mismatch unless this side predicts the same, within rounding."""
        found = self.predict(variant)
        scale = expected.double().square().mean().sqrt()
        difference = float((found.double() - expected.double()).square().mean().sqrt() / scale)
        tolerance = TOLERANCE[self.policy.dtype]
        if not difference <= tolerance:  # NaN as well
            raise Mismatch(
                f"under the same {variant} weights this sampler predicts something else than the learner: relative "
                f"difference {difference:.2g}, allowed {tolerance:.2g}. Likely causes: another base model or text "
                "encoder at model.path on this machine, other versions of torch, diffusers or peft, or a model.dtype "
                "that this device cannot compute in"
            )
