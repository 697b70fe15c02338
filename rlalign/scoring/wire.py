"""What a reward server is asked, in bytes: schema 1 as JSON with PNGs, as multipart or as safetensors. Never pickle.

All three say {"schema": 1, "prompts": [{"text", "negative", "metadata"}, ...], "images": [...]}, one prompt an image;
without "schema" it is 1. What a sample is made from stands in its prompt, as "image" or "video".

    application/json             an image is a PNG in base64, a video a list of its frames' PNGs
    multipart/form-data          the part "request" is that JSON without images, every part "images" a PNG file
    application/vnd.safetensors  the tensor "images" is uint8 [B, 3, H, W] or [B, F, 3, H, W], and "image.ROW" or
                                 "video.ROW" what a row is made from; the rest is JSON in the metadata's "request"

Readers are given bytes of strangers: whatever they cannot use is a `Malformed` of one sentence.
"""

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any, Literal, TypeVar

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from rlalign.types import Prompt

SCHEMA = 1
JSON, MULTIPART, SAFETENSORS = "application/json", "multipart/form-data", "application/vnd.safetensors"

Shown = str | list[str]
"""A PNG in base64, or those of a video's frames."""


class Malformed(ValueError):
    """A request that cannot be used; 400 where it cannot even be read, 422 where it says something impossible."""

    def __init__(self, sentence: str, status: Literal[400, 413, 422] = 422) -> None:
        super().__init__(sentence)
        self.status = status


class AskedPrompt(BaseModel):
    """A prompt and what its sample is made from."""

    model_config = ConfigDict(extra="forbid")

    text: str
    negative: str | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    image: str | None = None
    video: list[str] | None = None


