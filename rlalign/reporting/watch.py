"""Alarms: conditions on a run's numbers that mean trouble, each with likely causes and what to look at next."""

from collections import deque
from collections.abc import Mapping
from statistics import median

from pydantic import Field

from rlalign.settings import Settings

Alarms = dict[str, str]


class WatchConfig(Settings):
    """When to warn. Starting points, to be tuned."""

    ratio_share: float = Field(default=0.1, gt=0)
    """off_policy: largest |ratio - 1| at a first update, as a share of the clip range."""
    clip_fraction: float = Field(default=0.5, gt=0, le=1)
    """clip_saturation: share of clipped ratios, of those that can be: at a step's first update fresh ones are 1 ..."""
    clip_steps: int = Field(default=5, ge=1)
    """... for so many steps."""
    zero_std_groups: float = Field(default=0.5, gt=0, le=1)
    """dead_signal: share of groups without any spread of reward."""
    eps_factor: float = Field(default=10.0, gt=0)
    """swallowed_gradient: gradient RMS below so many times the optimizer's eps."""
    grad_norm_factor: float = Field(default=10.0, gt=1)
    """divergence: gradient norm against the median of the last steps."""
    diversity: float = Field(default=0.8, ge=0)
    """collapse: held-out diversity against the base model's."""
    hacking_evaluations: int = Field(default=3, ge=2)
    """reward_hacking: so many evaluations in a row in which training rewards rose and held-out ones fell."""


class Watch:
    """Remembers a few steps; says what is wrong now."""

    def __init__(
        self, config: WatchConfig, clip_range: float | None, eps: float, heldout: tuple[str, ...], updates: int = 1
    ) -> None:
        """``updates``: optimizer steps a batch."""
        self.config, self.clip_range, self.eps, self.heldout = config, clip_range, eps, heldout
        self.updates = updates
        self.norms: deque[float] = deque(maxlen=20)
        self.saturated = 0
        self.trend: deque[tuple[float, float]] = deque(maxlen=config.hacking_evaluations + 1)

    def step(self, row: Mapping[str, float]) -> Alarms:
        checks = (self._off_policy, self._clip_saturation, self._dead_signal, self._swallowed, self._divergence)
        return {name: words for check in checks for name, words in check(row).items()}

    def evaluation(self, metrics: Mapping[str, float]) -> Alarms:
        return {**self._collapse(metrics), **self._hacking(metrics)}

    def _off_policy(self, row: Mapping[str, float]) -> Alarms:
        deviation, bound = row.get("ratio/max_abs_dev", 0.0), self.config.ratio_share * (self.clip_range or 0)
        if self.clip_range is None or deviation <= bound or row.get("staleness", 0) > 0:
            return {}
        return {
            "off_policy": f"|ratio - 1| reaches {deviation:.2e} at the first update of fresh samples, more than "
            f"{bound:.1e}: sampler and learner disagree. Check that both use one micro_batch, dtype, attention kernel "
            "and number of threads, unmerged LoRA, and deterministic layers"
        }

    def _clip_saturation(self, row: Mapping[str, float]) -> Alarms:
        fresh = self.updates > 1 and row.get("staleness", 0) == 0
        share = row.get("clip_fraction", 0.0) * (self.updates / (self.updates - 1) if fresh else 1)
        self.saturated = self.saturated + 1 if share > self.config.clip_fraction else 0
        if self.saturated != self.config.clip_steps:
            return {}
        return {
            "clip_saturation": f"{share:.0%} of the ratios were clipped for {self.saturated} steps: most samples "
            "teach nothing. Lower optimizer.lr or updates_per_step, or raise algorithm.clip_range: a range that suits "
            "one kernel, latent size or log-prob does not suit another (docs/kernels.md)"
        }

    def _dead_signal(self, row: Mapping[str, float]) -> Alarms:
        share = row["reward/zero_std_groups"]
        if share <= self.config.zero_std_groups:
            return {}
        return {
            "dead_signal": f"in {share:.0%} of the groups all samples scored the same, so they teach nothing. Use "
            "prompts of mixed difficulty, more samples_per_prompt, or a finer reward"
        }

    def _swallowed(self, row: Mapping[str, float]) -> Alarms:
        rms = row.get("grad_rms", 0.0)
        if not 0 < rms < self.config.eps_factor * self.eps:
            return {}
        return {
            "swallowed_gradient": f"the gradient's RMS {rms:.1e} is not well above optimizer.eps {self.eps:.0e}, so "
            "Adam divides by eps and hardly moves. Lower optimizer.eps (1e-15)"
        }

    def _divergence(self, row: Mapping[str, float]) -> Alarms:
        norm, usual = row.get("grad_norm", 0.0), median(self.norms) if len(self.norms) >= 5 else None
        self.norms.append(norm)
        if usual is None or norm <= self.config.grad_norm_factor * usual:
            return {}
        return {
            "divergence": f"the gradient norm {norm:.2e} is {norm / max(usual, 1e-30):.0f} times its median of the "
            "last steps. If it stays there, lower optimizer.lr and go back to an earlier checkpoint"
        }

    def _collapse(self, metrics: Mapping[str, float]) -> Alarms:
        if metrics["diversity"] >= self.config.diversity:
            return {}
        return {
            "collapse": f"held-out pictures of one prompt are {metrics['diversity']:.2f} times as far apart as the "
            "base model's. Stop earlier, lower optimizer.lr, or weigh in a penalty (algorithm.kl_weight)"
        }

    def _hacking(self, metrics: Mapping[str, float]) -> Alarms:
        if not self.heldout or "reward/mean" not in metrics:  # recorded scores have no mean on new pictures
            return {}
        heldout = sum(metrics[f"reward/{name}/mean"] for name in self.heldout) / len(self.heldout)
        self.trend.append((metrics["reward/mean"], heldout))
        pairs = list(zip(self.trend, list(self.trend)[1:], strict=False))
        if len(pairs) < self.config.hacking_evaluations or not all(b[0] > a[0] and b[1] < a[1] for a, b in pairs):
            return {}
        return {
            "reward_hacking": f"for {len(pairs)} evaluations the training reward rose while held-out rewards fell to "
            f"{heldout:.3f}. Look at the pictures, stop at an earlier checkpoint, mix rewards or raise the penalty"
        }
