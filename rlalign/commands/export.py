"""export: trained weights for everyone else."""

import logging
from dataclasses import dataclass
from pathlib import Path

from rlalign.commands import usage
from rlalign.commands.problems import in_preparation
from rlalign.commands.push import Hub, hub_for, push
from rlalign.commands.runs import Trained, Weights, config_of_run, trained
from rlalign.config import RunConfig
from rlalign.files import in_words
from rlalign.models.lora import LORA_FILE, save_lora
from rlalign.models.single_file import readable_net, save_single_lora, save_single_net
from rlalign.paths import ZOO, model_path
from rlalign.prompts import read
from rlalign.prompts.matching import shared
from rlalign.reporting.card import Exported, picture_of, require_ours, write_card

SUFFIX = ".safetensors"
UNSEEN = "prompts that were never trained on"
WHAT = {
    "lora": "A LoRA",
    "pipeline": "The whole pipeline",
    "single lora": "A LoRA in one file",
    "single net": "The trained network in one file",
}


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for."""

    run: Path
    to: Path
    full: bool = False
    single_file: bool = False
    weights: Weights | None = None
    push: str | None = None
    public: bool = False

    def kind(self, config: RunConfig) -> str:
        """A key of ``WHAT``. Runs without adapters have no LoRA to write."""
        lora = config.model.lora is not None and not self.full
        if self.single_file:
            return "single lora" if lora else "single net"
        return "lora" if lora else "pipeline"

    def card(self) -> Path:
        """A folder's README.md, and beside a file one that is called as it is."""
        return self.to.with_suffix(".md") if self.to.suffix == SUFFIX else self.to / "README.md"

    def single_name(self) -> str:
        """What a single file is called in a folder."""
        return f"{self.run.resolve().name}{SUFFIX}"


def export(wish: Wish, hub: Hub | None = None) -> int:
    """Writes weights and their card, and uploads them if asked to; the exit code. ``hub`` is HfApi unless given."""
    with in_preparation():
        config = config_of_run(wish.run)
        kind = wish.kind(config)
        _refuse(wish, kind)
        if wish.push:
            hub = hub or hub_for(wish.push)
        model = trained(wish.run, config, wish.weights)
        with in_words(f"write into {wish.to}"):
            file = _written(wish, kind, model)
        exported = _exported(wish, config, kind, model, file)
        files = write_card(wish.run, wish.card(), exported)
    print(f"weights      {model.weights} after {model.step} updates")
    print(f"written      {file}")
    print(f"model card   {' and '.join(map(str, files))}")
    here = f"model.path {file} in a run file, or what the card says"
    if kind != "pipeline":
        here = _use(wish, kind, Base.of(config.model.path), model, file, str(file.parent))
    print(f"to use it    {here.splitlines()[-1]}")
    if wish.push and hub:
        with in_preparation():
            address = push(wish.to, wish.push, wish.public, hub)
        print(f"uploaded     {address}")
    return 0


def _refuse(wish: Wish, kind: str) -> None:
    """ValueError for what would be lost, or could not be done."""
    if wish.to.exists() and (wish.to.is_file() or wish.to.suffix == SUFFIX):
        raise ValueError(f"{wish.to} is there already; name another place with --to")
    if kind == "pipeline" and wish.to.suffix == SUFFIX:
        raise ValueError(f"--to {wish.to} is a file and a pipeline a folder; name a folder, or add --single-file")
    weights = {"lora": LORA_FILE, "pipeline": "model_index.json"}.get(kind, wish.single_name())
    require_ours(wish.card(), picture_of(wish.card()), *([] if wish.to.suffix == SUFFIX else [wish.to / weights]))
    if wish.public and not wish.push:
        raise ValueError("--public says who sees what --push uploads; add --push ORG/NAME")
    if wish.push and (wish.to.suffix == SUFFIX or (wish.to.exists() and any(wish.to.iterdir()))):
        raise ValueError(f"--push uploads a folder with all that is in it; {wish.to} has to be a new one")


def _written(wish: Wish, kind: str, model: Trained) -> Path:
    """Into the folder, under the name that its readers look for, or under the file name that was given."""
    policy, to = model.policy, wish.to
    family, tensors = policy.family, policy.weights(model.weights)
    if kind == "pipeline":
        logging.getLogger("diffusers").setLevel(logging.CRITICAL)  # it calls a text encoder that is not there an error
        with policy.using(model.weights):
            family.save_pipeline(to)
        return to
    if kind == "lora":
        folder, name = (to.parent, to.name) if to.suffix == SUFFIX else (to, LORA_FILE)
        return save_lora(family.nets, folder, tensors, name)
    net = readable_net(family.nets, sorted({name.partition(".")[0] for name in tensors}))
    file = to if to.suffix == SUFFIX else to / wish.single_name()
    if kind == "single lora":
        return save_single_lora(net, family.nets[net], tensors, file)
    with policy.using(model.weights):
        return save_single_net(family.nets[net], file)


def _exported(wish: Wish, config: RunConfig, kind: str, model: Trained, file: Path) -> Exported:
    base = Base.of(config.model.path)
    place = "." if wish.to.suffix == SUFFIX else wish.to.resolve().name  # a card tells names, not where they lie
    return Exported(
        what=WHAT[kind],
        relation="adapter" if kind in ("lora", "single lora") else "finetune",
        weights=model.weights,
        step=model.step,
        language="text" if wish.single_file else "python",
        use=_use(wish, kind, base, model, file, place),
        about=(config.algorithm_module.__doc__ or "").strip().partition("\n")[0],
        base=base.name if base.on_hub else None,
        base_folder=base.folder,
        heldout=_heldout(config),
    )


def _heldout(config: RunConfig) -> str:
    """What is known of the held-out prompts: where they still are to be read, how many of them were trained on."""
    try:
        heldout, train = (read(config.prompts, part).prompts for part in ("heldout", "train"))
    except (ValueError, OSError):
        return "held-out prompts"
    seen = len(shared(heldout, train))
    return f"held-out prompts, of which {seen} of {len(heldout)} were trained on" if seen else UNSEEN


def _use(wish: Wish, kind: str, base: "Base", model: Trained, file: Path, place: str) -> str:
    """Lines that load the export, from the Hub if it goes there, else from the folder that ``place`` names."""
    if kind == "pipeline":
        return usage.of_pipeline(wish.push or place, file)
    if kind == "lora":
        trained = dict.fromkeys(name.partition(".")[0] for name in model.policy.parameters)
        nets = {name: model.policy.family.nets[name] for name in trained}
        pipeline = usage.of_pipeline(base.name, base.folder)
        return usage.of_lora(pipeline, wish.push or place, wish.push is not None, file.name, nets)
    return usage.of_single_file(kind == "single lora", file)


@dataclass(frozen=True, slots=True)
class Base:
    """The model that was trained."""

    name: str  # to load it by: an id of the Hub, or the last part of where it lies
    on_hub: bool
    folder: Path | None  # if that is known without asking the Hub

    @staticmethod
    def of(path: str) -> "Base":
        if path.startswith(ZOO):
            return Base(f"rlalign/zoo/{path.removeprefix(ZOO)}", False, Path(model_path(path)))
        if not path or Path(path).is_absolute():
            return Base(Path(path).name, False, Path(model_path(path)) if path else None)
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "model_index.json")
        return Base(path, True, Path(cached).parent if isinstance(cached, str) else None)
