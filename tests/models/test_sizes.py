"""How large a model is, read off its folder: with its weights there, and with its configs alone."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from rlalign.models import sizes
from rlalign.models.lora import LoraConfig, attach
from tests.models.stable_diffusion import sd_folder, sd_policy
from tests.tiny import sd3_folder, sd3_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd3_folder(tmp_path_factory.mktemp("sd3"), t5=True)


def without_weights(folder: Path) -> Path:
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


def total(model: sizes.Model | None) -> dict[str, int]:
    assert model is not None
    return {part: model.numel(part) for part in model.parts}


def test_configs_tell_as_much_as_weights(tmp_path: Path, folder: Path):
    whole, bare = sizes.read(folder), sizes.read(without_weights(sd3_folder(tmp_path, t5=True)))
    assert whole is not None and bare is not None and whole.has_weights and not bare.has_weights
    assert set(whole.parts) == {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    assert total(whole) == total(bare)
    assert {n: list(s) for n, s in whole.parts["transformer"].items()} == dict(bare.parts["transformer"])
    assert "text_encoder_3" not in total(sizes.read(folder, ["text_encoder_3"]))


def test_what_is_no_pipeline_and_what_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert sizes.read(tmp_path) is None and sizes.found(str(tmp_path)) == tmp_path
    assert sizes.found("nobody/has-this") is None and sizes.found("/nowhere/at-all") is None
    assert sizes.found("my models/flux") is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
        (b"", "no whole file"),
        (b'\x40\0\0\0\0\0\0\0{"a": {', "no whole file"),
        (b'\x03\0\0\0\0\0\0\0{"a', "no whole file"),
    ],
    ids=["git-lfs", "empty", "cut", "not JSON"],
)
def test_weights_that_are_not_whole_are_named(content: bytes, words: str, tmp_path: Path):
    folder = sd3_folder(tmp_path)
    (file,) = (folder / "transformer").glob("*.safetensors")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} .*{words}"):
        sizes.read(folder)


def test_a_class_that_no_library_has_is_unknown(tmp_path: Path):
    folder = without_weights(sd3_folder(tmp_path))
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "OtherTransformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    model = sizes.read(folder)
    assert model is not None and model.unknown == ("transformer",) and "vae" in model.parts


@pytest.mark.parametrize("net", ["unet", "transformer"])
def test_it_counts_what_trains(net: str, tmp_path: Path, folder: Path):
    place = sd_folder(tmp_path / "sd") if net == "unet" else folder
    family = (sd_policy if net == "unet" else sd3_policy)(place, lora=False).family
    model, lora = sizes.read(place), LoraConfig(rank=3)
    assert model is not None
    shapes, targets = model.parts[net], family.lora_targets
    everything = sum(tensor.numel() for tensor in family.nets[net].state_dict().values())  # a few are buffers
    assert sizes.trained(shapes, net, None, targets) == everything
    adapters = attach(family.nets, [net], lora, targets, 0)
    assert sizes.trained(shapes, net, lora, targets) == sum(parameter.numel() for parameter in adapters.values())


# --- activations


def pipeline(folder: Path, **parts: dict[str, Any]) -> sizes.Model:
    for part, config in parts.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    return sizes.Model(folder, {part: {} for part in parts})


VAE = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}
FLUX = {"in_channels": 64, "patch_size": 1, "num_attention_heads": 24, "attention_head_dim": 128}
LAYERS = {"num_layers": 19, "num_single_layers": 38}
GIB = 2**29  # numbers of 2 bytes


def test_a_transformer_keeps_so_many_numbers_a_token(tmp_path: Path):
    """FLUX at 512 x 512: 1,024 tokens of the picture and 512 of the text, 57 blocks of 3,072 channels."""
    model = pipeline(tmp_path, transformer=FLUX | LAYERS, vae=VAE)
    one = (1024 + 512) * 3072
    assert sizes.kept_numbers(model, "transformer", (512, 512, 1), 512, False) == one * 57 * sizes.BLOCK
    assert sizes.kept_numbers(model, "transformer", (512, 512, 1), 512, True) == one * (57 + sizes.BLOCK)
    assert sizes.decoded_numbers(model, (1024, 1024, 1)) == 6 * 1024**2 * 128


SD15 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
}
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "transformer_layers_per_block": [1, 2, 10],
}


@pytest.mark.parametrize(
    ("unet", "side", "kept", "again"), [(SD15, 512, 1.05, 0.14), (SDXL, 1024, 7.4, 0.45)], ids=["SD 1.5", "SDXL"]
)
def test_unets_keep_what_was_counted_on_the_meta_device(
    unet: dict[str, Any], side: int, kept: float, again: float, tmp_path: Path
):
    """GiB a row in half precision, without the matrices of attention."""
    model = pipeline(tmp_path, unet=unet, vae=VAE | {"latent_channels": 4})
    found = sizes.kept_numbers(model, "unet", (side, side, 1), 77, False)
    assert found is not None and found / GIB == pytest.approx(kept, rel=0.1)
    less = sizes.kept_numbers(model, "unet", (side, side, 1), 77, True)
    assert less is not None and again / 2 < less / GIB < 2 * again


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("AutoencoderKLQwenImage", []),
        ("AutoencoderKLWan", []),
        ("AutoencoderKLWan", ["scale_factor_spatial", "scale_factor_temporal"]),  # as Wan 2.1 was published
        ("AutoencoderKLLTXVideo", []),
    ],
)
def test_films_are_as_small_as_their_vae_makes_them(kind: str, left_out: list[str], tmp_path: Path):
    """Whose config does not always say by how much; one channel and layer, one number a token."""
    with torch.device("meta"):
        vae: Any = getattr(diffusers, kind)()
    config = {key: value for key, value in vae.config.items() if key not in left_out}
    net = {"in_channels": 1, "patch_size": 1, "num_attention_heads": 1, "attention_head_dim": 1, "num_layers": 1}
    model, side = pipeline(tmp_path, transformer=net, vae=config), vae.spatial_compression_ratio
    length = getattr(vae, "temporal_compression_ratio", 4)
    numbers = sizes.kept_numbers(model, "transformer", (4 * side, 2 * side, 2 * length + 1), 7, False)
    assert numbers == (4 * 2 * 3 + 7) * sizes.BLOCK


def test_what_is_strange_is_not_estimated(tmp_path: Path):
    model = pipeline(tmp_path, transformer={"depth": 3}, vae={"what": 1}, unet={"depth": 3})
    assert sizes.kept_numbers(model, "transformer", (512, 512, 1), 77, False) is None
    (tmp_path / "vae" / "config.json").write_text(json.dumps(VAE))
    assert sizes.kept_numbers(model, "transformer", (512, 512, 1), 77, False) is None
