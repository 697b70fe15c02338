"""Rows whose reward failed are left out of the update, whatever the algorithm does with an advantage of 0."""

import pytest
import torch

from tests.small import algorithm, sample, scored, workers


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_what_a_dropped_row_holds_does_not_matter(name: str) -> None:
    results = []
    for spoiled in (0.0, 50.0):
        chosen = algorithm(name)
        sampler, learner = workers(chosen)
        trajectories = sample(sampler)
        advantages = chosen.advantages(scored(trajectories))
        valid = torch.ones_like(advantages, dtype=torch.bool)
        valid[0, 1] = valid[2] = False
        trajectories[0].final[1] += spoiled  # row 1 is group 0, sample 1
        trajectories[0].x_next[1] += spoiled
        learner.update(trajectories, advantages.masked_fill(~valid, 0.0), 0, valid)
        results.append(learner.state_dict().tensors)
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_an_update_without_any_valid_row_moves_nothing() -> None:
    chosen = algorithm("nft")
    sampler, learner = workers(chosen)
    before = learner.state_dict().tensors
    learner.update(sample(sampler), torch.zeros(4, 6), 0, torch.zeros(4, 6, dtype=torch.bool))
    assert learner.updates == 0
    assert all(torch.equal(before[key], value) for key, value in learner.state_dict().tensors.items())
