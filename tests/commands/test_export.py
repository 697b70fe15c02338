"""What `rlalign export` leaves behind: weights that load, a card that is true, and an upload that is asked for."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import load_file

from rlalign import checkpoint
from rlalign.commands.export import Wish, export
from rlalign.commands.problems import BadInput
from rlalign.commands.push import hub_for, push
from rlalign.commands.runs import config_of_run, trained
from rlalign.reporting.card import MARK
from rlalign.reporting.licence import front_matter
from tests.contracts.families.pixart import pixart_folder
from tests.contracts.families.wan import written as wan_folder
from tests.models.stable_diffusion import sd_folder
from tests.runs import call, run_file, without_pages
from tests.tiny import sd3_folder

Capture = pytest.CaptureFixture[str]
RUN = ["rewards.0=jpeg_compressibility", "rewards.1={use: saturation, role: heldout}", "optimizer.lr=1e-2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    without_pages(monkeypatch)
    return tmp_path


def train(capsys: Capture, model: str, *more: str) -> None:
    done = call(capsys, "train", "run.yaml", f"model={{{model}}}", "rollout.size=[16,16]", *RUN, *more)
    assert done.code == 0, done.err


def sd3(here: Path, capsys: Capture, readme: str = "") -> Path:
    folder = sd3_folder(here / "tiny")
    if readme:
        (folder / "README.md").write_text(readme)
    train(capsys, "family: sd3, path: ./tiny, text_encoder_3: false, max_sequence_length: 0, lora: {rank: 2}")
    return folder


def shown(card: Path) -> dict[str, Any]:
    return dict(front_matter(card.read_text()))


def code(card: Path) -> str:
    """What the card says that loads the export."""
    (found,) = re.findall(r"```python\n(.*?)\n```", card.read_text(), re.DOTALL)
    return found


# --- the card


def test_the_card_of_a_lora(here: Path, capsys: Capture):
    sd3(here, capsys, "---\nlicense: other\nlicense_name: tiny-community\nlicense_link: https://x.example/l\n---\n# T")
    done = call(capsys, "export", "runs/run", "--to", "lora")
    assert done.code == 0 and "lora/README.md and lora/reward.png" in done.out
    card = (here / "lora" / "README.md").read_text()
    assert shown(here / "lora" / "README.md") == {
        "license": "other",
        "license_name": "tiny-community",
        "license_link": "https://x.example/l",
        "library_name": "diffusers",
        "tags": ["lora", "rlalign", "reinforcement-learning", "grpo"],
    }
    assert "[2505.05470](https://arxiv.org/abs/2505.05470)" in card
    assert "| `jpeg_compressibility` | train | 1.0 |" in card and "| `saturation` | heldout |  |" in card
    assert "`train.txt` (train), `heldout.txt` (heldout)" in card
    assert re.search(r"\| `reward/saturation/mean` \| [\d.−e]+ \| [\d.−e]+ \| [+−\d.e]+ \|", card)
    assert "The base model's licence governs these weights. Its card declares: tiny-community" in card
    assert "after 2 updates" in card and "torch " in card and str(here) not in card
    assert (here / "lora" / "reward.png").read_bytes().startswith(b"\x89PNG")
    (config,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert yaml.safe_load(config)["rollout"]["samples_per_prompt"] == 8


def test_an_unknown_licence_is_said_to_be_unknown(here: Path, capsys: Capture):
    sd3(here, capsys)
    call(capsys, "export", "runs/run", "--to", "lora")
    assert "license" not in shown(here / "lora" / "README.md")
    assert "was not to be read from the base model's folder" in " ".join((here / "lora/README.md").read_text().split())


def test_a_base_model_of_the_hub_is_named_as_the_hub_names_it(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    """The config alone says so; the weights come from the folder that it was trained with."""
    folder = sd3(here, capsys)
    resolved = here / "runs" / "run" / "config.yaml"
    resolved.write_text(resolved.read_text().replace(f"path: {folder}", "path: acme/tiny-sd3"))
    monkeypatch.setattr("rlalign.build.model_path", lambda path: str(folder))
    assert call(capsys, "export", "runs/run", "--to", "lora").code == 0
    front = shown(here / "lora" / "README.md")
    assert (front["base_model"], front["base_model_relation"]) == ("acme/tiny-sd3", "adapter")
    assert "from_pretrained('acme/tiny-sd3')" in code(here / "lora" / "README.md")


def test_the_card_says_which_held_out_prompts_were_trained_on(here: Path, capsys: Capture):
    sd3(here, capsys)

    def said() -> str:
        call(capsys, "export", "runs/run", "--to", "lora")
        (found,) = re.findall(r"\nOn (.*), from the same noise", (here / "lora" / "README.md").read_text())
        return found

    assert said() == "prompts that were never trained on"
    (here / "heldout.txt").write_text((here / "train.txt").read_text().splitlines()[0] + "\nanother\n")
    assert said() == "held-out prompts, of which 1 of 2 were trained on"
    (here / "train.txt").unlink()
    assert said() == "held-out prompts"


def test_beside_a_file_the_card_is_called_as_it_is(here: Path, capsys: Capture):
    sd3(here, capsys)
    (here / "README.md").write_text("my project")
    other = here / "pytorch_lora_weights.safetensors"
    other.write_text("somebody else's")
    assert call(capsys, "export", "runs/run", "--to", "mine.safetensors").code == 0
    assert {"mine.safetensors", "mine.md", "mine.png"} <= {path.name for path in here.iterdir()}
    assert (here / "README.md").read_text() == "my project" and other.read_text() == "somebody else's"


def test_a_card_that_is_not_ours_stays(here: Path, capsys: Capture):
    sd3(here, capsys)
    (here / "README.md").write_text("my project")
    done = call(capsys, "export", "runs/run", "--to", ".")
    assert done.code == 2 and "rlalign did not write it" in done.err
    assert not (here / "pytorch_lora_weights.safetensors").exists()
    for _ in range(2):
        assert call(capsys, "export", "runs/run", "--to", "again").code == 0
    assert MARK in (here / "again" / "README.md").read_text()


@pytest.mark.parametrize(
    ("there", "to", "more"),
    [
        ("cat.png", "cat.safetensors", []),
        ("reward.png", ".", []),
        ("pytorch_lora_weights.safetensors", ".", []),
        ("run.safetensors", ".", ["--single-file"]),
        ("model_index.json", ".", ["--full"]),
    ],
)
def test_files_of_somebody_else_stay(there: str, to: str, more: list[str], here: Path, capsys: Capture):
    sd3(here, capsys)
    (here / there).write_text("my own")
    done = call(capsys, "export", "runs/run", "--to", to, *more)
    assert done.code == 2 and f"{there} is there already, and rlalign did not write it" in done.err
    assert (here / there).read_text() == "my own"


# --- what the card says loads the export


def loaded(card: Path, **names: Any) -> Any:
    scope: dict[str, Any] = dict(names)
    exec(code(card), scope)
    return scope["pipe"]


def layers(net: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in net.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("family", ["sd", "pixart"])
def test_the_lines_of_the_card_load_the_adapters(here: Path, capsys: Capture, family: str):
    """By the pipeline's own method, or by peft where the pipeline has none."""
    {"sd": sd_folder, "pixart": pixart_folder}[family](here / "tiny")
    extra = ", max_sequence_length: 12" if family == "pixart" else ""
    train(capsys, f"family: {family}, path: ./tiny, lora: {{rank: 2, alpha: 6}}{extra}", "rollout.kernel=ddim")
    assert call(capsys, "export", "runs/run", "--to", "lora").code == 0
    name = "unet" if family == "sd" else "transformer"
    net = getattr(loaded(here / "lora" / "README.md"), name)
    mine = load_file(here / "lora" / "pytorch_lora_weights.safetensors")
    found = list(layers(net).values())
    assert len(found) == len(mine)
    assert sum(t.double().abs().sum() for t in found) == pytest.approx(
        sum(t.double().abs().sum() for t in mine.values())
    )
    assert {layer.scaling[n] for layer in net.modules() for n in getattr(layer, "scaling", {})} == {3.0}


