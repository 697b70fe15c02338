"""Adapters: deterministic, in float32, and gone without a trace where they should be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from rlalign.models import sd3
from rlalign.models.lora import LORA_FILE, LoraConfig, attach, freeze, full, merged, reference_weights, save_lora
from rlalign.types import Prompt, Size
from tests.tiny import sd3_folder, sd3_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return sd3_folder(tmp_path_factory.mktemp("sd3"))


def nets() -> dict[str, nn.Module]:
    return {"net": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), "other": nn.Linear(4, 4)}


def attached(seed: int, **config: Any) -> dict[str, nn.Parameter]:
    return attach(nets(), ["net"], LoraConfig(**{"rank": 2, **config}), ["0", "1"], seed)


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_the_seed_alone_decides(init: str):
    first, other = attached(0, init=init), attached(1, init=init)
    torch.rand(5)
    again = attached(0, init=init)
    assert list(first) == sorted(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert not any(first[name].any() for name in first if "lora_B" in name)


def test_the_global_generator_does_not_move():
    both, before = nets(), torch.random.get_rng_state()
    attach(both, ["net"], LoraConfig(rank=2), ["0"], 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_names_say_which_net():
    assert list(attached(0)) == [f"net.{layer}.lora_{end}.default.weight" for layer in "01" for end in "AB"]


def test_chosen_targets_replace_the_family_s():
    assert {name.split(".")[1] for name in attached(0, targets=("1",))} == {"1"}


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no net called 'unet' to train; there are: net, other"):
        attach(nets(), ["unet"], LoraConfig(), ["0"], 0)
    with pytest.raises(ValueError, match="unet"):
        full(nets(), ["unet"])
    with pytest.raises(ValueError, match="to_q"):
        attach(nets(), ["net"], LoraConfig(targets=("to_q",)), ["0"], 0)


def test_full_trains_the_named_nets_alone():
    both = nets()
    parameters = full(both, ["other"])
    assert list(parameters) == ["other.bias", "other.weight"]
    assert not any(parameter.requires_grad for parameter in both["net"].parameters())


def test_adapters_of_a_half_precision_net_are_float32(folder: Path):
    family = sd3.Family.load(
        sd3.Config(text_encoder_3=False, max_sequence_length=0), str(folder), torch.bfloat16, "cpu"
    )
    parameters = attach(family.nets, ["transformer"], LoraConfig(rank=2), family.lora_targets, 0)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    cond, _ = family.encode([Prompt("red cat")])
    assert {value.dtype for value in cond.values()} == {torch.bfloat16}
    output = family.predict(torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor([500.0]), cond, Size(16, 16))
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in parameters.values())
    assert family.decode(output.detach(), Size(16, 16)).dtype == torch.float32


def test_reference_weights_come_back_after_an_error():
    both = nets()
    parameters = attach(both, ["net"], LoraConfig(rank=2), ["0"], 0)
    nn.init.ones_(parameters["net.0.lora_B.default.weight"])
    x = torch.ones(1, 4)
    adapted = both["net"](x)
    with pytest.raises(RuntimeError, match="inside"), reference_weights(both):
        assert not torch.equal(both["net"](x), adapted)
        raise RuntimeError("inside")
    assert torch.equal(both["net"](x), adapted)
    assert all(parameter.requires_grad for parameter in parameters.values())


def test_merged_nets_are_plain_copies():
    both = nets()
    plain = {name for name, _ in both["net"].named_parameters()}
    parameters = attach(both, ["net"], LoraConfig(rank=2), ["0", "1"], 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        nn.init.normal_(parameter, std=0.1, generator=generator)  # small: alpha / rank is 32
    x = torch.ones(3, 4)
    before = both["net"](x)
    copies = merged(both)
    assert {name for name, _ in copies["net"].named_parameters()} == plain
    torch.testing.assert_close(copies["net"](x), before)
    nn.init.zeros_(next(copies["net"].parameters()))
    assert torch.equal(both["net"](x), before)


def test_merging_takes_no_room_beside_the_net(monkeypatch: pytest.MonkeyPatch):
    """A GPU that trained it may have none: no weight is copied where it lies."""
    both = nets()
    attach(both, ["net"], LoraConfig(rank=2), ["0", "1"], 0)

    def copied(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        raise AssertionError("a weight was copied on its own device")

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", copied)
    assert merged(both)["net"] is not both["net"]


def test_exported_file(folder: Path, tmp_path: Path):
    policy = sd3_policy(folder, rank=4, shake=0.1)
    path = save_lora(policy.family.nets, tmp_path / "new", policy.weights("policy"))
    assert path == tmp_path / "new" / LORA_FILE
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert names == {name.replace(".default", "") for name in policy.parameters}
    assert metadata["transformer.r"] == 4 and metadata["transformer.lora_alpha"] == 64


def test_frozen_weights_lie_as_new_ones_do(folder: Path):
    """Files are mapped at odd addresses, and there products have other last bits than on copies of the weights."""
    family = sd3.Family.load(sd3.Config(text_encoder_3=False), str(folder), torch.float32, "cpu")
    tensors = [*family.nets["transformer"].parameters(), *family.nets["transformer"].buffers()]
    assert {tensor.data_ptr() % 64 for tensor in tensors} == {0}
    layer = nn.Linear(2, 2)
    freeze(layer)
    assert not layer.training and not layer.weight.requires_grad
