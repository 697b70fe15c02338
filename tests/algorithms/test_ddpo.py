"""DDPO: the running baseline by hand, the two modes, and what a checkpoint must hold."""

import json

import pytest
import torch
from pydantic import ValidationError

from rlalign.algorithms.baselines import Tracker
from rlalign.algorithms.ddpo import Algorithm, Config
from rlalign.mdp.noise import Noise
from rlalign.types import RewardScores, Scores

from .chains import make_policy, sample

ALL = torch.ones(2, 2, dtype=torch.bool)


def scores(values: list[list[float]], prompts: tuple[str, ...], valid: torch.Tensor = ALL) -> Scores:
    return Scores({"r": RewardScores(torch.tensor(values), valid, "train", 1.0)}, prompts)


def test_a_prompt_with_a_past_is_judged_by_it_and_others_by_the_batch():
    tracker = Tracker(buffer_size=3, min_count=3)
    rewards = torch.tensor([[0.0, 2.0], [4.0, 6.0]], dtype=torch.float64)
    first = tracker.advantages(["a", "b"], rewards, ALL)
    assert torch.allclose(first, (rewards - 3) / 5**0.5, atol=1e-5)  # both prompts have two rewards: the batch's 3, √5
    second = tracker.advantages(["a", "c"], torch.tensor([[7.0, 3.0], [0.0, 0.0]], dtype=torch.float64), ALL)
    assert tracker.rewards["a"] == [2.0, 7.0, 3.0]  # the oldest has left; the present ones count
    assert torch.allclose(second[0], (torch.tensor([7.0, 3.0]).double() - 4) / (14 / 3) ** 0.5, atol=1e-5)
    assert torch.allclose(second[1], torch.tensor([-2.5, -2.5]).double() / 8.25**0.5, atol=1e-5)


def test_groups_of_the_same_prompt_share_one_past():
    tracker = Tracker(buffer_size=16, min_count=4)
    advantages = tracker.advantages(["a", "a"], torch.tensor([[0.0, 2.0], [4.0, 6.0]], dtype=torch.float64), ALL)
    assert torch.allclose(advantages, torch.tensor([[-3.0, -1], [1, 3]]).double() / 5**0.5, atol=1e-5)


def test_failed_rewards_leave_no_trace():
    algorithm = Algorithm(Config(buffer_size=4, min_count=1))
    valid = torch.tensor([[True, False], [True, True]])
    advantages = algorithm.advantages(scores([[1.0, 0.0], [1.0, 3.0]], ("a", "b"), valid))
    assert advantages.tolist() == [[0.0, 0.0], [pytest.approx(-1, abs=1e-5), pytest.approx(1, abs=1e-5)]]
    assert algorithm.tracker.rewards["a"] == [1.0]
    nothing = algorithm.advantages(scores([[0.0, 0.0], [0.0, 0.0]], ("new", "newer"), ~ALL))
    assert nothing.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_equal_rewards_give_exactly_zero_and_outliers_are_clamped():
    algorithm = Algorithm(Config(buffer_size=2, min_count=2, adv_clip=5.0))
    assert (algorithm.advantages(scores([[0.1, 0.1], [0.3, 0.3]], ("a", "b"))) == 0).all()
    flat = scores([[9.0, 0.1], [0.3, 0.3]], ("a", "b"))
    assert algorithm.advantages(flat).abs().max() <= 5


def test_the_past_survives_a_checkpoint():
    before, after = Algorithm(Config(min_count=3)), Algorithm(Config(min_count=3))
    before.advantages(scores([[0.1, 0.7], [0.3, 0.4]], ("a", "b")))
    state = before.state_dict()
    after.load_state_dict(type(state)(values=json.loads(json.dumps(state.values))))
    nxt = scores([[0.2, 0.9], [0.8, 0.5]], ("a", "c"))
    assert torch.equal(before.advantages(nxt), after.advantages(nxt))


def test_both_modes_have_one_gradient_on_fresh_samples():
    policy = make_policy(dim=2)
    trajectory, advantages = sample(policy, 8, seed=0), torch.linspace(-1, 2, 8).double()
    gradients: list[torch.Tensor] = []
    for mode in ("sf", "is"):
        (parameter,) = policy.parameters.values()
        parameter.grad = None
        for loss in Algorithm(Config(mode=mode)).losses(policy, trajectory, advantages, Noise(0)):
            assert (loss.maxima["ratio/max_abs_dev"] == 0).all()
            loss.rows.sum().backward()
        assert parameter.grad is not None
        gradients.append(parameter.grad.clone())
    assert gradients[0].abs().max() > 1e-3
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-12)


def test_the_score_function_is_refused_where_it_would_be_biased():
    with pytest.raises(ValidationError, match="updates_per_step: 1"):
        Config(mode="sf", updates_per_step=2)
    with pytest.raises(ValidationError, match="epochs_per_step: 1"):
        Config(mode="sf", epochs_per_step=2)
    with pytest.raises(ValidationError, match="never reached"):
        Config(buffer_size=4, min_count=5)
