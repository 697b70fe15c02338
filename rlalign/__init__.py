"""rlalign: online reinforcement learning that aligns diffusion and flow-matching models with rewards."""

__version__ = "0.1.0"
