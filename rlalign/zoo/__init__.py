"""Tiny pipelines that ship with rlalign, and what made them: scenes, prompts, networks, training."""
