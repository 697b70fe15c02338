"""How well a pipeline paints its held-out prompts: composition accuracy per task and OCR score."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor

from rlalign.types import Prompt
from rlalign.zoo.networks import load
from rlalign.zoo.prompts import composition_prompts, text_prompts
from rlalign.zoo.scenes import Metadata, caption
from rlalign_rewards.composition import composition

SHIPPED = Path(__file__).parent / "scenes"
_BATCH = 256


def as_prompts(scenes: Sequence[Metadata], images_each: int = 1) -> list[Prompt]:
    """Every scene `images_each` times, in words."""
    return [Prompt(caption(metadata), metadata=metadata) for metadata in scenes for _ in range(images_each)]


@torch.inference_mode()
def paint(
    pipeline: StableDiffusion3Pipeline, prompts: Sequence[Prompt], guidance: float, steps: int = 20, seed: int = 0
) -> Tensor:
    """One picture per prompt. uint8 [B, 3, H, W]"""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        pipeline(
            [prompt.text for prompt in batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=0,
            generator=generator,
            output_type="pt",
        ).images
        for batch in _batches(prompts)
    ]
    return to_bytes(torch.cat(batches))


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """There and back. uint8 [B, 3, H, W]"""
    latents = vae.encode(images.to(vae.device, vae.dtype) / 127.5 - 1).latent_dist.mode()
    return to_bytes(vae.decode(latents).sample / 2 + 0.5)


def to_bytes(images: Tensor) -> Tensor:
    """[0, 1] to uint8, on the CPU."""
    return (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)


def accuracies(images: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Mean composition score, over all and per task."""
    scores = composition(images, prompts)
    return {name.removeprefix("task/"): score.nanmean().item() for name, score in scores.items()}


def ocr_score(images: Tensor, prompts: Sequence[Prompt]) -> float:
    """Mean of the catalogue's `ocr` reward, which needs the extra `rlalign[ocr]`."""
    from rlalign_rewards.ocr import ocr

    return torch.as_tensor(ocr(images, prompts)["score"]).mean().item()


def _batches(prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    return (prompts[start : start + _BATCH] for start in range(0, len(prompts), _BATCH))


def main() -> None:
    """Print one JSON line per guidance scale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", type=Path, default=SHIPPED, help="diffusers folder (default: the shipped one)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0], help="guidance scales to try")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps")
    parser.add_argument("--images-each", type=int, default=4, help="pictures per held-out prompt (128 compositions)")
    parser.add_argument("--ocr", action="store_true", help="read the held-out texts too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pipeline = load(args.pipeline, args.device)
    scenes = as_prompts(composition_prompts(heldout=True), args.images_each)
    texts = as_prompts(text_prompts(heldout=True), args.images_each)
    for guidance in args.guidance:
        results = accuracies(paint(pipeline, scenes, guidance, args.steps, args.seed), scenes)
        if args.ocr:
            results["ocr"] = ocr_score(paint(pipeline, texts, guidance, args.steps, args.seed), texts)
        print(json.dumps({"guidance": guidance} | {name: round(value, 3) for name, value in results.items()}))


if __name__ == "__main__":
    main()
