"""Tiny random networks of the kinds that features come from, as folders of transformers."""

from pathlib import Path

import torch
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

SIDE = 16


def clip_folder(folder: Path) -> Path:
    """With its half for texts, as CLIPs are published."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        both = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = {**both, "image_size": SIDE, "patch_size": 8, "initializer_factor": 5.0}
        config = CLIPConfig(vision_config=vision, text_config={**both, "vocab_size": 8}, projection_dim=6)
        CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    return folder


def dinov2_folder(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=8,
            mlp_ratio=2,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=8,
            initializer_range=0.5,
        )
        Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder
