"""Whether a family does what its pipeline does: two guided steps of both, from the same noise."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlalign.mdp.prediction import from_network
from rlalign.mdp.transition import ode
from rlalign.models.base import Family
from rlalign.types import Prompt, Size

STEPS, GUIDANCE = 2, 3.0
PROMPT = Prompt("a red cube on a table", negative="blue")


@torch.no_grad()
def distance(family: Family, pipeline: Any, sampler: Any, size: Size) -> float:
    """Of their latents, as a share of the norm; the pipeline is called with ``sampler`` as its scheduler."""
    weight = next(next(iter(family.nets.values())).parameters())
    noise = torch.randn(1, *family.latent_shape(size), generator=torch.Generator().manual_seed(0)).to(weight.device)
    theirs, mine = called(pipeline, sampler, noise.to(weight.dtype), size), stepped(family, noise, weight.dtype, size)
    return ((mine - theirs).norm() / theirs.norm()).item()


def called(pipeline: Any, sampler: Any, noise: Tensor, size: Size) -> Tensor:
    """What the pipeline makes of the noise."""
    wanted = {"use_resolution_binning": False, "negative_prompt": PROMPT.negative}
    known = inspect.signature(pipeline.__call__).parameters
    pipeline.set_progress_bar_config(disable=True)
    with replaced(pipeline, {"scheduler": type(sampler).from_config(sampler.config)}):
        latents: Tensor = pipeline(
            PROMPT.text,
            height=size.height,
            width=size.width,
            latents=noise,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="latent",
            return_dict=False,
            **{name: value for name, value in wanted.items() if name in known},
        )[0]
    return latents.float()


def stepped(family: Family, x: Tensor, dtype: torch.dtype, size: Size) -> Tensor:
    """What the family makes of it, with a net in that precision."""
    schedule, (cond, uncond) = family.schedule(STEPS, size), family.encode([PROMPT])
    assert uncond is not None
    for k in range(STEPS):
        now, nxt, time = schedule.level(k, x), schedule.level(k + 1, x), schedule.time[k : k + 1].to(x.device)
        positive, negative = (family.predict(x.to(dtype), time, half, size) for half in (cond, uncond))
        output = family.guide(positive, negative, GUIDANCE).to(x)
        x = ode(x, from_network(family.prediction, output, x, now), now, nxt, 0.0).mean
    return x


@contextmanager
def replaced(pipeline: Any, parts: Mapping[str, Any]) -> Iterator[None]:
    """The pipeline has these components inside the block."""
    own = {name: pipeline.components[name] for name in parts}
    pipeline.register_modules(**parts)
    try:
        yield
    finally:
        pipeline.register_modules(**own)
