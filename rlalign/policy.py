"""A policy: a family's net, its weights under several names, and the kernel; sampler and learner share it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rlalign.ema import blend_
from rlalign.mdp.noise import Noise
from rlalign.mdp.prediction import Prediction, from_network
from rlalign.mdp.rollout import Chain, rollout, step_noise
from rlalign.mdp.row_gradients import linear_layers, stored, watched
from rlalign.mdp.schedule import (
    compressed_tail_sigmas,
    exponential_hold,
    flow_schedule,
    linear_hold,
    moving_window,
    plain_sigmas,
)
from rlalign.mdp.solvers import SOLVERS
from rlalign.mdp.transition import KERNELS, Gaussian, unscaled_log_prob
from rlalign.models.base import EncodesImages, Family, Unusable
from rlalign.models.embeddings import Embeddings
from rlalign.models.lora import encoders_among, reference_weights
from rlalign.models.memory import Offloaded, networks
from rlalign.settings import Settings
from rlalign.sharding import cut, shard, swap
from rlalign.types import Cond, Encoded, Level, Prompt, Schedule, Size, Trajectory

Variant = Literal["policy", "old", "ema", "reference", "start", "teacher", "anchor"]
FLOW_KERNELS = ("flow_sde", "dance_sde", "memoryless", "flash_sde")
"""Euler-Maruyama kernels, on the path x = (1 - sigma) x0 + sigma eps only."""


class Window(Settings):
    """Which steps are stochastic and trained: ``size`` neighbours, their place drawn per group or moving with time."""

    size: int = Field(ge=1)
    """How many steps."""
    range: tuple[int, int] | Literal["all", "first_half"] = "all"
    """First step that may belong to the window, and the step that may not any more; all: the last step alone may not,
    first_half: the first num_steps/2 may, both as far as ``compress`` leaves a step after it."""
    schedule: Literal["random", "progressive", "decay", "exp_decay"] = "random"
    """random: drawn per group; the others move from the noise on, for all groups alike, and stay equally long
    (progressive) or ever shorter towards the sample (MixGRPO)."""
    hold: int = Field(default=25, ge=1)
    """Training steps that a moving window stays at its first place."""
    stride: int = Field(default=1, ge=1)
    """Denoising steps that a moving window goes on by."""
    at_end: Literal["stay", "restart"] = "stay"
    """What a moving window does at the end of the range."""
    compress: float | None = Field(default=None, gt=0, le=1)
    """Share of the steps after a moving window that trained chains keep, on the grid of ``rollout.shift``: 0.4 in
    MixGRPO-Flash; null: all."""

    @model_validator(mode="after")
    def _fits(self) -> "Window":
        if isinstance(self.range, tuple):
            self.places(0)
        return self

    def bounds(self, num_steps: int) -> tuple[int, int]:
        """``range`` in numbers, of a chain of so many steps."""
        if isinstance(self.range, tuple):
            return self.range
        return 0, min(num_steps - 1 if self.range == "all" else num_steps // 2, self.end(num_steps))

    def end(self, num_steps: int) -> int:
        """The first step that must not belong to a window: after it a step has to be left, compressed or not."""
        share = self.compress or 1.0
        return max((end for end in range(1, num_steps) if int((num_steps - end + 1) * share) >= 2), default=0)

    def places(self, num_steps: int) -> int:
        """At how many steps the window may start."""
        low, high = self.bounds(num_steps)
        if low < 0 or high - low < self.size:
            raise ValueError(f"a window of {self.size} steps does not fit into range {[low, high]}")
        return high - low - self.size + 1

    def moved(self, step: int, num_steps: int) -> int:
        """Where a window that is not drawn starts in training step ``step``."""
        places = self.places(num_steps)
        hold = {
            "progressive": lambda start: self.hold,
            "decay": linear_hold(self.hold, max(1, self.hold // 4), places),
            "exp_decay": exponential_hold(self.hold),
        }[self.schedule]
        start = moving_window(step, 1, places, self.stride, hold, self.at_end == "restart").start
        return self.bounds(num_steps)[0] + start


class RolloutConfig(Settings):
    """How samples are made."""

    source: Literal["samples", "data"] = "samples"
    """data: nothing is sampled; the images are those that prompts.train records, with their scores."""
    prompts_per_step: int = Field(default=24, ge=1)
    """P: groups of a step."""
    samples_per_prompt: int = Field(default=8, ge=2)
    """G: samples of a group. A group of one has no advantage and cannot learn."""
    num_steps: int = Field(default=10, ge=1)
    """N: denoising steps."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance; 1 means one pass of the net a step."""
    size: tuple[int, int] | tuple[int, int, int]
    """Height and width in pixels, and frames for video."""
    kernel: Literal["flow_sde", "dance_sde", "memoryless", "flash_sde", "cps", "ddim", "ddpm", "precise"] = "flow_sde"
    """Transition of the stochastic steps."""
    noise_level: float = Field(default=0.7, ge=0)
    """The kernel's knob: a of Flow-SDE and CPS, eta of Dance-SDE and DDIM."""
    window: Window | None = None
    """Stochastic steps; null: all but the last."""
    train_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the stochastic steps that is kept and trained, drawn per group (DanceGRPO: 0.6)."""
    last_step: Literal["ode", "sde_untrained"] = "ode"
    """sde_untrained adds noise to the last step too, as the first Flow-GRPO pipeline does; never trained."""
    solver: Literal["euler", "dpmpp_2m", "dpmpp_3m"] = "euler"
    """Solver of the deterministic steps."""
    shift: float | None = Field(default=None, gt=0)
    """Time shift of the plain grid; null takes the model's own schedule."""
    init_noise: Literal["independent", "shared"] = "independent"
    """shared: the samples of a group start from the same noise (DanceGRPO, MixGRPO)."""
    time_to_net: Literal["float", "int"] = "float"
    """int truncates the time that the net is told (DanceGRPO)."""
    latent_store: Literal["fp32", "model_round_first"] = "fp32"
    """model_round_first: the states of trained chains are rounded to the net's precision before they are scored."""
    logprob_reduction: Literal["mean", "sum"] = "mean"
    """mean over latent elements, as every public framework, or the true density."""
    cps_logprob: Literal["gaussian", "unscaled"] = "gaussian"
    """unscaled: -mean (x' - mean)^2 under the cps kernel, as flow_grpo and verl-omni."""
    uncond_grad: bool = True
    """False detaches the unconditional half of guidance, which then costs no backward pass (flow_grpo)."""
    candidates: int | None = Field(default=None, ge=2)
    """Draws from one state in every trained step, each a sample of its own, and the chain goes on from one of them
    (SPO); null: a sample is a chain."""
    micro_batch: int = Field(default=16, ge=1)
    """Rows of one pass of the net, the same in rollout and replay; part of the numbers."""
    retain: bool | Literal["gradients"] = False
    """Keep the graphs of trained steps for the update, which saves its forward pass and takes memory for all of them.
    gradients: keep each row's gradients in their place, which are as large as the adapters."""

    @model_validator(mode="after")
    def _fits(self) -> "RolloutConfig":
        if self.window and self.window.bounds(self.num_steps)[1] > self.num_steps - 1:
            raise ValueError(
                f"window.range {list(self.window.range)} leaves the {self.num_steps} steps: the last step is always "
                f"deterministic, so range may end at {self.num_steps - 1} at most"
            )
        if self.window:
            self.window.places(self.num_steps)
        if self.window and self.window.compress:
            self._tail_fits(self.window, self.window.compress)
        if self.cps_logprob == "unscaled" and self.kernel != "cps":
            raise ValueError("cps_logprob: unscaled belongs to kernel: cps")
        if self.samples_per_prompt % self.chain_rows:
            raise ValueError(
                f"samples_per_prompt is {self.samples_per_prompt}, but {self.candidates} candidates in each of "
                f"{self.num_kept} trained steps make {self.chain_rows} samples of a chain: set it to a multiple of "
                "that, or train other steps by window.size"
            )
        return self

    def _tail_fits(self, window: Window, share: float) -> None:
        if window.schedule == "random" or self.shift is None:
            raise ValueError(
                "window.compress is for chains that are alike in all groups, on the plain grid: set window.schedule to "
                "progressive, decay or exp_decay, and shift, 3 for instance"
            )
        if window.bounds(self.num_steps)[1] > (end := window.end(self.num_steps)):
            raise ValueError(
                f"window.compress {share:g} leaves no step after the last places of the window: raise it, or set "
                f"window.range to end at {end} at most"
            )

    def grid(self, step: int | None = None) -> Tensor:
        """[N+1] the plain grid of ``shift``; with ``step`` that of chains which are trained in that training step."""
        window, shift = self.window, self.shift or 1.0
        if step is None or window is None or window.compress is None:
            return plain_sigmas(self.num_steps, shift)
        last = window.moved(step, self.num_steps) + window.size - 1
        return compressed_tail_sigmas(self.num_steps, shift, last, window.compress)

    @property
    def num_kept(self) -> int:
        """K: how many steps of a chain are kept and trained."""
        return max(1, int(self.train_fraction * (self.window.size if self.window else self.num_steps - 1)))

    @property
    def chain_rows(self) -> int:
        """How many rows one chain makes."""
        return self.num_kept * self.candidates if self.candidates else 1


