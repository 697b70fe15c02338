"""Text encoders that train: encoded anew with a graph, under the weights in use, and exported for plain diffusers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from rlalign import cli
from rlalign.mdp.noise import Noise
from rlalign.models.lora import LORA_FILE, LoraConfig, attach, save_lora
from rlalign.models.memory import MemoryConfig, fit
from rlalign.policy import Policy
from rlalign.types import Prompt, Trajectory, Unit
from rlalign.workers.learner import Learner
from rlalign.workers.optimizer import OptimizerConfig
from rlalign.workers.sampler import Sampler
from tests.contracts.families import FAMILIES, Case, ode, rollout_settings
from tests.runs import without_pages
from tests.small import algorithm

NETS = {"sd": ["unet", "text_encoder"], "sdxl": ["unet", "text_encoder", "text_encoder_2"]}
NETS["sd3"] = ["transformer", "text_encoder", "text_encoder_2"]
CASES = {case.module: case for case in reversed(FAMILIES.values()) if case.module in NETS}


@pytest.fixture(scope="module", params=sorted(NETS))
def name(request: pytest.FixtureRequest) -> str:
    torch.set_num_threads(1)
    return request.param


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASES[name].write(tmp_path_factory.mktemp(name))


def trained(name: str, folder: Path, nets: list[str], shake: float = 0.1, **changes: Any) -> Policy:
    """Adapters on these nets, none of their weights zero."""
    case = CASES[name]
    family = case.load(folder)
    parameters = attach(family.nets, nets, LoraConfig(rank=2, alpha=8), family.lora_targets, seed=1)
    with torch.no_grad():
        for number, parameter in enumerate(parameters.values()):
            parameter += shake * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return Policy(family, rollout_settings(case, **changes), parameters, lora=True)


def sampled(policy: Policy) -> Trajectory:
    unit = Unit(0, (0, 1), tuple(CASES["sd"].prompts), 2)
    return Sampler(policy, Noise(0), "policy", keep_steps=True, shares=True).sample(unit)[0]


def pixels(policy: Policy, case: Case) -> Tensor:
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return ode(policy, case.prompts, latents, rollout_settings(case, guidance_scale=4.5))


def test_the_first_net_stays_the_default(name: str, folder: Path):
    assert list(CASES[name].load(folder).nets) == NETS[name]


def test_on_policy_the_ratio_is_one_to_the_bit(name: str, folder: Path):
    """Each prompt is encoded alone, here and in the sampler; with guidance, too."""
    policy = trained(name, folder, NETS[name], guidance_scale=2.0)
    rows = sampled(policy).take(torch.tensor([0, 1, 2, 3]))
    for slot in range(rows.num_kept):
        now, then = policy.log_probs(rows, slot)
        assert torch.equal(now, then) and now.requires_grad


def test_the_gradient_is_that_of_the_embeddings(name: str, folder: Path):
    """By the chain rule, written out: through what the net is told, to the text encoder's adapters."""
    policy = trained(name, folder, NETS[name])
    rows = sampled(policy).take(torch.tensor([0, 3]))
    policy.replay(rows, 0).gaussian.mean.square().sum().backward()
    found = {
        key: p.grad for key, p in policy.parameters.items() if key.startswith("text_encoder") and p.grad is not None
    }
    assert found and any(gradient.any() for gradient in found.values())
    cond, uncond = policy.conditions(rows)
    told = {name: value.detach().requires_grad_() for name, value in cond.items()}
    policy.trains_encoder = False
    frozen = Trajectory(told, uncond, *(getattr(rows, f) for f in list(Trajectory.__dataclass_fields__)[2:]))
    policy.replay(frozen, 0).gaussian.mean.square().sum().backward()
    used = [name for name, value in told.items() if value.grad is not None]
    own = {key: policy.parameters[key] for key in found}
    expected = torch.autograd.grad([cond[n] for n in used], list(own.values()), [told[n].grad for n in used])
    for key, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-6)


def test_weights_under_other_names_encode_with_their_own(name: str, folder: Path):
    policy = trained(name, folder, NETS[name])
    policy.keep("old")
    rows = sampled(policy).take(torch.tensor([0, 3]))
    before, _ = policy.conditions(rows)
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.mul_(-1.5)
    after, _ = policy.conditions(rows)
    with policy.using("old"):
        old, _ = policy.conditions(rows)
    with policy.using("reference"):
        reference, _ = policy.conditions(rows)
    plain, _ = CASES[name].load(folder).encode([rows.prompts[0]])
    for key, value in before.items():
        assert torch.equal(old[key], value) and not torch.equal(after[key], value)
        torch.testing.assert_close(reference[key][:1], plain[key], rtol=0, atol=0)


