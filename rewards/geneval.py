"""GenEval (https://arxiv.org/abs/2310.11513): does a detector find the asked objects, counts, colours and places?"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlalign.types import Prompt
from rlalign_rewards._clip import Clip, open_clip, transformers_clip
from rlalign_rewards._networks import from_hub, placed

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

# GenEval's prompts call these classes of COCO by a longer name.
_ALIASES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}

_SURE = 0.3  # a detection counts from this score on,
_SURE_IN_COUNTING = 0.9  # and in prompts that count from this one on
_MOST = 16  # objects of a class
_NEAR = 0.1  # of both sizes together: objects that are less far apart stand in no relation
_GREY = 0x99 / 255  # around an object whose colour is asked


@dataclass(frozen=True, slots=True)
class Found:
    """One detected object."""

    label: str
    score: float
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    mask: Tensor | None = None  # bool [H, W]

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def size(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return right - left, bottom - top


Groups = Mapping[str, Sequence[Found]]
"""The counted objects of every class, the surest first."""


class Geneval:
    """1 where a detector finds what was asked: objects, how many, which colours, who stands where; 0 elsewhere.

    Model: facebook/mask2former-swin-small-coco-instance (transformers' port of GenEval's detector) or any object
    detector or instance segmentation of transformers, and for colours open_clip's ViT-L-14 of OpenAI; with `clip_tag`
    null, `clip` is a CLIP of transformers. Folders or names on the hub. The prompt's metadata is GenEval's: `tag`,
    `include` with class, count, color, position, and `exclude`.
    Score: 0 or 1, its mean the accuracy; the details task/... split it by GenEval's six tasks, "share" is the share of
    clauses that hold. With reward: share that is the score, which is denser. The detector is not mmdetection's, so
    compare with published accuracies only after scoring a known model here.
    Licence: Mask2Former MIT (as its port), COCO's pictures their own; CLIP MIT.
    Known hacks: sticker-like objects, repeated and side by side on plain ground; the detector's own blind spots. Style
    and realism do not count at all, so use it beside a preference reward.
    Options: detector, clip, clip_tag, reward (strict or share), device (a GPU where there is one), dtype (float32,
    bfloat16, float16).
    """

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "ViT-L-14",
        clip_tag: str | None = "openai",
        reward: Literal["strict", "share"] = "strict",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        if reward not in ("strict", "share"):
            raise ValueError(f"reward {reward!r} is none of strict, share")
        self._detector = Detector(detector, device, dtype)
        named = open_clip(clip, clip_tag, device, dtype) if clip_tag else transformers_clip(clip, clip, device, dtype)
        self._color = Colors(named)
        self._reward = reward

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """images: uint8 [B, 3, H, W]"""
        if images.ndim != 4:
            raise ValueError(f"geneval looks at pictures [B, 3, H, W], and got a tensor of shape {list(images.shape)}")
        for prompt in prompts:
            self._detector.check(prompt)
        rows = zip(images, self._detector.find(images), prompts, strict=True)
        share = torch.tensor([self._share(*row) for row in rows])
        strict = (share == 1).float()
        tags = [prompt.metadata.get("tag") for prompt in prompts]
        nan = torch.full_like(share, torch.nan)
        return {"score": strict if self._reward == "strict" else share, "strict": strict, "share": share} | {
            f"task/{task}": strict.where(torch.tensor([tag == task for tag in tags]), nan) for task in TASKS
        }

    def _share(self, image: Tensor, found: Sequence[Found], prompt: Prompt) -> float:
        objects = grouped(found, prompt.metadata.get("tag") == "counting")
        clauses = checked(objects, prompt.metadata, lambda things, label: self._color(image, things, label))
        return sum(clauses) / len(clauses)


class Detector:
    """Boxes, and masks where the network makes them."""

    def __init__(self, name: str, device: str | None, dtype: str) -> None:
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModelForObjectDetection,
            AutoModelForUniversalSegmentation,
        )
        from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES as SEGMENTING

        kind = from_hub(name, AutoConfig.from_pretrained).model_type
        self._masks = kind in SEGMENTING and kind != "detr"
        loader: Any = AutoModelForUniversalSegmentation if self._masks else AutoModelForObjectDetection
        self._network: Any = placed(from_hub(name, loader.from_pretrained), device, dtype)
        self._processor: Any = from_hub(name, AutoImageProcessor.from_pretrained)
        self._labels: dict[int, str] = self._network.config.id2label

    def check(self, prompt: Prompt) -> None:
        """ValueError where the metadata does not say what to find, or the detector does not know it."""
        clauses = prompt.metadata.get("include")
        if not clauses:
            raise ValueError(f"geneval needs metadata with 'include' on every prompt; {prompt.text!r} has none")
        for clause in [*clauses, *prompt.metadata.get("exclude", [])]:
            if canonical(clause["class"]) not in self._labels.values():
                raise ValueError(f"the detector knows no {clause['class']!r}, which {prompt.text!r} asks for")
            if clause.get("color") not in (None, *COLORS):
                raise ValueError(f"{prompt.text!r} asks for the colour {clause['color']!r}; known: {', '.join(COLORS)}")

    @torch.no_grad()
    def find(self, images: Tensor) -> list[list[Found]]:
        """Of each picture what is at least likely, the surest first. images: uint8 [B, 3, H, W]"""
        inputs = self._processor(images=list(images), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self._network.device, self._network.dtype)
        outputs = self._network(pixel_values=pixels)
        sizes = [(images.shape[-2], images.shape[-1])] * len(images)
        read = self._segments if self._masks else self._boxes
        return [sorted(found, key=lambda thing: -thing.score) for found in read(outputs, sizes)]

    def _boxes(self, outputs: Any, sizes: list[tuple[int, int]]) -> list[list[Found]]:
        answers = self._processor.post_process_object_detection(outputs, threshold=_SURE, target_sizes=sizes)
        return [
            [
                Found(canonical(self._labels[label]), score, tuple(box))
                for label, score, box in zip(
                    *(answer[key].tolist() for key in ("labels", "scores", "boxes")), strict=True
                )
            ]
            for answer in answers
        ]

    def _segments(self, outputs: Any, sizes: list[tuple[int, int]]) -> list[list[Found]]:
        answers = self._processor.post_process_instance_segmentation(
            outputs, threshold=_SURE, target_sizes=sizes, return_binary_maps=True
        )
        return [
            [
                Found(canonical(self._labels[segment["label_id"]]), segment["score"], around(mask), mask.cpu())
                for segment, mask in zip(answer["segments_info"], answer["segmentation"].bool(), strict=True)
                if mask.any()
            ]
            if answer["segments_info"]
            else []
            for answer in answers
        ]


class Colors:
    """CLIP's guess which of ten colours an object has, as GenEval asks it: on grey ground, cut out."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._known: dict[str, Tensor] = {}  # by class, [color, D]

    def __call__(self, image: Tensor, things: Sequence[Found], label: str) -> list[str]:
        """image: uint8 [3, H, W]"""
        with torch.no_grad():
            seen = torch.cat([self._clip.images(cut_out(image, thing)[None]) for thing in things])
        return [COLORS[index] for index in (seen @ self._named(label).T).argmax(1).tolist()]

    def _named(self, label: str) -> Tensor:
        if label not in self._known:
            words = [f"a photo of a {{}} {label}", f"a photo of a {{}}-colored {label}", "a photo of a {} object"]
            texts = [word.format(color) for color in COLORS for word in words]
            mean = self._clip.texts(texts).unflatten(0, (len(COLORS), len(words))).mean(1)
            self._known[label] = torch.nn.functional.normalize(mean, dim=-1)
        return self._known[label]


