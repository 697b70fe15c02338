"""Run files and overrides become one RunConfig: the layers in their order, paths, and what the hash stands for."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlalign import runfile
from rlalign.algorithms import grpo, nft
from rlalign.checks import warnings
from rlalign.config import RECIPES, RunConfig, find, load, recipes
from rlalign.overlays import presets
from rlalign.paths import model_path
from rlalign.policy import Window
from rlalign.workers.learner import EmaConfig
from tests.runs import RUN, run_file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_file(tmp_path)


def rewritten(run: Path, old: str, new: str) -> Path:
    assert old in RUN
    run.write_text(RUN.replace(old, new))
    return run


# --- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), ("1.e3", 1000.0), ("1e", "1e"), ("e5", "e5"), ("12", 12)],
)
def test_numbers_with_an_exponent(text: str, value: Any):
    ((_, got),) = runfile.parse([f"key={text}"])
    assert got == value and type(got) is type(value)


def test_yaml_anchors_still_work(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("base: &b {lr: 1, eps: 2}\noptimizer: {<<: *b, lr: 3}\n")
    assert runfile.read(path)["optimizer"] == {"lr": 3, "eps": 2}


def test_merging_leaves_its_inputs_alone():
    under: dict[str, Any] = {"a": {"b": 1, "c": (1, 2)}, "d": None}
    over: dict[str, Any] = {"a": {"b": 2}, "d": {"e": 3}}
    result = runfile.merged(under, over)
    runfile.put(result, (("d", "e"), 4))
    assert result == {"a": {"b": 2, "c": [1, 2]}, "d": {"e": 4}}
    assert under["a"]["b"] == 1 and over["d"]["e"] == 3


# --- layers


def test_defaults_overlay_file_overrides(run: Path):
    """lr stands in the file, kernel in the overlay, weight_decay is a default: each can be overridden."""
    plain = load(run)
    assert plain.optimizer.lr == 1e-4
    assert plain.rollout.kernel == grpo.OVERLAY["rollout"]["kernel"]
    assert plain.optimizer.weight_decay == 1e-4
    changed = load(run, ["optimizer.lr=2e-4", "rollout.kernel=cps", "optimizer.weight_decay=0"])
    assert (changed.optimizer.lr, changed.rollout.kernel, changed.optimizer.weight_decay) == (2e-4, "cps", 0)


def test_the_file_wins_over_the_overlay(run: Path):
    assert load(rewritten(run, "num_steps: 4", "num_steps: 4, kernel: cps")).rollout.kernel == "cps"


def test_a_preset_sets_every_block_and_becomes_its_algorithm(run: Path):
    rewritten(run, "{name: grpo}", "flow_grpo_sd35")
    got, preset = load(run), grpo.PRESETS["flow_grpo_sd35"]
    assert got.algorithm.name == "grpo"
    assert got.algorithm.kl_weight == preset["algorithm"]["kl_weight"]
    assert got.rollout.guidance_scale == preset["rollout"]["guidance_scale"]
    assert got.ema is not None and got.ema.decay == preset["ema"]["decay"]
    assert got.rollout.size == (1, 2), "the file's own keys stay"


def test_choosing_another_algorithm_drops_what_the_file_says_for_its_own(run: Path):
    text = RUN.replace("num_steps: 4", "num_steps: 4, kernel: cps, noise_level: 0.3, train_fraction: 0.5")
    run.write_text(text.replace("{name: grpo}", "{name: grpo, clip_range: 0.1}"))
    chosen = load(run, ["algorithm=nft"])
    assert isinstance(chosen.algorithm, nft.Config)
    assert chosen.rollout.solver == nft.OVERLAY["rollout"]["solver"]
    assert chosen.rollout.kernel == "flow_sde", "covered by grpo's overlay, so dropped"
    assert chosen.rollout.train_fraction == 0.5, "not covered, so kept"
    assert chosen.rollout.num_steps == 4


def test_choosing_the_algorithm_that_the_file_has_changes_nothing(run: Path):
    rewritten(run, "{name: grpo}", "{name: grpo, clip_range: 0.1}")
    assert load(run, ["algorithm=grpo"]) == load(run)


def test_overrides_of_the_chosen_algorithm(run: Path):
    assert load(run, ["algorithm=nft", "algorithm.beta=0.5"]).algorithm.beta == 0.5
    assert load(run, ["algorithm={name: nft, beta: 0.5}"]).algorithm.beta == 0.5
    assert load(run, ["algorithm=nft_sd35_ocr", "rollout.size=[1,2]"]).algorithm.old_decay == 2


def test_short_spellings(run: Path):
    assert load(run, ["runtime=local", "runtime.scorers=2"]).runtime.scorers == 2
    assert [one.use for one in load(run, ["rewards=composition"]).rewards] == ["composition"]
    both = load(run, ["rewards.1={use: ocr, role: monitor}", "rewards.0.weight=2"]).rewards
    assert [(one.name, one.weight) for one in both] == [("first", 2), ("ocr", 1)]
    assert load(run, ["ema.decay=0.5"]).ema == EmaConfig(decay=0.5)
    assert load(run, ["rollout.window={size: 1, range: [0, 2]}"]).rollout.window == Window(size=1, range=(0, 2))


def test_an_algorithm_and_a_family_of_ones_own(run: Path):
    (run.parent / "mine.py").write_text(
        "from rlalign.algorithms.grpo import *\nfrom rlalign.algorithms.grpo import OVERLAY\n"
    )
    (run.parent / "family.py").write_text("from rlalign.models.analytic import *\n")
    run.write_text(RUN.replace("{name: grpo}", "mine.py").replace("family: analytic", "family: family.py"))
    got = load(run)
    assert got.algorithm.name == str(run.parent / "mine.py")
    assert got.algorithm_module.Algorithm(got.algorithm).needs.trajectory
    assert got.model.family == str(run.parent / "family.py")


# --- paths


def test_paths_count_from_the_file_and_in_overrides_from_here(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    got = load(run, ["prompts.heldout=other.txt", "rewards.1=mine.py:f"])
    assert got.prompts.train == run.parent / "train.txt"
    assert got.prompts.heldout == here / "other.txt"
    assert got.rewards[0].use == f"{run.parent}/reward.py:first"
    assert got.rewards[1].use == f"{here}/mine.py:f"
    assert load(run, ["rewards.0.venv=env"]).rewards[0].venv == str(here / "env")
    assert load(rewritten(run, "retries: 0", "retries: 0, venv: env")).rewards[0].venv == str(run.parent / "env")


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("zoo:scenes", "zoo:scenes"),
        ("stabilityai/sd3", "stabilityai/sd3"),
        ("./models/mine", "HERE/models/mine"),
        ("there", "HERE/there"),
    ],
)
def test_model_paths(run: Path, path: str, meant: str):
    (run.parent / "there").mkdir()
    got = load(rewritten(run, "lora: null", f"lora: null, path: '{path}'")).model.path
    assert got == meant.replace("HERE", str(run.parent))


# --- resolved


def test_the_resolved_config_reads_back_as_the_same(run: Path, tmp_path: Path):
    got = load(run, ["algorithm=nft", "runtime.samplers=2", "ema={decay: 0.5}"])
    path = tmp_path / "resolved" / "config.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(got.tree(), sort_keys=False))
    again = load(path)
    assert again.tree() == got.tree()
    assert again.config_hash == got.config_hash


@pytest.mark.parametrize(
    "same",
    [
        "steps=7",
        "checkpoint.every=3",
        "runtime.samplers=4",
        "runtime.scorers=2",
        "reporting.tensorboard=true",
        "rewards.0.venv=/envs/mine",
        "rewards.0.pip=[hpsv2]",
        *("model.memory.gradient_checkpointing=true", "model.memory.offload=[vae]", "model.memory.embeddings=kept"),
    ],
)
def test_the_hash_ignores_what_does_not_move_the_numbers(run: Path, same: str):
    assert load(run, [same]).config_hash == load(run).config_hash


@pytest.mark.parametrize(
    "other",
    [
        *("seed=1", "optimizer.lr=2e-4", "runtime.threads_per_worker=2", "runtime.max_staleness=1"),
        *("rewards.0.weight=2", "model.memory.vae_tiling=true", "model.memory.attention=native"),
    ],
)
def test_the_hash_sees_what_moves_the_numbers(run: Path, other: str):
    assert load(run, [other]).config_hash != load(run).config_hash


def test_a_run_can_be_moved_but_its_prompts_not_changed(run: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    moved.mkdir()
    run_file(moved)
    before = load(run).config_hash
    assert load(moved / "run.yaml").config_hash == before
    (moved / "train.txt").write_text("another prompt\n")
    assert load(moved / "run.yaml").config_hash != before


# --- what is shipped


@pytest.mark.parametrize("name", recipes())
@pytest.mark.parametrize("algorithm", [None, "grpo", "nft", "ddpo"])
def test_recipes_are_sound(name: str, algorithm: str | None):
    """With other algorithms, too: the size of samples stays the file's, presets that keep an average go with it."""
    got = load(find(name), [f"algorithm={algorithm}", "evaluation.weights=policy"] if algorithm else [])
    assert isinstance(got, RunConfig)
    assert got.rollout.size == load(find(name)).rollout.size
    train = got.prompts.train
    assert isinstance(train, Path) and train.parent == RECIPES / "prompts" and train.exists()
    assert model_path(got.model.path)


