"""One file of every family that ComfyUI reads, back in diffusers: it draws what the policy draws."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from safetensors.torch import load_file
from torch import Tensor

from rlalign.models.base import Family
from rlalign.models.lora import LORA_FILE, LoraConfig, attach
from rlalign.models.single_file import readable_net, save_single_lora, save_single_net
from rlalign.policy import Policy
from tests.contracts.families import FIRST, Case, ode, rollout_settings
from tests.tiny import shaken

READ = ("diffusers", "flux", "flux_kontext", "pixart", "qwen_image", "qwen_image_edit", "sd", "sd3", "sdxl", "z_image")
GUIDANCE = 4.5


def tuned(case: Case, family: Family) -> Policy:
    """With adapters whose alpha is not their rank, and a scale that rounds nothing."""
    parameters = attach(family.nets, [next(iter(family.nets))], LoraConfig(rank=2, alpha=8), family.lora_targets, 1)
    policy = Policy(family, rollout_settings(case, guidance_scale=GUIDANCE), parameters, lora=True)
    shaken(policy, 0.05)  # with 0.2 the nets amplify the last bit a thousandfold
    return policy


@pytest.mark.parametrize("family", READ)
def test_they_draw_the_same_picture(family: str, tmp_path: Path):
    torch.set_num_threads(1)
    case = FIRST[family]
    folder = case.write(tmp_path / "model")
    policy = tuned(case, case.load(folder))
    nets = policy.family.nets
    name = readable_net(nets, [next(iter(nets))])
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    mine = ode(policy, case.prompts, latents, policy.settings)

    def same(library: Any) -> None:
        theirs: Tensor = library.draw(case.prompts, latents, policy.settings.num_steps, GUIDANCE)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    lora = case.plain(folder)
    lora.load_lora(save_single_lora(name, nets[name], policy.weights("policy"), tmp_path / LORA_FILE).parent)
    same(lora)
    file = save_single_net(nets[name], tmp_path / "net.safetensors")
    whole: Any = case.plain(folder)
    net = getattr(whole.pipeline, name)
    net.load_state_dict(load_file(file))
    same(whole)
    if isinstance(net, FromOriginalModelMixin):  # by the library's own reader of such files
        again = type(net).from_single_file(file, config=str(folder), subfolder=name)
        torch.testing.assert_close(again.state_dict(), net.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("family", sorted(FIRST.keys() - READ))
def test_what_nobody_else_reads_is_refused(family: str, tmp_path: Path):
    nets = FIRST[family].load(FIRST[family].write(tmp_path / "model")).nets
    with pytest.raises(ValueError, match="export without"):
        readable_net(nets, [next(iter(nets))])


def test_a_file_holds_one_net():
    with pytest.raises(ValueError, match="trained text_encoder, unet; export without it"):
        readable_net({}, ["text_encoder", "unet"])


def test_the_lora_of_a_unet_has_kohyas_names(tmp_path: Path):
    case = FIRST["sd"]
    policy = tuned(case, case.load(case.write(tmp_path / "model")))
    file = save_single_lora("unet", policy.family.nets["unet"], policy.weights("policy"), tmp_path / "a.safetensors")
    tensors = load_file(file)
    own = next(name for name in policy.parameters if name.endswith("attn1.to_out.0.lora_A.default.weight"))
    key = own.partition(".lora_A")[0].replace("unet.", "lora_unet_").replace(".", "_")
    down, up = (policy.parameters[own.replace("lora_A", end)].detach() for end in ("lora_A", "lora_B"))
    assert tensors[f"{key}.alpha"] == 2
    torch.testing.assert_close(tensors[f"{key}.lora_down.weight"], down, rtol=0, atol=0)
    torch.testing.assert_close(tensors[f"{key}.lora_up.weight"], 4 * up, rtol=0, atol=0)
