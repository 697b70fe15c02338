"""LTX-Video: what the conformance test does not see."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlalign.models import ltx
from rlalign.models.lora import LoraConfig, attach
from rlalign.policy import Policy, RolloutConfig
from rlalign.types import Prompt, Size
from tests.contracts.families import ode
from tests.contracts.families.ltx import SIZE, TOKENS, PlainLTX, written

PROMPTS = [Prompt("red cat"), Prompt("two")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return written(tmp_path_factory.mktemp("ltx"), timestep_conditioning=True)


def load(folder: Path, **config: float) -> ltx.Family:
    settings = ltx.Config.model_validate({"max_sequence_length": TOKENS, **config})
    return ltx.Family.load(settings, str(folder), torch.float32, "cpu")


def noise() -> Tensor:
    return torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))


def test_a_decoder_conditioned_on_time_is_told_it(folder: Path):
    family = load(folder)
    parameters = attach(family.nets, list(family.nets), LoraConfig(rank=2), family.lora_targets, seed=1)
    policy = Policy(family, RolloutConfig(size=SIZE, num_steps=3, micro_batch=2), parameters, lora=True)
    mine = ode(policy, PROMPTS, noise(), policy.settings)
    torch.testing.assert_close(mine, PlainLTX(folder).draw(PROMPTS, noise(), 3, 1.0), rtol=1e-4, atol=1e-5)
    early = load(folder, decode_timestep=0.05).decode(noise(), SIZE)
    assert not torch.allclose(family.decode(noise(), SIZE), early)


def test_a_decoder_that_draws_noise_is_refused(folder: Path):
    family = load(folder)
    family.pipeline.vae.register_to_config(decoder_inject_noise=(True, False, False))
    with pytest.raises(ValueError, match="draws noise while it decodes"):
        ltx.Family(family.config, family.pipeline)


def test_the_frame_rate_is_told(folder: Path):
    inputs = noise(), torch.tensor([500.0, 500.0]), load(folder).encode(PROMPTS)[0], SIZE
    assert not torch.allclose(load(folder).predict(*inputs), load(folder, frame_rate=5).predict(*inputs))


def test_films_are_encoded_to_what_decode_takes(folder: Path):
    family, pixels = load(folder), torch.rand(2, 5, 3, *SIZE[:2], generator=torch.Generator().manual_seed(0))
    vae, latents = family.pipeline.vae, family.encode_images(pixels, SIZE)
    raw = vae.encode(2 * pixels.transpose(1, 2) - 1).latent_dist.mode()  # [2, 4, 2, 2, 4]
    assert latents.shape == (2, *family.latent_shape(SIZE))
    expected = (raw[:, 1] + 0.2) / 0.9 * 0.9  # the second channel's mean and deviation, and the factor of the tiny VAE
    torch.testing.assert_close(latents[:, :, 1], expected.flatten(1))


def test_sizes(folder: Path):
    family = load(folder)
    assert family.latent_shape(Size(32, 32)) == (4, 4)
    assert family.latent_shape(Size(64, 32, 9)) == (24, 4)
    with pytest.raises(ValueError, match="divisible by 16, and frames one more than a multiple of 4"):
        family.latent_shape(Size(32, 32, 6))
