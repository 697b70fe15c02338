"""What rewards share that are a Qwen2-VL with a head, read at tokens of their own: loading, sizes, questions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlalign_rewards._networks import from_hub, placed, resized

_PATCH = 28  # pixels of one token's side


class QwenVl:
    """The network below the head, with its processor."""

    def __init__(
        self,
        base: str,
        state: dict[str, Tensor],
        source: Path,
        tokens: Sequence[str],
        device: str | None,
        dtype: str,
    ) -> None:
        """`base` gives architecture, tokenizer and processor, `state` all weights, named as `renamed` names them."""
        from transformers import AutoConfig, AutoProcessor

        config: Any = from_hub(base, AutoConfig.from_pretrained)
        self.processor: Any = from_hub(base, lambda name: AutoProcessor.from_pretrained(name, padding_side="right"))
        self.processor.tokenizer.add_tokens(list(tokens), special_tokens=True)
        self._tokens = self.processor.tokenizer.convert_tokens_to_ids(list(tokens))
        config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
        self._network: Any = placed(_filled(config, state, source), device, dtype)

    @torch.no_grad()
    def hidden(self, kind: str, shown: Sequence[Tensor], questions: Sequence[str]) -> Tensor:
        """The last hidden states [B, tokens, D] float32 where each token stands last in chat.

        `kind` is image or video; shown: uint8 [3, H, W] or [F, 3, H, W] each, in their final size
        """
        chats = [self._chat(kind, question) for question in questions]
        files = {f"{kind}s": list(shown)}
        batch = self.processor(text=chats, do_resize=False, padding=True, return_tensors="pt", **files)
        batch = batch.to(self._network.device)
        pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
        batch[pixels] = batch[pixels].to(self._network.dtype)
        ids = batch["input_ids"]  # [B, T]
        place = torch.arange(ids.shape[1], device=ids.device)
        # The published code embeds pictures before it calls the network, which then counts their tokens like words.
        positions = place.expand(3, *ids.shape)
        hidden = self._network(**batch, position_ids=positions, use_cache=False).last_hidden_state  # [B, T, D]
        last = torch.stack([(place * (ids == token)).amax(1) for token in self._tokens], 1)  # [B, tokens]
        return hidden[torch.arange(len(ids), device=ids.device)[:, None], last].float()

    def _chat(self, kind: str, question: str) -> str:
        turn = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}
        return self.processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)


def fitted(images: Tensor, least: int, most: int) -> Tensor:
    """Between so many pixels, both sides multiples of 28, by bicubic. uint8 [B, 3, H, W]"""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    height, width = smart_resize(*images.shape[-2:], factor=_PATCH, min_pixels=least, max_pixels=most)
    return (255 * resized(images / 255, height, width)).round().to(torch.uint8)


def renamed(name: str) -> str:
    """transformers has had three layouts of this network: visual.* and model.*, and both of them below model.*"""
    name = name.removeprefix("model.")
    kept = name.startswith(("visual.", "language_model.", "rm_head.", "lm_head."))
    return name if kept else f"language_model.{name}"


def _filled(config: Any, state: dict[str, Tensor], source: Path) -> Any:
    """Without random numbers for billions of weights first."""
    from transformers import Qwen2VLModel

    network, report = Qwen2VLModel.from_pretrained(
        None, config=config, state_dict=state, dtype="auto", output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        raise ValueError(f"{source} lacks tensors of this network or has them in other sizes: {(missing or ['?'])[0]}")
    return network
