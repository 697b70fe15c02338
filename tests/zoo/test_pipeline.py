"""The shipped pipeline is an ordinary, small diffusers folder that leaves room for reinforcement learning."""

import subprocess
import sys

import pytest
from diffusers import StableDiffusion3Pipeline

from rlalign.zoo.evaluate import SHIPPED, accuracies, as_prompts, ocr_score, paint
from rlalign.zoo.networks import TEXT_TOKENS, build_tokenizer, load, vocabulary
from rlalign.zoo.prompts import composition_prompts, text_prompts
from rlalign.zoo.scenes import WORDS, caption

PLAIN_DIFFUSERS = f"""
import sys
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained({str(SHIPPED)!r}, text_encoder_3=None, tokenizer_3=None)
call = dict(num_inference_steps=2, guidance_scale=3.0, max_sequence_length=0)
[image] = pipe("a red circle above a blue square", **call).images
assert image.size == (32, 32)
assert not any(name.startswith("rlalign") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return load(SHIPPED)


def test_loads_and_paints_in_plain_diffusers() -> None:
    subprocess.run([sys.executable, "-c", PLAIN_DIFFUSERS], check=True)


def test_is_small() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*")) < 10e6


def test_leaves_room_without_guidance_and_shows_it_with(pipeline: StableDiffusion3Pipeline) -> None:
    prompts = as_prompts(composition_prompts(heldout=True))
    plain, guided = (accuracies(paint(pipeline, prompts, guidance), prompts)["score"] for guidance in (1.0, 3.0))
    assert 0.25 < plain < 0.55
    assert guided > plain + 0.2


def test_writes_half_legibly(pipeline: StableDiffusion3Pipeline) -> None:
    pytest.importorskip("rapidocr", reason="needs the extra rlalign[ocr]")
    prompts = as_prompts(text_prompts(heldout=True))
    assert 0.4 < ocr_score(paint(pipeline, prompts, guidance=1.0), prompts) < 0.8


def test_every_word_is_one_token_and_every_letter_of_a_text(pipeline: StableDiffusion3Pipeline) -> None:
    tokenizer = pipeline.tokenizer
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert all(len(tokenizer(word).input_ids) == 3 for word in vocabulary())
    assert all(len(tokenizer(word).input_ids) == 2 + len(word) for word in WORDS)


@pytest.mark.parametrize("heldout", [False, True])
def test_every_prompt_fits(pipeline: StableDiffusion3Pipeline, heldout: bool) -> None:
    texts = [caption(scene) for scene in composition_prompts(heldout=heldout) + text_prompts(heldout=heldout)]
    tokens = pipeline.tokenizer(texts, padding="max_length").input_ids  # not truncated
    assert {len(row) for row in tokens} == {TEXT_TOKENS}
