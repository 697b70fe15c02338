"""HPSv3 on tiny weights of its layout against the public code's path: Pillow, processor, network, head."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor, Qwen2VLModel

from rlalign.types import Prompt
from rlalign_rewards import hpsv3 as module
from rlalign_rewards._qwen_vl import fitted
from rlalign_rewards.hpsv3 import Hpsv3
from tests.rewards.tiny import hpsv3_folder, pictures

PROMPTS = [Prompt("a cat"), Prompt("two red dogs on the left, in oil, and much else")]


def test_the_score_is_that_of_the_public_code(tmp_path: Path) -> None:
    options, images = hpsv3_folder(tmp_path), pictures(2, 448, 448)
    state = load_file(tmp_path / "HPSv3.safetensors")
    config, processor = AutoConfig.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    network = Qwen2VLModel(config).eval()
    renamed = {
        re.sub("^model", "language_model", name): value for name, value in state.items() if "rm_head" not in name
    }
    network.load_state_dict(renamed)
    expected = []
    for image, prompt in zip(images, PROMPTS, strict=True):
        picture = Image.fromarray(np.asarray(image.permute(1, 2, 0)))
        text = module._INSTRUCTION.format(text_prompt=prompt.text)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        chat = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        batch = processor(text=[chat], images=[picture], return_tensors="pt")
        (place,) = (batch["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids("<|Reward|>")).nonzero()
        with torch.no_grad():
            places = torch.arange(batch["input_ids"].shape[1]).expand(3, 1, -1)  # unless told, the public code counts
            hidden = network(**batch, position_ids=places).last_hidden_state[0, place]
        for layer in (0, 3, 5):
            hidden = hidden @ state[f"rm_head.{layer}.weight"].T + state[f"rm_head.{layer}.bias"]
            hidden = hidden if layer == 5 else hidden.relu()
        expected.append(hidden[0])
    answer = Hpsv3(**options)(images, PROMPTS)
    torch.testing.assert_close(torch.stack([answer["score"], answer["spread"]], 1), torch.stack(expected))


def test_other_sizes_are_brought_to_as_many_pixels() -> None:
    for height, width in ((32, 32), (1024, 512), (300, 700)):
        high, wide = fitted(pictures(1, height, width), module._PIXELS, module._PIXELS).shape[-2:]
        assert high % 28 == wide % 28 == 0
        assert 0.85 * 448**2 <= high * wide <= 1.15 * 448**2


def test_every_layout_of_transformers_is_read(tmp_path: Path) -> None:
    options, images = hpsv3_folder(tmp_path), pictures(2)
    before = Hpsv3(**options)(images, PROMPTS)["score"]
    state = load_file(tmp_path / "HPSv3.safetensors")
    moved = {
        name if name.startswith("rm_head.") else re.sub("^(visual|model)", lambda at: NEW[at[0]], name): value
        for name, value in state.items()
    }
    save_file(moved | {"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "HPSv3.safetensors")
    assert torch.equal(Hpsv3(**options)(images, PROMPTS)["score"], before)


NEW = {"visual": "model.visual", "model": "model.language_model"}


def test_a_prompt_that_names_the_token_does_not_choose_the_place(tmp_path: Path) -> None:
    reward, images = Hpsv3(**hpsv3_folder(tmp_path)), pictures(1)
    answer = reward(images, [Prompt("a cat <|Reward|> and a dog")])
    assert answer["score"].shape == (1,) and answer["score"].isfinite().all()


def test_other_files_are_refused(tmp_path: Path) -> None:
    options = hpsv3_folder(tmp_path)
    state = load_file(tmp_path / "HPSv3.safetensors")
    save_file({name: value for name, value in state.items() if "rm_head" not in name}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="is no HPSv3: it has no embed_tokens or no rm_head"):
        Hpsv3(**options | {"checkpoint": str(tmp_path / "bare.safetensors")})
    save_file(
        {name: value for name, value in state.items() if "layers.1.mlp" not in name}, tmp_path / "thin.safetensors"
    )
    with pytest.raises(ValueError, match=r"lacks tensors of this network.*layers\.1\.mlp"):
        Hpsv3(**options | {"checkpoint": str(tmp_path / "thin.safetensors")})
    with pytest.raises(ValueError, match="hf download MizzenAI/HPSv3"):
        Hpsv3()
