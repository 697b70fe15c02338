"""export: trained weights for everyone else."""

import logging
from pathlib import Path

from rlalign.commands.problems import in_preparation
from rlalign.commands.runs import Trained, Weights, config_of_run, trained
from rlalign.files import in_words
from rlalign.models.lora import save_lora


def export(folder: Path, to: Path, full: bool, weights: Weights | None) -> int:
    """Writes a LoRA that diffusers reads, or the whole pipeline; the exit code."""
    with in_preparation():
        config = config_of_run(folder)
        if to.exists() and (to.is_file() or to.suffix == ".safetensors"):
            raise ValueError(f"{to} is there already; name another place with --to")
        model = trained(folder, config, weights)
        with in_words(f"write into {to}"):
            lora = config.model.lora is not None and not full
            written = _write_lora(model, to) if lora else _write_pipeline(model, to)
    print(f"weights      {model.weights} after {model.step} updates")
    print(f"written      {written}")
    if lora:
        print(f"to use it    pipe.load_lora_weights({str(written.parent)!r}, weight_name={written.name!r})")
    else:
        print(f"to use it    model.path {written} in a run file, or the pipeline's own library (docs/quickstart.md)")
    return 0


def _write_lora(model: Trained, to: Path) -> Path:
    """Into the folder, under the name that diffusers looks for, or under the file name that was given."""
    nets, tensors = model.policy.family.nets, model.policy.weights(model.weights)
    if to.suffix != ".safetensors":
        return save_lora(nets, to, tensors)
    return save_lora(nets, to.parent, tensors).rename(to)


def _write_pipeline(model: Trained, to: Path) -> Path:
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)  # it calls a text encoder that is not there an error
    with model.policy.using(model.weights):
        model.policy.family.save_pipeline(to)
    return to