def test_the_recipes_are_these():
    small = {"quickstart", "ocr", "jpeg"}
    large = {"sd35_24gb", "flux_80gb", "flow_grpo_sd35_8gpu", "nft_sd35_8gpu", "dance_flux_8gpu", "qwen_image_cluster"}
    assert set(recipes()) == small | large | {"ddpo_sd15", "flow_factory_flux_8gpu"}


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_are_sound(run: Path, name: str):
    """A run file without a word on how to sample and learn."""
    kept = [line for line in RUN.splitlines() if line.startswith(("model", "prompts", "rewards"))]
    run.write_text("\n".join(kept).replace(", lora: null", ""))
    module, preset = presets()[name]
    size = [] if "size" in preset.get("rollout", {}) else ["rollout.size=[1, 2]"]
    got = load(run, [f"algorithm={name}", *size])
    assert isinstance(got.algorithm, module.Config)
    for block in {"rollout", "algorithm", "optimizer"} & preset.keys():
        values = getattr(got, block)
        assert values == type(values).model_validate({**values.model_dump(), **preset[block]})


@pytest.mark.parametrize("name", ["flow_grpo_flux", "flow_grpo_kontext", "dance_flux", "dance_flux_lora", "mix_flux"])
def test_presets_for_nets_that_are_told_their_guidance_leave_out_the_second_pass(run: Path, name: str):
    lines = [line for line in RUN.splitlines() if line.startswith(("model", "prompts", "rewards"))]
    run.write_text("\n".join([*lines[1:], "model: {family: flux, path: .}"]))
    told = load(run, [f"algorithm={name}"])
    assert told.rollout.guidance_scale == 1 and told.model.model_dump()["guidance"] == 3.5
    assert "second pass" not in "\n".join(warnings(told))
    assert "second pass" in "\n".join(warnings(load(run, [f"algorithm={name}", "rollout.guidance_scale=3.5"])))


