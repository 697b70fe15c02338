"""The reward service: one front process that speaks HTTP, and worker processes that hold the reward and are asked."""