def canonical(label: str) -> str:
    return _ALIASES.get(label, label)


def grouped(found: Sequence[Found], counting: bool) -> Groups:
    """By class, those that are sure enough."""
    least = _SURE_IN_COUNTING if counting else _SURE
    groups: dict[str, list[Found]] = {}
    for thing in found:
        if thing.score > least:
            groups.setdefault(thing.label, []).append(thing)
    return {label: things[:_MOST] for label, things in groups.items()}


def checked(
    objects: Groups, metadata: Mapping[str, Any], colors: Callable[[Sequence[Found], str], Sequence[str]]
) -> list[bool]:
    """Clause by clause: the surest objects of a class are those that are meant, their colours and places are judged."""
    holds: list[bool] = []
    matched: list[Sequence[Found]] = []  # by clause, empty where it does not hold
    for clause in metadata["include"]:
        things = objects.get(canonical(clause["class"]), [])[: clause["count"]]
        good = len(things) == clause["count"]
        if good and "color" in clause:
            good = all(color == clause["color"] for color in colors(things, clause["class"]))
        if good and "position" in clause:
            relation, target = clause["position"]
            others = matched[target]
            good = bool(others) and all(relation in relations(a, b) for a in things for b in others)
        holds.append(good)
        matched.append(things if good else [])
    for clause in metadata.get("exclude", []):
        holds.append(len(objects.get(canonical(clause["class"]), [])) < clause["count"])
    return holds


def relations(thing: Found, other: Found) -> set[str]:
    """Where `thing` is, seen from `other`; nowhere where they are too close for their sizes."""
    offset = [a - b for a, b in zip(thing.center, other.center, strict=True)]
    spans = [a + b for a, b in zip(thing.size, other.size, strict=True)]
    free = [math.copysign(max(abs(shift) - _NEAR * span, 0), shift) for shift, span in zip(offset, spans, strict=True)]
    if max(abs(shift) for shift in free) < 1e-3:
        return set()
    right, down = (shift / math.hypot(*offset) for shift in free)
    names = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in names.items() if holds}


def around(mask: Tensor) -> tuple[float, float, float, float]:
    """The box of a mask [H, W], its last pixel included."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1


def cut_out(image: Tensor, thing: Found) -> Tensor:
    """The object's box, grey outside of its mask. image: uint8 [3, H, W] -> float [3, h, w] in [0, 1]"""
    pixels = image / 255
    if thing.mask is not None:
        pixels = pixels.where(thing.mask.to(image.device), torch.tensor(_GREY))
    left, top, right, bottom = thing.box
    height, width = image.shape[-2:]
    left, top = min(max(int(left), 0), width - 1), min(max(int(top), 0), height - 1)
    right, bottom = min(max(math.ceil(right), left + 1), width), min(max(math.ceil(bottom), top + 1), height)
    return pixels[:, top:bottom, left:right]
