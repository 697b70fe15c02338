"""VideoReward on tiny weights of its layout against the public code's path: frames, processor, adapters, head."""

from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import InterpolationMode, resize
from transformers import AutoProcessor

from rlalign.types import Prompt
from rlalign_rewards import videoalign as module
from rlalign_rewards.videoalign import VideoAlign, seen
from tests.rewards.tiny import pictures, videoalign_folder, videoalign_network

PROMPTS = [Prompt("a cat"), Prompt("two red dogs on the left, in oil, and much else")]
TOKENS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]


def films(rows: int, frames: int, height: int = 40, width: int = 64) -> torch.Tensor:
    return pictures(rows * frames, height, width).unflatten(0, (rows, frames))


def test_the_scores_are_those_of_the_public_code(tmp_path: Path) -> None:
    """Each film alone, adapters beside their layers, tokens counted like words."""
    options, shown = videoalign_folder(tmp_path), films(2, 33)
    network, head = videoalign_network(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    rated = processor.tokenizer.convert_tokens_to_ids(TOKENS)
    expected = []
    for film, prompt in zip(shown, PROMPTS, strict=True):
        frames = film[[0, 11, 21, 32]]  # of 33 frames at 16 a second, 2 a second
        frames = resize(frames, [252, 420], interpolation=InterpolationMode.BICUBIC, antialias=True).float()
        text = module._QUESTION.format(text_prompt=prompt.text)
        turn = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}
        chat = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        batch = processor(text=[chat], videos=[frames], return_tensors="pt", do_resize=False)
        ids = batch["input_ids"][0]
        places = [int((ids == token).nonzero()) for token in rated]
        with torch.no_grad():
            hidden = network(**batch, position_ids=torch.arange(len(ids)).expand(3, 1, -1)).last_hidden_state
        raw = hidden[0, places] @ head[0]
        expected.append((raw - torch.tensor([3.6757, 1.1646, 2.8105])) / torch.tensor([2.2476, 1.3811, 2.5121]))
    answer = VideoAlign(**options)(shown, PROMPTS)
    details = torch.stack([answer["visual"], answer["motion"], answer["text"]], 1)
    torch.testing.assert_close(details, torch.stack(expected), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(answer["score"], details.sum(1))


@pytest.mark.parametrize(
    ("frames", "fps", "expected"),
    [
        (33, 16.0, [0, 11, 21, 32]),
        (81, 16.0, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (8, 2.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (7, 2.0, [0, 1, 2, 4, 5, 6]),
        (5, 16.0, [0, 1, 3, 4]),
        (3, 16.0, [0, 2]),
        (1, 16.0, [0, 0]),
    ],
)
def test_two_frames_a_second_are_seen_four_where_there_are_so_many(
    frames: int, fps: float, expected: list[int]
) -> None:
    assert seen(frames, fps) == expected


def test_weights_say_what_the_score_is_made_of(tmp_path: Path) -> None:
    options, shown = videoalign_folder(tmp_path), films(2, 4)
    whole = VideoAlign(**options)(shown, PROMPTS)
    some = VideoAlign(**options, weights={"motion": 2, "text": -1})(shown, PROMPTS)
    torch.testing.assert_close(some["score"], 2 * whole["motion"] - whole["text"])
    assert torch.equal(some["visual"], whole["visual"])


def test_the_order_of_frames_counts_and_a_picture_stands_still(tmp_path: Path) -> None:
    reward, shown = VideoAlign(**videoalign_folder(tmp_path)), films(1, 4)
    forwards, backwards = reward(shown, PROMPTS[:1]), reward(shown.flip(1), PROMPTS[:1])
    assert abs(backwards["score"] - forwards["score"]) > 1e-4
    still = reward(shown[:, :1].expand(-1, 2, -1, -1, -1), PROMPTS[:1])
    assert torch.equal(reward(shown[:, 0], PROMPTS[:1])["score"], still["score"])


def test_a_prompt_that_names_the_tokens_rates_nothing_twice(tmp_path: Path) -> None:
    reward, shown = VideoAlign(**videoalign_folder(tmp_path)), films(1, 4)
    plain = reward(shown, [Prompt("a cat ")])
    assert torch.equal(reward(shown, [Prompt("a cat <|MQ_reward|>")])["score"], plain["score"])


def test_other_files_and_options_are_refused(tmp_path: Path) -> None:
    options = videoalign_folder(tmp_path)
    state = torch.load(tmp_path / "checkpoint-11352" / "model.pth")
    for name, without, words in (
        ("bare.pth", "rm_head", "is no VideoReward: it has no embed_tokens or no rm_head"),
        ("half.pth", "q_proj.lora_B", "has an adapter of language_model.layers.0.self_attn.q_proj without its other"),
        ("thin.pth", "layers.1.mlp", r"lacks tensors of this network.*layers\.1\.mlp"),
    ):
        torch.save({key: value for key, value in state.items() if without not in key}, tmp_path / name)
        with pytest.raises(ValueError, match=words):
            VideoAlign(**options | {"checkpoint": str(tmp_path / name)})
    with pytest.raises(ValueError, match="weights has sound; there are visual, motion, text"):
        VideoAlign(**options, weights={"sound": 1})
    with pytest.raises(ValueError, match="fps is 0; it counts frames a second"):
        VideoAlign(**options, fps=0)
    with pytest.raises(ValueError, match="hf download KwaiVGI/VideoReward"):
        VideoAlign()
