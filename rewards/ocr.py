"""Does the picture spell the asked text? Read by a real recogniser, scored as in Flow-GRPO (https://arxiv.org/abs/2505.05470).

    score = 1 - min(distance(read, asked), len(asked)) / len(asked)

with the edit distance, case and white space ignored. The asked text is `metadata["text"]` of the prompt, or else what
stands between its first two double quotes. The network is RapidOCR's PP-OCRv6, whose wheel carries its weights; nothing
is downloaded. There are two ways to read:

    detect: false  the whole picture is one line, which suits small pictures filled by their text and takes 4 ms of one
                   CPU thread at 32 x 32. Unlike in Flow-GRPO a reading that merely contains the asked text does not get
                   full marks: of short words a picture full of letters would contain many. It reads a lone thin 7 as 1;
                   words are safer.
    detect: true   lines are searched for first, which suits scenes of 512 x 512 with text somewhere in them, where it
                   takes 0.2 s of one thread. They are joined in reading order and compared as in Flow-GRPO's code: a
                   reading that contains the asked text gets full marks, since detectors take round things for an O.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rlalign.types import Prompt

try:
    import rapidocr
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError('the reward ocr needs RapidOCR: pip install "rlalign[ocr]"', name=missing.name) from None

_HEIGHT = 48  # pixels, what the recogniser was trained on
_BATCH = 8  # pictures; more are not faster, and the reading does not depend on it


def ocr(images: Tensor, prompts: Sequence[Prompt], detect: bool = False) -> dict[str, Tensor]:
    """Does the picture spell the asked text, to a real recogniser? images: uint8 [B, 3, H, W]

    Model: RapidOCR's PP-OCRv6, on the CPU; its weights come with the wheel (`pip install "rlalign[ocr]"`).
    Option `detect`: false takes the whole picture as one line, for small pictures filled by their text; true searches
    for lines first, for scenes.
    Score: 1 - min(edit distance, length) / length in [0, 1], case and white space ignored, and with `detect` 1 where
    the reading contains the asked text; the detail "exact" is 1 where nothing but the asked text is read. The asked
    text is metadata `text`, or what stands in double quotes in the prompt.
    Licence: Apache-2.0.
    Known hacks: as one line, the text alone on an empty picture scores best and the rest of the prompt is dropped;
    large plain letters everywhere, which cost nothing with `detect`.
    """
    asked = [_plain(asked_text(prompt)) for prompt in prompts]
    found = [_plain(text) for text in read(images, detect)]
    scores = [
        1.0 if detect and wanted in text else similarity(text, wanted)
        for text, wanted in zip(found, asked, strict=True)
    ]
    exact = [float(text == wanted) for text, wanted in zip(found, asked, strict=True)]
    return {"score": torch.tensor(scores), "exact": torch.tensor(exact)}  # each [B]


def asked_text(prompt: Prompt) -> str:
    """What the picture should spell."""
    quoted = re.search(r'"(.*?)"', prompt.text)
    text = prompt.metadata.get("text") or (quoted.group(1) if quoted else "")
    if not isinstance(text, str) or not _plain(text):
        raise ValueError(f"ocr needs metadata 'text' or text in double quotes; the prompt {prompt.text!r} has neither")
    return text


def read(images: Tensor, detect: bool = False) -> list[str]:
    """What each picture spells, '' for nothing; with `detect` its lines, joined. images: uint8 [B, 3, H, W]"""
    if images.ndim != 4:
        raise ValueError(f"ocr reads pictures [B, 3, H, W], not videos; it got a tensor of shape {list(images.shape)}")
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    if detect:
        return [" ".join(_recogniser()(picture[..., ::-1]).txts or ()) for picture in pictures]
    lines = [_line(picture) for picture in pictures]
    return list(_recogniser().recognize_txt(lines).txts)


def similarity(text: str, asked: str) -> float:
    """1 - min(distance, len(asked)) / len(asked)"""
    return 1 - min(edit_distance(text, asked), len(asked)) / len(asked)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the least number of letters to insert, delete or replace."""
    above = list(range(len(b) + 1))
    for row, x in enumerate(a, start=1):
        here = [row]
        for column, y in enumerate(b, start=1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (x != y)))
        above = here
    return above[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def _line(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 3] -> [48, width, 3], with the channels in the recogniser's order."""
    height, width, _ = picture.shape
    size = (max(1, round(_HEIGHT * width / height)), _HEIGHT)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))[..., ::-1]


@cache
def _recogniser() -> Any:
    """Once per process: it takes half a second and 100 MB. One thread, so that workers do not fight over the cores."""
    return rapidocr.RapidOCR(
        params={
            "Global.log_level": "error",
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Global.use_cls": False,  # of lines that stand upside down
            "Det.model_path": str(_weights("det")),  # loaded when it is used first
            "Rec.model_path": str(_weights("rec")),
            "Rec.rec_batch_num": _BATCH,
            "Rec.rec_img_shape": [3, _HEIGHT, _HEIGHT],  # pads to square at least, instead of to 320 pixels
        }
    )


def _weights(kind: str) -> Path:
    """Those of the wheel by their path: asked by name, RapidOCR would download what it does not find."""
    folder = Path(rapidocr.__file__).parent / "models"
    found = sorted(folder.glob(f"*_{kind}_*.onnx"))
    if len(found) != 1:
        raise ValueError(f"ocr expects one *_{kind}_*.onnx in {folder} and found {len(found)}; reinstall rapidocr")
    return found[0]
