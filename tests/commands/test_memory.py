"""plan counts memory by role, from configs alone where there are no weights, and names what would make it fit."""

import re
from pathlib import Path

import pytest
import yaml

from rlalign.build import load_policy
from rlalign.commands.fitting import advice, lines, with_key
from rlalign.commands.memory import Account, Facts, accounts
from rlalign.commands.plan import measure_kept
from rlalign.config import RunConfig, load
from rlalign.models import sizes
from rlalign.models.lora import LoraConfig
from rlalign.types import Prompt
from tests.published import FLUX, published
from tests.runs import call
from tests.tiny import sd3_folder

GIB = 2**30


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    published(folder / "flux", FLUX)
    (folder / "prompts.txt").write_text("a\nb\nc\nd\ne\nf\ng\nh\n")
    run = {
        "model": {"family": "flux", "path": "flux", "dtype": "bfloat16", "lora": {"rank": 32}},
        "prompts": {"train": "prompts.txt", "heldout": "prompts.txt"},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 8, "size": [512, 512], "micro_batch": 4},
        "rewards": ["jpeg_compressibility"],
        "algorithm": "grpo",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def facts(run: Path, *overrides: str) -> Facts:
    config = load(run, overrides)
    return Facts(config, sizes.read(Path(config.model.path)))


@pytest.fixture(scope="module")
def model(flux: Path) -> sizes.Model:
    found = sizes.read(flux.parent / "flux")
    assert found is not None
    return found


def account(run: Path, model: sizes.Model, *overrides: str) -> dict[str, Account]:
    config = load(run, overrides)
    return accounts(config, Facts(config, model))


def test_a_folder_of_configs_can_be_planned(flux: Path, capsys: pytest.CaptureFixture[str]):
    done = call(capsys, "plan", str(flux), "--gpu-memory", "80")
    assert done.code == 0
    assert "transformer 11,901,408,320" in done.out and "text_encoder_2 4,762,310,656" in done.out
    assert re.search(r"memory +about 8\d\.\d GiB: weights 31\.4 GiB, training state 1\.3 GiB, activations", done.out)
    assert "activations are estimated" in done.out
    assert re.search(r"warning +that is more than the 80\.0 GiB of a GPU; set model.memory.gradient_checkp", done.out)


def test_a_hub_id_that_is_not_here_is_unknown(flux: Path, capsys: pytest.CaptureFixture[str]):
    done = call(capsys, "plan", str(flux), "model.path=nobody/has-this")
    assert done.code == 0 and "nobody/has-this is not here; a folder with its config.json files is enough" in done.out


def test_the_worst_moment_counts_once():
    learner = Account({"weights": 5, "state": 1}, {"activations": 4})
    sampler = Account({"weights": 5, "copies": 2}, {"VAE": 3, "encoders": 1})
    assert (learner.total, sampler.total) == (10, 10)
    assert learner.beside(sampler).total == 5 + 1 + 5 + 2 + 4
    assert learner.beside(sampler, shared=("weights", "copies")).total == 10
    assert "activations" in learner.words and "encoders" not in sampler.words


def test_what_trains_has_state(flux: Path, model: sizes.Model):
    """16 bytes a number of LoRA, or of all weights in bfloat16 but for the 2 of the weight itself."""
    adapters, everything = 89_653_248, 11_901_408_320

    def state(*overrides: str) -> float:
        return account(flux, model, *overrides)[""].stays["training state"]

    assert state() == 16 * adapters
    assert state("optimizer.kind=adamw8bit") == 10 * adapters
    assert state("ema={decay: 0.9}") == 20 * adapters
    assert state("model.lora=null") == (2 + 4 + 8 + 2) * everything  # gradient, master, moments, reference
    assert state("model.lora=null", "model.dtype=float32") == (4 + 8 + 4) * everything

    def at_the_step(*overrides: str) -> float:
        return account(flux, model, *overrides)[""].passes["gradients in float32"]

    assert at_the_step("model.lora=null") == 2 * everything  # activations are gone by then
    assert at_the_step() == at_the_step("model.lora=null", "model.dtype=float32") == 0


def test_who_is_on_a_gpu(flux: Path, model: sizes.Model):
    own = account(flux, model, "runtime=ray")
    assert [*own] == ["learner rank", "sampler"]
    both = account(flux, model, "runtime=ray", "runtime.placement=colocated")["learner rank with its sampler"]
    assert both.stays["weights"] == 2 * own["sampler"].stays["weights"]
    turns = account(flux, model, "runtime=ray", "runtime.placement=colocated", "runtime.offload_idle=true")
    assert max(one.total for one in turns.values()) == own["learner rank"].total
    cut = account(flux, model, "runtime=ray", "runtime.learners=4", "model.lora=null")["learner rank"]
    whole = account(flux, model, "runtime=ray", "model.lora=null")["learner rank"]
    assert cut.stays["training state"] == whole.stays["training state"] / 4


def test_parts_that_wait_are_fetched_one_after_the_other(flux: Path, model: sizes.Model):
    sampler = account(flux, model, "runtime=ray")["sampler"]
    waiting = account(flux, model, "runtime=ray", "model.memory.offload=[text_encoders, vae]")["sampler"]
    encoders, vae = 2 * model.numel("text_encoder_2"), 4 * model.numel("vae")
    assert sampler.stays["weights"] - waiting.stays["weights"] == encoders + vae
    assert waiting.passes["text encoders that are fetched"] == encoders
    assert waiting.passes["the VAE at work"] == sampler.passes["the VAE at work"] + vae


