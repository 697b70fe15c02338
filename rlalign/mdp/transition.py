"""One stochastic denoising step as a Gaussian: the kernels of the published methods, densities and divergences."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlalign.mdp.prediction import Prediction
from rlalign.types import Level

Reduction = Literal["sum", "mean"]
"""Over the latent elements of a row: sum is the true density or divergence, mean that divided by their number."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """x' ~ N(mean, std^2 I), with std the whole standard deviation of the step, sqrt(tau) included."""

    mean: Tensor  # [B, *L]
    std: Tensor  # [] or [B, 1, ...]

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor, reduction: Reduction) -> Tensor:
        """log N(x; mean, std) = -(x - mean)^2/(2 std^2) - log std - log(2 pi)/2, reduced to [B].

        x is data: no gradient flows into it. ValueError where std is 0, since there is no density.
        """
        self._require_noise("log-probability")
        square = (x.detach() - self.mean).square() / (2 * self.std.square())
        return _reduced(-square - self.std.log() - 0.5 * math.log(2 * math.pi), reduction)

    def kl(self, other: "Gaussian", reduction: Reduction) -> Tensor:
        """KL(self || other) = (mean - mean_o)^2/(2 std_o^2) + (r^2 - 1)/2 - log r, r = std/std_o, reduced to [B]."""
        self._require_noise("KL divergence")
        other._require_noise("KL divergence")
        ratio = self.std / other.std
        square = (self.mean - other.mean).square() / (2 * other.std.square())
        return _reduced(square + (ratio.square() - 1) / 2 - ratio.log(), reduction)

    def _require_noise(self, what: str) -> None:
        if not bool((self.std > 0).all()):
            raise ValueError(f"a step without noise (std 0) has no {what}: keep it out of the trained steps")


def unscaled_log_prob(gaussian: Gaussian, x: Tensor) -> Tensor:
    """-(x - mean)^2, mean over elements [B]: flow_grpo's and verl-omni's log-probability of cps. No density."""
    return _reduced(-(x.detach() - gaussian.mean).square(), "mean")


def _reduced(elements: Tensor, reduction: Reduction) -> Tensor:
    rows = elements.flatten(1)
    return rows.sum(1) if reduction == "sum" else rows.mean(1)


Kernel = Callable[[Tensor, Prediction, Level, Level, float | Tensor], Gaussian]
"""kernel(x, prediction, now, nxt, noise_level): a noise_level tensor must broadcast against x."""


def flow_sde(x: Tensor, prediction: Prediction, now: Level, nxt: Level, noise_level: float | Tensor) -> Gaussian:
    """Flow-GRPO, arXiv 2505.05470: s = a sqrt(sigma/(1 - sigma~)), with sigma~ = sigma but sigma_1 where sigma = 1.

    Flow path only, like every kernel with a drift in s.
    """
    s = noise_level * (now.sigma / (1 - _interior(now))).sqrt()
    return _euler_maruyama(x, prediction, now, nxt, s)


def dance_sde(x: Tensor, prediction: Prediction, now: Level, nxt: Level, noise_level: float | Tensor) -> Gaussian:
    """DanceGRPO, arXiv 2505.07818: s = eta, constant. Flow path only."""
    return _euler_maruyama(x, prediction, now, nxt, noise_level)


def memoryless(x: Tensor, prediction: Prediction, now: Level, nxt: Level, noise_level: float | Tensor) -> Gaussian:
    """Adjoint Matching, arXiv 2409.08861: s^2 = 2 sigma/(1 - sigma~); noise_level is not used. Flow path only."""
    return flow_sde(x, prediction, now, nxt, math.sqrt(2))


def flash_sde(x: Tensor, prediction: Prediction, now: Level, nxt: Level, noise_level: float | Tensor) -> Gaussian:
    """Flash-GRPO, arXiv 2605.15980: s = sigma_N + (sigma_1 - sigma_N) sigma with sigma_N = 0; noise_level is not used.

    Flow path only.
    """
    return _euler_maruyama(x, prediction, now, nxt, now.interior * now.sigma)


