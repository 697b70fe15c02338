"""Human Preference Score v2 and v2.1 (https://arxiv.org/abs/2306.09341)."""

from collections.abc import Sequence

from torch import Tensor

from rlalign.scoring import differentiable
from rlalign.types import Prompt
from rlalign_rewards._clip import open_clip_checkpoint
from rlalign_rewards._networks import over_frames, weights_file

_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


@differentiable
class Hpsv2:
    """Which picture would people prefer for the prompt: HPSv2.1 or HPSv2, a CLIP-H trained on HPDv2, differentiable.

    Model: open_clip's ViT-H-14 with the weights of `version` from xswu/HPSv2 on the hub, or of `checkpoint`, a file or
    a folder that holds HPS_v2.1_compressed.pt (2 GB, loaded without pickled objects). 224 px; pictures that are not
    square are fitted in, with black around them. Prompts are cut at 77 tokens.
    Score: the cosine; text-to-image models get 0.20 to 0.43, and v2.1 lies on another scale than v2.0. Of a video the
    mean over its frames.
    Licence: Apache-2.0 (code and weights); HPDv2's pictures have their own.
    Known hacks: over-saturation, hard contrast, an airbrushed look, fine texture everywhere; anime and concept art
    score above photographs.
    Options: version (v2.1 or v2.0), checkpoint, model (an architecture of open_clip), device (a GPU where there is
    one), dtype (float32, bfloat16, float16).
    """

    def __init__(
        self,
        version: str = "v2.1",
        checkpoint: str = "xswu/HPSv2",
        model: str = "ViT-H-14",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        if version not in _FILES:
            raise ValueError(f"HPSv2 has no version {version!r}; there are {' and '.join(_FILES)}")
        path = weights_file(checkpoint, _FILES[version])
        self._clip = open_clip_checkpoint(model, path, device, dtype)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[B]. images: float [B, (F,) 3, H, W] in [0, 1]"""
        return over_frames(self._clip.cosines, images, prompts)
