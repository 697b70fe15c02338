"""transformers types a tokenizer's special ids as `int | list[int] | str | list[str]`, which none of its own configs
takes, so rlalign looks at it as untyped."""

from typing import Any

def __getattr__(name: str) -> Any: ...
