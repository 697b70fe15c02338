"""Wan: the two experts, half precision and films, which the conformance test does not see."""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from rlalign.mdp.prediction import Prediction
from rlalign.models import wan
from rlalign.models.lora import LoraConfig, attach, full, save_lora
from rlalign.policy import Policy, RolloutConfig
from rlalign.types import Prompt, Size
from tests.contracts.families import ode
from tests.contracts.families.wan import SIZE, TOKENS, PlainWan, written

PROMPTS = [Prompt("red cat"), Prompt("two", negative="blue")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return written(tmp_path_factory.mktemp("wan"), experts=2)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> wan.Family:
    return wan.Family.load(wan.Config(max_sequence_length=TOKENS), str(folder), dtype, "cpu")


def noise(rows: int) -> Tensor:
    return torch.randn(rows, 4, 2, 2, 4, generator=torch.Generator().manual_seed(0))


def test_each_row_has_the_expert_of_its_time(folder: Path):
    family, x = load(folder), noise(3)
    cond, _ = family.encode([PROMPTS[0]] * 3)
    time = torch.tensor([874.9, 875.0, 999.0])
    mixed = family.predict(x, time, cond, SIZE)
    for row, name in enumerate(("transformer_2", "transformer", "transformer")):
        alone = family.nets[name](x, time, cond["prompt_embeds"], return_dict=False)[0]
        torch.testing.assert_close(mixed[row], alone[row], rtol=0, atol=0)


def test_rows_have_the_same_bits_in_rollout_and_replay(folder: Path):
    """In a rollout all rows have one time, in a replay each its own."""
    family, x = load(folder), noise(2)
    cond, _ = family.encode(PROMPTS)
    times = torch.tensor([900.0, 300.0])
    replayed = family.predict(x, times, cond, SIZE)
    for row, time in enumerate(times):
        rolled_out = family.predict(x, time.expand(2), cond, SIZE)
        torch.testing.assert_close(replayed[row], rolled_out[row], rtol=0, atol=0)


def test_adapters_of_both_experts_are_read_by_diffusers(folder: Path, tmp_path: Path):
    family = load(folder)
    parameters = attach(family.nets, list(family.nets), LoraConfig(rank=2), family.lora_targets, seed=1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.2
    policy = Policy(family, RolloutConfig(size=SIZE, num_steps=4, micro_batch=2), parameters, lora=True)
    mine = ode(policy, PROMPTS, noise(2), policy.settings)
    save_lora(family.nets, tmp_path, policy.weights("policy"))
    plain = PlainWan(folder)
    plain.load_lora(tmp_path)
    first_alone = plain.draw(PROMPTS, noise(2), 4, 1.0)
    plain.pipeline.transformer_2.load_lora_adapter(tmp_path, prefix="transformer_2", use_safetensors=True)
    torch.testing.assert_close(mine, plain.draw(PROMPTS, noise(2), 4, 1.0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mine, first_alone, atol=1e-3)


def test_half_precision(folder: Path):
    """Some of the nets' weights stay in float32, the first of all among them."""
    family = load(folder, torch.bfloat16)
    cond, _ = family.encode(PROMPTS)
    output = family.predict(noise(2), torch.tensor([900.0, 300.0]), cond, SIZE)
    exact = load(folder).predict(noise(2), torch.tensor([900.0, 300.0]), load(folder).encode(PROMPTS)[0], SIZE)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.1, atol=0.05)
    assert family.decode(noise(2), SIZE).dtype == torch.float32


def test_times_of_every_token_are_the_one_of_the_row(tmp_path: Path):
    """Wan 2.2 with 5 billion weights is told the time token by token, which matters for image to video alone."""
    family = load(written(tmp_path, expand_timesteps=True))
    parameters = attach(family.nets, list(family.nets), LoraConfig(rank=2), family.lora_targets, seed=1)
    policy = Policy(family, RolloutConfig(size=SIZE, num_steps=3, micro_batch=2), parameters, lora=True)
    mine = ode(policy, PROMPTS, noise(2), policy.settings)
    torch.testing.assert_close(mine, PlainWan(tmp_path).draw(PROMPTS, noise(2), 3, 1.0), rtol=1e-4, atol=1e-5)
    family.save_pipeline(tmp_path / "out")
    assert WanPipeline.from_pretrained(tmp_path / "out").config.expand_timesteps


def test_films_are_encoded_frame_by_four_frames(folder: Path):
    family, pixels = load(folder), torch.rand(2, 5, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    vae, latents = family.pipeline.vae, family.encode_images(pixels, SIZE)
    raw = vae.encode(2 * pixels.transpose(1, 2) - 1).latent_dist.mode()
    assert latents.shape == (2, *family.latent_shape(SIZE))
    torch.testing.assert_close(latents[:, 1], (raw[:, 1] + 0.2) / 0.9)  # of the tiny VAE
    one = family.encode_images(pixels[:, 0], Size(16, 32))
    torch.testing.assert_close(one[:, :, 0], latents[:, :, 0])  # causal: a film begins as its first picture


def test_a_single_frame_is_a_picture(folder: Path):
    family = load(folder)
    assert family.latent_shape(Size(16, 32)) == (4, 1, 2, 4)
    assert family.decode(noise(2)[:, :, :1], Size(16, 32)).shape == (2, 3, 16, 32)


def test_sizes(folder: Path):
    family = load(folder)
    assert family.latent_shape(Size(32, 48, 9)) == (4, 3, 4, 6)
    for size in (Size(24, 32, 5), Size(16, 24, 5), Size(16, 32, 4)):
        with pytest.raises(ValueError, match="divisible by 16, and frames one more than a multiple of 4"):
            family.latent_shape(size)


def test_the_first_step_of_unipc_has_bounded_noise(folder: Path):
    """From 0.999999, as UniPC has it, Flow-SDE's would be 0.7 * 1000 * sqrt(step)."""
    family, x = load(folder), noise(2)
    policy = Policy(family, RolloutConfig(size=SIZE, num_steps=10), full(family.nets, ["transformer"]), lora=False)
    schedule = policy.schedule(policy.settings)
    now, nxt = schedule.level(0, x), schedule.level(1, x)
    gaussian = policy.kernel(x, Prediction(x, x), now, nxt)
    assert schedule.sigma[0] == 1 and schedule.time[0] == 999
    expected = 0.7 * (1 / (1 - nxt.sigma)).sqrt() * (1 - nxt.sigma).sqrt()
    torch.testing.assert_close(gaussian.std.expand(()), expected)


def test_a_scheduler_without_flow_levels_is_refused(folder: Path):
    family = load(folder)
    family.pipeline.scheduler.register_to_config(use_flow_sigmas=False)
    with pytest.raises(ValueError, match="set use_flow_sigmas"):
        family.schedule(4, SIZE)