@pytest.mark.parametrize(
    ("gpu", "overrides", "first"),
    [
        (60, [], "model.memory.gradient_checkpointing=true"),
        (34, ["model.memory.gradient_checkpointing=true"], "model.memory.offload=[text_encoders]"),
        (50, ["model.dtype=float32", "model.memory.gradient_checkpointing=true"], "model.dtype=bfloat16"),
        (
            80,
            ["model.lora=null", "model.memory.offload=[text_encoders,vae]"],
            "model.memory.gradient_checkpointing=true",
        ),
    ],
)
def test_the_advice_is_what_makes_it_fit(flux: Path, model: sizes.Model, gpu: float, overrides: list[str], first: str):
    config = load(flux, overrides)
    words = advice(Facts(config, model), "", gpu * GIB)
    said = re.findall(r"(\S+)=(\S+) \(about", words)
    assert words.startswith(f"set {first} ") and "still too much" not in words
    advised = load(flux, [*overrides, *(f"{key}={value}" for key, value in said)])
    assert accounts(advised, Facts(advised, model))[""].total <= gpu * GIB
    short = load(flux, [*overrides, *(f"{key}={value}" for key, value in said[:-1])])
    assert accounts(short, Facts(short, model))[""].total > gpu * GIB


COLOCATED = ("runtime=ray", "runtime.placement=colocated")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model={family: sd3, train: [transformer, text_encoder]}"],
        ["algorithm=draft", "rewards.0=saturation"],
        ["rollout.retain=true"],
        ["runtime.samplers=2"],
        [*COLOCATED, "runtime.transport=collective"],
        [*COLOCATED, "runtime.max_staleness=1"],
        [*COLOCATED, "runtime={learners: 2, samplers: 2}", "model.lora=null"],
    ],
    ids=" ".join,
)
def test_what_is_advised_is_not_refused(flux: Path, model: sizes.Model, overrides: list[str]):
    facts = Facts(load(flux, overrides), model)
    for role in accounts(facts.config, facts):
        said = re.findall(r"(\S+)=(\S+) \(about", advice(facts, role, 10 * GIB))
        for number in range(len(said)):
            load(flux, [*overrides, *(f"{key}={value}" for key, value in said[: number + 1])])


def test_what_nothing_makes_fit(flux: Path, model: sizes.Model):
    assert "still too much" in advice(Facts(load(flux), model), "", 10 * GIB)


@pytest.fixture
def tiny(tmp_path: Path, flux: Path) -> Path:
    """A run file of a model that is small enough to be loaded."""
    sd3_folder(tmp_path / "sd3")
    run = yaml.safe_load(flux.read_text())
    run["model"] = {"family": "sd3", "path": str(tmp_path / "sd3"), "lora": {"rank": 4}}
    run["model"] |= {"text_encoder_3": False, "max_sequence_length": 0}
    run["rollout"]["size"] = [16, 16]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "prompts.txt").write_text("a\n")
    return tmp_path / "run.yaml"


def test_a_model_that_was_loaded_is_measured(tiny: Path, capsys: pytest.CaptureFixture[str]):
    done = call(capsys, "plan", str(tiny))
    assert done.code == 0 and "activations and trajectories are measured on the model" in done.out

    def activations(*overrides: str) -> int:
        config = load(tiny, overrides)
        return measure_kept(config, load_policy(config)).activations

    assert 0 < activations("model.memory.gradient_checkpointing=true") < activations() / 2


def test_embeddings_count_once_a_prompt(tiny: Path):
    """And those to guide away from, too."""
    config = load(tiny)
    policy = load_policy(config)
    kept, ((cond, _),) = measure_kept(config, policy), policy.encode([Prompt("a")])
    assert kept.embeddings == sum(tensor.nbytes for tensor in cond.values())
    guided = measure_kept(load(tiny, ["rollout.guidance_scale=3"]), policy)
    assert guided.embeddings == 2 * kept.embeddings and guided.trajectory == kept.trajectory
    stays = accounts(config, Facts(config, policy=policy, kept=kept))[""].stays
    assert stays["trajectories of a step"] == 64 * kept.trajectory + 8 * kept.embeddings


def test_what_trains_is_known_whatever_else_changes(flux: Path):
    """Of a policy without a folder."""
    config = load(flux, ["model={family: analytic, path: '', lora: null}", "model.dtype=float32", "rollout.size=[1,1]"])
    facts = Facts(config, policy=load_policy(config))
    changed = with_key(config, "model.memory.vae_slicing", True)
    assert facts.trained(changed) == facts.trained(config) > 0
    assert facts.trained(with_key(config, "model.lora", LoraConfig())) == 0  # unknown


def test_keys_deep_down(flux: Path):
    config: RunConfig = with_key(load(flux), "model.memory.offload", ["vae"])
    assert config.model.memory.offload == ["vae"] and load(flux).model.memory.offload == []
    assert [name for name, _ in lines(Facts(config), 1.0)] == ["weights"]