@dataclass(frozen=True, slots=True)
class Step:
    """One replayed step of b rows, under the weights in use."""

    gaussian: Gaussian
    prediction: Prediction
    now: Level
    nxt: Level
    held: Tensor | None = None  # [b]   what a penalty is multiplied by; None: 1


class Policy:
    """``policy`` is what the net holds; ``reference`` what the run began with; all others are copies that lag."""

    def __init__(
        self,
        family: Family,
        settings: RolloutConfig,
        parameters: dict[str, nn.Parameter],
        lora: bool,
        offloaded: Offloaded | None = None,
        embeddings: Embeddings | None = None,
    ) -> None:
        self.family = family
        self.offloaded, self.embeddings = offloaded or Offloaded(), embeddings
        self.settings = settings
        self.size = Size(*settings.size)
        self.latent_shape = family.latent_shape(self.size)
        self.parameters = parameters
        self.trains_encoder = bool(encoders_among(parameters))  # then embeddings are as old as the weights
        self.lora = lora
        self.copies: dict[str, dict[str, Tensor]] = {}
        self.anchor: Variant = "reference"  # what losses mean by the reference; another copy where it moves
        self.sharded = False  # every rank of a learner group holds a part of each parameter and of each copy
        if not lora:
            self.keep("reference")
        if settings.retain == "gradients":
            linear_layers(family.nets.values(), parameters.values())  # refuses those that hold other weights
        first = next(iter(parameters.values()))
        self.device, self.dtype = first.device, _main_dtype(next(iter(family.nets.values())))

    # --- weights under several names

    def keep(self, name: str) -> None:
        """Starts a copy of the present weights under ``name``."""
        self.copies[name] = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}

    def blend(self, name: str, decay: float) -> None:
        """copy <- decay * copy + (1 - decay) * policy."""
        blend_(self.copies[name], self.parameters, decay)

    @torch.no_grad()
    def copy(self, name: str, source: str) -> None:
        """The weights under ``name`` become those under ``source``."""
        for key, tensor in self.weights(source).items():
            self.copies[name][key].copy_(tensor)

    def move(self, device: torch.device | str) -> None:
        """All networks and copies, but for parts that wait on the CPU anyway; where they compute is not changed."""
        waiting = {id(module) for modules in self.offloaded.parts.values() for module in modules}
        for module in networks(self.family):
            if id(module) not in waiting:
                module.to(device)
        for copy in self.copies.values():
            copy.update({key: tensor.to(device) for key, tensor in copy.items()})

    @contextmanager
    def using(self, name: Variant) -> Iterator[None]:
        """The net computes with these weights inside the block; nothing inside may train."""
        if name == "policy":
            yield
        elif name == "reference" and self.lora:
            with reference_weights(self.family.nets):
                yield
        elif self.sharded:  # the parts themselves are what a pass of the net gathers: they cannot be pointed elsewhere
            swap(self.weights("policy"), self.copies[name])
            try:
                yield
            finally:
                swap(self.weights("policy"), self.copies[name])
        else:
            own = {key: parameter.data for key, parameter in self.parameters.items()}
            try:
                self._point_at(self.copies[name])
                yield
            finally:
                self._point_at(own)

    def _point_at(self, tensors: dict[str, Tensor]) -> None:
        for key, parameter in self.parameters.items():
            parameter.data = tensors[key]

    def weights(self, name: str) -> dict[str, Tensor]:
        """The tensors themselves, by parameter name; not copies."""
        return {key: p.data for key, p in self.parameters.items()} if name == "policy" else self.copies[name]

    @torch.no_grad()
    def load(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Overwrites the weights under ``name``. ValueError when names or shapes are not exactly those held."""
        if name != "policy" and name not in self.copies:
            self.keep(name)
        held = self.weights(name)
        if held.keys() != tensors.keys():
            missing, strange = sorted(held.keys() - tensors.keys()), sorted(tensors.keys() - held.keys())
            counts = f"{len(missing)} missing {missing[:3]}, {len(strange)} strange {strange[:3]}"
            raise ValueError(f"weights {name!r}: {counts}")
        for key, tensor in tensors.items():
            if held[key].shape != tensor.shape:
                raise ValueError(f"weights {name!r}: {key} is {list(tensor.shape)}, not {list(held[key].shape)}")
        for key, tensor in tensors.items():  # only now: all of them or none
            held[key].copy_(cut(tensor, held[key]) if self.sharded else tensor)

    def shard(self, mesh: Any) -> None:
        """Full fine-tuning on several ranks: from here on every one holds a part, by FSDP2 over the device mesh."""
        nets = {key.partition(".")[0]: None for key in self.parameters}
        for name in nets:
            shard(self.family.nets[name], mesh)
        found = {f"{name}.{key}": p for name in nets for key, p in self.family.nets[name].named_parameters()}
        self.parameters = {key: found[key] for key in self.parameters}
        for copy in self.copies.values():
            copy.update({key: cut(tensor, self.parameters[key].data) for key, tensor in copy.items()})
        self.sharded = True

    # --- what the family does besides, its parts fetched for it

    def encode(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """Each prompt on its own, so that its numbers never depend on others; metadata is for rewards."""
        pictures = any(prompt.image is not None or prompt.video is not None for prompt in prompts)
        with self.offloaded.here("text_encoders", *(["vae"] if pictures else [])):
            return [self.family.encode([replace(prompt, metadata={})]) for prompt in prompts]

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> latents [B, *L]."""
        assert isinstance(self.family, EncodesImages)  # the config was refused otherwise
        with self.offloaded.here("vae"):
            return self.family.encode_images(pixels, self.size)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, *L] -> pixels [B, (F,) 3, H, W] in [0, 1]."""
        with self.offloaded.here("vae"):
            return self.family.decode(latents, self.size)

    def conditions(self, sample: Trajectory) -> Encoded:
        """The embeddings of a micro-batch; where a text encoder trains, made again under the weights in use."""
        if not self.trains_encoder:
            return sample.cond, sample.uncond
        prompts = {id(prompt): prompt for prompt in sample.prompts}
        encoded = dict(zip(prompts, self.encode([*prompts.values()]), strict=True))
        cond, uncond = joined([encoded[id(prompt)] for prompt in sample.prompts])
        return cond, None if sample.uncond is None else uncond

    # --- one guided prediction, for everyone

    def predict(
        self, x: Tensor, time: Tensor, level: Level, cond: Cond, uncond: Cond | None, scale: float
    ) -> Prediction:
        """x [b, *L] at ``level``, time [b] -> the implied clean latent and noise, in x's dtype."""
        told = time.trunc() if self.settings.time_to_net == "int" else time
        output = self._guided(x.to(self.dtype), told, cond, uncond, scale).to(x.dtype)
        return from_network(self.family.prediction, output, x, level)

    def _guided(self, x: Tensor, time: Tensor, cond: Cond, uncond: Cond | None, scale: float) -> Tensor:
        net = self.family.predict
        if uncond is None or scale == 1:
            return net(x, time, cond, self.size)
        if self.settings.uncond_grad:  # one doubled pass
            both = {name: torch.cat([uncond[name], cond[name]]) for name in cond}
            negative, positive = net(torch.cat([x, x]), torch.cat([time, time]), both, self.size).chunk(2)
        else:  # a pass of its own in rollout too, so that its bits agree with the replay's
            with torch.no_grad():
                negative = net(x, time, uncond, self.size)
            positive = net(x, time, cond, self.size)
        return self.family.guide(positive, negative, scale)

    # --- rollout and replay: the same functions on the same numbers

    def schedule(self, settings: RolloutConfig, step: int | None = None) -> Schedule:
        """The chain's points, with ``step`` those of chains that are trained in that training step.

        Unusable where a shift is asked of a model that is on another path.
        """
        own = self.family.schedule(settings.num_steps, self.size)
        if settings.shift is None:
            return own
        if not own.is_flow:
            raise Unusable("rollout.shift is for flow-matching models, and this one is not: leave it out")
        return flow_schedule(settings.grid(step))

    @property
    def stored_in(self) -> torch.dtype | None:
        """The precision that states of trained chains are rounded to; None: their own."""
        return self.dtype if self.settings.latent_store == "model_round_first" else None

    def kernel(self, x: Tensor, prediction: Prediction, now: Level, nxt: Level) -> Gaussian:
        return KERNELS[self.settings.kernel](x, prediction, now, nxt, self.settings.noise_level)

    def log_prob(self, gaussian: Gaussian, x_next: Tensor) -> Tensor:
        """[b] of x_next [b, *L], in the reduction that the run uses."""
        if self.settings.cps_logprob == "unscaled":
            return unscaled_log_prob(gaussian, x_next)
        return gaussian.log_prob(x_next, self.settings.logprob_reduction)

    def roll_out(
        self,
        x: Tensor,
        cond: Cond,
        uncond: Cond | None,
        schedule: Schedule,
        stochastic: Tensor,
        kept: Tensor,
        noise: Callable[[int], Tensor],
        settings: RolloutConfig,
        retain: bool = False,
        gaussians: bool = False,
    ) -> Chain:
        """Denoises x [b, *L]; stochastic [b, N] bool, kept [b, K]; noise(k) -> [b, *L]. See ``mdp.rollout``."""

        def predict(state: Tensor, k: int) -> Prediction:
            time = schedule.time[k].to(self.device).expand(state.shape[0])
            level = schedule.level(k, state)
            return self.predict(state, time, level, cond, uncond, settings.guidance_scale)

        solver = SOLVERS[settings.solver]
        scored = (self.kernel, solver, noise, self.log_prob)
        by_rows = retain and settings.retain == "gradients"
        layers = linear_layers(self.family.nets.values(), self.parameters.values()) if by_rows else []
        precision = self.stored_in if kept.numel() else None
        with watched(layers) as passes:
            chain = rollout(predict, x, schedule, stochastic, kept, *scored, precision, retain, gaussians)
        doubled = uncond is not None and settings.guidance_scale != 1 and self.settings.uncond_grad
        graphs = (stored(graph, passes, len(x), doubled) for graph in chain.graphs) if by_rows else chain.graphs
        return replace(chain, graphs=tuple(graphs))

    def log_probs(self, sample: Trajectory, slot: int, step: Step | None = None) -> tuple[Tensor, Tensor]:
        """Of kept step ``slot`` under the weights in use, with a graph, and under those that sampled: [b] each.

        ``step`` is its replay, where it is at hand.
        """
        sampled = sample.log_probs[:, slot]
        if sampled.requires_grad:  # retained in the rollout, under these very weights
            return sampled, sampled.detach()
        step = step or self.replay(sample, slot)
        return self.log_prob(step.gaussian, sample.x_next[:, slot]), sampled

    def replay(self, sample: Trajectory, slot: int) -> Step:
        """Kept step ``slot`` again under the weights in use; sample is a micro-batch with P = B = b."""
        x, at = sample.x[:, slot].contiguous(), sample.steps[:, slot].cpu()
        now, nxt = sample.schedule.level(at, x), sample.schedule.level(at + 1, x)
        time = sample.schedule.time[at].to(x.device)
        prediction = self.predict(x, time, now, *self.conditions(sample), self.settings.guidance_scale)
        return Step(self.kernel(x, prediction, now, nxt), prediction, now, nxt, sample.held)

    def old_mean(self, sample: Trajectory, slot: int, step: Step, noise: Noise) -> Tensor:
        """[b, *L]: where the weights that sampled had the mean of this step, to rounding, without its being stored.

        x_next = mean_old + c z; c does not depend on weights, and z is drawn again from its address.
        """
        x_next = sample.x_next[:, slot]
        z = step_noise(noise, "rollout", sample.address, sample.steps[:, slot], x_next)
        return x_next - step.gaussian.std.detach() * z

    def predict_noised(self, sample: Trajectory, x: Tensor, t: Tensor, guidance: float | None = None) -> Prediction:
        """Forward-process methods: x [b, *L] on the flow path at t [b] in (0, 1), whatever the model's own path.

        ``guidance`` replaces the rollout's scale.
        """
        if sample.schedule.table is None and not sample.schedule.is_flow:
            raise Unusable(
                "this algorithm noises finished samples, for which the model's family has to say how noisy every "
                "training time is, in the table of its schedule"
            )
        level, time = sample.schedule.between(t, x)
        own = x if sample.schedule.table is None else x * (level.alpha + level.sigma)
        scale = self.settings.guidance_scale if guidance is None else guidance
        return self.predict(own, time, level, *self.conditions(sample), scale)


