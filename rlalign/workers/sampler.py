"""The sampler: prompts -> trajectories and pictures, under weights that it has verified."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from rlalign.mdp.noise import Noise
from rlalign.mdp.rollout import Chain
from rlalign.policy import Policy, RolloutConfig, Variant, draw_steps
from rlalign.types import Cond, Prompt, Trajectory, Unit
from rlalign.workers.weights import Weights

T = TypeVar("T")
MAX_ENCODED = 4096  # prompts whose embeddings are kept; text encoders are frozen


class Sampler:
    """Plain class: owns (or shares) a policy. One call rolls out whole groups in fixed micro-batches."""

    def __init__(self, policy: Policy, noise: Noise, sample_with: Variant, keep_steps: bool, shares: bool) -> None:
        self.policy = policy
        self.noise = noise
        self.sample_with: Variant = sample_with
        self.keep_steps = keep_steps
        self.shares = shares  # the learner's own network: publishing is a version number
        self.version = 0
        self.encoded: OrderedDict[tuple[str, str | None], tuple[Cond, Cond | None]] = OrderedDict()

    @torch.no_grad()
    def sample(
        self,
        unit: Unit,
        settings: RolloutConfig | None = None,
        weights: Variant | None = None,
        initial: Tensor | None = None,
    ) -> tuple[Trajectory, Tensor]:
        """The unit's trajectories and its pictures [B, (F,) 3, H, W] uint8.

        With ``settings`` of its own (evaluation, pictures) every step is deterministic and nothing is kept.
        ``initial`` [B, *L] replaces the addressed noise, to compare with other programs.
        """
        plan, keep = settings or self.policy.settings, self.keep_steps and settings is None
        with self.policy.using(weights or self.sample_with):
            latents = self.initial_noise(unit, plan) if initial is None else initial
            trajectory = self._trajectory(unit, plan, keep, latents)
            return trajectory, self._pictures(trajectory.final)

    def receive(self, weights: Weights) -> dict[str, int]:
        """Takes over published weights, after checking that all of them came through; answers what it now holds."""
        if not self.shares:
            weights.verify()
            for name, tensors in weights.variants.items():
                self.policy.load(name, tensors)
        self.version = weights.version
        return {"version": self.version, "checksum": weights.checksum, "tensors": weights.count}

    def initial_noise(self, unit: Unit, settings: RolloutConfig) -> Tensor:
        """[B, *L] float32: the latents that the unit's rows start from."""
        address = addresses(unit)
        if settings.init_noise == "shared":
            address = address * torch.tensor([1, 1, 0])
        return self.noise.normal(f"{unit.purpose}/initial", address, 0, self.policy.latent_shape)

    def _trajectory(self, unit: Unit, plan: RolloutConfig, keep: bool, initial: Tensor) -> Trajectory:
        policy, address = self.policy, addresses(unit)
        cond, uncond = self._encode(unit.prompts)
        if plan.guidance_scale == 1:
            uncond = None
        schedule = policy.schedule(plan)
        drawn = [draw_steps(plan, keep, self.noise, unit.step, group) for group in unit.groups]
        stochastic, kept = (torch.stack(part) for part in zip(*drawn, strict=True))

        def chain(rows: Tensor) -> Chain:
            groups = rows // unit.samples

            def noise(k: int) -> Tensor:
                return self.noise.normal(f"{unit.purpose}/step", address[rows], k, policy.latent_shape)

            return policy.roll_out(
                initial[rows].to(policy.device),
                {name: value[groups] for name, value in cond.items()},
                None if uncond is None else {name: value[groups] for name, value in uncond.items()},
                schedule,
                stochastic[groups],
                kept[groups],
                noise,
                plan,
            )

        parts = in_micro_batches(chain, len(address), plan.micro_batch)
        return Trajectory(
            cond=cond,
            uncond=uncond,
            schedule=schedule,
            steps=kept,
            x=torch.cat([part.x[:n] for part, n in parts]),
            x_next=torch.cat([part.x_next[:n] for part, n in parts]),
            log_probs=torch.cat([part.log_probs[:n] for part, n in parts]),
            final=torch.cat([part.final[:n] for part, n in parts]),
            version=torch.full((len(address),), self.version),
            address=address,
        )

    def _pictures(self, final: Tensor) -> Tensor:
        def decode(rows: Tensor) -> Tensor:
            pixels = self.policy.family.decode(final[rows], self.policy.size)
            return pixels.float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()

        parts = in_micro_batches(decode, len(final), self.policy.settings.micro_batch)
        return torch.cat([part[:n] for part, n in parts])

    def _encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """Embeddings [P, ...]; each prompt is encoded once, on its own, so that its numbers never depend on others."""
        encoded = [self._encode_one(prompt) for prompt in prompts]
        cond = {name: torch.cat([c[name] for c, _ in encoded]) for name in encoded[0][0]}
        negatives = [u for _, u in encoded if u is not None]
        uncond = {name: torch.cat([u[name] for u in negatives]) for name in negatives[0]} if negatives else None
        return cond, uncond

    def _encode_one(self, prompt: Prompt) -> tuple[Cond, Cond | None]:
        key = (prompt.text, prompt.negative)
        if key not in self.encoded:
            self.encoded[key] = self.policy.family.encode([replace(prompt, metadata={})])
            if len(self.encoded) > MAX_ENCODED:
                self.encoded.popitem(last=False)
        self.encoded.move_to_end(key)
        return self.encoded[key]


def addresses(unit: Unit) -> Tensor:
    """[B, 3] int64: (step, group, sample) of every row."""
    rows = [(unit.step, group, sample) for group in unit.groups for sample in range(unit.samples)]
    return torch.tensor(rows, dtype=torch.int64)


def in_micro_batches(compute: Callable[[Tensor], T], num_rows: int, micro_batch: int) -> list[tuple[T, int]]:
    """compute(rows [micro_batch]) for all rows, the tail padded with its last row; with each, how many rows are real.

    A fixed shape is part of the numbers: the same rows in a batch of another size give other bits.
    """
    results: list[tuple[T, int]] = []
    for start in range(0, num_rows, micro_batch):
        rows = torch.arange(start, start + micro_batch).clamp(max=num_rows - 1)
        results.append((compute(rows), min(micro_batch, num_rows - start)))
    return results
