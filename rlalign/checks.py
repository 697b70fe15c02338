"""What only several blocks together can tell: settings that cannot work are refused, doubtful ones warned of."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlalign.algorithms.advantages import AdvantageSettings
from rlalign.algorithms.base import epochs_of
from rlalign.algorithms.regularise import penalty_of
from rlalign.models.lora import encoders_among
from rlalign.plugins import did_you_mean
from rlalign.prompts import read
from rlalign.prompts.matching import shared
from rlalign.prompts.sources import others
from rlalign.scoring import check_rewards

if TYPE_CHECKING:
    from rlalign.config import RunConfig  # which calls this file

NEEDS_NO_LEVEL = ("memoryless", "flash_sde", "ddpm")  # kernels that bring their own noise
LR_LORA, LR_FULL = (1e-5, 3e-3), (1e-7, 1e-4)
SMALL_GROUP = 8
LARGE_EPS = 1e-9


def refuse(config: "RunConfig") -> None:
    """ValueError, one sentence that says what to change, for the first setting that cannot work."""
    for problem in _problems(config):
        raise ValueError(problem)


def _problems(config: "RunConfig") -> Iterator[str]:
    rollout, evaluation = config.rollout, config.evaluation
    algorithm = config.algorithm_module.Algorithm(config.algorithm)
    needs = algorithm.needs
    try:
        check_rewards(config.rewards)
    except ValueError as error:
        yield f"rewards: {error}"
    if config.updates_per_step > rollout.prompts_per_step:
        yield (
            f"algorithm.updates_per_step is {config.updates_per_step}, but a step has only "
            f"{rollout.prompts_per_step} groups to share out; lower it, or raise rollout.prompts_per_step"
        )
    if needs.trajectory:
        yield from _no_noise(config)
    if needs.recorded and rollout.source != "data":
        yield (
            f"this setting of algorithm {config.algorithm.name} trains on given images, which a run has with "
            "rollout.source: data alone; set it, and name them in prompts.train"
        )
    if needs.fresh and config.runtime.max_staleness:
        yield (
            f"runtime.max_staleness is {config.runtime.max_staleness}, but this setting of algorithm "
            f"{config.algorithm.name} is right for fresh samples only; set it to 0, or for ddpo algorithm.mode: is"
        )
    if needs.densities and rollout.cps_logprob == "unscaled":
        yield (
            f"rollout.cps_logprob is unscaled, which is no density, and this setting of algorithm "
            f"{config.algorithm.name} compares densities; set it to gaussian"
        )
    yield from _no_such_reward(config, penalty_of(algorithm).gate)
    if needs.exact_states and rollout.latent_store != "fp32":
        yield (
            f"rollout.latent_store is {rollout.latent_store}, but algorithm {config.algorithm.name} recovers means "
            "from the states that a step leaves, which are not to be rounded; set it to fp32"
        )
    yield from _no_siblings(config, needs.candidates)
    if rollout.retain:
        yield from _no_graph(config)
    yield from _no_journey(config, needs.reward_gradient)
    if needs.reward_gradient:
        yield from _no_distance(config)
    yield from _no_full(config)
    yield from _no_stale_text(config)
    times = getattr(config.algorithm, "num_times", None)  # only forward-process algorithms have it
    on_grid = getattr(config.algorithm, "times", "grid") == "grid"  # else times are drawn, as many as one likes
    if on_grid and times is not None and times > rollout.num_steps:
        yield f"algorithm.num_times is {times}, but the rollout has only {rollout.num_steps} levels; lower it"
    if evaluation.weights == "ema" and config.ema is None:
        yield "evaluation.weights is ema, but the run keeps none; set ema={decay: 0.9} or evaluation.weights=policy"
    if evaluation.weights == "old" and "old" not in needs.copies:
        yield "evaluation.weights is old, but this algorithm keeps no old policy; set evaluation.weights=policy"
    best, stale = config.checkpoint.keep_best, config.runtime.max_staleness
    if best is not None and stale and not best.startswith("eval/"):
        yield (
            f"checkpoint.keep_best is {best}, which with runtime.max_staleness {stale} was measured under the weights "
            "of earlier checkpoints; name a metric of eval/, or set runtime.max_staleness to 0"
        )
    if evaluation.num_images % evaluation.samples_per_prompt:
        whole = max(1, evaluation.num_images // evaluation.samples_per_prompt) * evaluation.samples_per_prompt
        yield (
            f"evaluation.num_images is {evaluation.num_images}, which is no multiple of evaluation.samples_per_prompt "
            f"{evaluation.samples_per_prompt}; set it to {whole}"
        )


def _no_noise(config: "RunConfig") -> Iterator[str]:
    """A trajectory algorithm learns from stochastic steps."""
    rollout = config.rollout
    if rollout.num_steps == 1:
        yield "rollout.num_steps is 1, and the last step is never trained, so nothing would be; set it to 2 or more"
    if rollout.noise_level == 0 and rollout.kernel not in NEEDS_NO_LEVEL:
        yield (
            f"rollout.noise_level is 0, which makes the steps of {rollout.kernel} deterministic, and this algorithm "
            "learns from stochastic ones; set it above 0"
        )


def _no_such_reward(config: "RunConfig", gate: Sequence[str]) -> Iterator[str]:
    """Keys of the algorithm that name rewards with role train."""
    trained = sorted(reward.name for reward in config.rewards if reward.role == "train")
    named: dict[str, Iterable[str]] = {"penalty.gate": gate}
    if isinstance(config.algorithm, AdvantageSettings):
        diversity = config.algorithm.diversity or "pixels"
        named |= {"constraints": config.algorithm.constraints, "diversity": {diversity} - {"pixels"}}
    for key, names in named.items():
        if unknown := sorted({*names} - {*trained}):
            told = did_you_mean(unknown[0], trained)
            yield f"algorithm.{key} names {unknown[0]!r}, and no reward with role train is called that{told}"
    if gate and {*gate} >= {*trained}:
        yield "algorithm.penalty.gate names all rewards with role train; leave out those that are trained"


def _no_siblings(config: "RunConfig", wanted: bool) -> Iterator[str]:
    """Candidates of a step are other rows than samples: whole chains are no substitute, nor the other way round."""
    name, number = config.algorithm.name, config.rollout.candidates
    if wanted and number is None:
        yield f"algorithm {name} compares candidates of one step; set rollout.candidates, 4 for instance"
    if number is not None and not wanted:
        yield f"rollout.candidates is {number}, but algorithm {name} compares finished samples; leave it out"


def _no_graph(config: "RunConfig") -> Iterator[str]:
    """A graph lives in one process, and is right until the weights move."""
    runtime = config.runtime
    if not config.algorithm_module.Algorithm(config.algorithm).needs.log_probs_only:
        yield "rollout.retain is for algorithms that need log-probs alone, grpo and ddpo without penalty; leave it out"
    updates = config.updates_per_step * epochs_of(config.algorithm)
    if runtime.kind != "local" or runtime.samplers > 1 or runtime.max_staleness or updates > 1:
        yield (
            "rollout.retain needs sampler and learner in one process and one update a step: set runtime.kind: local, "
            "runtime.samplers: 1, runtime.max_staleness: 0 and, of algorithm, updates_per_step and epochs_per_step: 1, "
            "or leave it out"
        )
    if config.model.memory.gradient_checkpointing:
        yield "rollout.retain keeps what model.memory.gradient_checkpointing throws away; leave one of them out"


def _no_journey(config: "RunConfig", differentiated: bool) -> Iterator[str]:
    """A part that waits on the CPU is fetched by one worker, and gone when a backward pass comes by."""
    offload, runtime = config.model.memory.offload, config.runtime
    if "vae" in offload and differentiated:
        yield (
            f"model.memory.offload has the vae, but {config.algorithm.name} needs it in the backward pass of its "
            "rewards; leave the vae out"
        )
    if offload and runtime.kind == "local" and (runtime.samplers > 1 or runtime.max_staleness):
        yield (
            "model.memory.offload moves parts for one worker at a time: set runtime.samplers: 1 and "
            "runtime.max_staleness: 0, or runtime.kind: ray"
        )


def _no_distance(config: "RunConfig") -> Iterator[str]:
    """Told before environments are made, which takes minutes."""
    for reward in config.rewards:
        if reward.apart and reward.role == "train":
            yield (
                f"reward {reward.name!r} has an environment of its own, out of which no gradient comes: leave venv and "
                "pip out, give it role: monitor, or choose an algorithm that needs no gradient"
            )


def _no_full(config: "RunConfig") -> Iterator[str]:
    """What cannot be done with all weights."""
    if config.model.lora is not None:
        return
    if config.model.dtype == "float16":
        yield (
            "model.dtype is float16 and model.lora null: without loss scaling, gradients of float16 weights are mostly "
            "0; set model.dtype to bfloat16 or float32, or train LoRA"
        )
    if config.runtime.offload_idle and config.runtime.learners > 1:
        yield (
            "runtime.offload_idle cannot move weights that are cut into parts, as those of several learners are when "
            "model.lora is null; leave it out, or train LoRA"
        )
    if len(config.model.train or []) > 1 and config.runtime.learners > 1:
        yield (
            "model.train names several nets, which several learners cannot train when model.lora is null: each rank "
            "would wait at a net that the others' rows need not; name one, set runtime.learners to 1, or train LoRA"
        )
    if config.optimizer.kind == "adamw8bit" and config.runtime.learners > 1:
        yield (
            "optimizer.kind adamw8bit cannot step weights that are cut into parts, as those of several learners are "
            "when model.lora is null; set runtime.learners to 1, optimizer.kind to adamw, or train LoRA"
        )


def _no_stale_text(config: "RunConfig") -> Iterator[str]:
    """Embeddings of a text encoder that trains are made anew, with a graph."""
    encoders = encoders_among(config.model.train or [])
    if not encoders:
        return
    named, memory = f"model.train names {encoders[0]}", config.model.memory
    if config.model.lora is None:
        yield f"{named}, which trains by LoRA only; set model.lora"
    if memory.embeddings is not None:
        yield f"{named}, whose embeddings change with every update; leave model.memory.embeddings out"
    if "text_encoders" in memory.offload:
        yield f"{named}, which is always in use; leave text_encoders out of model.memory.offload"
    if config.rollout.retain:
        yield f"{named}, of which rollout.retain keeps no graph; leave rollout.retain out"


def warnings(config: "RunConfig") -> list[str]:
    """One sentence for each setting that works but is probably not meant."""
    return [*_doubts(config)]


def _doubts(config: "RunConfig") -> Iterator[str]:
    rollout = config.rollout
    low, high = LR_LORA if config.model.lora else LR_FULL
    if not low <= config.optimizer.lr <= high:
        kind = "LoRA" if config.model.lora else "full fine-tuning"
        yield f"optimizer.lr {config.optimizer.lr:g} is outside {low:g} to {high:g}, where {kind} is known to work"
    if config.model.dtype == "float16":
        yield "model.dtype float16 comes without loss scaling: small gradients on their way through the net are 0"
    copies = [*(["ema"] if config.ema else []), *config.algorithm_module.Algorithm(config.algorithm).needs.copies]
    if config.model.dtype == "bfloat16" and config.model.lora is None and copies:
        yield (
            f"full fine-tuning in bfloat16 averages its {' and '.join(copies)} weights in bfloat16, which swallows "
            "changes below 1/256 of a weight; use LoRA or float32 where the average decays slowly"
        )
    if rollout.samples_per_prompt < SMALL_GROUP and rollout.source == "samples":
        yield f"groups of {rollout.samples_per_prompt} give noisy advantages; {SMALL_GROUP} or more are usual"
    images = rollout.prompts_per_step * rollout.samples_per_prompt
    if rollout.micro_batch > images:
        yield f"rollout.micro_batch {rollout.micro_batch} exceeds the {images} images of a step; the rest is padding"
    trajectory = config.algorithm_module.Algorithm(config.algorithm).needs.trajectory
    if trajectory and rollout.logprob_reduction == "mean" and config.optimizer.eps > LARGE_EPS:
        yield f"optimizer.eps {config.optimizer.eps:g} can swallow the tiny gradients of mean log-probs; 1e-15 is safe"
    yield from _guidance_doubts(config)
    yield from _prompt_doubts(config)


def _guidance_doubts(config: "RunConfig") -> Iterator[str]:
    trained, judged = config.rollout.guidance_scale, config.evaluation.guidance_scale
    told = "guidance" in type(config.model).model_fields  # of families whose net is told a number
    if told and trained != 1:
        yield (
            f"rollout.guidance_scale {trained:g} adds a second pass of the net, away from the negative prompt, to "
            "model.guidance, which this family is told anyway; 1 leaves it out"
        )
    elif trained != 1 and judged == 1:
        yield f"rollout.guidance_scale is {trained:g}, but evaluation.guidance_scale 1 judges without guidance"


def _prompt_doubts(config: "RunConfig") -> Iterator[str]:
    if _same(config.prompts.train, config.prompts.heldout):
        yield "prompts.heldout is the training file, so evaluation cannot show whether anything generalises"
        return
    train = read(config.prompts, "train")
    wanted = config.rollout.prompts_per_step
    if len(train.prompts) < wanted:
        yield f"prompts.train has {len(train.prompts)} prompts, so a step of {wanted} repeats some"
    for part in others(config.prompts):
        if both := shared(train.prompts, read(config.prompts, part).prompts):
            yield (
                f"{len(both)} prompts of prompts.train ask for the same as prompts of prompts.{part}, "
                f"{min(prompt.title for prompt in both)!r} for one; prompts.disjoint: true leaves them out"
            )


def _same(one: object, other: object) -> bool:
    if isinstance(one, Path) and isinstance(other, Path):
        return one.exists() and other.exists() and one.samefile(other)
    return one == other
