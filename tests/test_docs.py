"""The pages say what the code does: their tables are the code's, their examples run."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from docs.generate import filled
from rlalign.cli import app
from rlalign.config import find, recipes, resolve
from rlalign.mdp.noise import Noise
from rlalign.models.lora import LoraConfig, attach
from rlalign.overlays import algorithm_names, presets
from rlalign.plugins import load
from rlalign.policy import Policy, RolloutConfig
from rlalign.runfile import Loader
from rlalign.scoring import RewardConfig, load_reward
from rlalign.types import Prompt, RewardScores, Scores, Size, Unit
from rlalign.workers.learner import Learner
from rlalign.workers.optimizer import OptimizerConfig
from rlalign.workers.sampler import Sampler
from tests.exact.conftest import proofs
from tests.runs import call, without_pages
from tests.tiny import sd3_folder, sd3_policy

ROOT = Path(__file__).parents[1]

CODE = re.compile(r"```bash\n(.*?)```|`([^`\n]+)`", re.DOTALL)

Example = Callable[[str], Path]


@pytest.fixture
def example(tmp_path: Path) -> Example:
    """CONTRIBUTING's example of that name, as a file."""

    def written(name: str) -> Path:
        found = re.search(
            rf"```(?:python|yaml)\n# {re.escape(name)}\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL
        )
        assert found, f"CONTRIBUTING.md shows no {name}"
        path = tmp_path / Path(name).name
        path.write_text(found[1])
        return path

    return written


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_tables_are_those_of_the_code(page: Path):
    assert page.read_text() == filled(page.read_text()), "run: python docs/generate.py"


NAMES = """
reinforce ddpo dpok grpo flow_grpo_fast dance_grpo mix_grpo mix_grpo_flash tempflow_grpo flash_grpo grpo_guard flow_dppo
nft awm epg pepg par fpo dgpo crd ram rvm rwr raft dpo online_dpo ipo d3po kto prdp spo refl draft draft_lv alignprop
drtune
"""
PAPERS = NAMES.split()
SECTIONS = ("When to use it", "Settings", "Exact result", "On the shipped pipeline")


@pytest.mark.parametrize("name", algorithm_names())
def test_every_algorithm_has_a_page_and_papers_presets_a_section(name: str):
    """With the formula, the exact result and the curve; a model's presets stand in their algorithm's tables."""
    algorithm = presets()[name][0].__name__.rpartition(".")[2] if name in presets() else name
    page = (ROOT / "docs" / "algorithms" / f"{algorithm}.md").read_text()
    assert f"`{name}`" in page or name == algorithm
    if name not in PAPERS:
        return
    if name == algorithm:
        assert all(f"\n## {section}\n" in page for section in SECTIONS)
        assert "arxiv.org" in page.partition("\n## ")[0] and "\n```\n" in page
    else:
        assert f"\n### {name}\n" in page
    exact, curve = (marked(page, f"{kind} {name}") for kind in ("exact", "curve"))
    assert re.search(r"^\| T\d+ \|", exact, re.MULTILINE) and "**failed**" not in exact
    assert curve


def test_a_row_of_the_exact_ladder_is_as_good_as_the_worst_test_that_feeds_it():
    row = {"algorithm": "grpo", "rung": "T2", "case": "c", "quantity": "q", "bound": "b", "percent": False}
    one, two = (json.dumps({**row, "value": value}) for value in (1.0, 2.0))
    found = proofs([("a", "passed", [one]), ("b", "failed", [two]), ("c", "failed", []), ("d", "passed", [])])
    assert found["rows"] == [{**row, "outcome": "failed", "values": [1.0, 2.0]}]
    assert found["without_row"] == ["c"]


def test_numbers_in_sentences_are_those_that_were_measured():
    test = "test_frontier.py::test_no_point_is_above_the_frontier"
    mark = f"<!-- exact: .1f expected_kl of {test}[grpo"
    assert filled(f"KL {mark}-1.0] -->9<!-- -->.") == f"KL {mark}-1.0] -->0.4<!-- -->."
    assert filled(f"KL {mark} --><!-- -->") == f"KL {mark} -->0.0 to 1.4<!-- -->"
    assert "**not measured**" in filled(f"{mark}-7.0] -->9<!-- -->")


def marked(page: str, table: str) -> str:
    """What a marker is filled with."""
    (found,) = re.findall(rf"<!-- table: {re.escape(table)} -->\n(.*?)<!-- end -->", page, re.DOTALL)
    return found.strip()


def test_names_of_papers_are_those_of_the_command_line():
    assert {*PAPERS} <= {*algorithm_names()}


@pytest.mark.parametrize("page", ["README.md", "docs/run_file.md"])
def test_the_run_file_on_a_page_is_one(page: str):
    (shown,) = re.findall(r"```yaml\n(model:.*?)```", (ROOT / page).read_text(), re.DOTALL)
    config = resolve(yaml.load(shown, Loader), ROOT, page)
    assert config.model.family == "sd3"


def test_the_changes_of_a_run_file_fit_the_quickstart():
    page, recipe = ROOT / "docs" / "your_model_reward_cluster.md", find("quickstart")
    (diff,) = re.findall(r"```diff\n(.*?)```", page.read_text(), re.DOTALL)
    lines = diff.splitlines()
    assert not {line[1:] for line in lines if line[0] in " -"} - set(recipe.read_text().splitlines())
    changed = [line for line in lines if line[0] in "+ "]
    config = resolve(yaml.load("\n".join(line[1:] for line in changed), Loader), recipe.parent, page.name)
    assert config.rollout.size == (512, 512)


