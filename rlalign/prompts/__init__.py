"""Prompts: where they are read (`sources`), when two are the same (`matching`), which a step uses (`sets`)."""

from rlalign.prompts.config import PromptsConfig
from rlalign.prompts.images import read_image, seen_by_model, stand_in
from rlalign.prompts.sets import PromptSet, drawn, evenly
from rlalign.prompts.sources import read

__all__ = ["PromptSet", "PromptsConfig", "drawn", "evenly", "read", "read_image", "seen_by_model", "stand_in"]
