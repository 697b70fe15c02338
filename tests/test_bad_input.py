"""Whatever a user gets wrong is one clear sentence and exit code 2: no traceback, nothing half-written."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlalign import checkpoint, cli
from tests.runs import RUN, Done, call, run_file, without_pages

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments, files that replace or join those of the toy run, and what the sentence must say."""

    name: str
    arguments: tuple[str, ...]
    words: Words
    files: Mapping[str, str | bytes] = field(default_factory=dict[str, str | bytes])


def train(name: str, override: str, *words: str, **files: str | bytes) -> Case:
    """`rlalign train run.yaml` with an override; files by their names with _ for the dot."""
    given = (override,) if override else ()
    return Case(name, ("train", "run.yaml", *given), words, {k.replace("_", "."): v for k, v in files.items()})


COMMANDS = [
    Case("unknown command", ("trian",), ("trian", "did you mean 'train'")),
    Case("no run file", ("train",), ("NAME|FILE",)),
    Case("unknown option", ("train", "run.yaml", "--stepz", "3"), ("--stepz",)),
    Case("steps no number", ("train", "run.yaml", "--steps", "many"), ("--steps", "integer")),
    Case("steps 0", ("train", "run.yaml", "--steps", "0"), ("steps is 0", "at least 1", "command line")),
    Case("negative seed", ("train", "run.yaml", "--seed", "-1"), ("seed is -1", "at least 0")),
    Case("missing run file", ("train", "nosuch.yaml"), ("no run file nosuch.yaml",)),
    Case("misspelt recipe", ("train", "quikstart"), ("quikstart", "did you mean 'quickstart'")),
    Case("folder as run file", ("train", "."), ("no run file", "rlalign resume")),
    Case("resume nothing", ("resume", "nosuch"), ("no run in nosuch",)),
    Case("resume a folder", ("resume", "."), ("no run",)),
    Case("export no run", ("export", ".", "--to", "lora"), ("no run",)),
    Case("export to nowhere", ("export", "."), ("--to",)),
    Case("report no run", ("report", "nosuch"), ("nosuch", "no run")),
    Case("evaluate nothing", ("evaluate", "nosuch"), ("no run file or recipe", "nosuch")),
    Case("unknown weights", ("export", ".", "--to", "lora", "--weights", "best"), ("--weights", "policy", "ema")),
    Case("unknown reward shown", ("rewards", "show", "sharpnes"), ("sharpnes", "did you mean 'sharpness'")),
    Case("sample no prompts", ("sample", "zoo:scenes"), ("--prompt",)),
    Case("sample no pipeline", ("sample", ".", "--prompt", "a"), ("no pipeline of diffusers", "model_index.json")),
    Case("unknown zoo model", ("sample", "zoo:scene", "--prompt", "a"), ("zoo:scene", "did you mean 'scenes'")),
    Case("latents missing", ("sample", "run.yaml", "--latents", "l.safetensors"), ("no file l.safetensors",)),
    Case(
        "latents no safetensors",
        ("sample", "run.yaml", "--latents", "l.safetensors"),
        ("l.safetensors is not a safetensors file",),
        {"l.safetensors": b"nonsense"},
    ),
]
SETTINGS = [
    train("override without =", "lr", "'lr' is not an override", "key=value"),
    train("override without key", "=3", "not an override"),
    train("override unreadable", "rollout={", "rollout={", "cannot be read"),
    train("unknown block", "stepz=3", "stepz is not a key", "did you mean 'steps'", "command line"),
    train("unknown key", "rollout.num_step=3", "rollout.num_step is not a key", "did you mean 'num_steps'"),
    train("unknown key in a list", "rewards.0.wieght=2", "rewards.0.wieght", "did you mean 'weight'"),
    train("unknown key deep down", "rollout.window={sise: 3}", "rollout.window.sise", "did you mean 'size'"),
    train("unknown key of the algorithm", "algorithm.clip_rnge=1", "algorithm.clip_rnge", "did you mean 'clip_range'"),
    train("unknown key of the family", "model.shfit=1", "model.shfit", "did you mean 'shift'"),
    train("key under a value", "steps.many=1", "steps.many is not a key"),
    train("place outside a list", "rewards.7.weight=1", "rewards.7", "rewards is a list"),
    Case(
        "a graph across processes",
        ("train", "run.yaml", "rollout.retain=true", "runtime.samplers=2"),
        ("rollout.retain needs", "one process"),
    ),
    Case(
        "a graph that nobody uses",
        ("train", "run.yaml", "rollout.retain=true", "algorithm=nft"),
        ("rollout.retain is for algorithms",),
    ),
    Case(
        "stale samples of a score function",
        ("train", "run.yaml", "algorithm=reinforce", "runtime.max_staleness=1"),
        ("runtime.max_staleness is 1", "fresh samples", "set it to 0"),
    ),
    *(
        Case(
            f"no densities for {name} {more}",
            ("train", "run.yaml", f"algorithm={name}", "rollout.kernel=cps", "rollout.cps_logprob=unscaled", *more),
            ("rollout.cps_logprob is unscaled", name, "set it to gaussian"),
        )
        for name, more in (
            ("grpo", ("algorithm.kl_weight=0.1",)),
            ("grpo", ("algorithm.kl_weight=0.1", "algorithm.kl_form=no_tau")),
            ("flow_dppo", ("algorithm.kl_weight=0.1", "algorithm.updates_per_step=1")),
            ("flow_dppo", ("algorithm.kl_weight=0.1", "algorithm.kl_form=no_tau", "algorithm.updates_per_step=1")),
            ("dpok", ()),
            ("grpo_guard", ()),
            ("prdp", ()),
        )
    ),
    train("a constraint of no reward", "algorithm.constraints={frist: 0.6}", "constraints names", "mean 'first'"),
    train("diversity by no reward", "algorithm.diversity=dino", "algorithm.diversity names 'dino'", "there are: first"),
    *(
        Case(
            f"a gate that names {gate}",
            ("train", "run.yaml", f"algorithm={{name: {name}, kl_weight: 0.1, penalty: {{gate: [{gate}]}}}}"),
            ("algorithm.penalty.gate names", *words),
        )
        for name, gate, words in (
            ("grpo", "taste", ("'taste'", "there are: first")),
            ("nft", "first", ("all rewards with role train",)),
        )
    ),
    Case(
        "pre-training without data",
        ("train", "run.yaml", "algorithm={name: refl, pretraining: 1.0}"),
        ("trains on given images", "rollout.source: data"),
    ),
    Case(
        "rounded states whose mean is recovered",
        ("train", "run.yaml", "algorithm=grpo_guard", "rollout.latent_store=model_round_first"),
        ("rollout.latent_store", "recovers means", "set it to fp32"),
    ),
    Case(
        "parts for several workers at a time",
        ("train", "run.yaml", "model.memory.offload=[vae]", "runtime.samplers=2"),
        ("model.memory.offload", "runtime.samplers: 1", "runtime.kind: ray"),
    ),
    Case(
        "a part that a backward pass needs",
        ("train", "run.yaml", "model.memory.offload=[vae]", "algorithm=draft"),
        ("model.memory.offload has the vae", "draft", "leave the vae out"),
    ),
    Case(
        "activations that are both kept and made again",
        ("train", "run.yaml", "rollout.retain=true", "model.memory.gradient_checkpointing=true"),
        ("rollout.retain keeps", "model.memory.gradient_checkpointing"),
    ),
    train(
        "checkpointing of a net without it",
        "model.memory.gradient_checkpointing=true",
        "model.memory.gradient_checkpointing: the net velocity of this model cannot do that; leave it out",
    ),
    train("gradients that are 0", "model.dtype=float16", "model.dtype is float16", "loss scaling", "bfloat16"),
    Case(
        "8 bits of cut weights",
        ("train", "run.yaml", "optimizer.kind=adamw8bit", "runtime=ray", "runtime.learners=2"),
        ("optimizer.kind adamw8bit cannot step", "runtime.learners to 1"),
    ),
    Case(
        "several nets that are cut",
        ("train", "run.yaml", "model.train=[velocity, other]", "runtime=ray", "runtime.learners=2"),
        ("model.train names several nets", "name one", "runtime.learners to 1"),
    ),
    Case(
        "the best of other weights",
        ("train", "run.yaml", "checkpoint.keep_best=reward/mean", "runtime.max_staleness=1"),
        ("checkpoint.keep_best is reward/mean", "a metric of eval/", "runtime.max_staleness to 0"),
    ),
    train("all weights of a text encoder", "model.train=[text_encoder]", "trains by LoRA only", "set model.lora"),
    *(
        Case(
            f"a text encoder that trains, and {setting}",
            ("train", "run.yaml", "model.train=[text_encoder]", "model.lora={rank: 2}", setting),
            ("model.train names text_encoder", f"leave {out} out"),
        )
        for setting, out in (
            ("model.memory.embeddings=kept", "model.memory.embeddings"),
            ("model.memory.offload=[text_encoders]", "text_encoders"),
            ("rollout.retain=true", "rollout.retain"),
        )
    ),
    train("embeddings of no pipeline", "model.memory.embeddings=kept", "model.memory.embeddings", "no pipeline"),
    train("a part that is none", "model.memory.offload=[unet]", "model.memory.offload", "'unet'", "text_encoders"),
    Case(
        "a gradient out of another environment, before that is made",
        ("train", "run.yaml", "algorithm=draft", "rewards.0.pip=[nothing]"),
        ("out of which no gradient comes", "leave venv and pip out"),
    ),
    Case(
        "two lists of packages for one environment",
        ("train", "run.yaml", "rewards=[{use: a:b, venv: env, pip: [one]}, {use: a:c, venv: env, pip: [two]}]"),
        ("two lists of packages would be installed into", "/env; ", "a venv of its own"),
    ),
    train("a reward without gradient", "algorithm=draft", "no gradient", "@differentiable"),
    train("text for a number", "rollout.num_steps=ten", "rollout.num_steps is 'ten'", "a whole number"),
    train("fraction for a count", "rollout.num_steps=2.5", "rollout.num_steps is 2.5", "a whole number"),
    train("true for a number", "steps=true", "steps is true", "a number"),
    train("value for a block", "optimizer=3", "optimizer is 3", "lr, betas"),
    train("value for a list", "rewards=3", "rewards is 3", "a list"),
    train("null for a block", "model=", "model.family is missing"),
    train("negative lr", "optimizer.lr=-1e-4", "optimizer.lr is -0.0001", "above 0"),
    train("lr not a number", "optimizer.lr=.nan", "optimizer.lr is nan", "a finite number"),
    train("group of 1", "rollout.samples_per_prompt=1", "samples_per_prompt is 1", "at least 2", "cannot learn"),
    train("window outside steps", "rollout.window={size: 1, range: [0, 4]}", "window.range [0, 4]", "4 steps", "at 3"),
    train("size of another shape", "rollout.size=[1]", "rollout.size is [1]", "length"),
    train("size the model cannot make", "rollout.size=[2,2]", "rollout", "[2, 2", "2 dimensions"),
    train("misspelt kernel", "rollout.kernel=flow_sd", "did you mean 'flow_sde'"),
    train("more updates than groups", "algorithm.updates_per_step=3", "updates_per_step is 3", "2 groups"),
    train("deterministic steps", "rollout.noise_level=0", "rollout.noise_level is 0", "above 0"),
    Case(
        "a single step",
        ("train", "run.yaml", "rollout.num_steps=1", "rollout.window=null"),
        ("rollout.num_steps is 1", "2 or more"),
    ),
    train("no reward to train on", "rewards.0.role=monitor", "no reward has the role train"),
    train("two rewards of a name", "rewards=[reward.py:first, reward.py:first]", "two rewards are called 'first'"),
    train("ema that is not kept", "evaluation.weights=ema", "evaluation.weights is ema", "ema="),
    train("old that is not kept", "evaluation.weights=old", "evaluation.weights is old", "policy"),
    train("uneven evaluation", "evaluation.num_images=10", "num_images is 10", "set it to 8"),
    train("unknown algorithm", "algorithm=gpro", "gpro", "did you mean 'grpo'"),
    train("algorithm no plug-in", "algorithm=reward.py", "reward.py is no algorithm", "defines no Config"),
    train("family no plug-in", "model.family=reward.py", "reward.py is no model", "defines no Config"),
    train("algorithm file missing", "algorithm=mine.py", "no file", "mine.py"),
    train("unknown preset", "algorithm=flow_grpo_sd3", "did you mean 'flow_grpo_sd35'"),
    train("algorithm no name", "algorithm=3", "algorithm is 3"),
    train("unknown family", "model.family=sd_3", "sd_3", "did you mean 'sd3'"),
    train("family without adapters", "model.lora={targets: [nothing]}", "model.lora", "nothing"),
    train("unknown net", "model.train=[unet]", "unet", "velocity"),
    train("learners in one process", "runtime.learners=2", "2 learners need runtime.kind ray"),
    train("more samplers at the start than at all", "runtime.min_samplers=2", "min_samplers 2 exceeds samplers 1"),
    train("strange device", "runtime.device=tpu", "runtime.device is 'tpu'"),
    train("steps in text", "steps='ten'", "steps is 'ten'"),
]
FILES = [
    train("empty run file", "", "run.yaml is empty", run_yaml=""),
    train("comments alone", "", "run.yaml is empty", run_yaml="# nothing yet\n"),
    train("list as run file", "", "run.yaml", "list", run_yaml="- a\n- b\n"),
    train("text as run file", "", "run.yaml", "str", run_yaml="hello"),
    train("YAML that breaks off", "", "run.yaml", "line 2", run_yaml="model: {family: sd3\nsteps: 3"),
    train("binary run file", "", "run.yaml is not a run file", run_yaml=bytes(range(256))),
    train("key given twice", "", "line 11", "'steps' is given twice", run_yaml=RUN + "steps: 3\n"),
    train("no model", "", "model.family is missing", run_yaml=RUN.replace("model:", "# ")),
    train("no prompts", "", "prompts is missing", "run.yaml", run_yaml=RUN.replace("prompts:", "# ")),
    train("no rewards", "", "rewards is missing", run_yaml=RUN.replace("rewards:", "# ")),
    train("misspelt in the file", "", "did you mean 'steps'", "(run.yaml)", run_yaml=RUN.replace("\nsteps", "\nstepz")),
    train("no prompts file", "prompts.train=nosuch.txt", "nosuch.txt"),
    train("empty prompts file", "", "train.txt holds no prompts", train_txt="\n\n"),
    train("prompts not UTF-8", "", "heldout.txt is not UTF-8", heldout_txt=b"caf\xe9"),
    train("prompts no JSON", "prompts.train=p.jsonl", "p.jsonl, line 2", "JSON", p_jsonl='{"text": "a"}\n{"text"\n'),
    train("prompts without text", "prompts.train=p.jsonl", "p.jsonl, line 1", '"text"', p_jsonl='{"prompt": "a"}\n'),
    train("prompts of a strange kind", "prompts.train=p.csv", "p.csv", ".jsonl", p_csv="a\n"),
    train("reward not in the catalogue", "rewards=vividness", "no 'vividness'", "path/to/file.py:function"),
    train("reward file missing", "rewards=mine.py:f", "no file", "mine.py"),
    train("reward function missing", "rewards=reward.py:fisrt", "no 'fisrt'", "did you mean 'first'"),
    train("reward file broken", "rewards=broken.py:f", "broken.py cannot be imported", broken_py="def f(:\n"),
    train("reward not callable", "rewards=reward.py:uncallable", "it is 3"),
    Case("run folder is a file", ("train", "run.yaml", "--run-dir", "train.txt"), ("train.txt",)),
    Case("run folder under a file", ("train", "run.yaml", "--run-dir", "train.txt/run"), ("train.txt",)),
]
MODELS = [
    train("model folder missing", "model={family: sd3, path: ./nosuch}", "no folder"),
    train("model folder no pipeline", "model={family: sd3, path: .}", "no Stable Diffusion 3 pipeline"),
]


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def check(done: Done, words: Words) -> None:
    assert done.code == 2, done
    assert len(done.complaints) == 1, done.err
    assert "Traceback" not in done.err
    missing = [word for word in words if word not in done.complaints[0]]
    assert not missing, f"{missing} not in: {done.complaints[0]}"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run_file(tmp_path)
    without_pages(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", [*COMMANDS, *SETTINGS, *FILES, *MODELS], ids=lambda case: case.name)
def test_is_refused_before_anything_starts(case: Case, here: Path, capsys: pytest.CaptureFixture[str]):
    for name, content in case.files.items():
        (here / name).write_bytes(content.encode() if isinstance(content, str) else content)
    before = files_in(here)
    check(call(capsys, *case.arguments), case.words)
    assert files_in(here) == before


REWARDS = [
    ("raises", "", ("raises", "the scorer is on fire", "prompt 'd'", "sample 0 of the evaluation")),
    ("hangs", "timeout_s: 0.2", ("hangs", "0.2 s")),
    ("nan", "", ("nan", "prompt")),
    ("short", "", ("short", "1 numbers for 8")),
    ("text", "", ("text",)),
]


@pytest.mark.parametrize(
    ("function", "more", "words"), REWARDS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_failing_reward_ends_the_run(
    function: str, more: str, words: Words, here: Path, capsys: pytest.CaptureFixture[str]
):
    """Under the policy `fail`; the run's folder says that it failed, and holds no half checkpoint."""
    entry = f"rewards=[{{use: 'reward.py:{function}', retries: 0, {more}}}]"
    check(call(capsys, "train", "run.yaml", entry, "evaluation.every=0"), words)
    assert json.loads((here / "runs/run/run.json").read_text())["status"] == "failed"
    assert not list((here / "runs/run/checkpoints").iterdir())


def test_a_failing_reward_that_may_be_dropped(capsys: pytest.CaptureFixture[str]):
    """A monitor that fails costs its own numbers alone."""
    entry = "rewards.1={use: 'reward.py:nan', role: monitor, on_failure: drop_sample, retries: 0}"
    assert call(capsys, "train", "run.yaml", entry).code == 0


# --- runs that exist


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        without_pages(patch)
        assert cli.run(["train", str(run_file(folder)), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def started(here: Path, finished: Path) -> Path:
    return shutil.copytree(finished, here / "runs" / "run")


def damaged(path: Path, content: bytes = b"{") -> None:
    path.write_bytes(content)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_another_config_in_the_same_folder(started: Path, capsys: pytest.CaptureFixture[str]):
    check(call(capsys, "train", "run.yaml", "--seed", "7"), ("runs/run", "seed was 0 and is 7", "--fresh", "--run-dir"))


def test_fewer_steps_than_there_are(started: Path, capsys: pytest.CaptureFixture[str]):
    check(call(capsys, "train", "run.yaml", "--steps", "1"), ("2 steps", "more than the 1"))


def test_a_damaged_run_file(started: Path, capsys: pytest.CaptureFixture[str]):
    damaged(started / "run.json")
    check(call(capsys, "train", "run.yaml"), ("run.json", "damaged"))


def test_a_damaged_config(started: Path, capsys: pytest.CaptureFixture[str]):
    damaged(started / "config.yaml")
    check(call(capsys, "resume", "runs/run"), ("config.yaml", "damaged"))


def test_checkpoints_all_broken(started: Path, capsys: pytest.CaptureFixture[str]):
    for path in (started / "checkpoints").glob("*/*.safetensors"):
        flip(path)
    check(call(capsys, "train", "run.yaml", "--steps", "3"), ("no checkpoint", "broken", "SHA-256"))
    check(call(capsys, "export", "runs/run", "--to", "lora"), ("no checkpoint", "SHA-256"))


def test_export_without_a_checkpoint(started: Path, capsys: pytest.CaptureFixture[str]):
    for path in (started / "checkpoints").iterdir():
        path.rename(started / path.name)
    check(call(capsys, "export", "runs/run", "--to", "lora"), ("no checkpoint yet",))


def test_export_of_an_average_that_is_not_kept(started: Path, capsys: pytest.CaptureFixture[str]):
    check(call(capsys, "export", "runs/run", "--to", "out", "--weights", "ema"), ("keeps no ema", "--weights policy"))
    assert not Path("out").exists()


def test_export_onto_a_file(started: Path, capsys: pytest.CaptureFixture[str]):
    check(call(capsys, "export", "runs/run", "--to", "train.txt"), ("train.txt", "--to"))


def test_evaluation_into_a_file(started: Path, capsys: pytest.CaptureFixture[str]):
    check(call(capsys, "evaluate", "runs/run", "--to", "train.txt"), ("train.txt", "--to"))


def test_latents_of_another_shape(here: Path, capsys: pytest.CaptureFixture[str]):
    save_file({"latents": torch.zeros(3, 5)}, here / "l.safetensors")
    done = call(capsys, "sample", "run.yaml", "--prompt", "a", "--latents", "l.safetensors")
    check(done, ("[4, 1, 1, 2]", "[3, 5]"))
    assert not (here / "samples").exists()


def test_no_space_left_for_a_checkpoint(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_durably", full)
    check(call(capsys, "train", "run.yaml"), ("checkpoint step_000001", "No space left on device"))
    assert not list((here / "runs/run/checkpoints").iterdir())


def test_no_space_left_for_anything_else(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/run/samples/step_000000.png")

    monkeypatch.setattr("rlalign.reporting.recorder.save_grid", full)
    check(call(capsys, "train", "run.yaml"), ("samples/step_000000.png: No space left on device",))


@pytest.mark.parametrize(
    "arguments", [["train", "run.yaml"], ["plan", "run.yaml", "--measure"], ["sample", "run.yaml", "--prompt", "a"]]
)
def test_a_gpu_without_room_for_the_model(
    arguments: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("rlalign.build.load_family", full)
    check(call(capsys, *arguments), ("model.memory", "rlalign plan"))


# --- what is not bad input


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A ValueError from inside a library is nobody's bad input, whenever it comes."""

    def bug(*_: Any) -> None:
        torch.zeros(2).normal_(std=-1)

    def other_bug(*_: Any) -> None:
        int("not a number")

    for broken in (bug, other_bug):
        monkeypatch.setattr("rlalign.workers.learner.Learner.update", broken)
        with pytest.raises((ValueError, RuntimeError)):
            call(capsys, "train", "run.yaml", "--fresh")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "run.yaml", "model={family: sd3, path: some/model}"], 2, "some/model"),
        (["trian"], 2, "'train'"),
        ([], 0, ""),
    ],
    ids=["model not here", "bad command", "help"],
)
def test_exit_codes_of_a_real_process(arguments: list[str], code: int, words: str):
    done = subprocess.run([sys.executable, "-m", "rlalign", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_internal_error_of_a_real_process(here: Path):
    break_it = "import rlalign.build as b, rlalign.cli as c\nb.load_policy = lambda config: 1 / 0\nc.main()"
    command = [sys.executable, "-c", break_it, "train", "run.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr
    assert not (here / "runs").exists()