def cps(x: Tensor, prediction: Prediction, now: Level, nxt: Level, noise_level: float | Tensor) -> Gaussian:
    """Coefficient-preserving sampling, arXiv 2509.05952, any path: f = sin(a pi/2), sqrt(1 - f^2) = cos(a pi/2)."""
    angle = torch.as_tensor(noise_level, dtype=x.dtype, device=x.device) * (math.pi / 2)
    return _marginal_preserving(prediction, nxt, angle.sin(), angle.cos())


def ddim(x: Tensor, prediction: Prediction, now: Level, nxt: Level, noise_level: float | Tensor) -> Gaussian:
    """DDIM, arXiv 2010.02502, any path: f = eta sqrt(1 - rho^2), so 1 - f^2 = 1 - eta^2 + eta^2 rho^2."""
    rho = _rho(now, nxt)
    variance = noise_level * noise_level
    f = noise_level * (1 - rho.square()).clamp(min=0).sqrt()
    return _marginal_preserving(prediction, nxt, f, (1 - variance + variance * rho.square()).clamp(min=0).sqrt())


def ddpm(x: Tensor, prediction: Prediction, now: Level, nxt: Level, noise_level: float | Tensor) -> Gaussian:
    """DDPM's posterior of x' given x and x0, arXiv 2006.11239, any path: DDIM with eta = 1; noise_level is not used."""
    return ddim(x, prediction, now, nxt, 1.0)


def precise(x: Tensor, prediction: Prediction, now: Level, nxt: Level, noise_level: float | Tensor) -> Gaussian:
    """PRECISE, arXiv 2605.23522, any path: f = sqrt(1 - rho^(eta^2)), so sqrt(1 - f^2) = rho^(eta^2/2)."""
    # Not a power: torch's differs in the last bit with the place in the vector, and replay packs rows differently.
    exponent = torch.xlogy(noise_level * noise_level, _rho(now, nxt))
    return _marginal_preserving(prediction, nxt, (-exponent.expm1()).clamp(min=0).sqrt(), (exponent / 2).exp())


def ode(x: Tensor, prediction: Prediction, now: Level, nxt: Level, noise_level: float | Tensor) -> Gaussian:
    """No noise, f = 0: the deterministic Euler or DDIM step, any path; noise_level is not used."""
    return _marginal_preserving(prediction, nxt, torch.zeros_like(nxt.sigma), torch.ones_like(nxt.sigma))


KERNELS: dict[str, Kernel] = {
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "memoryless": memoryless,
    "flash_sde": flash_sde,
    "cps": cps,
    "ddim": ddim,
    "ddpm": ddpm,
    "precise": precise,
    "ode": ode,
}


def _euler_maruyama(x: Tensor, prediction: Prediction, now: Level, nxt: Level, s: float | Tensor) -> Gaussian:
    """mean = x - tau (v + s^2/(2 sigma) x1), std = s sqrt(tau): the SDE whose marginals are the flow's as tau -> 0."""
    tau = now.sigma - nxt.sigma
    drift = prediction.velocity + s * s / (2 * now.sigma) * prediction.eps
    return Gaussian(x - tau * drift, s * tau.sqrt())


def _marginal_preserving(prediction: Prediction, nxt: Level, f: Tensor, kept: Tensor) -> Gaussian:
    """mean = alpha' x0 + sigma' kept x1, std = sigma' f, with f^2 + kept^2 = 1: noise of variance sigma'^2 in all."""
    mean = nxt.alpha * prediction.x0 + nxt.sigma * kept * prediction.eps
    return Gaussian(mean, nxt.sigma * f)


def _interior(now: Level) -> Tensor:
    """sigma~: sigma, but sigma_1 of the schedule where sigma is 1 and 1/(1 - sigma) would be infinite."""
    return torch.where(now.sigma == 1, now.interior, now.sigma)


def _rho(now: Level, nxt: Level) -> Tensor:
    """rho = (alpha sigma')/(alpha' sigma), from 0 (x is forgotten) to 1 (nothing happens)."""
    return (now.alpha * nxt.sigma) / (nxt.alpha * now.sigma)
