"""How well picture and prompt agree to CLIP (https://arxiv.org/abs/2104.08718)."""

from collections.abc import Sequence

from torch import Tensor

from rlalign.scoring import differentiable
from rlalign.types import Prompt
from rlalign_rewards._clip import open_clip, transformers_clip
from rlalign_rewards._networks import over_frames


@differentiable
class ClipScore:
    """How well picture and prompt agree to CLIP: max(100 cos, 0), differentiable.

    Model: openai/clip-vit-large-patch14 by transformers, 224 px (1.7 GB); any other CLIP by `model`, a folder or a name
    on the hub. With `pretrained`, `model` is an architecture of open_clip and `pretrained` one of its tags or a file:
    {model: ViT-H-14, pretrained: laion2b_s32b_b79k}. Prompts are cut at 77 tokens.
    Score: 100 times the cosine, 0 where that is negative, as torchmetrics has it; natural pictures reach 20 to 35, and
    another CLIP has another range. The paper's own number is 2.5 max(cos, 0). Of a video the mean over its frames.
    Licence: MIT (code and weights of OpenAI; its model card asks for research use); others have their own.
    Known hacks: close to a bag of words, blind to counts, sides and which colour belongs to what; the prompt written
    into the picture, high-frequency patterns when differentiated.
    Options: model, pretrained, device (a GPU where there is one), dtype (float32, bfloat16, float16).
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        self._clip = (
            open_clip(model, pretrained, device, dtype)
            if pretrained is not None
            else transformers_clip(model, model, device, dtype)
        )

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[B]. images: float [B, (F,) 3, H, W] in [0, 1]"""
        return (100 * over_frames(self._clip.cosines, images, prompts)).clamp(min=0)
