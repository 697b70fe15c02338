"""What the pixels say without a network: how colourful and how sharp a picture is. Good monitors, poor goals.

Both are differentiable, so that algorithms that need a gradient can be tried without a download. As goals they are easy
to exaggerate: neon colours, and noise or halos.
"""

from collections.abc import Sequence

from torch import Tensor

from rlalign.scoring import differentiable
from rlalign.types import Prompt

_EPS = 1e-4  # keeps the gradient of black pixels finite


@differentiable
def saturation(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """HSV's saturation: the mean of (max - min) / max, differentiable. images: float [B, (F,) 3, H, W] in [0, 1]

    Score: in [0, 1], of a video the mean over its frames. A monitor: many rewards drive it up while they are hacked.
    Known hacks: neon colours; on dark pixels a slight tint counts as much as on bright ones.
    """
    high, low = images.amax(-3), images.amin(-3)
    return ((high - low) / (high + _EPS)).flatten(1).mean(1)


@differentiable
def sharpness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Mean square of the Laplacian of the grey values, differentiable. images: float [B, (F,) 3, H, W] in [0, 1]

    Score: times 100, from 0 for a blank picture to 1600 for a chequerboard. A monitor of grids and over-sharpening.
    Known hacks: noise, halos, a chequerboard.
    """
    grey = (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(-3)  # [B, (F,) H, W]
    inner = grey[..., 1:-1, 1:-1]
    around = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1] + grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    return 100 * (around - 4 * inner).square().flatten(1).mean(1)
