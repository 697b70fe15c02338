"""Weights of a few kilobytes in the layouts of the published ones, and the options that load them."""

import json
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import peft
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BitImageProcessor,
    BlipTextConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from rlalign_rewards._networks import rating_head
from rlalign_rewards.hpsv3 import _INSTRUCTION
from rlalign_rewards.hpsv3 import _head as rated_head

SIDE = 28
WIDTH = 16

SMALL_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 7,
}

OPEN_CLIP = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 7},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """With every weight off its initial value: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


@cache
def _words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's own vocabulary and merges, which open_clip's wheel carries."""
    tokens = SimpleTokenizer()
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {ends.get(word, word): number for word, number in tokens.encoder.items()}, list(tokens.bpe_ranks)


def clip_folder(folder: Path, seed: int = 7, width: int = WIDTH) -> str:
    """A CLIPModel with tokenizer and processor, as transformers stores it; seed 7 has positive cosines."""
    config = CLIPConfig(
        projection_dim=width,
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": 7,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = CLIPModel(config)
    shaken(network, seed).save_pretrained(folder)
    vocabulary, merges = _words()
    CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return str(folder)


def open_clip_file(folder: Path) -> tuple[str, str]:
    """The name of a tiny architecture, made known to open_clip, and a checkpoint of it as HPSv2 stores its own."""
    config = folder / "rlalign-tiny.json"
    config.write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.CLIP(**OPEN_CLIP)
    path = folder / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": shaken(network).state_dict()}, path)
    return "rlalign-tiny", str(path)


def head_file(path: Path, width: int) -> str:
    """The aesthetic head as published: a table of tensors called layers.0.weight and so on."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = rating_head(width)
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, path)
    return str(path)


def _clipscore(folder: Path) -> dict[str, Any]:
    return {"model": clip_folder(folder)}


def _pickscore(folder: Path) -> dict[str, Any]:
    model = clip_folder(folder)
    return {"model": model, "processor": model}


def _aesthetic(folder: Path) -> dict[str, Any]:
    return {"clip": clip_folder(folder, width=768), "head": head_file(folder / "head.pth", 768)}


def _hpsv2(folder: Path) -> dict[str, Any]:
    model, checkpoint = open_clip_file(folder)
    return {"model": model, "checkpoint": checkpoint}


def imagereward_file(folder: Path) -> dict[str, Any]:
    """ImageReward.pt in BLIP's names, as published, and a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        eyes = VisionTransformer(SIDE, 7, embed_dim=128, depth=2, num_heads=2, num_classes=0)
        config = BlipTextConfig(
            vocab_size=40,
            hidden_size=64,
            encoder_hidden_size=128,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=64,
            is_decoder=True,
        )
        reader, head = BlipTextModel(config, add_pooling_layer=False), rating_head(64)
    parts = {"blip.visual_encoder": eyes, "blip.text_encoder": reader, "mlp.layers": head}
    state = {f"{part}.{name}": value for part, net in parts.items() for name, value in shaken(net).state_dict().items()}
    torch.save(state | {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}, folder / "ImageReward.pt")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "red",
        "circle",
        "dogs",
        "the",
        "left",
        *"abcdefgh",
        *"249 5",
    ]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return {"checkpoint": str(folder), "tokenizer": str(folder)}


def mps_file(folder: Path) -> dict[str, Any]:
    """The names and shapes of MPS: a CLIP and four layers of cross and self attention."""
    clip = clip_folder(folder)
    width, heads, inner = WIDTH, 2, 24
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    state = {f"model.{name}": value for name, value in CLIPModel.from_pretrained(clip).state_dict().items()}
    for layer in (f"cross_model.layers.{number}" for number in range(4)):
        state |= {
            f"{layer}.0.fn.norm.weight": 1 + random(width),
            f"{layer}.0.fn.norm.bias": torch.zeros(width),
            f"{layer}.0.fn.to_q.weight": random(heads * 64, width),
            f"{layer}.0.fn.to_kv.weight": random(128, width),
            f"{layer}.0.fn.to_out.weight": random(width, heads * 64),
            f"{layer}.0.fn.ff.0.weight": random(2 * inner, width),
            f"{layer}.0.fn.ff.2.weight": random(width, inner),
            f"{layer}.1.fn.norm.weight": 1 + random(width),
            f"{layer}.1.fn.norm.bias": torch.zeros(width),
            f"{layer}.1.fn.rotary_emb.inv_freq": 1e4 ** -(torch.arange(0, 64, 2) / 64),
            f"{layer}.1.fn.fused_attn_ff_proj.weight": random(heads * 64 + 128 + 2 * inner, width),
            f"{layer}.1.fn.attn_out.weight": random(width, heads * 64),
            f"{layer}.1.fn.ff_out.1.weight": random(width, inner),
        }
    torch.save(state, folder / "mps.pth")
    return {"checkpoint": str(folder / "mps.pth"), "clip": clip}


def classifier_folder(folder: Path) -> dict[str, Any]:
    """A ViT with the labels of Falconsai's."""
    labels = {0: "normal", 1: "nsfw"}
    config = ViTConfig(**SMALL_VIT, id2label=labels, label2id={label: number for number, label in labels.items()})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shaken(ViTForImageClassification(config)).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return {"model": str(folder)}


