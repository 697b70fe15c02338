"""The reward layer: what a reward is (`protocol`), how it is named (`config`), found, called, and what if it fails."""

from rlalign.scoring.config import RewardConfig, check_rewards
from rlalign.scoring.engine import Scoring, require_valid_group
from rlalign.scoring.loading import find_reward, load_reward, load_rewards, reward_names
from rlalign.scoring.protocol import Reward, RewardError, differentiable, groupwise, of_recordings

__all__ = [
    "Reward",
    "RewardConfig",
    "RewardError",
    "Scoring",
    "check_rewards",
    "differentiable",
    "find_reward",
    "groupwise",
    "load_reward",
    "load_rewards",
    "of_recordings",
    "require_valid_group",
    "reward_names",
]
