"""The command line is a contract: what each command does, prints and leaves behind."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from rlalign import cli
from rlalign.commands.train import write_pages
from tests.runs import Done, call, run_file, without_pages
from tests.tiny import sd3_folder

Capture = pytest.CaptureFixture[str]
GROUPS = ["rewards", "models", "algorithms", "prompts", "cluster"]
COMMANDS = ["train", "resume", "submit", "plan", "doctor", "sample", "evaluate", "record", "export", "report"]
COMMANDS += ["serve-reward", *GROUPS]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run_file(tmp_path)
    without_pages(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def numbers(run: str) -> list[dict[str, float]]:
    """Everything that does not depend on the clock."""
    clock = re.compile(r"^(time|runtime)/|_s$")
    return [{name: value for name, value in row.items() if not clock.search(name)} for row in rows(run)]


def weights(run: str, step: int) -> str:
    path = Path(run, f"checkpoints/step_{step:06d}/learner.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- help


@pytest.mark.parametrize("arguments", [[], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help(arguments: list[str], capsys: Capture):
    done = call(capsys, *arguments)
    assert done.code == 0
    assert "Usage: rlalign" in done.out


def test_help_does_not_wait_for_torch():
    heavy = "print(sorted({'torch', 'diffusers', 'ray', 'peft', 'pydantic'} & set(sys.modules)))"
    script = f"import sys, rlalign.cli as c; c.run([]); {heavy}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_has_help():
    named = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    assert named | set(GROUPS) == set(COMMANDS)


# --- train and resume


def test_train_leaves_a_run_and_says_where(capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlalign.commands.train.write_pages", write_pages)
    done = call(capsys, "train", "run.yaml")
    assert done.code == 0
    for name in ("report.html", "samples", "checkpoints/step_000002"):
        assert f"runs/run/{name}" in done.out and Path("runs/run", name).exists()
    assert [row["step"] for row in rows("runs/run")] == [0, 1]
    assert all(row["ratio/max_abs_dev"] == 0 for row in rows("runs/run"))
    info = json.loads(Path("runs/run/run.json").read_text())
    assert info["status"] == "finished" and ">finished<" in Path("runs/run/report.html").read_text()
    roles = [worker["role"] for worker in json.loads(Path("runs/run/workers.json").read_text())]
    assert sorted(roles) == ["learner", "sampler", "scorer"]


def test_the_same_command_again_does_nothing(capsys: Capture):
    call(capsys, "train", "run.yaml")
    before = weights("runs/run", 2)
    for arguments in (["train", "run.yaml"], ["resume", "runs/run"]):
        done = call(capsys, *arguments)
        assert done.code == 0 and "finished after 2 steps" in done.out
    assert weights("runs/run", 2) == before


def test_options_are_short_for_overrides(capsys: Capture):
    call(capsys, "train", "run.yaml", "--steps", "1", "--seed", "5", "--run-dir", "mine", "optimizer.lr=2e-5")
    config = yaml.safe_load(Path("mine/config.yaml").read_text())
    assert (config["steps"], config["seed"], config["optimizer"]["lr"]) == (1, 5, 2e-5)


@pytest.mark.parametrize("algorithm", ["grpo", "nft", "ddpo"])
def test_a_run_in_two_parts_equals_the_unbroken_one(algorithm: str, capsys: Capture):
    call(capsys, "train", "run.yaml", f"algorithm={algorithm}", "--steps", "3", "--run-dir", "whole")
    call(capsys, "train", "run.yaml", f"algorithm={algorithm}", "--steps", "1", "--run-dir", "parts")
    assert call(capsys, "resume", "parts", "--steps", "3").code == 0
    assert weights("parts", 3) == weights("whole", 3)
    assert [row["step"] for row in rows("parts")] == [0, 1, 2]
    assert [row["reward/mean"] for row in rows("parts")] == [row["reward/mean"] for row in rows("whole")]


@pytest.mark.parametrize("more", [["runtime.samplers=2"], ["runtime.samplers=4", "runtime.scorers=2"]], ids=" ".join)
@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
def test_the_number_of_workers_does_not_matter(algorithm: str, more: list[str], capsys: Capture):
    call(capsys, "train", "run.yaml", f"algorithm={algorithm}", "--run-dir", "one")
    assert call(capsys, "train", "run.yaml", f"algorithm={algorithm}", "--run-dir", "many", *more).code == 0
    assert weights("one", 2) == weights("many", 2)
    assert numbers("one") == numbers("many")


def test_samplers_may_run_ahead(capsys: Capture):
    assert call(capsys, "train", "run.yaml", "runtime.max_staleness=1", "--steps", "4").code == 0
    assert [row["staleness"] for row in rows("runs/run")] == [0, 1, 1, 1]


def test_fresh_moves_the_old_run_aside(capsys: Capture):
    call(capsys, "train", "run.yaml")
    done = call(capsys, "train", "run.yaml", "--fresh", "--seed", "9")
    assert done.code == 0
    assert yaml.safe_load(Path("runs/run/config.yaml").read_text())["seed"] == 9
    assert yaml.safe_load(Path("runs/run.old-1/config.yaml").read_text())["seed"] == 0


def test_resume_needs_only_the_folder(here: Path, capsys: Capture):
    call(capsys, "train", "run.yaml", "--steps", "1")
    shutil.move("runs/run", "elsewhere")
    (here / "run.yaml").unlink()
    assert call(capsys, "resume", "elsewhere", "--steps", "2").code == 0
    assert len(rows("elsewhere")) == 2


@pytest.mark.parametrize("stale", [0, 1])
def test_that_work_ahead_does_not_resume_exactly_is_said(here: Path, capsys: Capture, stale: int):
    words = ("train", "run.yaml", f"runtime.max_staleness={stale}", "--steps")
    assert "unbroken run" not in call(capsys, *words, "1").err
    assert ("the steps after a break, 1 of them, are sampled" in call(capsys, *words, "3").err) == (stale == 1)


def test_a_failed_run_goes_on_once_its_reward_is_mended(here: Path, capsys: Capture):
    good = (here / "reward.py").read_text()
    (here / "reward.py").write_text(good.replace("return images[:, 0", "return oops[:, 0"))
    assert call(capsys, "train", "run.yaml").code == 2
    (here / "reward.py").write_text(good)
    assert call(capsys, "train", "run.yaml").code == 0


# --- interrupts

SIGNALLING = """
import os, signal, time

def first(images, prompts):
    if not {everywhere} and os.path.exists("runs/run/metrics.jsonl") and os.path.getsize("runs/run/metrics.jsonl"):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.05)
    return images[:, 0, 0, 0].float() / 255
"""

STUCK = """
import pathlib, time

def first(images, prompts):
    pathlib.Path("called").touch()
    time.sleep(60)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupt_finishes_the_step_and_says_how_to_go_on(name: str, code: int, here: Path, capsys: Capture):
    """The signal comes while the second step is scored: that step is completed and saved, the third never starts."""
    overrides = ["--steps", "3", "checkpoint.every=10", "evaluation.every=0", "rollout.micro_batch=16"]
    call(capsys, "train", "run.yaml", *overrides, "--run-dir", "whole")
    (here / "reward.py").write_text(SIGNALLING.format(name=name, everywhere=False))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done = call(capsys, "train", "run.yaml", *overrides)
    assert done.code == code
    assert "rlalign resume runs/run" in done.out
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert json.loads(Path("runs/run/run.json").read_text())["status"] == "interrupted"
    assert len(rows("runs/run")) == 2
    (here / "reward.py").write_text(SIGNALLING.format(name=name, everywhere=True))
    assert call(capsys, "resume", "runs/run").code == 0
    assert weights("runs/run", 3) == weights("whole", 3)


def test_a_second_interrupt_ends_at_once(here: Path):
    (here / "reward.py").write_text(STUCK)
    command = [sys.executable, "-m", "rlalign", "train", "run.yaml", "rewards.0.timeout_s=100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while not (here / "called").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert any("once more to end at once" in line for line in process.stderr)  # stops reading at that line
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    assert not [name for name in os.listdir("runs/run/checkpoints") if name.startswith("step")]


# --- sample, evaluate, export, report


@pytest.fixture
def trained(capsys: Capture) -> Done:
    return call(capsys, "train", "run.yaml", "model.lora={rank: 2}", "ema={decay: 0.5, every: 1}", "optimizer.lr=1e-2")


def pixels(path: str) -> list[bytes]:
    return [Image.open(file).tobytes() for file in sorted(Path(path).glob("0*.png"))]


def test_sample_from_a_run_and_from_its_latents(trained: Done, capsys: Capture):
    asked = ["--prompt", "a", "--prompt", "b", "--num", "2", "--steps", "3"]
    done = call(capsys, "sample", "runs/run", *asked, "--save-latents", "l.safetensors", "--to", "one")
    assert done.code == 0
    assert "ema" in done.out and "after 2 updates" in done.out
    assert Path("one/grid.png").exists() and len(pixels("one")) == 4
    assert load_file("l.safetensors")["latents"].shape == (4, 1, 1, 2)
    call(capsys, "sample", "runs/run", *asked, "--seed", "7", "--latents", "l.safetensors", "--to", "two")
    assert pixels("one") == pixels("two")
    call(capsys, "sample", "runs/run", *asked, "--seed", "7", "--to", "three")
    assert pixels("one") != pixels("three")
    done = call(capsys, "sample", "runs/run", *asked, "--weights", "policy", "--to", "four")
    assert "policy after 2 updates" in done.out


def test_sample_from_an_untrained_model(capsys: Capture):
    done = call(capsys, "sample", "run.yaml", "--num", "1")
    assert done.code == 0
    assert "the untrained model" in done.out
    assert len(pixels("samples")) == 8, "held-out prompts, going round"


def test_evaluate_repeats_the_runs_own_numbers(capsys: Capture):
    call(capsys, "train", "run.yaml")
    first, last = rows("runs/run")[0], rows("runs/run")[-1]
    assert call(capsys, "evaluate", "runs/run", "--to", "after").code == 0
    after = json.loads(Path("after/metrics.json").read_text())
    assert after["reward/mean"] == last["eval_final/reward/mean"] and after["step"] == 2
    call(capsys, "evaluate", "run.yaml", "--to", "before")
    assert json.loads(Path("before/metrics.json").read_text())["reward/mean"] == first["eval/reward/mean"]
    assert Path("before/grid.png").exists()


def test_export_writes_safetensors(trained: Done, capsys: Capture):
    for to, file in (
        ("out", "out/pytorch_lora_weights.safetensors"),
        ("deep/mine.safetensors", "deep/mine.safetensors"),
    ):
        done = call(capsys, "export", "runs/run", "--to", to)
        assert done.code == 0 and file in done.out
        assert load_file(file)
    ema, policy = load_file("deep/mine.safetensors"), Path("policy")
    call(capsys, "export", "runs/run", "--to", str(policy), "--weights", "policy")
    other = load_file(policy / "pytorch_lora_weights.safetensors")
    assert any(not torch.equal(ema[name], other[name]) for name in ema)


def test_export_of_the_whole_pipeline(trained: Done, capsys: Capture):
    """Sampling from the exported model gives the same pictures, without a run or an adapter."""
    assert call(capsys, "export", "runs/run", "--to", "whole", "--full").code == 0
    call(capsys, "sample", "runs/run", "--to", "one")
    plain = f"model.path={Path('whole').resolve()}"
    call(capsys, "sample", "run.yaml", plain, "--to", "two")
    assert pixels("one") == pixels("two")


TINY_SD3 = ["model={family: sd3, path: ./tiny, text_encoder_3: false, max_sequence_length: 0, lora: {rank: 2}}"]
TINY_SD3 += ["rollout.size=[16,16]", "rewards=jpeg_compressibility", "optimizer.lr=1e-2"]


def test_the_exported_lora_is_what_sample_shows(here: Path, capsys: Capture):
    """In plain diffusers, from the same latents."""
    folder = sd3_folder(here / "tiny")
    assert call(capsys, "train", "run.yaml", *TINY_SD3).code == 0
    asked = ["--prompt", "a red circle", "--num", "2", "--steps", "4", "--guidance", "3"]
    call(capsys, "sample", "runs/run", *asked, "--save-latents", "l.safetensors")
    call(capsys, "export", "runs/run", "--to", "lora")
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 0, "output_type": "np"}
    size = {"height": 16, "width": 16, "num_images_per_prompt": 2}
    pipe.set_progress_bar_config(disable=True)
    latents = load_file("l.safetensors")["latents"]

    def shown() -> torch.Tensor:
        return torch.tensor(pipe("a red circle", latents=latents, **size, **options).images * 255).round()

    plain = shown()
    pipe.load_lora_weights("lora")
    ours = torch.stack([torch.tensor(list(picture)).reshape(16, 16, 3) for picture in pixels("samples")])
    assert (shown() - ours).abs().max() <= 1
    assert (plain - ours).abs().max() > 1


def test_report_can_be_written_again(trained: Done, capsys: Capture):
    assert call(capsys, "report", "runs/run").code == 0
    assert Path("runs/run/report.html").exists()


# --- plan, doctor, lists


@pytest.mark.parametrize(
    ("overrides", "rollout", "update"),
    [
        (
            ["rollout.window=null"],
            "4 passes of the network an image, 64 a step",
            "3 passes with gradient and 0 without",
        ),
        (["rollout.window={size: 1, range: [0, 3]}"], "4 passes", "1 passes with gradient and 0 without"),
        (["rollout.window=null", "rollout.guidance_scale=3"], "8 passes", "6 passes with gradient and 0 without"),
        (["rollout.window=null", "algorithm.kl_weight=0.1"], "4 passes", "3 passes with gradient and 3 without"),
        (
            ["algorithm=nft", "algorithm.num_times=2", "algorithm.kl_weight=0"],
            "4 passes",
            "2 passes with gradient and 2 without",
        ),
        (
            ["rewards.0=saturation", "algorithm={name: draft, last_steps: 2}"],
            "4 passes",
            "2 passes with gradient and 2",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_plan_counts_passes(overrides: list[str], rollout: str, update: str, here: Path, capsys: Capture):
    done = call(capsys, "plan", "run.yaml", *overrides)
    assert done.code == 0
    assert rollout in done.out and update in done.out
    assert "2 prompts x 8 samples = 16 images" in done.out
    assert not (here / "runs").exists()


def test_plan_estimates_memory(capsys: Capture):
    done = call(capsys, "plan", "run.yaml")
    found = re.search(r"memory +about ([\d.]+) MiB: weights .* activations .*", done.out)
    assert found and 0 <= float(found[1]) < 1


def test_plan_divides_gpus_by_passes_or_by_what_a_run_measured(capsys: Capture):
    done = call(capsys, "plan", "run.yaml", "--gpus", "4")
    assert done.code == 0 and "sampling 40%, updating 60%, by passes" in done.out
    assert re.search(r"4 GPUs, max_staleness 1: 2 samplers, 1 scorer, 2 learners \(idle: .*\); 3.3 times as", done.out)
    call(capsys, "train", "run.yaml")
    assert "as this run measured" in call(capsys, "plan", "runs/run", "--gpus", "4").out
    refused = call(capsys, "plan", "run.yaml", "--gpus", "0")
    assert refused.code == 2 and "--gpus" in refused.complaints[0]


def test_doctor(capsys: Capture):
    done = call(capsys, "doctor")
    assert done.code == 0
    assert all(word in done.out for word in ("torch", "zoo:scenes", "composition: ok", "quickstart"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rewards", "list"], ["composition", "jpeg_compressibility", "ocr"]),
        (["rewards", "show", "jpeg_compressibility"], ["images", "prompts", "jpeg.py"]),
        (["models", "list"], ["sd3", "analytic", "zoo:scenes"]),
        (["algorithms", "list"], ["grpo", "nft", "ddpo", "flow_grpo_sd35", "nft_sd35", "ddpo_sd15"]),
    ],
    ids=" ".join,
)
def test_lists(arguments: list[str], words: list[str], capsys: Capture):
    done = call(capsys, *arguments)
    assert done.code == 0
    assert all(word in done.out for word in words)


def test_version(capsys: Capture):
    assert re.fullmatch(r"rlalign \d+\.\d+\.\d+\n", call(capsys, "--version").out)
