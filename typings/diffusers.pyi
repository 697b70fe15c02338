"""diffusers states types that its own calls contradict (`text_encoder_3: T5EncoderModel` is None in every small SD3,
configs are dicts with attributes), so rlalign looks at it as untyped."""

from typing import Any

def __getattr__(name: str) -> Any: ...
