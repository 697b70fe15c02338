"""Wan, image to video: what the conformance test does not see."""

from pathlib import Path

import pytest
import torch

from rlalign.mdp.noise import Noise
from rlalign.models import wan_i2v
from rlalign.models.lora import full
from rlalign.policy import Policy, RolloutConfig
from rlalign.types import Prompt, Size, Unit
from rlalign.workers.sampler import Sampler
from tests.contracts.families.case import with_image
from tests.contracts.families.wan_i2v import SIZE, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return written(tmp_path_factory.mktemp("wan_i2v"), "2.2")


def load(folder: Path, frames: int = SIZE.frames) -> wan_i2v.Family:
    return wan_i2v.Family.load(wan_i2v.Config(frames=frames), str(folder), torch.float32, "cpu")


def test_the_known_part_is_the_first_frame(folder: Path):
    """Four channels say which of a latent's four frames are known; the first latent has the first frame alone."""
    cond, _ = load(folder, frames=9).encode([with_image(Prompt("red"), 0, SIZE)])
    assert cond["condition"].shape == (1, 4 + 4, 3, 2, 4)
    marks = cond["condition"][0, :4]
    assert (marks[:, 0] == 1).all() and (marks[:, 1:] == 0).all()
    other, _ = load(folder, frames=9).encode([with_image(Prompt("red"), 1, SIZE)])
    assert not torch.equal(cond["condition"], other["condition"])


def test_encoding_draws_no_random_numbers(folder: Path):
    family, before = load(folder), torch.get_rng_state()
    family.encode([with_image(Prompt("red"), 0, SIZE)])
    assert torch.equal(torch.get_rng_state(), before)


def test_frames_of_model_and_rollout_must_agree(folder: Path):
    assert load(folder, frames=9).latent_shape(Size(16, 32, 9)) == (4, 3, 2, 4)
    with pytest.raises(ValueError, match=r"model.frames is 9, and must be"):
        load(folder, frames=9).latent_shape(SIZE)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> wan_i2v.Family:
    """A model that is given the first frame."""
    return load(written(tmp_path_factory.mktemp("given"), "2.2-5b"))


@pytest.mark.parametrize("kernel", ["flow_sde", "cps"])
def test_a_given_first_frame_is_the_image_after_any_chain(given: wan_i2v.Family, kernel: str):
    settings = RolloutConfig(size=SIZE, num_steps=4, micro_batch=2, kernel=kernel, samples_per_prompt=2)
    policy = Policy(given, settings, full(given.nets, list(given.nets)), lora=False)
    sampler = Sampler(policy, Noise(0), "policy", keep_steps=True, shares=True)
    prompt = with_image(Prompt("red"), 0, SIZE)
    trajectory, _ = sampler.sample(Unit(0, (0,), (prompt,), 2))
    first = trajectory.cond["condition"].expand(2, -1, -1, -1, -1)
    torch.testing.assert_close(trajectory.final[:, :, :1], first, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trajectory.final[0, :, 1], trajectory.final[1, :, 1], atol=1e-2)


def test_the_net_never_sees_noise_in_a_given_frame(given: wan_i2v.Family):
    cond, _ = given.encode([with_image(Prompt("red"), 0, SIZE)])
    x = torch.randn(1, *given.latent_shape(SIZE), generator=torch.Generator().manual_seed(0))
    other = torch.cat([x[:, :, :1] + 1, x[:, :, 1:]], 2)
    one, two = (given.predict(latents, torch.tensor([500.0]), cond, SIZE) for latents in (x, other))
    torch.testing.assert_close(one[:, :, 1:], two[:, :, 1:], rtol=0, atol=0)
    torch.testing.assert_close(two[:, :, :1] - one[:, :, :1], torch.full_like(one[:, :, :1], 2.0))  # 1 / t