def test_only_times_of_the_rollouts_grid_are_limited_by_it(run: Path):
    few = ["rollout.num_steps=4", "algorithm.num_times=5"]
    assert load(run, ["algorithm=ram", *few]).algorithm.num_times == 5  # drawn from (0, 1)
    with pytest.raises(ValueError, match="only 4 levels"):
        load(run, ["algorithm=ram", "algorithm.times=grid", *few])


def test_doubtful_settings_are_warned_of(run: Path):
    def words(*overrides: str) -> str:
        return "\n".join(warnings(load(run, overrides)))

    assert words() == ""
    assert "optimizer.lr 0.1" in words("optimizer.lr=0.1")
    assert "groups of 4" in words("rollout.samples_per_prompt=4")
    assert "padding" in words("rollout.micro_batch=64")
    assert "optimizer.eps" in words("optimizer.eps=1e-8")
    assert "judges without guidance" in words("rollout.guidance_scale=4.5")
    assert words("rollout.guidance_scale=4.5", "evaluation.guidance_scale=4.5") == ""
    assert "loss scaling" in words("model.dtype=float16", "model.lora={rank: 2}", "optimizer.lr=1e-3")
    assert words("model.dtype=bfloat16") == ""
    assert "averages its ema weights in bfloat16" in words("model.dtype=bfloat16", "ema={decay: 0.9}")
    assert "training file" in words(f"prompts.heldout={run.parent}/train.txt")
    assert "repeats" in words("rollout.prompts_per_step=5")
    (run.parent / "heldout.txt").write_text("a\n")
    assert "'a'" in words()
