"""Human Preference Score v3 (https://arxiv.org/abs/2508.03789)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlalign.types import Prompt
from rlalign_rewards._networks import below, fill, placed, state_dict, weights_file
from rlalign_rewards._qwen_vl import QwenVl, fitted, renamed

_PIXELS = 256 * 28 * 28  # every picture is brought to about as many
_HERE = "{text_prompt}"
_TOKEN = "<|Reward|>"  # its last hidden state is what the head reads

# The wording that the model was trained on, blanks at line ends included, so it is not ours to improve.
_INSTRUCTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being "
    "the best. \n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal "
    "body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense "
    "of harmony and "
    "balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
    "logically fit the scenario described in the prompt. The environment should support and enhance the subject "
    "without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be "
    "acceptable, but critical "
    "attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the "
    "image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    "Textual prompt - {text_prompt}\n\n\n"
    "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
)


class Hpsv3:
    """Which picture would people prefer for the prompt: a Qwen2-VL 7B with a head, trained on HPDv3.

    Model: MizzenAI/HPSv3 on the hub, the file HPSv3.safetensors (16 GB), or `checkpoint`, a folder that holds it or the
    file itself; `base` gives architecture, tokenizer and processor: Qwen/Qwen2-VL-7B-Instruct or a folder, of which the
    weights are not read. Pictures are brought to about 448 x 448 pixels. Takes 16 GB of a GPU in bfloat16. Loading and
    prompt follow the public code; the whole has been tried on tiny weights of the same layout alone.
    Score: the mean of its Gaussian, unbounded; published averages of models lie between about 0 and 11. The detail
    "spread" is the head's second number as it comes. Of a video the mean over its frames.
    Licence: MIT (code and weights); Qwen2-VL-7B Apache-2.0.
    Known hacks: polished, detailed, softly lit pictures; text in the picture is read like the prompt.
    Options: checkpoint, base, device (a GPU where there is one), dtype (bfloat16, float32, float16).
    """

    def __init__(
        self,
        checkpoint: str = "MizzenAI/HPSv3",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        device: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        path = weights_file(checkpoint, "HPSv3.safetensors")
        state = {renamed(name): value for name, value in state_dict(path).items()}
        words, head = state.get("language_model.embed_tokens.weight"), below(state, "rm_head.")
        if words is None or not head:
            raise ValueError(f"{path} is no HPSv3: it has no embed_tokens or no rm_head")
        self._head = _head(words.shape[1])
        fill(self._head, head, path)
        placed(self._head, device, "float32")
        network = {name: value for name, value in state.items() if not name.startswith("rm_head.")}
        self._network = QwenVl(base, network, path, [_TOKEN], device, dtype)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """images: uint8 [B, (F,) 3, H, W]"""
        frames = images.flatten(0, -4)  # [B (* F), 3, H, W]
        texts = [prompt.text for prompt in prompts for _ in range(len(frames) // len(images))]
        rated = self._rate(frames, texts).unflatten(0, (len(images), -1)).mean(1).to(images.device)  # [B, 2]
        return {"score": rated[:, 0], "spread": rated[:, 1]}

    @torch.no_grad()
    def _rate(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        questions = [_INSTRUCTION.replace(_HERE, text) for text in texts]
        hidden = self._network.hidden("image", list(fitted(images, _PIXELS, _PIXELS)), questions)
        return self._head(hidden[:, 0])  # the last of its tokens: the prompt might name it too


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )
