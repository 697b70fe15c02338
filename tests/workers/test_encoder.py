"""Prompts are encoded once: what is kept in memory and on disk, how it is found again, and that runs are the same."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlalign import cli
from rlalign.build import load_policy
from rlalign.config import RunConfig, load
from rlalign.mdp.noise import Noise
from rlalign.models.embeddings import Embeddings
from rlalign.policy import Policy
from rlalign.types import Encoded, Prompt
from rlalign.workers import encoder as module
from rlalign.workers.canary import Canary
from rlalign.workers.encoder import Encoder, Store
from tests.contracts.families import FIRST
from tests.models.stable_diffusion import sd_folder, sd_policy
from tests.runs import without_pages

RED, BLUE = Prompt("red", negative="dark"), Prompt("blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return sd_folder(tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture
def policy(folder: Path) -> Policy:
    return sd_policy(folder)


def counted(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that go through the text encoder from now on."""
    seen, encode = list[str](), policy.family.encode

    def noted(prompts: Any) -> Encoded:
        seen.extend(prompt.text for prompt in prompts)
        return encode(prompts)

    monkeypatch.setattr(policy.family, "encode", noted)
    return seen


def same(one: Encoded, other: Encoded) -> bool:
    return all(
        (a is None and b is None) or (a and b and a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a))
        for a, b in zip(one, other, strict=True)
    )


def test_each_prompt_is_encoded_once(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    """Whatever else is asked for with it, and whatever its metadata is."""
    seen, encoder = counted(policy, monkeypatch), Encoder(policy)
    first, second, third = encoder([RED, BLUE, replace(RED, metadata={"tag": 1})])
    assert seen == ["red", "blue"] and same(first, third) and not same(first, second)
    assert same(encoder([BLUE])[0], second) and seen == ["red", "blue"]


@pytest.mark.parametrize("bound", ["MAX_PROMPTS", "MAX_BYTES"])
def test_memory_is_bounded(policy: Policy, monkeypatch: pytest.MonkeyPatch, bound: str):
    """By number and by bytes; those that were not asked for longest go first."""
    encoder = Encoder(policy)
    encoder([RED])
    monkeypatch.setattr(module, bound, 2 if bound == "MAX_PROMPTS" else 2 * encoder.num_bytes)
    size = encoder.num_bytes
    encoder([BLUE]), encoder([RED]), encoder([Prompt("green")])
    assert [key[0] for key in encoder.kept] == ["red", "green"] and encoder.num_bytes == 2 * size
    monkeypatch.setattr(module, "MAX_BYTES", 1)
    assert len(encoder([RED, BLUE])) == 2 and len(encoder.kept) == 1  # what is asked for at once is there at once


# --- on disk


def stored(policy: Policy, folder: Path, identity: str = "model") -> Policy:
    policy.embeddings = Embeddings(folder, identity)
    return policy


def test_another_worker_finds_them_on_disk(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = counted(stored(policy, tmp_path / "new" / "folder"), monkeypatch)
    fresh = Encoder(policy)([RED, BLUE])
    again = Encoder(policy)([BLUE, RED])
    assert seen == ["red", "blue"]
    assert same(fresh[0], again[1]) and same(fresh[1], again[0])
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 2
    Encoder(stored(policy, tmp_path / "new" / "folder", "another model"))([RED])
    assert seen == ["red", "blue", "red"]


def test_all_tensors_come_back_as_they_were(tmp_path: Path):
    store = Store(Embeddings(tmp_path, "model"))
    cond = {"embeds": torch.randn(1, 3, 2).bfloat16().transpose(1, 2), "mask": torch.tensor([[True, False]])}
    for key, encoded in (("a",), (cond, None)), (("b",), (cond, {"embeds": torch.zeros(1, 2)})):
        store.write(key, encoded)
        found = store.read(key)
        assert found is not None and same(found, encoded)
        assert found[0]["embeds"].dtype == torch.bfloat16 and found[0]["mask"].dtype == torch.bool


@pytest.mark.parametrize("name", ["flux_kontext", "flux2", "qwen_image_edit", "wan_i2v"])
def test_families_of_images_are_stored(name: str, tmp_path: Path):
    """Whose two halves share the image."""
    case = FIRST[name]
    (prompt, *_), family = case.prompts, case.load(case.write(tmp_path / "model"))
    store, encoded = Store(Embeddings(tmp_path / "kept", "model")), family.encode([prompt])
    store.write(("a",), encoded)
    assert same(store.read(("a",)) or ({}, None), encoded)


def cut(data: bytes) -> bytes:
    return data[:-1]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def emptied(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [cut, flipped, emptied])
def test_a_damaged_file_is_named_and_made_again(
    damage: Callable[[bytes], bytes],
    policy: Policy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    (fresh,) = Encoder(stored(policy, tmp_path))([RED])
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    seen = counted(policy, monkeypatch)
    (again,) = Encoder(policy)([RED])
    assert seen == ["red"] and same(again, fresh) and path.name in caplog.text
    Encoder(policy)([RED])
    assert seen == ["red"]


def test_several_write_the_same_at_once(tmp_path: Path):
    store, encoded = Store(Embeddings(tmp_path, "model")), ({"embeds": torch.ones(1, 4)}, None)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: store.write(("a",), encoded), range(32)))
    assert len(list(tmp_path.iterdir())) == 1 and same(store.read(("a",)) or ({}, None), encoded)


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write into .*file"):
        Store(Embeddings(tmp_path / "file", "model"))


# --- what they depend on


def config(tmp_path: Path, model: Path, **changes: Any) -> RunConfig:
    (tmp_path / "prompts.txt").write_text("red\nblue\n")
    (tmp_path / "reward.py").write_text("def bright(images, prompts):\n    return images.float().flatten(1).mean(1)\n")
    run: dict[str, Any] = {
        "model": {"family": "sd", "path": str(model), "lora": {"rank": 2}, **changes},
        "prompts": {"train": "prompts.txt", "heldout": "prompts.txt"},
        "rollout": {
            **{"prompts_per_step": 2, "samples_per_prompt": 2, "num_steps": 3, "size": [16, 16]},
            **{"micro_batch": 4, "guidance_scale": 2.0, "kernel": "ddim"},
        },
        "rewards": [{"use": "reward.py:bright"}],
        "evaluation": {"every": 0, "num_images": 4, "samples_per_prompt": 2, "num_steps": 2},
        "checkpoint": {"every": 2},
        "reporting": {"tensorboard": False},
        "steps": 2,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return load(tmp_path / "run.yaml")


def identity_of(tmp_path: Path, model: Path, **changes: Any) -> str:
    found = load_policy(config(tmp_path, model, **{"memory": {"embeddings": "kept"}, **changes})).embeddings
    assert found is not None and found.folder == tmp_path / "kept"
    return found.identity


def test_they_belong_to_the_weights_and_settings_that_made_them(tmp_path: Path, folder: Path):
    own = identity_of(tmp_path, folder)
    copy = sd_folder(tmp_path / "copy")
    assert identity_of(tmp_path, copy) == own  # the same model at another place
    assert identity_of(tmp_path, folder, lora=None) == own  # the text encoder is frozen all the same
    assert identity_of(tmp_path, sd_folder(tmp_path / "other", seed=1)) != own
    assert identity_of(tmp_path, folder, dtype="bfloat16") != own
    sliced = {"embeddings": "kept", "vae_slicing": True}
    assert identity_of(tmp_path, folder, memory=sliced) != own  # some models encode images
    tokenizer = copy / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"a</w>"', '"å</w>"'))
    assert identity_of(tmp_path, copy) != own


# --- a run


def train(tmp_path: Path, name: str, *overrides: str) -> tuple[list[dict[str, Any]], bytes]:
    run = tmp_path / name
    assert cli.run(["train", str(tmp_path / "run.yaml"), "--run-dir", str(run), *overrides]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (weights,) = (run / "checkpoints" / "step_000002").glob("learner*.safetensors")
    numbers = [{key: row[key] for key in ("reward", "grad_norm", "ratio/max_abs_dev") if key in row} for row in rows]
    return numbers, weights.read_bytes()


def test_a_run_is_the_same_with_and_without_the_folder(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """And the second run with it, in which no text encoder has to work."""
    without_pages(monkeypatch)
    config(tmp_path, folder)
    plain = train(tmp_path, "plain")
    kept = f"model.memory.embeddings={tmp_path / 'kept'}"
    assert train(tmp_path, "first", kept) == plain
    assert len(list((tmp_path / "kept").iterdir())) == 2

    def encode(self: Policy, prompts: Any) -> list[Encoded]:
        raise AssertionError("a text encoder was used")

    monkeypatch.setattr(Policy, "encode", encode)
    assert train(tmp_path, "second", kept) == plain


def test_memory_settings_change_no_number_of_a_run(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    without_pages(monkeypatch)
    config(tmp_path, folder)
    settings = "model.memory={gradient_checkpointing: true, offload: [text_encoders, vae]}"
    assert train(tmp_path, "plain") == train(tmp_path, "small", settings)


def test_the_canary_uses_the_folder(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = counted(stored(policy, tmp_path), monkeypatch)
    first = Canary(policy, Noise(0)).predict("policy")
    assert torch.equal(Canary(policy, Noise(0)).predict("policy"), first) and len(seen) == 1
