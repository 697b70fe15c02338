"""The algorithm interface: rewards -> advantages, and trajectories -> losses. It never asks which model it trains.

An algorithm is one file in this folder. It defines a pydantic ``Config``, one final class named ``Algorithm`` built as
``Algorithm(config)``, ``OVERLAY`` (what choosing it means for the blocks rollout, optimizer and ema of a run file) and
optionally ``PRESETS`` (overlays under the names of papers; their ``algorithm`` block holds this file's own keys).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from pydantic import Field
from torch import Tensor

from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.settings import Settings
from rlalign.types import Scores, State, Trajectory

SampleWith = Literal["policy", "old", "ema"]
Copy = Literal["old", "start", "teacher"]


class UpdateSettings(Settings):
    """The keys of every algorithm that say how often a batch is learnt from."""

    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer steps of a pass over the batch, each on its own share of whole groups."""
    epochs_per_step: int = Field(default=1, ge=1)
    """Passes over the batch; from the second optimizer step on its samples are those of older weights."""

    @property
    def single(self) -> bool:
        """All samples are of the very weights that they update."""
        return self.updates_per_step == self.epochs_per_step == 1


def epochs_of(config: Settings) -> int:
    """Passes over a batch, of an algorithm that may not know the key."""
    return config.epochs_per_step if isinstance(config, UpdateSettings) else 1


@dataclass(frozen=True, slots=True)
class Needs:
    """What an algorithm needs of the rest; everything else is not computed, kept or shipped."""

    trajectory: bool  # stochastic steps kept with their log-probs; False: final latents alone
    copies: tuple[Copy, ...] = ()
    """Further sets of weights that the learner keeps, each the policy's own at first; ``after_step`` moves them.

    By convention ``old`` lags behind and may be what samples, ``start`` is what the step began with, ``teacher`` an
    anchor.
    """
    silent_zero: bool = False  # a row with advantage 0 feels no more than the penalty, and may be skipped without one
    reward_gradient: bool = False  # differentiates the rewards: the learner sets ``reward`` (see reward_gradients.py)
    log_probs_only: bool = False  # asks ``Policy.log_probs`` and for no more of a replay, so ``rollout.retain`` will do
    whole_groups: bool = False  # losses couple the rows of a group, so micro-batches consist of whole groups, unpadded
    candidates: bool = False  # compares draws from one state: ``rollout.candidates`` says how many
    uncond: bool = False  # the negative prompts of samples that were made without guidance, too
    fits: bool = False  # a regression of its own, on the learner: see ``Fitting``
    recorded: bool = False  # trains on given images, besides what it samples itself: ``rollout.source: data``
    fresh: bool = False  # right for samples of the very weights that are updated, and for no others
    exact_states: bool = False  # finds the old mean of a step again by its noise: no rounding ``rollout.latent_store``
    densities: bool = False  # its log-probs have to be those of the step: no ``rollout.cps_logprob: unscaled``


@dataclass(frozen=True, slots=True)
class Loss:
    """One term to back-propagate. The learner sums rows over its share and divides by the planned number of rows."""

    rows: Tensor  # [b]   with graph
    means: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # metrics [b], logged as means over rows
    maxima: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # metrics [b], logged as maxima over rows


class Algorithm(Protocol):
    needs: Needs
    sample_with: SampleWith

    @property
    def config(self) -> Settings:
        """Its settings; a learner may replace them by others with another kl_weight (regularise.py)."""
        ...

    def advantages(self, scores: Scores) -> Tensor:
        """[P, G] float32, 0 where a score is invalid; on the driver, may keep state (running baselines)."""
        ...

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        """Losses of one micro-batch: every row its own prompt (P = B = b), advantages [b]. One backward per Loss.

        Rows of a group have the first two numbers of ``sample.address`` in common. With ``needs.whole_groups`` all its
        rows are there, in order, but for those left out: invalid ones and, with ``silent_zero``, those of advantage 0
        that no penalty holds.
        """
        ...

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        """After all updates of a step (``updates`` made since the start): moves old or reference weights; metrics."""
        ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...


@runtime_checkable
class Fitting(Protocol):
    """An algorithm that learns a regression beside the policy, from every batch after its updates.

    It happens where the trajectories are, on the learner, whose checkpoints hold it: all ranks count their own rows,
    and all fit the same sums.
    """

    def counted(self, sample: Trajectory, advantages: Tensor) -> Tensor:
        """What rows [b] that are their own prompts add to the sums of a batch."""
        ...

    def fit(self, counted: Tensor) -> None:
        """Of all rows of the batch."""
        ...

    @property
    def fitted(self) -> Tensor:
        """What it has learnt so far."""
        ...

    def load_fitted(self, fitted: Tensor) -> None: ...


def lag(policy: Policy, copies: tuple[Copy, ...], decay: float) -> dict[str, float]:
    """``after_step`` of old weights: the first of the copies, if there is any, moves after the policy."""
    if not copies:
        return {}
    policy.blend(copies[0], decay)
    return {"old_decay": decay}


class Stateless:
    """Of an algorithm that remembers nothing between steps and moves no weights after one."""

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        return {}

    def state_dict(self) -> State:
        return State()

    def load_state_dict(self, state: State) -> None:
        pass
