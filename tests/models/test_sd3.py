"""What the conformance test cannot ask of every family."""

from pathlib import Path

import pytest
import torch

from rlalign.models.sd3 import Config, Family
from rlalign.types import Prompt, Size
from tests.tiny import sd3_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return sd3_folder(tmp_path_factory.mktemp("sd3"))


def load(folder: Path | str, **config: int | bool) -> Family:
    return Family.load(Config(**{"text_encoder_3": False, **config}), str(folder), torch.float32, "cpu")


def test_zero_tokens_of_t5_follow_those_of_clip(folder: Path):
    short, _ = load(folder, max_sequence_length=0).encode([Prompt("red cat")])
    long, _ = load(folder, max_sequence_length=256).encode([Prompt("red cat")])
    assert short["prompt_embeds"].shape[1] == 8 and long["prompt_embeds"].shape[1] == 8 + 256
    assert torch.equal(long["prompt_embeds"][:, :8], short["prompt_embeds"])
    assert not long["prompt_embeds"][:, 8:].any()


def test_a_missing_folder_or_part_is_named(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no Stable Diffusion 3 pipeline could be loaded from .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"set model\.text_encoder_3 to false"):
        load(folder, text_encoder_3=True)


def test_t5_without_tokens_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="max_sequence_length 0"):
        load(sd3_folder(tmp_path, t5=True), text_encoder_3=True, max_sequence_length=0)


def test_sizes(folder: Path):
    family = load(folder)
    assert family.latent_shape(Size(16, 32)) == (4, 8, 16)
    for size in (Size(18, 16), Size(16, 64), Size(16, 16, frames=2)):
        with pytest.raises(ValueError, match="divisible by 4, up to 32"):
            family.latent_shape(size)


def test_images_are_encoded_as_diffusers_does(folder: Path):
    family, pixels = load(folder), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pipeline = family.pipeline
    latents = family.encode_images(pixels, Size(16, 16))
    mode = pipeline.vae.encode(pipeline.image_processor.preprocess(pixels)).latent_dist.mode()
    torch.testing.assert_close(latents, (mode - 0.0609) * 1.5305)  # of the tiny VAE
    assert latents.shape == (2, *family.latent_shape(Size(16, 16)))


def test_dynamic_shifting_depends_on_the_size(tmp_path: Path):
    settings = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    family = load(sd3_folder(tmp_path, scheduler=settings))
    small, large = (family.schedule(4, Size(side, side)).sigma for side in (16, 32))
    assert (large[1:-1] > small[1:-1]).all()


def test_no_negative_prompt_is_the_empty_one(folder: Path):
    family = load(folder)
    _, absent = family.encode([Prompt("red")])
    _, empty = family.encode([Prompt("red", negative="")])
    assert absent is not None and empty is not None
    assert all(torch.equal(absent[name], empty[name]) for name in absent)
