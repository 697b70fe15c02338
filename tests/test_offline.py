"""Recorded images with recorded scores in place of samples: pairs are learned, and what is wrong is said in words."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rlalign import plugins
from rlalign.build import build, load_policy
from rlalign.commands.problems import BadInput
from rlalign.commands.record import Wish, record
from rlalign.config import find, load
from rlalign.evaluation.heldout import evaluate
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, RolloutConfig
from rlalign.prompts import PromptSet, drawn, read_image
from rlalign.scoring import RewardConfig, load_reward
from rlalign.types import Prompt, Size, Trajectory, Unit
from rlalign.workers.sampler import Sampler
from tests.models.stable_diffusion import sd_folder
from tests.runs import Done, call, without_pages

Capture = pytest.CaptureFixture[str]
RECORDED = "rlalign_rewards.recorded:recorded"

# --- the toy: two grey pixels, seen as two numbers from -5 to 5

TOY = f"""\
model: {{family: analytic, means: [[0, 0]], lora: null}}
prompts: {{train: train.jsonl, heldout: heldout.txt}}
rollout: {{source: data, prompts_per_step: 2, samples_per_prompt: 2, num_steps: 4, size: [1, 2], micro_batch: 4}}
rewards: [{{use: "{RECORDED}", retries: 0}}, {{use: saturation, role: monitor}}]
algorithm: {{name: dpo}}
optimizer: {{lr: 1e-2}}
evaluation: {{every: 2, num_images: 8, num_steps: 2}}
checkpoint: {{every: 1}}
reporting: {{tensorboard: false}}
steps: 4
"""


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps({"text": f"prompt {n}", "metadata": row}) for n, row in enumerate(rows)]
    (folder / "train.jsonl").write_text("\n".join(lines))


def grey(path: Path, *values: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.frombytes("L", (len(values), 1), bytes(values)).save(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six prompts with three images each; the brighter, the better."""
    monkeypatch.chdir(tmp_path)
    without_pages(monkeypatch)
    rows: list[dict[str, Any]] = []
    for prompt in range(6):
        names = [f"images/{prompt}_{place}.png" for place in range(3)]
        for place, name in enumerate(names):
            grey(tmp_path / name, 100 + 30 * place, 120 + 7 * prompt)
        rows.append({"images": names, "scores": [0, 0.5, 1]})
    write(tmp_path, rows)
    (tmp_path / "heldout.txt").write_text("d\ne\n")
    (tmp_path / "run.yaml").write_text(TOY)
    return tmp_path


