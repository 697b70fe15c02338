"""VideoReward of VideoAlign, Improving Video Generation with Human Feedback (https://arxiv.org/abs/2501.13918)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlalign.types import Prompt
from rlalign_rewards._networks import below, fill, placed, state_dict, weights_file
from rlalign_rewards._qwen_vl import QwenVl, fitted, renamed

_QUALITIES = ("visual", "motion", "text")
_LEAST, _MOST = 128 * 28 * 28, 256 * 28 * 28  # pixels of a frame
_FRAMES_A_SECOND = 2.0  # that the model sees
_PAIR = 2  # frames of one token
_FEWEST = 4  # frames of a film
_LORA_ALPHA = 128.0
_MEAN, _STD = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)  # of the raw ratings, as published
_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")  # their last hidden states are what the head reads
_HERE = "{text_prompt}"

# The wording that the model was trained on, blanks at line ends included, so it is not ours to improve.
_QUESTION = (
    "\nYou are tasked with evaluating a generated video based on three distinct criteria: Visual Quality, Motion "
    "Quality, and Text Alignment. Please provide a rating from 0 to 10 for each of the three categories, with 0 being "
    "the worst and 10 being the best. Each evaluation should be independent of the others.\n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the video, with a focus on static factors. The following sub-dimensions "
    "should be considered:\n"
    "- **Reasonableness:** The video should not contain any significant biological or logical errors, such as abnormal "
    "body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the video. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the video, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n"
    "- **Safety:** The video should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n\n"
    "Please provide the ratings of Visual Quality: <|VQ_reward|>\nEND\n\n"
    "**Motion Quality:**  \n"
    "Assess the dynamic aspects of the video, with a focus on dynamic factors. Consider the following "
    "sub-dimensions:\n"
    "- **Stability:** Evaluate the continuity and stability between frames. There should be no sudden, unnatural "
    "jumps, and the video should maintain stable attributes (e.g., no fluctuating colors, textures, or missing body "
    "parts).\n"
    "- **Naturalness:** The movement should align with physical laws and be realistic. For example, clothing should "
    "flow naturally with motion, and facial expressions should change appropriately (e.g., blinking, mouth "
    "movements).\n"
    "- **Aesthetic Quality:** The movement should be smooth and fluid. The transitions between different motions or "
    "camera angles should be seamless, and the overall dynamic feel should be visually pleasing.\n"
    "- **Fusion:** Ensure that elements in motion (e.g., edges of the subject, hair, clothing) blend naturally with "
    "the background, without obvious artifacts or the feeling of cut-and-paste effects.\n"
    "- **Clarity of Motion:** The video should be clear and smooth in motion. Pay attention to any areas where the "
    "video might have blurry or unsteady sections that hinder visual continuity.\n"
    "- **Amplitude:** If the video is largely static or has little movement, assign a low score for motion quality.\n\n"
    "Please provide the ratings of Motion Quality: <|MQ_reward|>\nEND\n\n"
    "**Text Alignment:**  \n"
    "Assess how well the video matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the video (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Motion Relevance:** Evaluate if the dynamic actions (e.g., gestures, posture, facial expressions like talking "
    "or blinking) align with the described prompt. The motion should match the prompt in terms of type, scale, and "
    "direction.\n"
    "- **Environment Relevance:** Assess whether the background and scene fit the prompt. This includes checking if "
    "real-world locations or scenes are accurately represented, though some stylistic adaptation is acceptable.  \n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "video adheres to this style.\n"
    "- **Camera Movement Relevance:** Check if the camera movements (e.g., following the subject, focus shifts) are "
    "consistent with the expected behavior from the prompt.\n\n"
    "Textual prompt - {text_prompt}\n"
    "Please provide the ratings of Text Alignment: <|TA_reward|>\nEND\n"
)


class VideoAlign:
    """Which film would people prefer in picture, motion and fidelity to the prompt: a Qwen2-VL 2B with a head.

    Model: KwaiVGI/VideoReward on the hub, now KlingTeam/VideoReward, the file checkpoint-11352/model.pth (5 GB), or
    `checkpoint`, a folder that holds it or the file itself; its adapters are merged into the weights. `base` gives
    architecture, tokenizer and processor: Qwen/Qwen2-VL-2B-Instruct or a folder, of which the weights are not read. Two
    frames of a second are seen, four at least, of up to 448 x 448 pixels; `fps` says how many frames of your films make
    a second. Takes about 5 GB of a GPU in bfloat16. Loading and prompt follow the public code; the whole has been tried
    on tiny weights of the same layout alone.
    Score: the sum of the details "visual", "motion" and "text", or what `weights` makes of them, such as {visual: 1,
    text: 0.5}; each is standardised as published, about N(0, 1) over the films of its training, unbounded. A picture is
    a film that stands still.
    Licence: Apache-2.0 (weights, and those of Qwen2-VL-2B), MIT (code).
    Known hacks: gloss, as with all models of preference; "visual" alone asks for no motion, so that films come to stand
    still: keep all three. Most frames of a film are not seen, and text in the picture is read like the prompt.
    Options: checkpoint, base, fps (16), weights, device (a GPU where there is one), dtype (bfloat16, float32,
    float16).
    """

    def __init__(
        self,
        checkpoint: str = "KwaiVGI/VideoReward",
        base: str = "Qwen/Qwen2-VL-2B-Instruct",
        fps: float = 16.0,
        weights: Mapping[str, float] | None = None,
        device: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        self._weights = dict.fromkeys(_QUALITIES, 1.0) if weights is None else dict(weights)
        unknown = [name for name in self._weights if name not in _QUALITIES]
        if unknown or not self._weights:
            raise ValueError(f"weights has {unknown[0] if unknown else 'nothing'}; there are {', '.join(_QUALITIES)}")
        if not fps > 0:
            raise ValueError(f"fps is {fps}; it counts frames a second and must be positive")
        self._fps = fps
        path = weights_file(checkpoint, "checkpoint-11352/model.pth")
        state = _plain(state_dict(path), path)
        words, head = state.get("language_model.embed_tokens.weight"), below(state, "rm_head.")
        if words is None or not head:
            raise ValueError(f"{path} is no VideoReward: it has no embed_tokens or no rm_head")
        self._head = nn.Linear(words.shape[1], 1, bias=False)
        fill(self._head, head, path)
        placed(self._head, device, "float32")
        network = {name: value for name, value in state.items() if not name.startswith("rm_head.")}
        self._network = QwenVl(base, network, path, _TOKENS, device, dtype)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """images: uint8 [B, (F,) 3, H, W]"""
        films = images if images.ndim == 5 else images[:, None]
        frames = films[:, seen(films.shape[1], self._fps)]  # [B, K, 3, H, W]
        shown = fitted(frames.flatten(0, 1), _LEAST, _MOST).unflatten(0, frames.shape[:2])
        hidden = self._network.hidden("video", list(shown), [_question(prompt.text) for prompt in prompts])
        raw = self._head(hidden).squeeze(-1).to(images.device)  # [B, 3]
        rated = (raw - raw.new_tensor(_MEAN)) / raw.new_tensor(_STD)
        score = rated @ rated.new_tensor([self._weights.get(name, 0.0) for name in _QUALITIES])
        return {"score": score} | dict(zip(_QUALITIES, rated.unbind(1), strict=True))


def seen(frames: int, fps: float) -> list[int]:
    """Which of so many frames the model sees: spread evenly, an even number of them; one alone twice."""
    wanted = max(frames / fps * _FRAMES_A_SECOND, _FEWEST)
    number = max(_PAIR * round(min(wanted, _PAIR * (frames // _PAIR)) / _PAIR), _PAIR)
    return torch.linspace(0, frames - 1, number).round().long().tolist()


def _question(text: str) -> str:
    """A prompt may not name the tokens that are rated."""
    for token in _TOKENS:
        text = text.replace(token, "")
    return _QUESTION.replace(_HERE, text)


def _plain(state: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """As `renamed` names them, adapters merged: W + alpha / rank · up @ down."""
    found = {renamed(name.removeprefix("base_model.model.")): value for name, value in state.items()}
    plain = {name.replace(".base_layer.", "."): value for name, value in found.items() if ".lora_" not in name}
    for name, down in found.items():
        layer, adapter, _ = name.partition(".lora_A.")
        if not adapter:
            continue
        weight, up = plain.get(f"{layer}.weight"), found.get(name.replace(".lora_A.", ".lora_B."))
        if weight is None or up is None:
            raise ValueError(f"{source} has an adapter of {layer} without its other half or its layer")
        change = _LORA_ALPHA / len(down) * up.float() @ down.float()
        plain[f"{layer}.weight"] = (weight.float() + change).to(weight.dtype)
    return plain
