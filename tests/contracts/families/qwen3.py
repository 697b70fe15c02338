"""The text encoder that several families share, tiny."""

from string import ascii_lowercase

from transformers import Qwen2Tokenizer, Qwen3Config

CHAT = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def tokenizer() -> Qwen2Tokenizer:
    """Letters and blanks, between two marks."""
    symbols = ["<|endoftext|>", "Ġ", *ascii_lowercase]
    made = Qwen2Tokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)})
    made.add_tokens(["<|im_start|>", "<|im_end|>"])
    made.chat_template = CHAT
    return made


def config(layers: int) -> Qwen3Config:
    """16 numbers a token, large at the start of training already: at 0.02 the text hardly moves the picture."""
    return Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.2,
    )