def test_the_lines_of_the_card_load_text_encoders_once(here: Path, capsys: Capture):
    """load_lora_weights reads their adapters along with the first network's."""
    sd_folder(here / "tiny")
    model = "family: sd, path: ./tiny, lora: {rank: 2, alpha: 6}, train: [unet, text_encoder]"
    train(capsys, model, "rollout.kernel=ddim")
    assert call(capsys, "export", "runs/run", "--to", "lora").code == 0
    pipe = loaded(here / "lora" / "README.md")
    mine = load_file(here / "lora" / "pytorch_lora_weights.safetensors")
    assert len(layers(pipe.unet)) + len(layers(pipe.text_encoder)) == len(mine)
    names = {n for layer in pipe.text_encoder.modules() for n in getattr(layer, "scaling", {})}
    assert len(names) == 1 and "text_encoder" not in code(here / "lora" / "README.md")


def test_the_lines_of_a_pushed_card_take_the_weights_from_the_hub(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    pixart_folder(here / "tiny")
    train(capsys, "family: pixart, path: ./tiny, lora: {rank: 2}, max_sequence_length: 12", "rollout.kernel=ddim")
    assert export(Wish(Path("runs/run"), here / "lora", push="acme/red"), FakeHub()) == 0
    card = here / "lora" / "README.md"
    assert "hf_hub_download('acme/red', 'pytorch_lora_weights.safetensors')" in code(card)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: str(here / "lora" / file))
    assert layers(loaded(card).transformer)


def test_a_card_tells_names_and_the_terminal_where_they_lie(here: Path, capsys: Capture):
    sd3(here, capsys)
    done = call(capsys, "export", "runs/run", "--to", str(here / "out" / "lora"))
    assert f"pipe.load_lora_weights('{here}/out/lora'" in done.out
    assert "pipe.load_lora_weights('lora'" in code(here / "out" / "lora" / "README.md")
    call(capsys, "export", "runs/run", "--to", str(here / "out" / "whole"), "--full")
    assert "from_pretrained('whole'" in code(here / "out" / "whole" / "README.md")
    call(capsys, "export", "runs/run", "--to", str(here / "out" / "mine.safetensors"))
    assert "pipe.load_lora_weights('.', weight_name='mine.safetensors')" in code(here / "out" / "mine.md")
    assert all(str(here) not in card.read_text() for card in (here / "out").rglob("*.md"))


def test_the_lines_of_the_card_load_both_networks_of_wan(here: Path, capsys: Capture):
    wan_folder(here / "tiny", experts=2)
    model = "family: wan, path: ./tiny, lora: {rank: 2}, max_sequence_length: 16, train: [transformer, transformer_2]"
    train(capsys, model, "rollout.size=[16,32,5]", "rewards.0={use: video_frames, options: {of: saturation}}")
    assert call(capsys, "export", "runs/run", "--to", "lora").code == 0
    pipe = loaded(here / "lora" / "README.md")
    assert layers(pipe.transformer) and layers(pipe.transformer_2)


def test_the_lines_of_the_card_load_the_pipeline(here: Path, capsys: Capture):
    sd3(here, capsys)
    assert call(capsys, "export", "runs/run", "--to", "whole", "--full").code == 0
    assert ", text_encoder_3=None, tokenizer_3=None)" in code(here / "whole" / "README.md")
    pipe = loaded(here / "whole" / "README.md")
    model = trained(Path("runs/run"), config_of_run(Path("runs/run")))
    assert isinstance(pipe, DiffusionPipeline) and shown(here / "whole" / "README.md")["tags"][0] == "rlalign"
    merged = {name.replace(".base_layer", "") for name in model.policy.family.nets["transformer"].state_dict()}
    assert pipe.transformer.state_dict().keys() == {name for name in merged if "lora_" not in name}


def test_moments_are_not_read(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    sd3(here, capsys)
    read, names = checkpoint.read_part, set[str]()

    def noted(*given: Any, **more: Any) -> Any:
        state = read(*given, **more)
        names.update(name.partition("/")[0] for name in state.tensors)
        return state

    monkeypatch.setattr(checkpoint, "read_part", noted)
    assert trained(Path("runs/run"), config_of_run(Path("runs/run"))).weights == "policy" and names == {"policy"}


# --- one file


def test_a_single_file(here: Path, capsys: Capture):
    """tests/contracts/test_families.py draws with them; here it is which file, and which weights."""
    sd3(here, capsys)
    done = call(capsys, "export", "runs/run", "--to", "one", "--single-file")
    assert done.code == 0 and "copy run.safetensors to ComfyUI/models/loras" in done.out
    call(capsys, "export", "runs/run", "--to", "lora")
    one, lora = load_file("one/run.safetensors"), load_file("lora/pytorch_lora_weights.safetensors")
    for name, tensor in lora.items():  # alpha is 64 and rank 2
        torch.testing.assert_close(one[name], tensor * 32 if ".lora_B." in name else tensor, rtol=0, atol=0)
    done = call(capsys, "export", "runs/run", "--to", "net.safetensors", "--single-file", "--full")
    assert done.code == 0 and "ComfyUI/models/diffusion_models" in done.out
    assert "ComfyUI" in (here / "net.md").read_text()


def test_a_family_that_nobody_else_reads_is_refused(here: Path, capsys: Capture):
    assert call(capsys, "train", "run.yaml", "model.lora={rank: 2}").code == 0
    done = call(capsys, "export", "runs/run", "--to", "one", "--single-file")
    (sentence,) = done.complaints
    assert done.code == 2 and "export without" in sentence and not (here / "one").exists()


# --- the Hub


class FakeHub:
    """Takes what HfApi takes; the real one has these very arguments, see test_the_real_hub_takes_these_arguments."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: set[str] = set()
        self.error = error

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self.calls.append((repo_id, {"private": private, "exist_ok": exist_ok}))
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.error:
            raise self.error
        self.files = {path.name for path in Path(folder_path).iterdir()}


@pytest.mark.parametrize("public", [False, True])
def test_a_push_is_private_unless_it_is_said_to_be_public(here: Path, capsys: Capture, public: bool):
    sd3(here, capsys)
    hub = FakeHub()
    assert export(Wish(Path("runs/run"), Path("lora"), push="acme/red", public=public), hub) == 0
    assert hub.calls == [("acme/red", {"private": not public, "exist_ok": True})]
    assert hub.files == {"pytorch_lora_weights.safetensors", "README.md", "reward.png"}
    assert "pipe.load_lora_weights('acme/red'" in code(here / "lora" / "README.md")
    assert "https://hub.example/acme/red" in capsys.readouterr().out


def test_what_the_hub_refuses_is_one_sentence_and_the_export_is_there(here: Path, capsys: Capture):
    sd3(here, capsys)
    with pytest.raises(BadInput, match=r"403 Forbidden; .* is in lora, and `hf upload acme/red lora` tries again"):
        export(Wish(Path("runs/run"), Path("lora"), push="acme/red"), FakeHub(OSError("403 Forbidden")))
    assert (here / "lora" / "README.md").exists()


def test_a_folder_with_other_things_in_it_is_not_pushed(here: Path, capsys: Capture):
    sd3(here, capsys)
    done = call(capsys, "export", "runs/run", "--to", ".", "--push", "acme/red")
    assert done.code == 2 and "has to be a new one" in done.err
    done = call(capsys, "export", "runs/run", "--to", "new", "--public")
    assert done.code == 2 and "--push ORG/NAME" in done.err


def test_offline_and_without_a_token_nothing_is_exported(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    sd3(here, capsys)
    done = call(capsys, "export", "runs/run", "--to", "lora", "--push", "acme/red")
    assert done.code == 2 and "HF_HUB_OFFLINE" in done.err and not (here / "lora").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="HF_TOKEN"):
        hub_for("acme/red")
    for wrong, words in (("red", "ORG/NAME"), ("a/b/c", "a/b/c"), ("acme/r--d", "--")):
        with pytest.raises(ValueError, match=words):
            hub_for(wrong)


def test_the_real_hub_takes_these_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Offline it gets as far as the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_none")
    hub = hub_for("acme/red")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="could not upload to acme/red") as raised:
        push(tmp_path, "acme/red", public=False, hub=hub)
    assert "hf_none" not in str(raised.value)
