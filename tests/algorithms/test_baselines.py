"""Baselines over several batches: by hand, and the regression on states against rewards that they explain."""

from dataclasses import replace

import torch
from torch import Tensor

from rlalign.algorithms import dpok
from rlalign.algorithms.baselines import StateValue, Values, pooled
from rlalign.policy import Policy
from rlalign.types import Trajectory
from tests import small

from .chains import make_policy, sample


def test_the_value_of_a_prompt_follows_its_rewards():
    values, valid = Values(rate=0.25), torch.ones(2, 2, dtype=torch.bool)
    first = values.advantages(["a", "b"], torch.tensor([[0.0, 2.0], [4.0, 8.0]]).double(), valid)
    assert first.tolist() == [[-2.0, 2.0], [-4.0, 4.0]]  # nothing known: the group's other sample
    assert values.values == {"a": 1.0, "b": 6.0}
    valid[1, 1] = False
    second = values.advantages(["a", "b"], torch.tensor([[5.0, 5.0], [2.0, 0.0]]).double(), valid)
    assert second.tolist() == [[4.0, 4.0], [-4.0, 0.0]]
    assert values.values == {"a": 2.0, "b": 5.0}


def test_a_prompt_twice_in_a_batch_is_judged_by_what_was_known_before_it():
    values, valid = Values(rate=0.5), torch.ones(2, 2, dtype=torch.bool)
    values.values = {"a": 1.0}
    advantages = values.advantages(["a", "a"], torch.tensor([[3.0, 3.0], [0.0, 2.0]]).double(), valid)
    assert advantages.tolist() == [[2.0, 2.0], [-1.0, 1.0]]
    assert values.values == {"a": 1.5}


# --- of a state


def chains(rows: int, seed: int = 0, dim: int = 2) -> tuple[Policy, Trajectory]:
    policy = make_policy(dim, num_steps=4)
    return policy, sample(policy, rows, seed)


def told(trajectory: Trajectory, slot: int) -> Tensor:
    """2 + 3 y_1 - y_2², a step further times that."""
    y = trajectory.x[:, slot].flatten(1)
    return (slot + 1) * (2 + 3 * y[:, 0] - y[:, 1].square())


def test_a_state_is_summed_up_by_the_means_of_its_blocks():
    y = torch.arange(64.0).reshape(1, 4, 4, 4)
    features = pooled(y)
    assert features.shape == (1, 33)
    assert features[0, :3].tolist() == [1, 1.5, 5.5]
    assert features[0, 17].item() == (0 + 1 + 4 + 9) / 4
    assert pooled(torch.tensor([[[[2.0, 3.0]]]])).tolist() == [[1, 2, 3, 4, 9]]


def test_each_step_has_a_value_of_its_own_which_is_what_its_states_explain():
    _, trajectory = chains(4000)
    value = StateValue(rate=0.1)
    assert (value(trajectory, 0) == 0).all()
    for slot in range(3):
        alone = trajectory.steps[:, slot : slot + 1]
        rows = replace(trajectory, steps=alone, x=trajectory.x[:, slot : slot + 1])
        value.fit(value.counted(rows, told(trajectory, slot)))
    _, fresh = chains(50, seed=1)
    for slot in range(3):
        expected = told(fresh, slot)
        assert (value(fresh, slot) - expected).abs().max() < 0.02 * expected.abs().max()


def test_it_forgets_at_its_rate_and_counts_rows_wherever_they_are():
    _, one = chains(40, seed=0)
    _, two = chains(40, seed=1)
    value, whole = StateValue(rate=0.25), StateValue(rate=0.25)
    first, second = value.counted(one, told(one, 0)), value.counted(two, told(two, 0))
    halves = [one.take(rows) for rows in torch.arange(40).split([15, 25])]
    parts = [value.counted(half, told(half, 0)) for half in halves]
    torch.testing.assert_close(parts[0] + parts[1], first)
    nobody = value.counted(one.take(torch.arange(0)), torch.zeros(0).double())
    assert nobody.shape == first.shape and not nobody.any()  # a rank without rows
    value.fit(first)
    value.fit(second)
    torch.testing.assert_close(value.sums, 0.75 * first + second)
    assert (value.sums[:3, 0, 0] == 70).all() and (value.sums[3] == 0).all()
    whole.load(value.sums)
    assert torch.equal(whole(one, 1), value(one, 1))


def test_a_learner_counts_states_by_micro_batches():
    algorithm = dpok.Algorithm(dpok.Config(baseline="state"))
    sampler, learner = small.workers(algorithm)
    trajectories = small.sample(sampler)
    rows, total = list[int](), Trajectory.concat(trajectories).num_rows
    count = algorithm.counted
    vars(algorithm)["counted"] = lambda part, advantages: rows.append(part.num_rows) or count(part, advantages)
    advantages = algorithm.advantages(small.scored(trajectories))
    learner.update(trajectories, advantages, 0)
    assert rows == [8] * (total // 8)  # never the whole step, whose embeddings are repeated by row
    whole = Trajectory.concat(trajectories).take(torch.arange(total))
    torch.testing.assert_close(algorithm.fitted, count(whole, advantages.flatten()))


def test_a_restored_learner_knows_its_states():
    def run(break_at: int | None) -> dict[str, Tensor]:
        def start() -> tuple[small.Sampler, small.Learner]:
            return small.workers(dpok.Algorithm(dpok.Config(baseline="state")))

        sampler, learner = start()
        for step in range(4):
            if step == break_at:
                driver, state = learner.algorithm.state_dict(), learner.state_dict()
                sampler, learner = start()
                learner.load_state_dict(state)
                learner.algorithm.load_state_dict(driver)
            trajectories = small.sample(sampler, step)
            learner.update(trajectories, learner.algorithm.advantages(small.scored(trajectories)), step)
        return learner.state_dict().tensors

    unbroken, broken = run(None), run(2)
    assert unbroken["fitted/sums"].any()
    assert unbroken.keys() == broken.keys()
    assert all(torch.equal(unbroken[key], broken[key]) for key in unbroken)
