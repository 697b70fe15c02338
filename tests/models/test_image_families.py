"""What the conformance test cannot ask of Stable Diffusion 1, 2 and XL, PixArt and SANA."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from rlalign.mdp.prediction import from_network
from rlalign.mdp.transition import KERNELS
from rlalign.models import pixart, sana, sdxl
from rlalign.types import Prompt, Size
from tests.contracts.families import FAMILIES


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def loaded(name: str, folder: Path) -> Any:
    return FAMILIES[name].load(FAMILIES[name].write(folder))


@pytest.mark.parametrize(("kernel", "eta"), [("ddim", 1.0), ("ddim", 0.5), ("ddpm", 1.0)])
@pytest.mark.parametrize("name", ["sd-epsilon", "sd-v_prediction"])
def test_a_stochastic_step_is_that_of_diffusers(name: str, kernel: str, eta: float, tmp_path: Path):
    """Of DDIM's scheduler, and for ddpm of DDPM's, which draws its noise itself."""
    family, generator = loaded(name, tmp_path), torch.Generator().manual_seed(0)
    x, output, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(3))
    schedule, config = family.schedule(5, Size(16, 16)), family.pipeline.scheduler.config
    scheduler: Any = (DDPMScheduler if kernel == "ddpm" else DDIMScheduler).from_config(config)
    scheduler.set_timesteps(5)
    for k, time in enumerate(scheduler.timesteps[:-1]):
        now, nxt = schedule.level(k, x), schedule.level(k + 1, x)
        mine = KERNELS[kernel](x, from_network(family.prediction, output, x, now), now, nxt, eta)
        if kernel == "ddpm":
            theirs = scheduler.step(output, time, x, torch.Generator().manual_seed(k)).prev_sample
            noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(k))
        else:
            theirs = scheduler.step(output, time, x, eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(mine.sample(noise), theirs, rtol=1e-4, atol=1e-4)


def test_sdxl_guides_away_from_zeros_unless_a_negative_prompt_is_given(tmp_path: Path):
    family = loaded("sdxl", tmp_path)
    _, uncond = family.encode([Prompt("red"), Prompt("red", negative=""), Prompt("red", negative="blue")])
    for tensor in uncond.values():
        assert not tensor[0].any() and tensor[1].any() and not torch.equal(tensor[1], tensor[2])


def test_sdxl_is_told_the_size(tmp_path: Path):
    family = loaded("sdxl", tmp_path)
    cond, _ = family.encode([Prompt("red")])
    x, time = torch.zeros(1, 4, 8, 8), torch.tensor([500.0])
    seen: list[Any] = []
    family.nets["unet"].register_forward_pre_hook(lambda net, args, kwargs: seen.append(kwargs), with_kwargs=True)
    family.predict(x, time, cond, Size(16, 24))
    assert seen[0]["added_cond_kwargs"]["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]]


def test_sdxl_starts_from_noise_of_variance_1(tmp_path: Path):
    """So does Euler with leading times, which multiplies it by sqrt(1 + sigma^2)."""
    schedule = loaded("sdxl", tmp_path).schedule(4, Size(16, 16))
    torch.testing.assert_close(schedule.alpha.square() + schedule.sigma.square(), torch.ones(5))
    assert schedule.time.tolist() == [751, 501, 251, 1, 0]
    assert schedule.table is not None
    places = schedule.time[:-1].long()
    torch.testing.assert_close(schedule.table[places].float(), schedule.alpha[:-1])


def test_pixart_drops_the_learned_variance(tmp_path: Path):
    family = loaded("pixart", tmp_path)
    assert family.pipeline.transformer.config.out_channels == 8
    cond, _ = family.encode([Prompt("red")])
    x, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    whole = family.nets["transformer"](x, cond["prompt_embeds"], time, {}, None, None, cond["mask"], False)[0]
    torch.testing.assert_close(family.predict(x, time, cond, Size(16, 16)), whole.chunk(2, 1)[0])


def test_padding_says_nothing(tmp_path: Path):
    """Neither PixArt nor SANA looks at tokens that are not there."""
    for name in ("pixart", "sana-euler"):
        family = loaded(name, tmp_path / name)
        cond, _ = family.encode([Prompt("red")])
        assert not cond["mask"].all()
        other = {**cond, "prompt_embeds": cond["prompt_embeds"].where(cond["mask"][..., None], 7.0)}
        size = FAMILIES[name].size
        x, time = torch.ones(1, *family.latent_shape(size)), torch.tensor([500.0])
        torch.testing.assert_close(family.predict(x, time, other, size), family.predict(x, time, cond, size))


def test_sana_s_levels_are_those_of_its_scheduler_from_1_on(tmp_path: Path):
    family = loaded("sana", tmp_path)
    own = family.pipeline.scheduler
    assert isinstance(own, DPMSolverMultistepScheduler)
    own.set_timesteps(8)
    schedule = family.schedule(8, Size(32, 32))
    assert schedule.sigma[0] == 1 and schedule.is_flow
    torch.testing.assert_close(schedule.sigma, own.sigmas, rtol=0, atol=2e-3)


def test_sana_enriches_prompts_but_not_negative_ones(tmp_path: Path):
    plain, asked = loaded("sana-euler", tmp_path / "plain"), loaded("sana", tmp_path / "asked")
    prompts = [Prompt("red", negative="blue")]
    (cond, uncond), (asked_cond, asked_uncond) = plain.encode(prompts), asked.encode(prompts)
    assert not torch.allclose(cond["prompt_embeds"][:, 1:], asked_cond["prompt_embeds"][:, 1:])
    torch.testing.assert_close(uncond, asked_uncond)


@pytest.mark.parametrize("family", [sdxl, pixart, sana], ids=lambda module: module.__name__)
def test_a_folder_that_is_none_is_named(family: Any, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no \w+Pipeline could be loaded from"):
        family.Family.load(family.Config(), str(tmp_path), torch.float32, "cpu")


@pytest.mark.parametrize(
    ("name", "setting", "why"),
    [
        ("pixart", "use_additional_conditions", "is a PixArt-Alpha, which is told size and aspect ratio"),
        ("sana", "guidance_embeds", "is a SANA-Sprint, which is no flow model"),
    ],
)
def test_relatives_that_need_more_are_refused(name: str, setting: str, why: str, tmp_path: Path):
    folder = FAMILIES[name].write(tmp_path)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: True}))
    with pytest.raises(ValueError, match=why):
        FAMILIES[name].load(folder)