def test_checkpointing_changes_no_bit_of_their_gradient(name: str, folder: Path):
    def gradients(config: MemoryConfig) -> tuple[list[Tensor], int]:
        policy = trained(name, folder, NETS[name])
        fit(policy.family, config, NETS[name])
        calls = [0]
        for module in policy.family.nets["text_encoder"].modules():
            if type(module).__name__ == "CLIPMLP":
                module.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        rows = sampled(policy).take(torch.tensor([0, 3]))
        policy.replay(rows, 0).gaussian.mean.square().sum().backward()
        return [p.grad for p in policy.parameters.values() if p.grad is not None], calls[0]

    (kept, calls), (again, more) = gradients(MemoryConfig()), gradients(MemoryConfig(gradient_checkpointing=True))
    assert more > calls and len(kept) == len(again)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_samplers_follow_the_weights(name: str, folder: Path):
    policy = trained(name, folder, NETS[name])
    sampler = Sampler(policy, Noise(0), "policy", keep_steps=True, shares=True)
    (first, _), *_ = sampler.encoder([Prompt("red")])
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.mul_(-1.5)
    (second, _), *_ = sampler.encoder([Prompt("red")])
    assert not torch.equal(first["prompt_embeds"], second["prompt_embeds"]) and not sampler.encoder.kept


def test_plain_diffusers_draws_the_same_picture(name: str, folder: Path, tmp_path: Path):
    """From the adapters' file, and from a whole pipeline."""
    case, policy = CASES[name], trained(name, folder, NETS[name])
    mine = pixels(policy, case)
    save_lora(policy.family.nets, tmp_path, policy.weights("policy"))
    starts = {key.partition(".")[0] for key in load_file(tmp_path / LORA_FILE)}
    assert starts == set(NETS[name])
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    library, base = case.plain(folder), case.plain(folder)
    library.load_lora(tmp_path)
    drawn, steps = library.draw(case.prompts, latents, 4, 4.5), 4
    torch.testing.assert_close(mine, drawn, rtol=1e-4, atol=1e-5, check_dtype=False)
    assert not torch.allclose(mine, base.draw(case.prompts, latents, steps, 4.5), atol=1e-3)
    policy.family.save_pipeline(tmp_path / "whole")
    whole = case.plain(tmp_path / "whole").draw(case.prompts, latents, steps, 4.5)
    torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_encoders_matter_to_the_export(name: str, folder: Path, tmp_path: Path):
    """Adapters of the text encoders alone change the picture: what the test above compares is not the net's alone."""
    alone = trained(name, folder, NETS[name][1:], shake=0.3)
    assert not torch.allclose(pixels(alone, CASES[name]), pixels(trained(name, folder, NETS[name][:1], 0), CASES[name]))


@pytest.mark.parametrize("method", ["grpo", "nft"])
def test_a_run_trains_them(name: str, method: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_pages(monkeypatch)
    (tmp_path / "reward.py").write_text("def bright(images, prompts):\n    return images.float().flatten(1).mean(1)\n")
    (tmp_path / "prompts.txt").write_text("red\nblue\n")
    case = CASES[name]
    kernel = {"kernel": rollout_settings(case).kernel} if method == "grpo" else {}
    run = {
        "model": {"family": name, "path": str(folder), "lora": {"rank": 2}, "train": NETS[name], **case.config},
        "prompts": {"train": "prompts.txt", "heldout": "prompts.txt"},
        "rollout": {
            **{"prompts_per_step": 2, "samples_per_prompt": 2, "num_steps": 3, "size": [*case.size], "micro_batch": 4},
            **kernel,
        },
        "algorithm": {"name": method},
        "rewards": [{"use": "reward.py:bright"}],
        "evaluation": {"every": 0, "num_images": 4, "samples_per_prompt": 2, "num_steps": 2},
        "checkpoint": {"every": 1},
        "reporting": {"tensorboard": False},
        "steps": 2,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    out = tmp_path / "run"
    assert cli.run(["train", str(tmp_path / "run.yaml"), "--run-dir", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("ratio/max_abs_dev", 0.0) for row in rows] == [0, 0] and all(row["grad_norm"] > 0 for row in rows)
    weights = [load_file(out / "checkpoints" / f"step_00000{step}" / "learner.safetensors") for step in (1, 2)]
    texts = [key for key in weights[0] if "policy/text_encoder." in key and "lora_B" in key]
    moved = sum(bool(weights[0][key].any()) for key in texts)  # B begins at 0
    assert texts and moved >= len(texts) / 2  # SDXL leaves the last layer out
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in texts)


def test_a_learner_lets_them_move_alone(folder: Path, name: str):
    """The net itself may be left out."""
    policy = trained(name, folder, ["text_encoder"], micro_batch=4)
    chosen = algorithm()
    learner = Learner(policy, chosen, Noise(0), OptimizerConfig(lr=1e-2), None)
    before = {key: p.detach().clone() for key, p in policy.parameters.items()}
    metrics = learner.update([sampled(policy)], torch.tensor([[1.0, -1.0], [1.0, -1.0]]), 0)
    assert metrics["ratio/max_abs_dev"] == 0 and metrics["grad_norm"] > 0
    assert any(not torch.equal(p, before[key]) for key, p in policy.parameters.items())