class AskedPrompts(BaseModel):
    """A request whose pictures come beside it."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = Field(default=1, alias="schema")
    prompts: list[AskedPrompt] = Field(min_length=1)


class Asked(AskedPrompts):
    """A whole request as JSON."""

    images: list[Shown] = Field(min_length=1)


_Body = TypeVar("_Body", bound=AskedPrompts)


@dataclass(slots=True)
class Budget:
    """What pictures may still be unpacked: a small file can hold a huge one."""

    pictures: int = 1024
    pixels: int = 64_000_000

    def spend(self, pixels: int) -> None:
        self.pictures -= 1
        self.pixels -= pixels
        if self.pictures < 0 or self.pixels < 0:
            what = "pictures" if self.pictures < 0 else "pixels"
            raise Malformed(f"the request holds more {what} than this server unpacks at once; send fewer", 413)


# --- writing


def as_json(images: Tensor, prompts: Sequence[Prompt]) -> bytes:
    """images: uint8 [B, 3, H, W] or [B, F, 3, H, W]. TypeError where metadata is not JSON."""
    asked = [
        _plain(p) | {name: png(shown) for name, shown in (("image", p.image), ("video", p.video)) if shown is not None}
        for p in prompts
    ]
    return json.dumps({"schema": SCHEMA, "images": [png(image) for image in images], "prompts": asked}).encode()


def as_safetensors(images: Tensor, prompts: Sequence[Prompt]) -> bytes:
    """The same without packing the pixels, which costs time on both sides."""
    tensors = {"images": images.contiguous().numpy()}
    for row, prompt in enumerate(prompts):
        for name, shown in (("image", prompt.image), ("video", prompt.video)):
            if shown is not None:
                tensors[f"{name}.{row}"] = shown.contiguous().numpy()
    request = json.dumps({"schema": SCHEMA, "prompts": [_plain(prompt) for prompt in prompts]})
    # As arrays, since of tensors it refuses some that share memory, as the samples of one prompt do with what they are
    # made from; contiguous ones, since it does not ask for strides.
    return safetensors.numpy.save(tensors, {"request": request})


def _plain(prompt: Prompt) -> dict[str, Any]:
    return {"text": prompt.text, "negative": prompt.negative, "metadata": dict(prompt.metadata)}


def png(image: Tensor) -> Shown:
    """[3, H, W] in base64, a video [F, 3, H, W] frame by frame."""
    if image.ndim == 4:
        return [str(png(frame)) for frame in image]
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


# --- reading


def read(kind: str, body: bytes, budget: Budget) -> tuple[Tensor, list[Prompt]]:
    """images uint8 [B, (F,) 3, H, W] and their B prompts, out of a body with the Content-Type ``kind``."""
    readers = {JSON: _from_json, SAFETENSORS: _from_safetensors}
    if kind.startswith(MULTIPART):
        images, prompts = _from_multipart(kind, body, budget)
    else:
        images, prompts = readers[kind](body, budget)
    if len(images) != len(prompts):
        raise Malformed(f"there are {len(images)} images but {len(prompts)} prompts; every image needs its own")
    return images, prompts


def _from_json(body: bytes, budget: Budget) -> tuple[Tensor, list[Prompt]]:
    asked = _validated(Asked, body)
    images = [_unpacked(shown, f"images.{row}", budget) for row, shown in enumerate(asked.images)]
    prompts = [
        _prompt(
            one,
            {name: _unpacked(shown, f"prompts.{row}.{name}", budget) for name, shown in _made_from(one) if shown},
        )
        for row, one in enumerate(asked.prompts)
    ]
    return _stacked(images), prompts


def _from_multipart(kind: str, body: bytes, budget: Budget) -> tuple[Tensor, list[Prompt]]:
    message = BytesParser(EmailMessage, policy=HTTP).parsebytes(
        f"Content-Type: {kind}\r\n\r\n".encode("latin-1") + body
    )
    parts = [(part.get_param("name", header="content-disposition"), part) for part in message.iter_parts()]
    requests, pictures = ([part for name, part in parts if name == wanted] for wanted in ("request", "images"))
    if len(requests) != 1 or not pictures:
        raise Malformed('a multipart request has one part "request" with JSON and a part "images" for every PNG', 400)
    asked = _validated(AskedPrompts, _payload(requests[0]))
    images = [_pixels(_payload(part), f"part {row} of images", budget) for row, part in enumerate(pictures)]
    return _stacked(images), [_prompt(one, _none_inline(one)) for one in asked.prompts]


def _payload(part: Any) -> bytes:
    return part.get_payload(decode=True) or b""


def _from_safetensors(body: bytes, budget: Budget) -> tuple[Tensor, list[Prompt]]:
    try:
        tensors = safetensors.torch.load(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        request = header.get("__metadata__", {})["request"]
    except (SafetensorError, ValueError, RecursionError):
        raise Malformed("the body is not a safetensors file", 400) from None
    except KeyError:
        raise Malformed('the safetensors file has no "request" in its metadata, the JSON with the prompts') from None
    asked = _validated(AskedPrompts, request.encode())
    images = _checked(tensors.pop("images", None), "images", (4, 5), budget)
    shown: list[dict[str, Tensor]] = [{} for _ in asked.prompts]
    for name, tensor in tensors.items():
        kind, _, row = name.partition(".")
        if kind not in ("image", "video") or not row.isdecimal() or int(row) >= len(shown):
            raise Malformed(f"the tensor {name!r} belongs to nothing; there are images, and image.ROW or video.ROW")
        shown[int(row)][kind] = _checked(tensor[None], name, (4,) if kind == "image" else (5,), budget)[0]
    return images, [_prompt(one, _none_inline(one) | own) for one, own in zip(asked.prompts, shown, strict=True)]


def _checked(tensor: Tensor | None, name: str, ranks: tuple[int, ...], budget: Budget) -> Tensor:
    if tensor is None:
        raise Malformed(f"the safetensors file has no tensor {name!r}")
    if tensor.dtype != torch.uint8 or tensor.ndim not in ranks or tensor.shape[-3] != 3 or 0 in tensor.shape:
        has = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise Malformed(f"the tensor {name!r} is {has}; pictures are uint8 with 3 channels before height and width")
    for picture in tensor:
        budget.spend(picture.numel() // 3)
    return tensor


def _validated(kind: type[_Body], body: bytes) -> _Body:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        raise Malformed(f"the request is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}", 400)
    place = ".".join(str(part) for part in first["loc"])
    if place == "schema":
        raise Malformed(f"schema {first['input']!r:.40} is not known; this server speaks schema {SCHEMA}")
    if first["type"] == "extra_forbidden":
        raise Malformed(f"{place} is no key of a request")
    raise Malformed(f"{place or 'the request'}: {first['msg']}")


def _made_from(prompt: AskedPrompt) -> tuple[tuple[str, Shown | None], ...]:
    return ("image", prompt.image), ("video", prompt.video)


def _none_inline(prompt: AskedPrompt) -> dict[str, Tensor]:
    if any(shown for _, shown in _made_from(prompt)):
        raise Malformed("a prompt holds an image or video in base64, which stands in JSON requests only")
    return {}


def _prompt(asked: AskedPrompt, made_from: Mapping[str, Tensor]) -> Prompt:
    return Prompt(asked.text, asked.negative, asked.metadata, made_from.get("image"), made_from.get("video"))


def _unpacked(shown: Shown, where: str, budget: Budget) -> Tensor:
    if isinstance(shown, list):
        if not shown:
            raise Malformed(f"{where} is a video without frames")
        return _stacked([_unpacked(frame, f"{where}.{number}", budget) for number, frame in enumerate(shown)])
    try:
        data = base64.b64decode(shown, validate=True)
    except (binascii.Error, ValueError):
        raise Malformed(f"{where} is not base64") from None
    return _pixels(data, where, budget)


def _pixels(data: bytes, where: str, budget: Budget) -> Tensor:
    """[3, H, W] of a PNG; its size is asked before it is unpacked."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            budget.spend(image.width * image.height)
            pixels = np.array(image.convert("RGB"))
    except Malformed:
        raise
    except Exception:  # Pillow raises many kinds on a broken file
        raise Malformed(f"{where} is not a PNG that can be read") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _stacked(images: Sequence[Tensor]) -> Tensor:
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise Malformed(f"the pictures of one request must be equally large; there are {shapes[0]} and {shapes[1]}")
    return torch.stack([*images])