def joined(encoded: Sequence[Encoded]) -> Encoded:
    """Embeddings of single prompts as those of all, each tensor [P, ...]."""
    conds, unconds = [cond for cond, _ in encoded], [uncond for _, uncond in encoded if uncond is not None]
    if any(cond.keys() != conds[0].keys() for cond in conds):
        raise Unusable("some prompts have an image and some have none, which cannot be sampled together")
    cond = {name: torch.cat([one[name] for one in conds]) for name in conds[0]}
    uncond = {name: torch.cat([one[name] for one in unconds]) for name in unconds[0]} if unconds else None
    return cond, uncond


def _main_dtype(net: nn.Module) -> torch.dtype:
    """That of most weights: libraries keep some tables in float32, and adapters are float32."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in net.parameters():
        counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def draw_steps(settings: RolloutConfig, keep: bool, noise: Noise, step: int, group: int) -> tuple[Tensor, Tensor]:
    """Which steps of a group are stochastic [N] bool, and which of them are kept [K] int64, in order.

    Drawn per group, never per row: rows with other windows are no fair comparison. ``keep`` False: a deterministic
    rollout, nothing kept.
    """
    num_steps = settings.num_steps
    stochastic = torch.zeros(len(settings.grid(step if keep else None)) - 1, dtype=torch.bool)
    if not keep:
        return stochastic, torch.zeros(0, dtype=torch.int64)
    address = (step, group, 0)
    if settings.window:
        window = settings.window
        drawn = window.schedule == "random"
        low, places = window.bounds(num_steps)[0], window.places(num_steps)
        start = low + noise.integer("window", address, places) if drawn else window.moved(step, num_steps)
        stochastic[start : start + window.size] = True
    else:
        stochastic[:-1] = True
    kept = stochastic.nonzero().flatten()
    count = settings.num_kept
    if count < len(kept):
        kept = kept[noise.permutation("trained_steps", address, len(kept))[:count].sort().values]
    if settings.last_step == "sde_untrained":
        stochastic[-1] = True
    return stochastic, kept