def test_commands_on_the_pages_are_commands():
    """`rlalign train NAME` names a recipe, or a run file of the reader's own."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    code = "\n".join("".join(found) for page in pages for found in re.findall(CODE, page.read_text()))
    shown = set(re.findall(r"^rlalign ([a-z]+) ([\w./]+)", code, re.MULTILINE))
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    groups = {group.name for group in app.registered_groups}
    assert {verb for verb, _ in shown} <= commands | groups
    assert {name for verb, name in shown if verb == "train" and "." not in name} <= set(recipes())


def test_the_example_of_a_reward(example: Example):
    path = example("rewards/redness.py")
    reward = load_reward(RewardConfig(use=f"{path.name}:redness"), path.parent)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[0, 0] = 255
    images[1] = 100
    assert torch.as_tensor(reward.function(images, [Prompt("a"), Prompt("b")])).tolist() == pytest.approx([1, 1 / 3])


def test_the_example_of_an_algorithm(example: Example, tmp_path: Path):
    """One step of the real sampler and learner: the probability of the better samples rises."""
    module = load("algorithm", str(example("rlalign/algorithms/rloo.py")))
    algorithm = module.Algorithm(module.Config())
    policy = sd3_policy(sd3_folder(tmp_path / "sd3"), num_steps=3, micro_batch=4)
    unit = Unit(step=0, groups=(0,), prompts=(Prompt("one red cat"),), samples=4)
    trajectory, _ = Sampler(policy, Noise(0), "policy", keep_steps=True, shares=True).sample(unit)
    values = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    scores = Scores({"r": RewardScores(values, torch.ones_like(values, dtype=torch.bool), "train", 1.0)})
    advantages = algorithm.advantages(scores)
    torch.testing.assert_close(advantages, torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3]]))
    learner = Learner(policy, algorithm, Noise(0), OptimizerConfig(lr=1e-3), ema=None)

    def objective() -> float:
        with torch.no_grad():
            losses = algorithm.losses(policy, trajectory.take(torch.arange(4)), advantages.flatten(), Noise(0))
            return sum(float(loss.rows.sum()) for loss in losses)

    before = objective()
    learner.update([trajectory], advantages, version=0)
    assert objective() < before


def test_the_example_of_a_family(example: Example, tmp_path: Path):
    """A deterministic rollout under it is what diffusers makes of the same noise by DDIM; LoRA finds layers."""
    module = load("model", str(example("rlalign/models/ddpm.py")))
    unet = ddpm(tmp_path / "ddpm")
    family = module.Family.load(module.Config(), str(tmp_path / "ddpm"), torch.float32, "cpu")
    with pytest.raises(ValueError, match="8 x 8"):
        family.latent_shape(Size(16, 16))
    settings = RolloutConfig(size=(8, 8), num_steps=4, kernel="ddim", micro_batch=2, samples_per_prompt=2)
    policy = Policy(
        family, settings, attach(family.nets, ["unet"], LoraConfig(rank=2), family.lora_targets, 0), lora=True
    )
    sampler = Sampler(policy, Noise(0), "policy", keep_steps=True, shares=True)
    unit = Unit(step=0, groups=(0,), prompts=(Prompt(""),), samples=2)
    trajectory, images = sampler.sample(unit)
    assert images.shape == (2, 3, 8, 8)
    assert torch.isfinite(trajectory.log_probs).all()
    final = sampler.sample(unit, settings)[0].final
    torch.testing.assert_close(
        final, by_ddim(unet, sampler.initial_noise(unit, settings), steps=4), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
def test_the_example_of_a_family_trains_from_a_file_outside_the_package(
    example: Example,
    tmp_path: Path,
    algorithm: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Two steps by its own run file, through the command line, and out again for the library's own pipeline."""
    monkeypatch.chdir(tmp_path)
    without_pages(monkeypatch)
    ddpm(tmp_path / "ddpm")
    assert not example("rlalign/models/ddpm.py").is_relative_to(ROOT)
    run = example("ddpm.yaml")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    (tmp_path / "heldout.txt").write_text("c\n")
    overrides = [f"algorithm={algorithm}", *(["rollout.kernel=ddim"] if algorithm == "grpo" else [])]
    done = call(capsys, "train", str(run), *overrides, "steps=2", "optimizer.lr=1e-2", "reporting.tensorboard=false")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in Path("runs/ddpm/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and all(row["grad_norm"] > 0 for row in rows)
    assert all(row.get("ratio/max_abs_dev", 0.0) == 0 for row in rows)  # NFT has none
    assert call(capsys, "export", "runs/ddpm", "--to", "whole", "--full").code == 0
    before, after = (DDPMPipeline.from_pretrained(folder).unet.state_dict() for folder in ("ddpm", "whole"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


def ddpm(folder: Path) -> UNet2DModel:
    """A tiny random pipeline for the example, which it writes."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(prediction_type="epsilon")).save_pretrained(folder)
    return unet


@torch.no_grad()
def by_ddim(unet: UNet2DModel, x: torch.Tensor, steps: int) -> torch.Tensor:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    for time in scheduler.timesteps:
        x = scheduler.step(unet(x, time).sample, time, x).prev_sample
    return x
