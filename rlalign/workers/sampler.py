"""The sampler: prompts -> trajectories and pictures, under weights that it has verified."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlalign.mdp.noise import Noise
from rlalign.mdp.rollout import Chain, in_micro_batches
from rlalign.mdp.transition import Gaussian
from rlalign.models.base import Unusable
from rlalign.policy import FLOW_KERNELS, Policy, RolloutConfig, Variant, draw_steps, joined
from rlalign.types import Cond, Trajectory, Unit, joined_graphs
from rlalign.workers.broadcast import Broadcast
from rlalign.workers.canary import Canary
from rlalign.workers.candidates import Tree, candidates
from rlalign.workers.encoder import Encoder
from rlalign.workers.recordings import recorded
from rlalign.workers.shown import shown
from rlalign.workers.turn import Turn
from rlalign.workers.weights import Manifest

Buckets = Sequence[Tensor] | Callable[[], Sequence[Tensor]]


class Sampler:
    """Plain class: owns (or shares) a policy. One call rolls out whole groups in fixed micro-batches."""

    def __init__(
        self,
        policy: Policy,
        noise: Noise,
        sample_with: Variant,
        keep_steps: bool,
        shares: bool,
        keep_uncond: bool = False,
    ) -> None:
        if keep_steps:
            require_kernel(policy)
        self.policy = policy
        self.noise = noise
        self.sample_with: Variant = sample_with
        self.keep_steps, self.keep_uncond = keep_steps, keep_uncond
        self.shares = shares  # the learner's own network: publishing is a version number
        self.version = 0 if shares else None
        self.canary, self.broadcast = Canary(policy, noise), Broadcast()
        self.encoder, self.turn = Encoder(policy), Turn(policy)
        self.compared = False  # with the learner's canary, ever

    @torch.no_grad()
    def sample(
        self,
        unit: Unit,
        settings: RolloutConfig | None = None,
        weights: Variant | None = None,
        initial: Tensor | None = None,
    ) -> tuple[Trajectory, Tensor]:
        """The unit's trajectories and its pictures [B, (F,) 3, H, W] uint8.

        With ``rollout.source: data`` they are recorded ones (recordings.py).
        With ``settings`` of its own (evaluation, pictures) every step is deterministic and nothing is kept.
        ``initial`` [B, *L] replaces the addressed noise, to compare with other programs. Where a step has candidates
        (candidates.py) the pictures show what is expected of them, and a row of ``initial`` starts a chain.
        """
        version = self._require_version()
        self.turn.take()
        plan, keep = settings or self.policy.settings, self.keep_steps and settings is None
        if plan.source == "data" and settings is None:
            return recorded(self.policy, unit, addresses(unit), *self._conditions(unit, plan), version)
        with self.policy.using(weights or self.sample_with):
            latents = self.initial_noise(unit, plan, keep) if initial is None else initial
            trajectory = self._trajectory(unit, plan, keep, latents)
            return trajectory, self._pictures(trajectory.final)

    def show(self, unit: Unit, settings: RolloutConfig, weights: Variant) -> Tensor:
        """The unit's pictures for a grid, [B, 3, h, w] uint8."""
        return shown(self.sample(unit, settings, weights)[1])

    def receive(self, manifest: Manifest, buckets: Buckets) -> dict[str, int]:
        """Takes over published weights, after checking that all of them came through; answers what it now holds.

        ``buckets`` may be a function that fetches them, for when no broadcast has brought them already.
        """
        manifest.require_tensors()
        self.turn.take()  # for the canary
        if not self.shares:
            arrived = self.broadcast.take(manifest)
            if arrived is None:
                arrived = buckets() if callable(buckets) else buckets
            self._load(manifest, arrived)
        self.version = manifest.version
        return {"version": self.version, "checksum": manifest.checksum, "tensors": manifest.count}

    def rest(self) -> None:
        """Makes room on a GPU that it shares; the next call that computes comes back."""
        self.turn.leave()

    def _require_version(self) -> int:
        if self.version is None:
            raise RuntimeError("this sampler has verified no published weights yet, and samples under no others")
        return self.version

    def generation(self) -> int:
        """Of the broadcast group that it is in; this and the next two are called beside its other work."""
        return self.broadcast.generation

    def join(self, address: tuple[str, int], generation: int, size: int, timeout_s: float) -> int:
        return self.broadcast.join(address, generation, size, timeout_s, root=False)

    def exchange(self, generation: int, manifest: Manifest) -> int:
        """Receives the version that the learner sends."""
        return self.broadcast.receive(generation, manifest)

    def _load(self, manifest: Manifest, buckets: Sequence[Tensor]) -> None:
        """Weights that do not fit change nothing; between the first copy and the last check there is no version."""
        names, policy = manifest.names, self.policy
        manifest.require_fit({name: policy.weights(name if name in policy.copies else "policy") for name in names})
        self.version = None
        for name in names - {"policy", *policy.copies}:
            policy.keep(name)
        manifest.copy(buckets, {name: policy.weights(name) for name in names})
        if manifest.canary is not None and (manifest.canary_due or not self.compared):
            self.canary.check(manifest.canary, self.sample_with)
            self.compared = True

    def initial_noise(self, unit: Unit, settings: RolloutConfig, keep: bool = False) -> Tensor:
        """[B, *L] float32: the latents that the unit's rows start from; those of its chains when steps are kept."""
        address = addresses(unit)[:: settings.chain_rows if keep else 1]
        if settings.init_noise == "shared":
            address = address * torch.tensor([1, 1, 0])
        return self.noise.normal(f"{unit.purpose}/initial", address, 0, self.policy.latent_shape)

    def _trajectory(self, unit: Unit, plan: RolloutConfig, keep: bool, initial: Tensor) -> Trajectory:
        policy, address, version = self.policy, addresses(unit), self._require_version()
        heads = address[:: plan.chain_rows if keep else 1]  # [C, 3], of the chains
        chains_each = len(heads) // len(unit.groups)
        cond, uncond = self._conditions(unit, plan)
        schedule = policy.schedule(plan, unit.step if keep else None)
        drawn = [draw_steps(plan, keep, self.noise, unit.step, group) for group in unit.groups]
        stochastic, kept = (torch.stack(part) for part in zip(*drawn, strict=True))
        tree: Tree | None = None
        if keep and plan.candidates:
            kept_by_chain = kept.repeat_interleave(chains_each, 0)
            tree = Tree.drawn(address, kept_by_chain, plan.candidates, self.noise, unit.purpose)

        def chain(rows: Tensor) -> Chain:
            groups = rows // chains_each

            def noise(k: int) -> Tensor:
                whose = heads[rows] if tree is None else tree.followed(rows, k)
                return self.noise.normal(f"{unit.purpose}/step", whose, k, policy.latent_shape)

            return policy.roll_out(
                initial[rows].to(policy.device),
                {name: value[groups] for name, value in cond.items()},
                None if uncond is None else {name: value[groups] for name, value in uncond.items()},
                schedule,
                stochastic[groups],
                kept[groups],
                noise,
                plan,
                retain=keep and bool(plan.retain),
                gaussians=tree is not None,
            )

        parts = in_micro_batches(chain, len(heads), plan.micro_batch)
        chains = Trajectory(
            cond=cond,
            uncond=uncond,
            schedule=schedule,
            steps=kept,
            x=torch.cat([part.x[:n] for part, n in parts]),
            x_next=torch.cat([part.x_next[:n] for part, n in parts]),
            log_probs=torch.cat([part.log_probs[:n] for part, n in parts]),
            final=torch.cat([part.final[:n] for part, n in parts]),
            version=torch.full((len(heads),), version),
            address=heads,
            prompts=unit.prompts,
            graphs=joined_graphs([(part.graphs, n) for part, n in parts]),
        )
        if tree is None:
            return chains
        met = [(part.gaussians, n) for part, n in parts if part.gaussians is not None]
        gaussians = Gaussian(torch.cat([g.mean[:n] for g, n in met]), torch.cat([g.std[:n] for g, n in met]))
        return candidates(policy, self.noise, unit.purpose, chains, gaussians, tree, plan)

    def _pictures(self, final: Tensor) -> Tensor:
        def decode(rows: Tensor) -> Tensor:
            pixels = self.policy.decode(final[rows])
            return pixels.float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()

        with self.policy.offloaded.here("vae"):
            parts = list(in_micro_batches(decode, len(final), self.policy.settings.micro_batch))
        return torch.cat([part[:n] for part, n in parts])

    def _conditions(self, unit: Unit, plan: RolloutConfig) -> tuple[Cond, Cond | None]:
        cond, uncond = joined(self.encoder(unit.prompts))
        if uncond is None and (plan.guidance_scale != 1 or self.keep_uncond):
            raise Unusable(
                "this model has nothing to guide away from: set rollout.guidance_scale and evaluation.guidance_scale "
                "to 1, model.guidance is what the net is told, and choose an algorithm without guidance of its own"
            )
        return cond, None if plan.guidance_scale == 1 and not self.keep_uncond else uncond


def require_kernel(policy: Policy) -> None:
    """ValueError where the formula of stochastic steps does not hold on the model's path."""
    kernel = policy.settings.kernel
    if kernel in FLOW_KERNELS and not policy.schedule(policy.settings).is_flow:
        raise ValueError(f"rollout.kernel {kernel} is for flow-matching models, and this one is not: set it to ddim")


def addresses(unit: Unit) -> Tensor:
    """[B, 3] int64: (step, group, sample) of every row."""
    rows = [(unit.step, group, sample) for group in unit.groups for sample in range(unit.samples)]
    return torch.tensor(rows, dtype=torch.int64)
