"""What a run file says of one reward."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlalign.settings import Settings
from rlalign.types import Role

OnFailure = Literal["fail", "drop_sample", "drop_group"]


class RewardConfig(Settings):
    """One entry of the run file's list `rewards`."""

    use: str
    """A short name of the catalogue, `module:function`, `path/to/file.py:function` (from the run file's folder) or a
    URL."""
    name: str = Field(default="", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """What curves and messages call it; the last part of `use` unless given."""
    weight: float = 1.0
    """Its factor in the weighted sum; negative for something to avoid."""
    role: Role = "train"
    """train: part of the total; monitor: a curve only; heldout: a curve that nothing may be tuned on."""
    timeout_s: float = Field(default=60.0, gt=0)
    """A call that takes longer is given up."""
    retries: int = Field(default=2, ge=0)
    """How often a failed call is tried again."""
    backoff_s: float = Field(default=0.5, ge=0)
    """The pause before the first retry; it doubles with every further one, up to a minute."""
    on_failure: OnFailure = "fail"
    """fail ends the run; drop_sample leaves the pictures without a number out of the update, drop_group their whole
    groups too."""
    min_group_size: int = Field(default=2, ge=1)
    """A group with fewer valid samples than this is dropped: an advantage needs others to compare with. Of a group
    that is smaller from the start, all samples must be valid. Applies to train rewards together."""
    breaker_after: int = Field(default=3, ge=1)
    """After this many failed calls in a row it is not called again for the rest of the batch, and once, without
    retries, for each later batch until a call succeeds."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function or of the class's constructor."""
    batch_size: int | None = Field(default=None, ge=1)
    """Pictures in a call; the last call is filled up with copies of its last picture, so that a network's numbers do
    not depend on how the work was split. Unless given, all pictures that the scorer holds go in one call."""
    venv: str | None = Field(default=None, min_length=1)
    """The folder of a Python environment: the reward runs there, in a child process of the scorer's; from the run
    file's folder, and on a cluster a path of the scorer's machine."""
    pip: tuple[str, ...] | None = None
    """Packages of such an environment, which is made where the scorer runs, in `venv` or else below ~/.rlalign; [] for
    one with rlalign alone."""

    @model_validator(mode="before")
    @classmethod
    def _name_after_use(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("use"), str) and not data.get("name"):
            return data | {"name": default_name(data["use"])}
        return data

    @field_validator("use")
    @classmethod
    def _can_be_found(cls, use: str) -> str:
        if not use.strip():
            raise ValueError("an empty name; write a short name, module:function, path/to/file.py:function or a URL")
        if use.endswith(".py"):
            raise ValueError(f"{use!r} names a file but no function in it; write {use}:function")
        return use

    @model_validator(mode="after")
    def _somewhere(self) -> "RewardConfig":
        if self.apart and is_url(self.use):
            raise ValueError("a URL runs on its server; leave venv and pip out, `rlalign serve-reward` has them too")
        return self

    @property
    def apart(self) -> bool:
        """It runs in an environment of its own."""
        return self.venv is not None or self.pip is not None


def is_url(use: str) -> bool:
    return use.startswith(("http://", "https://"))


def default_name(use: str) -> str:
    """`composition`, `my_rewards:sharpness` -> sharpness, `https://host/score/beauty` -> beauty."""
    label = use.rpartition(":")[2]
    if is_url(use):
        url = urlsplit(use)
        label = url.path.rstrip("/").rpartition("/")[2] or url.netloc.rpartition("@")[2]
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", label).lstrip(".-") or "reward"


def check_rewards(rewards: Sequence[RewardConfig]) -> None:
    """ValueError unless the list can train something, and every curve has a name and every environment one list."""
    repeated = [name for name, count in Counter(reward.name for reward in rewards).items() if count > 1]
    if repeated:
        raise ValueError(f"two rewards are called {repeated[0]!r}; give one of them another `name`")
    lists: dict[Path, tuple[str, ...]] = {}
    for reward in rewards:
        if reward.venv is None or reward.pip is None:
            continue
        if lists.setdefault(Path(reward.venv), reward.pip) != reward.pip:
            raise ValueError(
                f"two lists of packages would be installed into {reward.venv}; give each a venv of its own, or both "
                "one list"
            )
    if not any(reward.role == "train" for reward in rewards):
        raise ValueError("no reward has the role train, so there is nothing to optimise; give one the role train")
