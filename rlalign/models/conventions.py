"""What most text-to-image pipelines of diffusers have in common, and how one is found not to have it."""

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from inspect import Parameter
from typing import Any

from diffusers import AutoencoderDC, AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

ARGUMENTS = {
    "prompt_embeds": "encoder_hidden_states",
    "prompt_attention_mask": "encoder_attention_mask",
    "pooled_prompt_embeds": "pooled_projections",
}
"""What encode_prompt returns, and what the net calls it."""
VAES = (AutoencoderKL, AutoencoderDC)


def missing(pipeline: Any) -> str | None:
    """What a pipeline does not have of the conventions; the first thing."""
    parts, nets, names = pipeline.components, net_names(pipeline), returned_names(pipeline)
    scheduler, known = parts.get("scheduler"), ("timestep", *ARGUMENTS.values())
    if len(nets) != 1:
        return f"one net called transformer or unet, and this one has {len(nets)}"
    if not isinstance(parts.get("vae"), VAES):
        return f"a vae of images ({' or '.join(one.__name__ for one in VAES)})"
    if "prompt_embeds" not in names or "negative_prompt_embeds" not in names:
        return "a method encode_prompt that returns prompt_embeds and negative_prompt_embeds"
    net = parts[nets[0]]
    if strange := [name for name in required(net.forward)[1:] if name not in known]:
        return f"a net that needs nothing but {', '.join(known)}, and this one needs {strange[0]}"
    if more := net.config.get("addition_embed_type"):
        return f"a net that needs nothing but {', '.join(known)}, and this one needs a {more} as well"
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not hasattr(scheduler, "alphas_cumprod"):
        return "a scheduler with alphas_cumprod, or FlowMatchEulerDiscreteScheduler"
    if scheduler.config.get("use_dynamic_shifting"):
        return "a scheduler without dynamic shifting"
    return None


def net_names(pipeline: Any) -> list[str]:
    return [name for name in ("transformer", "unet") if pipeline.components.get(name) is not None]


def returned_names(pipeline: Any) -> list[str]:
    """What encode_prompt calls the values that it returns, in order."""
    if not hasattr(pipeline, "encode_prompt"):
        return []
    tree = ast.parse(textwrap.dedent(inspect.getsource(pipeline.encode_prompt)))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    values = returned[-1].elts if returned and isinstance(returned[-1], ast.Tuple) else []
    return [value.id for value in values if isinstance(value, ast.Name)]


def encoded_prompts(pipeline: Any, texts: Sequence[str], negatives: Sequence[str]) -> dict[str, Tensor]:
    """encode_prompt as the pipeline's call uses it, and its values by name."""
    wanted = inspect.signature(pipeline.encode_prompt).parameters
    call = inspect.signature(pipeline.__call__).parameters
    known = {name: one.default for name, one in call.items() if one.default is not Parameter.empty}
    known |= {name: texts for name in ("prompt", *required(pipeline.encode_prompt)) if name.startswith("prompt")}
    known |= {"negative_prompt": negatives, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    known["device"] = pipeline.device
    values = pipeline.encode_prompt(**{name: known[name] for name in wanted if name in known})
    return dict(zip(returned_names(pipeline), values, strict=True))


def required(function: Any) -> list[str]:
    """Names of the arguments that have no default."""
    named = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    parameters: Mapping[str, Parameter] = inspect.signature(function).parameters
    return [name for name, one in parameters.items() if one.default is Parameter.empty and one.kind in named]


def deterministic(scheduler: Any) -> Any:
    """Euler's on the flow path and DDIM's on any other, with the settings of this one."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    if scheduler.config.get("use_flow_sigmas"):
        return FlowMatchEulerDiscreteScheduler(shift=scheduler.config.flow_shift)
    leading = scheduler.config.get("timestep_spacing") == "leading"  # DDIM's step does not go by "linspace"
    return DDIMScheduler.from_config(
        scheduler.config, clip_sample=False, timestep_spacing="leading" if leading else "trailing"
    )
