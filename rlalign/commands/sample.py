"""sample: pictures from a run, from a run file's model, or from a model folder."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlalign import models, plugins, runfile
from rlalign.build import load_policy
from rlalign.commands.problems import in_preparation, in_training
from rlalign.commands.runs import Trained, Weights, config_of, is_run, trained
from rlalign.config import RunConfig, resolve
from rlalign.files import in_words
from rlalign.mdp.noise import Noise
from rlalign.paths import ZOO, model_path
from rlalign.prompts import read, read_image
from rlalign.reporting.grids import GRID, save_grid
from rlalign.rundir import RunDir
from rlalign.types import Prompt, Size, Unit
from rlalign.workers.sampler import Sampler

SHOWN_PROMPTS = 8  # from the held-out file, when no prompt is given
NO_PROMPTS = "none.txt"
NO_T5 = {"text_encoder_3": False, "max_sequence_length": 0}


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for; None where the run's evaluation settings decide."""

    target: str
    overrides: Sequence[str]
    prompts: Sequence[str]
    num: int
    seed: int
    steps: int | None
    guidance: float | None
    weights: Weights | None
    latents_in: Path | None
    latents_out: Path | None
    to: Path
    image: Path | None = None


def sample(wish: Wish) -> int:
    with in_preparation():
        config = _config(wish)
        prompts = _prompts(config, wish)
        model = trained(Path(wish.target), config, wish.weights) if _is_trained(wish.target) else None
        policy = model.policy if model else load_policy(config)
        unit = Unit(0, tuple(range(len(prompts))), prompts, wish.num, purpose="sample")
        plan = config.evaluation.rollout(config.rollout)
        sampler = Sampler(policy, Noise(wish.seed), "policy", keep_steps=False, shares=True)
        initial = sampler.initial_noise(unit, plan)
        if wish.latents_in:
            initial = _read_latents(wish.latents_in, initial.shape)
    with in_training():
        _, pictures = sampler.sample(unit, plan, model.weights if model else "policy", initial)
    with in_preparation():
        _save(wish, pictures, [prompt.text for prompt in prompts], initial)
    print(f"weights      {_described(model)}")
    print(f"sampling     {plan.num_steps} steps of {plan.solver}, guidance {plan.guidance_scale:g}, seed {wish.seed}")
    print(f"pictures     {wish.to / GRID} and {len(pictures)} single ones beside it")
    if wish.latents_out:
        print(f"latents      {wish.latents_out}")
    return 0


def _is_trained(target: str) -> bool:
    return is_run(target) and RunDir(Path(target)).info.exists()


def _config(wish: Wish) -> RunConfig:
    overrides = list(wish.overrides)
    overrides += [f"evaluation.num_steps={wish.steps}"] if wish.steps is not None else []
    overrides += [f"evaluation.guidance_scale={wish.guidance}"] if wish.guidance is not None else []
    if _is_trained(wish.target) or not _is_model(wish.target):
        return config_of(wish.target, overrides)
    return _config_of_model(wish.target, overrides)


def _is_model(target: str) -> bool:
    return target.startswith(ZOO) or (is_run(target) and not RunDir(Path(target)).config.exists())


def _config_of_model(path: str, overrides: Sequence[str]) -> RunConfig:
    """A bare model in the diffusers layout: the blocks that training would need are there in form only."""
    folder = Path(model_path(path))
    index = _json(folder / "model_index.json")
    if not index:
        raise ValueError(f"{path} is no pipeline of diffusers: it has no model_index.json; nor is it a run's folder")
    nets = [_json(folder / net / "config.json") for net in ("transformer", "unet")]
    side = next((net["sample_size"] for net in nets if isinstance(net.get("sample_size"), int)), 64)
    stages = len(_json(folder / "vae/config.json").get("block_out_channels", [0] * 4))
    family = _family(index.get("_class_name", ""))
    has_t5 = index.get("text_encoder_3", [None, None])[0] is not None
    tree: dict[str, Any] = {
        "model": {"family": family, "path": path, **(NO_T5 if family == "sd3" and not has_t5 else {})},
        "prompts": {"train": NO_PROMPTS, "heldout": NO_PROMPTS},
        "rollout": {"size": [side * 2 ** (stages - 1)] * 2},
        "rewards": ["none"],
    }
    return resolve(tree, Path(), path, runfile.parse(overrides))


def _family(pipeline: str) -> str:
    """The family whose file names that pipeline of diffusers, read and not imported, which would take seconds each."""
    for name in plugins.names("model"):
        source = Path(models.__path__[0], f"{name}.py").read_text(encoding="utf-8")
        if re.search(rf"\b{re.escape(pipeline)}\b", source):
            return name
    return "diffusers"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.is_file() else {}


def _prompts(config: RunConfig, wish: Wish) -> tuple[Prompt, ...]:
    if wish.prompts:
        image = None if wish.image is None else read_image(wish.image, Size(*config.rollout.size))
        return tuple(Prompt(text, image=image) for text in wish.prompts)
    if wish.image:
        raise ValueError("--image is what the prompts given with --prompt start from; give one or more")
    if isinstance(config.prompts.heldout, Path) and config.prompts.heldout.name == NO_PROMPTS:
        raise ValueError("a model folder brings no prompts; give one or more with --prompt TEXT")
    return read(config.prompts, "heldout", Size(*config.rollout.size)).first(SHOWN_PROMPTS)


def _read_latents(path: Path, shape: torch.Size) -> Tensor:
    if not path.is_file():
        raise ValueError(f"there is no file {path} with latents")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    if "latents" not in tensors or tensors["latents"].shape != shape:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{path} must hold `latents` of shape {list(shape)}, prompts x --num first; it has {found}")
    return tensors["latents"].float()


def _save(wish: Wish, pictures: Tensor, captions: list[str], initial: Tensor) -> None:
    with in_words(f"write pictures into {wish.to}"):
        wish.to.mkdir(parents=True, exist_ok=True)
        for row, picture in enumerate(pictures):
            frames = picture if picture.ndim == 4 else picture[None]  # [F, 3, H, W]
            for number, frame in enumerate(frames):
                name = f"{row // wish.num:03d}_{row % wish.num:02d}" + (f"_{number:03d}" if len(frames) > 1 else "")
                Image.fromarray(frame.permute(1, 2, 0).numpy()).save(wish.to / f"{name}.png")
    save_grid(pictures.unflatten(0, (-1, wish.num)), captions, wish.to / GRID)
    if wish.latents_out:
        with in_words(f"write {wish.latents_out}"):
            wish.latents_out.parent.mkdir(parents=True, exist_ok=True)
            save_file({"latents": initial.contiguous()}, wish.latents_out)


def _described(model: Trained | None) -> str:
    if model is None:
        return "the untrained model"
    return f"{'the running average (ema)' if model.weights == 'ema' else 'policy'} after {model.step} updates"