def geneval_folder(folder: Path) -> dict[str, Any]:
    """A YOLOS that knows circles and dogs, and a CLIP."""
    labels = {0: "circle", 1: "dog"}
    sizes = SMALL_VIT | {"image_size": [SIDE, SIDE], "num_detection_tokens": 5}
    config = YolosConfig(**sizes, id2label=labels, label2id={label: number for number, label in labels.items()})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shaken(YolosForObjectDetection(config)).save_pretrained(folder / "detector")
    YolosImageProcessor(size={"shortest_edge": SIDE, "longest_edge": 64}).save_pretrained(folder / "detector")
    return {"detector": str(folder / "detector"), "clip": clip_folder(folder / "clip"), "clip_tag": None}


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte pairs of HPSv3's own question, so that it is short."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    trained.train_from_iterator([_INSTRUCTION], trainer)
    table = json.loads(trained.to_str())["model"]
    made = Qwen2Tokenizer(vocab=table["vocab"], merges=[tuple(pair) for pair in table["merges"]])
    made.add_tokens(["<|im_start|>", "<|im_end|>", *VISION], special_tokens=True)
    made.chat_template = (
        "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{% for part in turn['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
        "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
        "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    return made


VISION = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]


def qwen_folder(folder: Path, tokens: int) -> Qwen2VLConfig:
    """The configuration of a Qwen2-VL that knows so many tokens more than its tokenizer, and its processor."""
    words = qwen_tokenizer()
    start, image, end, video = words.convert_tokens_to_ids(VISION)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(words) + tokens,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1},
        vision_start_token_id=start,
        image_token_id=image,
        vision_end_token_id=end,
        video_token_id=video,
    )
    config.save_pretrained(folder)
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), words, Qwen2VLVideoProcessor(), words.chat_template)
    processor.save_pretrained(folder)
    return config


def old_layout(name: str) -> str:
    """As transformers 4.45 named the layers of a Qwen2-VL."""
    return name if name.startswith("visual.") else name.replace("language_model.", "model.", 1)


def hpsv3_folder(folder: Path) -> dict[str, Any]:
    """A Qwen2-VL with its processor, and HPSv3.safetensors in the layout of the published file."""
    config = qwen_folder(folder, tokens=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, head = shaken(Qwen2VLModel(config)), shaken(rated_head(16))
    state = {old_layout(name): value.contiguous() for name, value in network.state_dict().items()}
    state |= {f"rm_head.{name}": value for name, value in head.state_dict().items()}
    save_file(state, folder / "HPSv3.safetensors")
    return {"checkpoint": str(folder), "base": str(folder), "dtype": "float32"}


def videoalign_folder(folder: Path) -> dict[str, Any]:
    """A Qwen2-VL with its processor, and a model.pth as VideoReward's: of a PEFT model with its adapters apart."""
    network, head = videoalign_network(folder)
    state = {f"base_model.model.{old_layout(name)}": value for name, value in network.state_dict().items()}
    (folder / "checkpoint-11352").mkdir(exist_ok=True)
    torch.save(state | {"base_model.model.rm_head.weight": head}, folder / "checkpoint-11352" / "model.pth")
    return {"checkpoint": str(folder), "base": str(folder), "dtype": "float32"}


def videoalign_network(folder: Path) -> tuple[nn.Module, Tensor]:
    """The network with adapters in every linear layer of its language model, and the head's weights."""
    config = qwen_folder(folder, tokens=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Qwen2VLModel(config)
        layers = [name for name, part in network.language_model.named_modules() if isinstance(part, nn.Linear)]
        targets = [f"language_model.{name}" for name in layers]
        peft.inject_adapter_in_model(peft.LoraConfig(r=64, lora_alpha=128, target_modules=targets), network)
        head = torch.randn(1, 16)
    return shaken(network), head


def dino_folder(folder: Path) -> dict[str, Any]:
    """A DINOv2, which crops the middle of a larger picture."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shaken(Dinov2Model(Dinov2Config(**SMALL_VIT))).save_pretrained(folder)
    crop = {"height": SIDE, "width": SIDE}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(folder)
    return {"model": str(folder)}


OPTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "aesthetic": _aesthetic,
    "clipscore": _clipscore,
    "geneval": geneval_folder,
    "hpsv2": _hpsv2,
    "hpsv3": hpsv3_folder,
    "image_similarity": dino_folder,
    "imagereward": imagereward_file,
    "mps": mps_file,
    "nsfw": classifier_folder,
    "pickscore": _pickscore,
    "videoalign": videoalign_folder,
}
"""Of every reward whose weights are only on a hub: what makes it work without one."""


DECLARED: dict[str, str] = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
    "entry-points"
]["rlalign.rewards"]
"""The catalogue as it will be installed: what stands for a name, module:attribute."""


def pictures(rows: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """Smooth noise, which resizing does not erase. uint8 [rows, 3, height, width]"""
    coarse = torch.rand(rows, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (255 * nn.functional.interpolate(coarse, (height, width), mode="bilinear")).round().to(torch.uint8)
