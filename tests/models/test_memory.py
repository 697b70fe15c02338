"""What a model's library offers to save memory changes no gradient, and parts come to the device when they are used."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from rlalign.models import analytic
from rlalign.models.base import HasPipeline
from rlalign.models.lora import LoraConfig, attach
from rlalign.models.memory import MemoryConfig, Offloaded, fit, placed
from tests.contracts.families import FAMILIES, Case
from tests.models.stable_diffusion import sd_folder, sd_policy
from tests.tiny import sd3_folder, sd3_policy

FIRST = {case.module: case for case in reversed(FAMILIES.values()) if case.module != "analytic"}
ONE_WAY = {"sd", "sdxl", "sd3", "pixart", "sana", "diffusers"}
"""Families whose nets have attention of diffusers' older kind, which does not listen."""


@pytest.fixture(scope="module", params=sorted(FIRST))
def case(request: pytest.FixtureRequest) -> Case:
    torch.set_num_threads(1)
    return FIRST[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.write(tmp_path_factory.mktemp(case.module))


@pytest.fixture(autouse=True)
def own_attention() -> Iterator[None]:
    """diffusers keeps the choice for the whole process."""
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def gradients(case: Case, folder: Path, config: MemoryConfig) -> tuple[dict[str, Tensor], int]:
    """Of the adapters, and how often blocks of the first net ran."""
    family = case.load(folder)
    (name, net), *_ = family.nets.items()
    fit(family, config, [name])
    parameters = attach(family.nets, [name], LoraConfig(rank=2), family.lora_targets, seed=1)
    passes = [0]
    for module in net.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    cond, _ = family.encode(case.prompts)
    x = torch.randn(2, *family.latent_shape(case.size), generator=torch.Generator().manual_seed(0)).to(case.dtype)
    time = torch.tensor([900.0, 900.0])
    for parameter in parameters.values():
        parameter.data += 0.1  # where B is 0 the gradient of A is too
    family.predict(x, time, cond, case.size).square().mean().backward()
    return {key: p.grad for key, p in parameters.items() if p.grad is not None}, passes[0]


def test_checkpointing_changes_no_bit_of_a_gradient(case: Case, folder: Path):
    kept, passes = gradients(case, folder, MemoryConfig())
    again, more = gradients(case, folder, MemoryConfig(gradient_checkpointing=True))
    assert more > passes  # in evaluation mode, too
    assert kept.keys() == again.keys() and any(gradient.any() for gradient in kept.values())
    for key, gradient in kept.items():
        torch.testing.assert_close(again[key], gradient, rtol=0, atol=0)


def test_settings_of_the_vae_and_of_attention(case: Case, folder: Path):
    """Slices decode to the same picture."""
    family, plain = case.load(folder), case.load(folder)
    assert isinstance(family, HasPipeline) and not family.pipeline.vae.use_slicing
    fit(family, MemoryConfig(vae_slicing=True), [])
    latents = torch.randn(2, *family.latent_shape(case.size), generator=torch.Generator().manual_seed(0))
    assert family.pipeline.vae.use_slicing and not family.pipeline.vae.use_tiling
    torch.testing.assert_close(
        family.decode(latents, case.size), plain.decode(latents, case.size), rtol=1e-4, atol=1e-5
    )
    fit(family, MemoryConfig(vae_tiling=True), [])
    assert family.pipeline.vae.use_tiling
    if case.module in ONE_WAY:
        with pytest.raises(ValueError, match=r"model\.memory\.attention: the nets of this model compute .* one way"):
            fit(family, MemoryConfig(attention="native"), [])
    else:
        fit(family, MemoryConfig(attention="_native_math"), [])
        processors = [vars(module).get("processor") for net in family.nets.values() for module in net.modules()]
        assert AttentionBackendName._NATIVE_MATH in [one._attention_backend for one in processors if one is not None]


def test_strange_and_missing_attention_is_said_in_a_sentence(tmp_path: Path):
    family = FIRST["z_image"].load(FIRST["z_image"].write(tmp_path))
    with pytest.raises(ValueError, match=r"model\.memory\.attention is 'fast', but diffusers knows flash, .*native"):
        fit(family, MemoryConfig(attention="fast"), [])
    with pytest.raises(ValueError, match=r"model\.memory\.attention sage cannot be used here: .*sageattention"):
        fit(family, MemoryConfig(attention="sage"), [])


@pytest.mark.parametrize(
    "setting", [{"gradient_checkpointing": True}, {"vae_tiling": True}, {"vae_slicing": True}, {"attention": "native"}]
)
def test_a_model_without_it_is_refused(setting: dict[str, Any]):
    family = analytic.Family.load(analytic.Config(), "", torch.float32, "cpu")
    with pytest.raises(ValueError, match=rf"^model\.memory\.{next(iter(setting))}: .*; leave it out$"):
        fit(family, MemoryConfig(**setting), ["velocity"])
    with pytest.raises(ValueError, match=r"^model\.memory\.offload: this family has no pipeline"):
        placed(family, ["vae"], torch.device("cpu"))


# --- parts that wait on the CPU


class Travels:
    """Where modules are sent, in order; there is no other device here to send them to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: dict[nn.Module, str]) -> None:
        self.made: list[tuple[str, str]] = []

        def to(module: nn.Module, device: Any) -> nn.Module:
            if module in names:
                self.made.append((names[module], str(device)))
            return module

        monkeypatch.setattr(nn.Module, "to", to)


def test_everything_goes_to_the_device_but_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    family = sd3_policy(sd3_folder(tmp_path / "sd3", t5=False)).family
    assert isinstance(family, HasPipeline)
    names = {part: name for name, part in family.pipeline.components.items() if isinstance(part, nn.Module)}
    travels = Travels(monkeypatch, names)
    waiting = placed(family, ["text_encoders", "vae"], torch.device("cuda"))
    assert travels.made == [("transformer", "cuda")]
    with waiting.here("text_encoders"), waiting.here("text_encoders"):
        assert travels.made[1:] == [("text_encoder", "cuda"), ("text_encoder_2", "cuda")]
    assert travels.made[3:] == [("text_encoder", "cpu"), ("text_encoder_2", "cpu")]  # once, at the very end
    assert placed(family, [], torch.device("cuda")).parts == {} and len(travels.made) == 5
    rests = placed(family, ["vae"], torch.device("cuda"), resting=True)
    assert [*rests.parts] == ["vae"] and rests.device == torch.device("cuda") and len(travels.made) == 5


def test_weights_that_waited_are_not_copied_back(monkeypatch: pytest.MonkeyPatch):
    net = nn.Linear(2, 3)
    here = [weight.data_ptr() for weight in net.parameters()]

    def to(module: nn.Module, device: Any) -> nn.Module:  # what a journey does to weights that are not there yet
        for weight in module.parameters():
            if device != "cpu" or weight.data_ptr() not in here:
                weight.data = weight.data.clone()
        return module

    monkeypatch.setattr(nn.Module, "to", to)
    with Offloaded({"vae": [net]}, "cuda").here("vae"):
        assert not {weight.data_ptr() for weight in net.parameters()} & {*here}
    assert [weight.data_ptr() for weight in net.parameters()] == here


def test_a_policy_fetches_what_it_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy = sd_policy(sd_folder(tmp_path / "sd"))
    pipeline = policy.family.pipeline  # pyright: ignore[reportAttributeAccessIssue]
    policy.offloaded = Offloaded({"text_encoders": [pipeline.text_encoder], "vae": [pipeline.vae]}, "cuda")
    travels = Travels(monkeypatch, {pipeline.text_encoder: "text", pipeline.vae: "vae"})
    policy.encode(FIRST["sd"].prompts)
    assert travels.made == [("text", "cuda"), ("text", "cpu")]  # both prompts in one journey
    latents = torch.zeros(1, 4, 8, 8)
    policy.encode_images(policy.decode(latents))
    assert travels.made[2:] == [("vae", "cuda"), ("vae", "cpu")] * 2
