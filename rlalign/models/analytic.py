"""Data whose velocity is known exactly: a mixture of Gaussians. For tests and notebooks.

On the flow path x = (1 - t) x0 + t eps, for N(m, S):  v(x, t) = A_t (x - (1 - t) m) - m,
V_t = (1 - t)^2 S + t^2 I,  A_t = (t I - (1 - t) S) V_t^-1.  For a mixture, v = sum_i r_i v_i with responsibilities
r_i ~ w_i N(x; (1 - t) m_i, V_t,i). What trains is an affine residual that starts at 0: no error of pre-training at all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from pydantic import Field
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.nn.functional import one_hot

from rlalign.mdp.schedule import plain_sigmas
from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.lora import freeze, merged
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size

FILE = "velocity.safetensors"
SPAN = 10.0  # latents from -5 to 5 are grey values from 0 to 1


class Config(Settings):
    """The data, M components in D dimensions, and how its latents look."""

    means: list[list[float]] = Field(default=[[0.0]], min_length=1)
    """M x D."""
    stds: list[list[float]] | None = None
    """M x D standard deviations of independent dimensions; null: 1."""
    covariances: list[list[list[float]]] | None = None
    """M x D x D, in place of stds."""
    weights: list[float] | None = None
    """M, positive; null: all alike."""
    prompt_weights: dict[str, list[float]] = Field(default={})
    """Other weights of the components for these prompts, by text: what a condition is here."""
    shape: tuple[int, ...] | None = None
    """Latent axes that hold the D numbers; null: (1, height, width)."""
    shift: float = Field(default=3.0, gt=0)
    """Time shift of the schedule's plain grid."""
    knots: list[float] = Field(default=[0.5], min_length=1)
    """Times in [0, 1]; each has an affine residual of its own, and a time uses that of the nearest knot."""


class Velocity(nn.Module):
    """Exact velocity plus the residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        means = torch.tensor(config.means, dtype=torch.float64)
        count, dim = means.shape
        spread = torch.tensor(config.covariances or config.stds or [[1.0] * dim] * count, dtype=torch.float64)
        covariances = spread if config.covariances else spread.square().diag_embed()
        counts = [len(weights) for weights in (config.weights, *config.prompt_weights.values()) if weights]
        if covariances.shape != (count, dim, dim) or {count, *counts} != {count}:
            raise ValueError(f"model.means are {count} x {dim}: stds, covariances and weights must match them")
        variances, axes = torch.linalg.eigh(covariances)
        if not variances.gt(0).all():
            raise ValueError("model.stds or model.covariances: every component needs a positive variance everywhere")
        self.means, self.variances, self.axes = nn.Buffer(means), nn.Buffer(variances), nn.Buffer(axes)
        self.knots = nn.Buffer(torch.tensor(config.knots, dtype=torch.float64))
        residual = nn.Linear(len(config.knots) * (dim + 1), dim, bias=False, dtype=torch.float64, device="meta")
        self.residual = residual.to_empty(device="cpu")  # made on meta, so that the global generator is not moved
        nn.init.zeros_(self.residual.weight)

    def forward(self, x: Tensor, t: Tensor, log_weights: Tensor) -> Tensor:
        """x [B, D], t [B], log_weights [B, M] -> [B, D]."""
        return self.exact(x, t, log_weights) + self.residual(self._features(x, t))

    def exact(self, x: Tensor, t: Tensor, log_weights: Tensor) -> Tensor:
        """The velocity of the data, all in the axes in which a component's covariance is diagonal."""
        t = t[:, None, None]
        centred = torch.einsum("mij,bmi->bmj", self.axes, x[:, None] - (1 - t) * self.means)  # [B, M, D]
        spread = (1 - t).square() * self.variances + t.square()  # [B, M, D]
        slope = (t - (1 - t) * self.variances) / spread  # [B, M, D]
        velocities = torch.einsum("mij,bmj->bmi", self.axes, slope * centred) - self.means  # [B, M, D]
        log_density = -(centred.square() / spread + spread.log()).sum(-1) / 2  # [B, M]
        return ((log_weights + log_density).softmax(-1)[..., None] * velocities).sum(1)

    def _features(self, x: Tensor, t: Tensor) -> Tensor:
        """[B, T * (D + 1)]: (x, 1) in the places of the nearest knot, 0 elsewhere."""
        nearest = one_hot((t[:, None] - self.knots).abs().argmin(1), len(self.knots)).to(x.dtype)  # [B, T]
        affine = torch.cat([x, torch.ones_like(x[:, :1])], 1)  # [B, D + 1]
        return (nearest[:, :, None] * affine[:, None]).flatten(1)


@final
class Family:
    """The model around a Velocity. Needs no file; ``path`` may be a folder that ``save_pipeline`` wrote."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = ("residual",)
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, config: Config, net: Velocity) -> None:
        self.config = config
        self.net = net
        self.nets: dict[str, nn.Module] = {"velocity": net}

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        net = Velocity(config).to(device, dtype)
        if path:
            net.load_state_dict(load_file(Path(path) / FILE))
        freeze(net)
        return Family(config, net)

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """log_weights [P, M]: a prompt's own ones, and without a condition those of the data."""
        common = self.config.weights or [1.0] * len(self.config.means)
        texts = [[prompt.text for prompt in prompts], [prompt.negative or "" for prompt in prompts]]
        rows = [[self.config.prompt_weights.get(text, common) for text in half] for half in texts]  # [2, P, M]
        cond, uncond = torch.tensor(rows, dtype=torch.float64).log().to(self.net.means)
        return {"log_weights": cond}, {"log_weights": uncond}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        dim, shape = self.net.means.shape[1], self.config.shape or (1, size.height, size.width)
        if size.frames * size.height * size.width != dim or torch.Size(shape).numel() != dim:
            raise ValueError(f"size {list(size)} and shape {list(shape)} must hold the data's {dim} dimensions exactly")
        return shape

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The plain grid in the net's precision, times too: rounding them would make the velocity inexact."""
        sigma = plain_sigmas(steps, self.config.shift).to(self.net.means.dtype)
        return Schedule(1 - sigma, sigma, 1000 * sigma)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """Velocity [B, *L]."""
        return self.net(x.flatten(1), time.to(x.dtype) / 1000, cond["log_weights"]).reshape(x.shape)

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """Grey pixels that show the numbers: 0.5 + x / 10, one pixel each."""
        grey = (0.5 + latents / SPAN).clamp(0, 1).reshape(-1, size.frames, 1, size.height, size.width)
        return grey.expand(-1, -1, 3, -1, -1).squeeze(1)  # a single frame is an image

    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """The latents that grey pixels [B, 3, H, W] show."""
        return numbers(pixels).to(self.net.means).reshape(-1, *self.latent_shape(size))

    def save_pipeline(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_model(merged(self.nets)["velocity"], str(folder / FILE))


def numbers(images: Tensor) -> Tensor:
    """The latents [B, D] that pictures [B, (F,) 3, H, W], uint8 or in [0, 1], show: ``decode`` undone, for rewards."""
    grey = images.select(-3, 0).flatten(1)
    return ((grey.double() / 255 if grey.dtype == torch.uint8 else grey) - 0.5) * SPAN