def rows(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def trained(capsys: Capture, *arguments: str) -> Done:
    done = call(capsys, "train", "run.yaml", *arguments)
    assert done.code == 0, done.err
    return done


def test_what_is_trained_on_is_what_is_recorded(here: Path, capsys: Capture):
    trained(capsys, "rollout.samples_per_prompt=3", "rollout.prompts_per_step=6", "rollout.micro_batch=18")
    for row in rows("runs/run"):
        assert row["reward/mean"] == row["reward/recorded/mean"] == 0.5
        assert row["staleness"] == 0
    first, *_, last = rows("runs/run")
    assert first["policy_loss"] == pytest.approx(math.log(2))
    assert last["policy_loss"] < first["policy_loss"] and last["accuracy"] > 0.5


def test_new_pictures_have_no_recorded_scores(here: Path, capsys: Capture):
    trained(capsys)
    evaluated = {name for row in rows("runs/run") for name in row if name.startswith("eval/reward")}
    assert evaluated == {"eval/reward/saturation/mean"}


def test_refl_goes_on_with_pre_training_on_recorded_images(here: Path, capsys: Capture):
    """Its rewards judge what it samples itself; what is recorded is for the second term."""
    trained(capsys, "algorithm={name: refl, pretraining: 1.0}", "rewards=[{use: saturation}]", "rollout.num_steps=4")
    errors = [row["pretraining_error"] for row in rows("runs/run")]
    assert all(error > 0 for error in errors) and errors[-1] != errors[0]


MODULES = {name: plugins.load("algorithm", name) for name in plugins.names("algorithm")}
NEEDS = {name: module.Algorithm(module.Config()).needs for name, module in MODULES.items()}
FINAL = [name for name, needs in NEEDS.items() if not needs.trajectory and not needs.reward_gradient]


@pytest.mark.parametrize("name", FINAL)
def test_every_algorithm_of_final_images_can_learn_from_data(here: Path, name: str):
    """Two updates: finite numbers, and weights that moved."""
    parts, _ = build(load(here / "run.yaml", [f"algorithm={{name: {name}}}"]))
    (sampler,), (learner,) = parts.samplers.workers, parts.learners.workers  # pyright: ignore[reportAttributeAccessIssue]
    (scorer,) = parts.scorers.workers  # pyright: ignore[reportAttributeAccessIssue]
    before = {key: tensor.clone() for key, tensor in learner.policy.weights("policy").items()}
    prompts = parts.prompts
    for step in range(2):
        unit = Unit(step, (0, 1), drawn(prompts.at(0, step, 2), 2, 0, step), 2)
        trajectory, images = sampler.sample(unit)
        advantages = parts.algorithm.advantages(scorer.score(images, unit))
        metrics = learner.update([trajectory], advantages, version=step)
        assert all(map(math.isfinite, metrics.values()))
    assert any((tensor != before[key]).any() for key, tensor in learner.policy.weights("policy").items())


def test_a_plan_counts_no_sampling(here: Path, capsys: Capture):
    done = call(capsys, "plan", "run.yaml")
    assert done.code == 0 and "rollout      0 passes" in done.out


def test_a_resumed_run_goes_on_to_the_last_digit(here: Path, capsys: Capture):
    trained(capsys, "--run-dir", "whole")
    trained(capsys, "--run-dir", "parts", "--steps", "2")
    assert call(capsys, "resume", "parts", "--steps", "4").code == 0
    numbers = [{key: row[key] for key in ("policy_loss", "margin", "grad_norm")} for row in rows("whole")]
    assert numbers == [{key: row[key] for key in numbers[0]} for row in rows("parts")]
    assert numbers[3] != numbers[2]


# --- the sampler's side


def sampler_of(folder: Path, *overrides: str) -> tuple[Sampler, PromptSet]:
    config = load(folder / "run.yaml", overrides)
    prompts = PromptSet.read(config.prompts.train).recorded(config.rollout.samples_per_prompt)
    return Sampler(load_policy(config), Noise(0), "policy", keep_steps=False, shares=True), prompts


def test_the_sampler_hands_out_the_images_and_their_latents(here: Path):
    sampler, prompts = sampler_of(here, "rollout.samples_per_prompt=3", "rollout.guidance_scale=2")
    unit = Unit(7, (3, 4), prompts.prompts[:2], 3)
    trajectory, pictures = sampler.sample(unit)
    assert pictures.shape == (6, 3, 1, 2) and pictures[:, 0, 0].tolist() == [
        [100 + 30 * n, 120 + 7 * p] for p in (0, 1) for n in range(3)
    ]
    expected = 10 * (pictures[:, :1] / 255 - 0.5)
    torch.testing.assert_close(trajectory.final, expected)
    assert trajectory.num_kept == 0 and trajectory.address.tolist() == [[7, g, s] for g in (3, 4) for s in range(3)]
    assert trajectory.uncond is not None and trajectory.prompts == unit.prompts
    assert Trajectory.concat([trajectory, trajectory]).take(torch.tensor([8])).final.equal(trajectory.final[2:3])


def test_evaluation_samples(here: Path):
    sampler, prompts = sampler_of(here)
    unit, plan = Unit(0, (0,), (Prompt("d"),), 4, "evaluation"), sampler.policy.settings
    _, pictures = sampler.sample(unit, plan)
    assert len(pictures) == 4 and (pictures[0] != pictures[1]).any()
    assert prompts.prompts[0].metadata["images"][0] == str(here / "images" / "0_0.png")


def test_of_more_images_some_are_drawn_every_step():
    names, scores = [f"{n}.png" for n in range(5)], [0.0, 0.1, 0.2, 0.3, 0.4]
    prompts = [Prompt("a", metadata={"images": names, "scores": scores, "tag": 1})] * 3
    seen: set[tuple[str, ...]] = set()
    for step in range(10):
        for prompt in drawn(prompts, 2, seed=0, step=step):
            chosen = prompt.metadata["images"]
            assert prompt.metadata["scores"] == [scores[names.index(name)] for name in chosen] and len({*chosen}) == 2
            assert prompt.metadata["tag"] == 1
            seen.add(tuple(chosen))
    assert len(seen) > 5 and {name for chosen in seen for name in chosen} == {*names}
    assert drawn(prompts, 2, 0, 3) == drawn(prompts, 2, 0, 3) != drawn(prompts, 2, 1, 3)
    assert drawn(prompts, 5, 0, 3) == tuple(prompts)


def test_images_are_scaled_to_cover_the_size_and_cut_in_the_middle(tmp_path: Path):
    wide = torch.zeros(4, 12, 3, dtype=torch.uint8)
    wide[:, 4:8, 0], wide[:, :4, 1] = 200, 100
    Image.fromarray(wide.numpy()).save(tmp_path / "wide.png")
    assert read_image(tmp_path / "wide.png", Size(4, 4)).equal(wide[:, 4:8].permute(2, 0, 1))
    assert read_image(tmp_path / "wide.png", Size(2, 2)).shape == (3, 2, 2)
    turned = Image.fromarray(wide.numpy()).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png", Size(4, 12)).equal(wide.permute(2, 0, 1))
    Image.new("LA", (4, 4), (7, 255)).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png", Size(4, 4)) == 7).all()


# --- the reward


def test_the_reward_says_what_is_recorded():
    reward = load_reward(RewardConfig(use=RECORDED)).function
    prompts = [Prompt("a", metadata={"scores": [1, 0.25], "clip": [3, 4]})] * 2
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert reward(images, prompts) == [1.0, 0.25]
    other = load_reward(RewardConfig(use=RECORDED, options={"key": "clip"}))
    assert other.function(images, prompts) == [3.0, 4.0] and other.groupwise
    with pytest.raises(ValueError, match="'a' has no 2 numbers under 'scores'"):
        reward(images, [Prompt("a")] * 2)


def test_evaluation_asks_it_nothing(here: Path):
    parts, settings = build(load(here / "run.yaml"))
    found = evaluate(parts.samplers, parts.scorers, parts.heldout, settings.evaluation, settings.rollout).metrics
    assert "reward/saturation/mean" in found and "reward/mean" not in found


# --- what is wrong

GOOD = {"images": ["images/0_0.png", "images/0_1.png"], "scores": [1, 0]}
BAD: dict[str, tuple[list[str], dict[str, Any], tuple[str, ...]]] = {
    "no images": ([], {"tag": "a"}, ("line 2", '"images"')),
    "no list": ([], {**GOOD, "images": "images/0_0.png"}, ("line 2", '"images"')),
    "no scores": ([], {"images": GOOD["images"]}, ("line 2", '"scores"')),
    "a score too few": ([], {**GOOD, "scores": [1]}, ("line 2", '"scores"', "as many numbers")),
    "a score that is none": ([], {**GOOD, "scores": [1, None]}, ("line 2", '"scores"')),
    "too few": (["rollout.samples_per_prompt=4"], GOOD, ("line 1", "2 images", "samples_per_prompt 4")),
    "no such file": ([], {**GOOD, "images": ["images/0_0.png", "images/x.png"]}, ("line 2", "images/x.png")),
    "trajectories": (["algorithm=grpo"], GOOD, ("grpo", "denoising steps", "dpo, kto, nft", "rollout.source")),
    "gradients": (["algorithm=draft"], GOOD, ("draft", "dpo, kto, nft")),
    "text": (["prompts.train=heldout.txt"], GOOD, ("heldout.txt, line 1", '"images"', ".jsonl")),
    "video": (["rollout.size=[1,1,2]"], GOOD, ("encode_images", "rollout.size")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_refused_in_words_before_anything_starts(here: Path, capsys: Capture, name: str):
    overrides, row, words = BAD[name]
    write(here, [GOOD, row])
    done = call(capsys, "train", "run.yaml", *overrides)
    (complaint,) = done.complaints
    assert done.code == 2 and all(word in complaint for word in words), complaint
    assert not (here / "runs").exists()


@pytest.mark.parametrize("content", [b"", b"no image at all", None], ids=["empty", "text", "cut off"])
def test_an_image_that_cannot_be_read_is_named(here: Path, capsys: Capture, content: bytes | None):
    path = here / "images" / "0_1.png"
    path.write_bytes(path.read_bytes()[:45] if content is None else content)
    write(here, [GOOD])
    done = call(capsys, "train", "run.yaml")
    (complaint,) = done.complaints
    assert done.code == 2 and str(path) in complaint and "cannot be read as an image" in complaint


# --- a model of the noise, under the published settings


@pytest.mark.parametrize("preset", ["dpo_sd15", "kto_sd15", "dpo_sd15_pairs", "kto_sd15_pairs"])
def test_published_settings_train_a_tiny_stable_diffusion(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, preset: str
):
    monkeypatch.chdir(tmp_path)
    without_pages(monkeypatch)
    for n in range(4):
        Image.new("RGB", (20, 16), (60 * n, 100, 200 - 40 * n)).save(tmp_path / f"{n}.png")
    write(
        tmp_path, [{"images": ["0.png", "1.png"], "scores": [1, 0]}, {"images": ["2.png", "3.png"], "scores": [0, 1]}]
    )
    (tmp_path / "run.yaml").write_text(TINY.format(folder=sd_folder(tmp_path / "sd"), preset=preset))
    own = [f'rewards=[{{use: "{RECORDED}"}}]'] if preset.endswith("_pairs") else []
    trained(capsys, *own)
    first, *_, last = rows("runs/run")
    assert first["policy_loss"] == pytest.approx(math.log(2) if "dpo" in preset else 0.5, rel=1e-3)
    assert last["policy_loss"] != first["policy_loss"] and last["grad_norm"] > 0


TINY = """\
model: {{family: sd, path: "{folder}"}}
prompts: {{train: train.jsonl, heldout: train.jsonl}}
rollout: {{prompts_per_step: 2, samples_per_prompt: 2, num_steps: 4, size: [16, 16], micro_batch: 4}}
rewards: [{{use: saturation}}]
algorithm: {{name: {preset}}}
optimizer: {{lr: 1e-3}}
evaluation: {{every: 0, num_images: 4, num_steps: 2}}
checkpoint: {{every: 100}}
reporting: {{tensorboard: false}}
steps: 3
"""


# --- making such files


def test_a_models_pictures_are_recorded_with_their_scores_and_can_be_trained_on(here: Path, capsys: Capture):
    (here / "reward.py").write_text("def first(images, prompts):\n    return images[:, 0, 0, 0].float() / 255\n")
    (here / "train.txt").write_text("a\nb\nc\n")
    own = ["rollout.source=samples", "prompts.train=train.txt", "rewards=[{use: 'reward.py:first'}]"]
    wish = Wish("run.yaml", own, prompts=2, num=3, seed=5, weights=None, to=here / "new")
    assert record(wish) == 0
    lines = [json.loads(line) for line in (here / "new" / "train.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["a", "b"]
    for line in lines:
        shown = [read_image(here / "new" / name, Size(1, 2))[0, 0, 0] / 255 for name in line["metadata"]["images"]]
        assert line["metadata"]["scores"] == pytest.approx([float(value) for value in shown])
        assert len({*line["metadata"]["scores"]}) == 3
    trained(capsys, "prompts.train=new/train.jsonl", "steps=1")
    with pytest.raises(BadInput, match=r"train\.jsonl is there already"):
        record(wish)
    with pytest.raises(BadInput, match="needs a reward of role train"):
        record(replace(wish, overrides=[*own[:2], f"rewards=[{{use: '{RECORDED}'}}]"], to=here / "other"))


# --- the shipped pipeline


@pytest.fixture(scope="module")
def scenes() -> Policy:
    return load_policy(load(find("quickstart"), ["rollout.micro_batch=32"]))


def painted(policy: Policy, number: int, samples: int) -> tuple[tuple[Prompt, ...], Tensor, Trajectory]:
    prompts = PromptSet.read(load(find("quickstart")).prompts.train).first(number)
    plan = RolloutConfig(size=(32, 32), num_steps=6, micro_batch=32)
    unit = Unit(0, tuple(range(number)), prompts, samples)
    trajectory, pictures = Sampler(policy, Noise(1), "policy", False, True).sample(unit, plan)
    return prompts, pictures, trajectory


def test_encoding_undoes_decoding(scenes: Policy):
    _, pictures, trajectory = painted(scenes, 8, 4)
    pixels, size = pictures.float() / 255, scenes.size
    latents = scenes.family.encode_images(pixels, size)  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        again = scenes.family.decode(latents, size)
    assert (again - pixels).square().mean().sqrt() < 0.02
    assert (latents - trajectory.final).square().mean().sqrt() < 0.2 < 0.5 < trajectory.final.std()


def test_pairs_of_the_shipped_pipeline_are_learned(
    scenes: Policy, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    """Twelve pairs, the more colourful picture preferred: after ten updates the model tells most of them."""
    monkeypatch.chdir(tmp_path)
    without_pages(monkeypatch)
    prompts, pictures, _ = painted(scenes, 12, 2)
    lines: list[str] = []
    for number, (prompt, pair) in enumerate(zip(prompts, pictures.unflatten(0, (-1, 2)), strict=True)):
        names = [f"{number}_{place}.png" for place in range(2)]
        for name, picture in zip(names, pair, strict=True):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(name)
        colour = [float((p.amax(0) - p.amin(0)).float().mean()) for p in pair]
        scores = [int(colour[0] > colour[1]), int(colour[0] <= colour[1])]
        lines.append(json.dumps({"text": prompt.text, "metadata": {"images": names, "scores": scores}}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "heldout.txt").write_text("a red circle\n")
    (tmp_path / "run.yaml").write_text(PAIRS)
    trained(capsys)
    first, *_, last = rows("runs/run")
    assert first["policy_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["policy_loss"] < 0.6 and last["accuracy"] > 0.7


PAIRS = f"""\
model: {{family: sd3, path: "zoo:scenes", text_encoder_3: false, max_sequence_length: 0, lora: {{rank: 16, alpha: 32}}}}
prompts: {{train: train.jsonl, heldout: heldout.txt}}
rollout: {{source: data, prompts_per_step: 12, samples_per_prompt: 2, num_steps: 6, size: [32, 32], micro_batch: 24}}
rewards: [{{use: "{RECORDED}"}}, {{use: saturation, role: heldout}}]
algorithm: {{name: dpo, num_times: 2}}
optimizer: {{lr: 1.0e-3}}
evaluation: {{every: 0, num_images: 4, num_steps: 2}}
checkpoint: {{every: 100}}
reporting: {{tensorboard: false}}
steps: 10
"""
