"""What a reward is: any callable from pictures and prompts to one number a picture.

    def redness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images[:, 0].float().mean((1, 2)) / 255

`images` is a uint8 tensor [B, 3, H, W], of a video model [B, F, 3, H, W]: exactly the pixels that are saved.
`prompts` holds one `rlalign.types.Prompt` a picture: `.text`, `.metadata` as it stands in the prompt file,
and `.image` [3, H, W] or `.video` [F, 3, H, W], uint8, where the file says what the picture is made from.
It returns B numbers, higher is better: a list, an array, a tensor [B], or a dict with these under "score". Every other
key of the dict is a detail for the log, one number a picture, NaN where it does not apply. NaN or infinity as a score
says "I cannot tell"; what then happens is the reward's `on_failure` in the run file, and never a silent 0.

It can be
- a function; its `options` in the run file are passed as keyword arguments,
- a class with `__call__`; it is constructed once in every scorer with its `options` as keyword arguments, which is the
  place to load a network,
- a coroutine function, or a class whose `__call__` is one; every call gets an event loop of its own,
- an HTTP URL: `rlalign.scoring.remote` says what the server gets and answers.

In the run file it is named by `use`: a short name (`ocr`), `module:function` or `path/to/file.py:function`.

`@groupwise` marks a reward that compares: it gets all pictures of one prompt, and nothing else, in a call.
`@differentiable` marks one that is written in differentiable torch: it gets float pictures in [0, 1].
`@of_recordings` marks one that reads what was recorded of the training images: it is not asked in evaluation.

A call runs in a thread of its own, without gradients. Python cannot kill a thread: a call that hangs is given up at its
timeout and its thread is left behind by name, so a retry may run beside it. Only the end of its process gets rid of it:
the Ray runtime replaces scorers for that, and `venv` gives a reward a process of its own; a reward that calls out
should pass a timeout of its own to what it calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from rlalign.scoring.config import RewardConfig
from rlalign.types import Prompt

RewardFunction = Callable[[Tensor, Sequence[Prompt]], object]
"""What it returns is checked at every call (`answer.py`), so its type says nothing."""

_Marked = TypeVar("_Marked", bound=Callable[..., object])

GROUPWISE = "__rlalign_groupwise__"
DIFFERENTIABLE = "__rlalign_differentiable__"
OF_RECORDINGS = "__rlalign_of_recordings__"


class RewardError(ValueError):
    """A reward failed and its policy, or the circuit breaker, does not let the run go on; says which, where and why."""


@dataclass(frozen=True, slots=True)
class Reward:
    """A loaded reward: what the run file says of it, and the callable."""

    config: RewardConfig
    function: RewardFunction
    groupwise: bool = False
    differentiable: bool = False
    of_recordings: bool = False


def groupwise(reward: _Marked) -> _Marked:
    """Marks a function or class: every call gets the pictures of one prompt, all of them."""
    setattr(reward, GROUPWISE, True)
    return reward


def differentiable(reward: _Marked) -> _Marked:
    """Marks a function or class: it gets float pictures in [0, 1] and may be differentiated through."""
    setattr(reward, DIFFERENTIABLE, True)
    return reward


def of_recordings(reward: _Marked) -> _Marked:
    """Marks a function or class: it knows the images of `rollout.source: data`, and no others."""
    setattr(reward, OF_RECORDINGS, True)
    return reward
