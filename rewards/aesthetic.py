"""LAION's aesthetic predictor (https://github.com/christophschuhmann/improved-aesthetic-predictor)."""

from collections.abc import Sequence

from torch import Tensor

from rlalign.scoring import differentiable
from rlalign.types import Prompt
from rlalign_rewards._clip import transformers_clip
from rlalign_rewards._networks import fill, over_frames, placed, rating_head, state_dict, weights_file

_FILE = "aesthetic-model.pth"  # what the repository calls sac+logos+ava1-l14-linearMSE.pth


@differentiable
class Aesthetic:
    """How much people would like the picture, whatever the prompt: LAION's aesthetic predictor, differentiable.

    Model: the unit image embedding of openai/clip-vit-large-patch14 (1.7 GB) through a small head, 768-1024-128-64-16-1
    without activations, trained on SAC, AVA and LAION-Logos. `head` is the path of the published
    sac+logos+ava1-l14-linearMSE.pth (4 MB), of a .safetensors file with the same names, or a folder or repository on
    the hub with an aesthetic-model.pth; `clip` is a folder or a name on the hub.
    Score: ratings from 1 to 10; pictures of text-to-image models get 4.5 to 6.5. Nothing holds it in that range: the
    head is linear. Of a video the mean over its frames.
    Licence: head Apache-2.0, CLIP MIT; the ratings were collected for research.
    Known hacks: oily smoothness, golden light, portraits and landscapes whatever the prompt says; never train on it
    alone. Being linear in CLIP's embedding it is easy prey for high-frequency patterns when differentiated.
    Options: head, clip, device (a GPU where there is one), dtype (float32, bfloat16, float16).
    """

    def __init__(
        self,
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        clip: str = "openai/clip-vit-large-patch14",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        path = weights_file(head, _FILE)
        self._head = placed(rating_head(768), device, "float32")
        fill(self._head, {name.removeprefix("layers."): value for name, value in state_dict(path).items()}, path)
        self._clip = transformers_clip(clip, clip, device, dtype)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[B]. images: float [B, (F,) 3, H, W] in [0, 1]"""
        return over_frames(lambda frames, _: self._head(self._clip.images(frames))[:, 0], images, prompts)
