"""Configs of large pipelines as they were published, without their weights: all that `rlalign plan` needs.

folder = published(tmp_path / "flux", FLUX)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Parts = Mapping[str, tuple[list[str], dict[str, Any]]]
"""Library, class and config of each part."""

T5: tuple[list[str], dict[str, Any]] = (
    ["transformers", "T5EncoderModel"],
    {"model_type": "t5", "d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
    | {"feed_forward_proj": "gated-gelu"},
)
VAE: tuple[list[str], dict[str, Any]] = (
    ["diffusers", "AutoencoderKL"],
    {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "layers_per_block": 2}
    | {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
)
FLUX: Parts = {
    "transformer": (
        ["diffusers", "FluxTransformer2DModel"],
        {"guidance_embeds": True, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "patch_size": 1}
        | {"attention_head_dim": 128, "num_attention_heads": 24},
    ),
    "vae": VAE,
    "text_encoder_2": T5,
}
"""FLUX.1-dev, CLIP left out."""
SD35: Parts = {
    "transformer": (
        ["diffusers", "SD3Transformer2DModel"],
        {"attention_head_dim": 64, "num_attention_heads": 24, "num_layers": 24, "in_channels": 16, "out_channels": 16}
        | {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "caption_projection_dim": 1536}
        | {"dual_attention_layers": [*range(13)], "qk_norm": "rms_norm", "pos_embed_max_size": 384, "patch_size": 2},
    ),
    "vae": VAE,
    "text_encoder_2": (
        ["transformers", "CLIPTextModelWithProjection"],
        {"model_type": "clip_text_model", "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
        | {"num_attention_heads": 20, "projection_dim": 1280},
    ),
    "text_encoder_3": T5,
}
"""Stable Diffusion 3.5 medium, the smaller CLIP left out."""
QWEN_IMAGE: Parts = {
    "transformer": (
        ["diffusers", "QwenImageTransformer2DModel"],
        {"in_channels": 64, "out_channels": 16, "patch_size": 2, "num_layers": 60, "joint_attention_dim": 3584}
        | {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": [16, 56, 56]},
    ),
    "vae": (["diffusers", "AutoencoderKLQwenImage"], {"z_dim": 16, "temperal_downsample": [False, True, True]}),
    "text_encoder": (
        ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        {"model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
        | {"vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}},
    ),
}


def published(folder: Path, parts: Parts) -> Path:
    """Writes the configs; the folder."""
    for part, (_, config) in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({part: names for part, (names, _) in parts.items()}))
    return folder
