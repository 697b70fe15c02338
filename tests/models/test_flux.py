"""What FLUX.1, FLUX.1 Kontext, FLUX.2 and Z-Image have of their own, beside what every family is tested for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.mdp.noise import Noise
from rlalign.models.base import EncodesImages, Family
from rlalign.models.lora import LoraConfig, attach
from rlalign.policy import Policy
from rlalign.types import Prompt, Size, Unit
from rlalign.workers.canary import Canary
from rlalign.workers.sampler import Sampler
from tests.contracts.families import FAMILIES, rollout_settings

IMAGES = ["flux-dev", "flux_kontext", "flux2-klein", "z_image"]


def loaded(name: str, folder: Path, **config: Any) -> Family:
    torch.set_num_threads(1)
    case = replace(FAMILIES[name], config={**FAMILIES[name].config, **config})
    return case.load(case.write(folder))


def sampler(name: str, folder: Path, **rollout: Any) -> Sampler:
    family = loaded(name, folder)
    parameters = attach(family.nets, ["transformer"], LoraConfig(rank=2), family.lora_targets, seed=0)
    policy = Policy(family, rollout_settings(FAMILIES[name], num_steps=2, **rollout), parameters, lora=True)
    return Sampler(policy, Noise(0), "policy", keep_steps=True, shares=True)


def inputs(family: Family, name: str) -> dict[str, Any]:
    size = FAMILIES[name].size
    x = torch.randn(2, *family.latent_shape(size), generator=torch.Generator().manual_seed(0))
    return {
        "x": x,
        "time": torch.tensor([900.0, 300.0]),
        "cond": family.encode(FAMILIES[name].prompts)[0],
        "size": size,
    }


def changes(one: Tensor, other: Tensor) -> bool:
    return not torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_encoded_as_they_are_decoded(name: str, tmp_path: Path):
    """What the VAE's encoder says goes through its decoder as it is: scale, shift and order of patches undone."""
    family, size = loaded(name, tmp_path), FAMILIES[name].size
    assert isinstance(family, EncodesImages)
    vae = family.pipeline.vae  # pyright: ignore[reportAttributeAccessIssue]
    pixels = torch.rand(2, 3, *size[:2], generator=torch.Generator().manual_seed(0))
    latents = family.encode_images(pixels, size)
    assert latents.shape[1:] == family.latent_shape(size)
    with torch.no_grad():
        plain = vae.decode(vae.encode(2 * pixels - 1).latent_dist.mean).sample
        torch.testing.assert_close(family.decode(latents, size), (plain / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("name", ["flux-dev", "flux_kontext", "flux2-dev"])
def test_the_net_is_told_the_guidance(name: str, tmp_path: Path):
    families = [loaded(name, tmp_path, guidance=guidance) for guidance in (1.0, 4.0)]
    assert changes(*(family.predict(**inputs(family, name)) for family in families))


def test_schnell_is_told_none(tmp_path: Path):
    families = [loaded("flux-schnell", tmp_path, guidance=guidance) for guidance in (1.0, 4.0)]
    one, other = (family.predict(**inputs(family, "flux-schnell")) for family in families)
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["flux_kontext", "flux2-reference"])
def test_the_sample_depends_on_the_image_of_its_own_prompt(name: str, tmp_path: Path):
    family = loaded(name, tmp_path)
    given = inputs(family, name)
    other = {**given["cond"], "reference": given["cond"]["reference"].clone()}
    other["reference"][1] += 1
    before, after = family.predict(**given), family.predict(**{**given, "cond": other})
    assert changes(before[1], after[1])
    torch.testing.assert_close(before[0], after[0])


def test_kontext_says_which_prompt_has_no_image(tmp_path: Path):
    with pytest.raises(ValueError, match=r"the prompt 'two' has no image, which .* the path of a file"):
        loaded("flux_kontext", tmp_path).encode([*FAMILIES["flux_kontext"].prompts[:1], Prompt("two")])


@pytest.mark.parametrize("name", ["flux_kontext", "flux2-reference"])
def test_the_canary_needs_no_prompt_of_the_run(name: str, tmp_path: Path):
    policy = sampler(name, tmp_path).policy
    assert Canary(policy, Noise(0)).predict("policy").isfinite().all()


def test_prompts_with_and_without_an_image_are_not_mixed(tmp_path: Path):
    prompts = (*FAMILIES["flux2-reference"].prompts[:1], Prompt("two"))
    with pytest.raises(ValueError, match="some prompts have an image and some have none"):
        sampler("flux2-klein", tmp_path).sample(Unit(0, (0, 1), prompts, samples=2))


def test_dev_of_flux2_has_no_negative_prompt(tmp_path: Path):
    unit = Unit(0, (0,), (Prompt("a"),), samples=2)
    with pytest.raises(ValueError, match=r"nothing to guide away from: set rollout\.guidance_scale"):
        sampler("flux2-dev", tmp_path, guidance_scale=4.0).sample(unit)


def test_another_pipeline_is_not_flux2(tmp_path: Path):
    FAMILIES["flux-dev"].write(tmp_path)
    with pytest.raises(ValueError, match=r"holds a FluxPipeline, which is no pipeline of FLUX\.2"):
        FAMILIES["flux2-klein"].load(tmp_path)


def test_a_distilled_klein_stays_one(tmp_path: Path):
    family = loaded("flux2-klein", tmp_path / "model")
    family.pipeline.register_to_config(is_distilled=True)  # pyright: ignore[reportAttributeAccessIssue]
    family.save_pipeline(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["is_distilled"] is True


def test_adapters_of_flux2_are_in_both_kinds_of_blocks(tmp_path: Path):
    family = loaded("flux2-klein", tmp_path)
    adapted = attach(family.nets, ["transformer"], LoraConfig(rank=1), family.lora_targets, seed=0)
    layers = {name.split(".lora_")[0].removeprefix("transformer.") for name in adapted}
    double = {f"transformer_blocks.0.attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    assert layers == double | {f"single_transformer_blocks.0.attn.{layer}" for layer in ("to_qkv_mlp_proj", "to_out")}


def test_a_text_of_z_image_is_cut_and_padded(tmp_path: Path):
    family = loaded("z_image", tmp_path)
    cond, _ = family.encode([Prompt("a"), Prompt("a" * 100)])
    assert cond["mask"].sum(1).tolist() == [3, 16]  # between two marks
    assert cond["prompt_embeds"].shape[1] == 16 and not cond["prompt_embeds"][0, 3:].any()
    alone = family.encode([Prompt("a")])[0]
    x, time = torch.randn(1, *family.latent_shape(Size(16, 16))), torch.tensor([500.0])
    both = family.predict(torch.cat([x, x]), time.expand(2), cond, Size(16, 16))
    torch.testing.assert_close(both[:1], family.predict(x, time, alone, Size(16, 16)))
