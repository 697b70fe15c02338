"""PickScore (https://arxiv.org/abs/2305.01569)."""

from collections.abc import Sequence

from torch import Tensor

from rlalign.scoring import differentiable
from rlalign.types import Prompt
from rlalign_rewards._clip import transformers_clip
from rlalign_rewards._networks import over_frames


@differentiable
class PickScore:
    """Which picture would users pick for their prompt: a CLIP-H trained on Pick-a-Pic, differentiable.

    Model: yuvalkirstain/PickScore_v1 (3.9 GB), 224 px, with tokenizer and picture size of
    laion/CLIP-ViT-H-14-laion2B-s32B-b79K; both are folders or names on the hub. Prompts are cut at 77 tokens.
    Score: exp(logit_scale) cos, the public code's number before its softmax; text-to-image models get 19 to 26. Some
    papers divide by 100, flow_grpo by 26: set `scale` to 0.01 or 0.0384615 for theirs. Of a video the mean over its
    frames.
    Licence: MIT for the code; the weights and Pick-a-Pic's pictures come without one, read the model card.
    Known hacks: saturated, busy, glossy pictures; it follows taste more than the prompt.
    Options: model, processor, scale, device (a GPU where there is one), dtype (float32, bfloat16, float16).
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        scale: float = 1.0,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        self._clip = transformers_clip(model, processor, device, dtype)
        self._factor = scale * self._clip.logit_scale.float().exp().item()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[B]. images: float [B, (F,) 3, H, W] in [0, 1]"""
        return self._factor * over_frames(self._clip.cosines, images, prompts)
