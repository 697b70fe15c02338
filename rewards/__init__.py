"""The reward catalogue: one file per reward, importable as `rlalign_rewards`."""
