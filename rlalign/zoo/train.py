"""Makes the scenes pipeline: a VAE on drawn scenes, then text encoders and transformer by flow matching on its latents.

Four steps, each seeded, each on CPU or GPU:

    python -m rlalign.zoo.train draw --to work/scenes.safetensors
    python -m rlalign.zoo.train vae --scenes work/scenes.safetensors --to work/vae
    python -m rlalign.zoo.train flow --scenes work/scenes.safetensors --vae work/vae --to work/flow
    python -m rlalign.zoo.train assemble --vae work/vae --networks work/flow/FILE --to rlalign/zoo/scenes

`flow` keeps a file per evaluation, named by step and held-out accuracy without guidance, to choose from.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rlalign.zoo.evaluate import accuracies, as_prompts, paint, reconstruct
from rlalign.zoo.networks import Networks, assemble, build_tokenizer, build_vae, save
from rlalign.zoo.prompts import composition_prompts, pretraining_scene
from rlalign.zoo.scenes import caption, draw

_CHUNK = 2000  # scenes per task of a drawing process, and its seed's address
_KL_WEIGHT = 3e-4
_DROP_CAPTION = 0.1
_EMA_DECAY = 0.998
_WARMUP = 300


def render(count: int, seed: int, workers: int) -> tuple[Tensor, Tensor]:
    """Drawn scenes, uint8 [N, 3, H, W], and their captions' tokens, [N, T]."""
    with ProcessPoolExecutor(workers) as pool:
        chunks = list(pool.map(partial(_render_chunk, seed), range(-(-count // _CHUNK))))
    images, captions = zip(*chunks, strict=True)
    tokens = build_tokenizer()([text for chunk in captions for text in chunk], padding="max_length", truncation=True)
    return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2), torch.tensor(tokens.input_ids)


def _render_chunk(seed: int, index: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng((seed, index))
    scenes = [pretraining_scene(rng) for _ in range(_CHUNK)]
    return np.stack([draw(scene, rng) for scene in scenes]), [caption(scene) for scene in scenes]


class Clock:
    """Counts steps until their number or the time is used up."""

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds, self.start = steps, seconds, time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def progress(self, step: int) -> float:
        """0 at the start, 1 at the end of whichever budget ends first."""
        return max(step / self.steps, self.elapsed() / self.seconds)

    def __iter__(self) -> Iterator[int]:
        step = 0
        while self.progress(step) < 1:
            yield step
            step += 1


def train_vae(images: Tensor, channels: tuple[int, ...], batch: int, rate: float, clock: Clock) -> AutoencoderKL:
    """L1 and squared error plus a little KL; the learning rate falls along a cosine. images: uint8 [N, 3, H, W]"""
    vae = build_vae(channels).to(images.device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, weight_decay=0.0, fused=images.is_cuda)
    for step in clock:
        set_rate(optimizer, rate * min(1, (step + 1) / _WARMUP) * (1 + np.cos(np.pi * clock.progress(step))) / 2)
        pixels = images[torch.randint(len(images), (batch,), device=images.device)] / 127.5 - 1
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss = vae_loss(vae, pixels)
        descend(loss, vae, optimizer)
        if step % 500 == 0:
            print(f"vae step {step} loss {loss.item():.4f} {clock.elapsed():.0f} s", flush=True)
    return vae


def vae_loss(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """pixels: [B, 3, H, W] in [-1, 1]."""
    moments = vae.encode(pixels).latent_dist
    difference = vae.decode(moments.mean + moments.std * torch.randn_like(moments.mean)).sample - pixels
    kl = (moments.mean**2 + moments.var - 1 - moments.logvar).mean() / 2
    return difference.abs().mean() + difference.square().mean() + _KL_WEIGHT * kl


@torch.inference_mode()
def encode_all(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Posterior means. [N, 8, 8, 8]"""
    return torch.cat([vae.encode(batch / 127.5 - 1).latent_dist.mode() for batch in images.split(2000)])


def normalise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Write into the VAE's config what makes latents zero mean and unit variance."""
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def train_flow(
    networks: Networks, latents: Tensor, tokens: Tensor, batch: int, rate: float, clock: Clock
) -> Iterator[tuple[int, Networks]]:
    """Flow matching with a constant learning rate. Yields the steps done so far and the moving average."""
    average = AveragedModel(networks, multi_avg_fn=get_ema_multi_avg_fn(_EMA_DECAY))
    assert isinstance(average.module, Networks)
    optimizer = torch.optim.AdamW(
        networks.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.99), fused=latents.is_cuda
    )
    empty = torch.tensor(build_tokenizer()("", padding="max_length").input_ids, device=tokens.device)
    for step in clock:
        set_rate(optimizer, rate * min(1, (step + 1) / _WARMUP))
        rows = torch.randint(len(latents), (batch,), device=latents.device)
        dropped = torch.rand(batch, 1, device=latents.device) < _DROP_CAPTION
        loss = flow_loss(networks, latents[rows], torch.where(dropped, empty, tokens[rows]))
        descend(loss, networks, optimizer)
        average.update_parameters(networks)
        if step % 500 == 0:
            print(f"flow step {step} loss {loss.item():.4f} {clock.elapsed():.0f} s", flush=True)
        yield step + 1, average.module


def flow_loss(networks: Networks, clean: Tensor, tokens: Tensor) -> Tensor:
    """|v(x, sigma) - (noise - clean)|^2 at x = (1 - sigma) clean + sigma noise, sigma logit-normal as in SD3.

    https://arxiv.org/abs/2403.03206, section 3.1. clean: [B, 8, 8, 8], tokens: [B, T]
    """
    noise = torch.randn_like(clean)
    sigma = torch.randn(len(clean), device=clean.device).sigmoid()  # [B]
    along = sigma[:, None, None, None]
    return mse_loss(networks((1 - along) * clean + along * noise, sigma, tokens), noise - clean)


def descend(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step with clipped gradients."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def keep(networks: Networks, vae: AutoencoderKL, folder: Path, step: int, images_each: int) -> None:
    """Evaluate on the held-out compositions and save under a name that says how well it did."""
    prompts = as_prompts(composition_prompts(heldout=True), images_each)
    pipeline = assemble(networks, vae)
    plain, guided = (accuracies(paint(pipeline, prompts, guidance), prompts) for guidance in (1.0, 3.0))
    print(f"step {step} unguided {rounded(plain)} guided {guided['score']:.3f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in networks.state_dict().items()}
    config = networks.transformer.config
    shape = {"width": str(config.caption_projection_dim), "layers": str(config.num_layers)}
    save_file(tensors, folder / f"step_{step:06d}_{plain['score']:.3f}_{guided['score']:.3f}.safetensors", shape)


def rounded(numbers: dict[str, float]) -> dict[str, float]:
    """For printing."""
    return {name: round(number, 2) for name, number in numbers.items()}


def read_networks(path: Path) -> Networks:
    """The networks of one kept file, in float32."""
    with safe_open(path, "pt") as file:
        networks = Networks(**{name: int(value) for name, value in file.metadata().items()})
    networks.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return networks


def run_draw(args: argparse.Namespace) -> None:
    """Draw scenes once, to be used again and again."""
    images, tokens = render(args.count, args.seed, args.workers)
    args.to.parent.mkdir(parents=True, exist_ok=True)
    save_file({"images": images.contiguous(), "tokens": tokens}, args.to)


def run_vae(args: argparse.Namespace) -> None:
    """Train, normalise, save, and report how well fresh reconstructions are read."""
    images = load_file(args.scenes)["images"].to(args.device)
    vae = train_vae(images, tuple(args.channels), args.batch, args.rate, Clock(args.steps, args.seconds)).eval()
    normalise(vae, encode_all(vae, images[:20000]))
    vae.save_pretrained(args.to)
    report_reconstructions(vae)


def report_reconstructions(vae: AutoencoderKL) -> None:
    """Accuracy of the composition reward on fresh held-out scenes and on what the VAE makes of them."""
    rng = np.random.default_rng(1)
    prompts = as_prompts(composition_prompts(heldout=True), images_each=4)
    images = torch.from_numpy(np.stack([draw(dict(prompt.metadata), rng) for prompt in prompts])).permute(0, 3, 1, 2)
    print("drawn", rounded(accuracies(images, prompts)))
    print("reconstructed", rounded(accuracies(reconstruct(vae, images), prompts)), flush=True)


def run_flow(args: argparse.Namespace) -> None:
    """Encode the scenes, train and keep."""
    scenes = load_file(args.scenes, device=args.device)
    vae = AutoencoderKL.from_pretrained(args.vae).to(args.device).eval()
    latents = encode_all(vae, scenes["images"])
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    networks = Networks(args.width, args.layers).to(args.device)
    clock = Clock(args.steps, args.seconds)
    # Tensors made in inference mode cannot enter autograd, hence the clone.
    for step, average in train_flow(networks, latents.clone(), scenes["tokens"], args.batch, args.rate, clock):
        if step % args.every == 0:
            keep(average, vae, args.to, step, args.images_each)


def run_assemble(args: argparse.Namespace) -> None:
    """Write the diffusers folder."""
    save(assemble(read_networks(args.networks), AutoencoderKL.from_pretrained(args.vae)), args.to)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    draw_, vae, flow, assemble_ = (
        _command(commands, name, function)
        for name, function in (("draw", run_draw), ("vae", run_vae), ("flow", run_flow), ("assemble", run_assemble))
    )
    draw_.add_argument("--count", type=int, default=300_000)
    draw_.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw")
    for command, steps, batch, rate in ((vae, 3500, 256, 2e-3), (flow, 5000, 1024, 1e-3)):
        command.add_argument("--scenes", type=Path, required=True, help="file that `draw` wrote")
        command.add_argument("--steps", type=int, default=steps, help="at most so many steps")
        command.add_argument("--seconds", type=float, default=1e6, help="at most so long")
        command.add_argument("--batch", type=int, default=batch)
        command.add_argument("--rate", type=float, default=rate, help="learning rate")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    vae.add_argument("--channels", type=int, nargs="+", default=[16, 16, 48], help="per resolution")
    flow.add_argument("--width", type=int, default=96, help="of the transformer; a multiple of 32")
    flow.add_argument("--layers", type=int, default=3)
    flow.add_argument("--every", type=int, default=500, help="steps between evaluations")
    flow.add_argument("--images-each", type=int, default=4, help="pictures per held-out prompt in an evaluation")
    assemble_.add_argument("--networks", type=Path, required=True, help="file that `flow` kept")
    for command in (flow, assemble_):
        command.add_argument("--vae", type=Path, required=True, help="folder that `vae` wrote")
    return parser.parse_args()


def _command(commands: Any, name: str, function: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=function.__doc__)
    command.set_defaults(function=function)
    command.add_argument("--to", type=Path, required=True, help="what to write")
    command.add_argument("--seed", type=int, default=0)
    return command


def main() -> None:
    """Run one step."""
    args = parse()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.function(args)


if __name__ == "__main__":
    main()
