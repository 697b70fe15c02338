"""What a reward server is asked: three formats that say the same, and what strangers may send."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from rlalign.scoring import wire
from rlalign.types import Prompt

generator = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8, generator=generator)
VIDEOS = torch.randint(0, 256, (2, 5, 3, 4, 6), dtype=torch.uint8, generator=generator)
PROMPTS = [Prompt("a cat", "blurry", {"tag": "colors"}), Prompt("ein Hündchen")]


def png(image: torch.Tensor, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).convert(mode).save(file, format="PNG")
    return file.getvalue()


def multipart(request: object, *pictures: bytes) -> tuple[str, bytes]:
    parts = [("request", json.dumps(request).encode()), *(("images", picture) for picture in pictures)]
    body = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%s"; filename="f"\r\n\r\n%s\r\n' % (n.encode(), d)
        for n, d in parts
    )
    return f"{wire.MULTIPART}; boundary=x", body + b"--x--\r\n"


def read(kind: str, body: bytes, **budget: int) -> tuple[torch.Tensor, list[Prompt]]:
    return wire.read(kind, body, wire.Budget(**budget))


@pytest.mark.parametrize("images", [IMAGES, VIDEOS], ids=["images", "videos"])
@pytest.mark.parametrize(("kind", "write"), [(wire.JSON, wire.as_json), (wire.SAFETENSORS, wire.as_safetensors)])
def test_what_is_written_is_read(kind: str, write: Callable[..., bytes], images: torch.Tensor):
    made_from = [Prompt("a", image=IMAGES[0]), Prompt("b", video=VIDEOS[1])]
    for prompts in (PROMPTS, made_from):
        found, back = read(kind, write(images, prompts))
        assert torch.equal(found, images)
        for prompt, one in zip(prompts, back, strict=True):
            assert (one.text, one.negative, one.metadata) == (prompt.text, prompt.negative, prompt.metadata)
            for name in ("image", "video"):
                sent, got = getattr(prompt, name), getattr(one, name)
                assert got is None if sent is None else torch.equal(sent, got)


def test_samples_of_one_prompt_share_what_they_are_made_from():
    prompts = [Prompt("a", image=IMAGES[0])] * 2
    _, back = read(wire.SAFETENSORS, wire.as_safetensors(IMAGES, prompts))
    assert all(prompt.image is not None and torch.equal(prompt.image, IMAGES[0]) for prompt in back)


@pytest.mark.parametrize(("kind", "write"), [(wire.JSON, wire.as_json), (wire.SAFETENSORS, wire.as_safetensors)])
def test_views_are_sent_as_they_look(kind: str, write: Callable[..., bytes]):
    for view in (IMAGES.flip(0), IMAGES[:1].expand(2, -1, -1, -1), IMAGES.transpose(2, 3), IMAGES[:, :, ::2]):
        prompts = [Prompt("a", image=view[0]), Prompt("b", video=view)]
        images, back = read(kind, write(view, prompts))
        assert torch.equal(images, view)
        assert back[0].image is not None and torch.equal(back[0].image, view[0])
        assert back[1].video is not None and torch.equal(back[1].video, view)


def test_files_of_a_form_are_read_in_their_order():
    request = {"prompts": [{"text": "a"}, {"text": "b"}]}
    images, prompts = read(*multipart(request, *map(png, IMAGES)))
    assert torch.equal(images, IMAGES) and [prompt.text for prompt in prompts] == ["a", "b"]


def test_other_colour_modes_become_rgb():
    grey = torch.full((3, 4, 4), 9, dtype=torch.uint8)
    images, _ = read(*multipart({"prompts": [{"text": "a"}]}, png(grey, "L")))
    assert torch.equal(images[0], grey)


def asked(**changes: Any) -> bytes:
    """A good request as JSON, but for the changes."""
    packed = base64.b64encode(png(IMAGES[0])).decode()
    return json.dumps({"images": [packed], "prompts": [{"text": "a"}]} | changes).encode()


def tensors(request: object = None, **arrays: np.ndarray) -> bytes:
    told = {"prompts": [{"text": "a"}]} if request is None else request
    return safetensors.numpy.save(arrays, {"request": json.dumps(told)})


LARGE = base64.b64encode(png(torch.zeros(3, 40, 40, dtype=torch.uint8))).decode()
OTHER = base64.b64encode(png(torch.zeros(3, 9, 9, dtype=torch.uint8))).decode()
SMALL = base64.b64encode(png(IMAGES[0])).decode()


@pytest.mark.parametrize(
    ("status", "said", "kind", "body"),
    [
        (400, "the request is not JSON: expected value", wire.JSON, b"\x80\x04pickle"),
        (400, "the request is not JSON: recursion limit", wire.JSON, b"[" * 100_000),
        (422, "the request: Input should be an object", wire.JSON, b"[]"),
        (422, "schema 2 is not known; this server speaks schema 1", wire.JSON, asked(schema=2)),
        (422, "imagse is no key of a request", wire.JSON, asked(imagse=[])),
        (422, "images: List should have at least 1 item", wire.JSON, asked(images=[])),
        (422, "prompts.0.text: Field required", wire.JSON, asked(prompts=[{}])),
        (422, "there are 1 images but 2 prompts", wire.JSON, asked(prompts=[{"text": "a"}] * 2)),
        (422, "images.0 is not base64", wire.JSON, asked(images=["?"])),
        (422, "images.0 is not a PNG that can be read", wire.JSON, asked(images=["AAAA"])),
        (422, "images.0 is not a PNG that can be read", wire.JSON, asked(images=[SMALL[:60]])),
        (422, "images.0 is a video without frames", wire.JSON, asked(images=[[]])),
        (422, "equally large", wire.JSON, asked(images=[SMALL, OTHER], prompts=[{"text": "a"}] * 2)),
        (413, "more pixels than this server unpacks at once", wire.JSON, asked(images=[[LARGE]])),
        (413, "more pictures than this server unpacks at once", wire.JSON, asked(images=[[SMALL] * 4])),
        (422, "prompts.0.image is not base64", wire.JSON, asked(prompts=[{"text": "a", "image": "?"}])),
        (400, "the body is not a safetensors file", wire.SAFETENSORS, b"\x80\x04pickle"),
        (422, 'no "request" in its metadata', wire.SAFETENSORS, safetensors.numpy.save({"images": IMAGES.numpy()})),
        (422, "no tensor 'images'", wire.SAFETENSORS, tensors()),
        (422, "'images' is float32 [1, 3, 4, 4]", wire.SAFETENSORS, tensors(images=np.zeros((1, 3, 4, 4), "f4"))),
        (422, "'images' is uint8 [1, 4, 4, 3]", wire.SAFETENSORS, tensors(images=np.zeros((1, 4, 4, 3), "u1"))),
        (422, "'masks' belongs to nothing", wire.SAFETENSORS, tensors(images=IMAGES[:1].numpy(), masks=np.zeros(1))),
        (413, "more pixels", wire.SAFETENSORS, tensors(images=np.zeros((1, 3, 40, 40), "u1"))),
        (400, "a multipart request has one part", *multipart({"prompts": [{"text": "a"}]})),
        (422, "stands in JSON requests only", *multipart({"prompts": [{"text": "a", "image": SMALL}]}, png(IMAGES[0]))),
        (400, "a multipart request has one part", f"{wire.MULTIPART}; boundary=y", b"nothing of this kind"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told_in_words(status: int, said: str, kind: str, body: bytes):
    with pytest.raises(wire.Malformed) as caught:
        read(kind, body, pictures=3, pixels=1000)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.status == status


def test_a_bomb_is_not_unpacked():
    """A few kilobytes that would be 300 MB."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, format="PNG")
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(wire.Malformed, match="more pixels"):
        read(*multipart({"prompts": [{"text": "a"}]}, file.getvalue()))
