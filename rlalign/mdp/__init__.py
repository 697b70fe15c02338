"""The diffusion MDP: pure functions on tensors. Formulas and their papers stand in the docstrings.

Letters: ``x = alpha * x0 + sigma * eps``; a step goes from level ``now`` to the less noisy
``nxt`` (primed in formulas); x0 and x1 are the predicted clean latent and noise, ``v = x1 - x0`` the flow velocity that
they imply; ``tau = sigma - sigma'``.
"""
