"""The fallback takes pipelines that nobody wrote a family for, and says why it does not take others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from rlalign.models.diffusers import Config, Family
from rlalign.types import Prompt, Size
from tests.contracts.families import FAMILIES
from tests.contracts.families.wan import text_encoder
from tests.models.stable_diffusion import vae
from tests.tiny import sd3_folder, t5_tokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, **config: Any) -> Family:
    return Family.load(Config(**config), str(folder), torch.float32, "cpu")


def auraflow(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        )
        AuraFlowPipeline(
            transformer=transformer,
            vae=vae(),
            text_encoder=text_encoder(),
            tokenizer=t5_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        ).save_pretrained(folder)
    return folder


def test_a_pipeline_without_a_family(tmp_path: Path):
    """AuraFlow tells its net times from 0 to 1; the mask of its text is not among the net's arguments."""
    folder = auraflow(tmp_path)
    family = load(folder, time_scale=0.001)
    cond, uncond = family.encode([Prompt("red")])
    assert family.prediction == "velocity" and list(cond) == ["prompt_embeds"] and uncond is not None
    assert family.decode(torch.zeros(1, *family.latent_shape(Size(16, 32))), Size(16, 32)).shape == (1, 3, 16, 32)
    with pytest.raises(
        ValueError, match=r"AuraFlowPipeline needs a family of its own: .* away from .* model.time_scale"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("sdxl", "wants a net that needs nothing but .*, and this one needs a text_time as well"),
        ("flux-dev", "wants a method encode_prompt that returns prompt_embeds and negative_prompt_embeds"),
        ("wan", r"wants a vae of images \(AutoencoderKL or AutoencoderDC\)"),
    ],
)
def test_pipelines_that_are_otherwise_are_refused(name: str, why: str, tmp_path: Path):
    folder = next(case for key, case in FAMILIES.items() if key.startswith(name)).write(tmp_path)
    with pytest.raises(ValueError, match=f"Pipeline needs a family of its own: .*{why}"):
        load(folder)


def test_a_shift_by_size_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="wants a scheduler without dynamic shifting"):
        load(sd3_folder(tmp_path, t5=True, scheduler={"use_dynamic_shifting": True}))


def test_a_folder_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no DiffusionPipeline could be loaded from"):
        load(tmp_path)


def test_the_trial_leaves_the_pipeline_as_it_was(tmp_path: Path):
    family = load(FAMILIES["diffusers-pixart"].write(tmp_path))
    assert type(family.pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert family.pipeline.config.scheduler[1] == "DPMSolverMultistepScheduler"
