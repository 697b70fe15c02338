"""Hand-computed advantages, and what must hold of all of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign import plugins
from rlalign.algorithms.advantages import (
    AdvantageSettings,
    GroupRelative,
    Multipliers,
    Std,
    advantage_aggr,
    batch,
    center,
    diverse,
    extremes,
    flat,
    gdpo,
    global_std,
    group_relative,
    group_std,
    loo,
    lowest,
    moments,
    pareto_front,
    winrate,
)
from rlalign.types import RewardScores, Scores

REWARDS = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
ALL = torch.ones(2, 4, dtype=torch.bool)
PLAIN = Std(delta=0.0)


def close(ours: Tensor, theirs: list[list[float]]) -> bool:
    return torch.allclose(ours, torch.tensor(theirs, dtype=ours.dtype), rtol=0, atol=1e-6)


def test_center_and_leave_one_out():
    assert close(center(REWARDS, ALL), [[-2, -1, 0, 3], [0, 0, 0, 0]])
    assert close(loo(REWARDS, ALL), [[-8 / 3, -4 / 3, 0, 4], [0, 0, 0, 0]])


def test_group_std_population_and_unbiased():
    assert close(group_std(REWARDS, ALL, PLAIN), [[-1.069045, -0.534522, 0, 1.603567], [0, 0, 0, 0]])
    unbiased = group_std(REWARDS, ALL, Std(unbiased=True, delta=0.0))
    assert close(unbiased, [[-0.925820, -0.462910, 0, 1.388730], [0, 0, 0, 0]])


def test_global_std_is_of_all_rewards():
    assert close(global_std(REWARDS, ALL, PLAIN), [[-1.206045, -0.603023, 0, 1.809068], [0, 0, 0, 0]])


def test_batch_is_one_big_group():
    assert close(batch(REWARDS, ALL, PLAIN), [[-1.809068, -1.206045, -0.603023, 1.206045], [0.603023] * 4])


def test_delta_is_added_and_floor_is_a_maximum():
    rewards = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert close(group_std(rewards, valid, Std(delta=1.0)), [[-0.5, 0.5]])
    assert close(group_std(rewards, valid, Std(delta=0.0, floor=4.0)), [[-0.25, 0.25]])
    assert close(group_std(rewards, valid, Std(delta=1.0, floor=4.0)), [[-0.2, 0.2]])


def test_aggregated_advantages_weigh_each_reward_in_its_own_units():
    other = torch.tensor([[10.0, 10.0, 10.0, 14.0], [0.0, 0.0, 2.0, 2.0]], dtype=torch.float64)
    combined = advantage_aggr([REWARDS, other], [1.0, 0.5], ALL, PLAIN)
    a, b = group_std(REWARDS, ALL, PLAIN), group_std(other, ALL, PLAIN)
    assert close(b, [[-0.577350, -0.577350, -0.577350, 1.732051], [-1, -1, 1, 1]])
    assert torch.equal(combined, a + 0.5 * b)
    assert torch.allclose(gdpo([REWARDS, other], [1.0, 0.5], ALL, PLAIN), combined / combined.std(correction=0))


def test_trimming_leaves_the_lowest_out_of_mean_and_std_but_still_gives_them_an_advantage():
    assert lowest(REWARDS, ALL, 0.25).tolist() == [[True, False, False, False]] * 2
    assert lowest(REWARDS, ALL, 0.2).sum() == 0
    mean, std = 11 / 3, (26 / 9) ** 0.5  # of 2, 3 and 6
    expected = [[(r - mean) / std for r in (1.0, 2.0, 3.0, 6.0)], [0.0] * 4]
    assert close(group_std(REWARDS, ALL, PLAIN, trim=0.25), expected)


def test_moments_of_what_counts():
    counted = torch.tensor([[True, False, True, False], [False, False, False, False]])
    mean, std = moments(REWARDS, counted, [1])
    assert mean.flatten().tolist() == [2.0, 0.0]
    assert std.flatten().tolist() == [1.0, 0.0]


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "center": center,
    "loo": loo,
    "group_std": lambda r, v: group_std(r, v, PLAIN),
    "group_std unbiased": lambda r, v: group_std(r, v, Std(unbiased=True, delta=1e-8)),
    "global_std": lambda r, v: global_std(r, v, Std()),
    "batch": lambda r, v: batch(r, v, Std()),
    "advantage_aggr": lambda r, v: advantage_aggr([r, r.square()], [1.0, 0.1], v, Std()),
    "gdpo": lambda r, v: gdpo([r, r.square()], [1.0, 0.1], v, Std()),
}
GROUP_RULES = {name: rule for name, rule in RULES.items() if name != "batch"}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_invalid_entries_get_zero_and_say_nothing(rule: Callable[[Tensor, Tensor], Tensor]):
    valid = ALL.clone()
    valid[0, 1] = False
    poisoned = REWARDS.clone()
    poisoned[0, 1] = torch.nan
    advantages = rule(poisoned, valid)
    assert advantages.isfinite().all()
    assert advantages[0, 1] == 0
    poisoned[0, 1] = 1e6
    assert torch.equal(rule(poisoned, valid), advantages)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_nothing_valid_at_all(rule: Callable[[Tensor, Tensor], Tensor]):
    assert torch.equal(rule(torch.full_like(REWARDS, torch.nan), ~ALL), torch.zeros_like(REWARDS))


@pytest.mark.parametrize("rule", GROUP_RULES.values(), ids=GROUP_RULES)
def test_a_group_without_spread_gets_exactly_zero(rule: Callable[[Tensor, Tensor], Tensor]):
    rewards = torch.full((2, 7), 0.1)  # the mean of seven 0.1 is not 0.1
    rewards[0, 0] = 1.0
    assert (rule(rewards, torch.ones_like(rewards, dtype=torch.bool))[1] == 0).all()


@pytest.mark.parametrize("rule", GROUP_RULES.values(), ids=GROUP_RULES)
def test_a_group_with_a_single_valid_sample_gets_zero(rule: Callable[[Tensor, Tensor], Tensor]):
    valid = ALL.clone()
    valid[0, 1:] = False
    assert (rule(REWARDS, valid)[0] == 0).all()


def test_flat_groups_are_those_without_two_different_valid_rewards():
    valid = ALL.clone()
    valid[0, 1:] = False
    assert flat(REWARDS, ALL).tolist() == [False, True]
    assert flat(REWARDS, valid).tolist() == [True, True]
    assert flat(REWARDS, ~ALL).tolist() == [True, True]


def scores(*rewards: tuple[Tensor, float]) -> Scores:
    parts = {str(i): RewardScores(r.float(), ALL, "train", weight) for i, (r, weight) in enumerate(rewards)}
    monitor = RewardScores(torch.full((2, 4), 1e3), ~ALL, "monitor", 1.0)
    return Scores({**parts, "watched": monitor})


def test_settings_choose_the_rule_and_clip_last():
    both = scores((REWARDS, 1.0), (REWARDS.square(), 0.5))
    total = REWARDS + 0.5 * REWARDS.square()
    computed = group_relative(both, AdvantageSettings(advantage="center", adv_clip=5.0))
    assert computed.dtype == torch.float32
    assert torch.allclose(computed, center(total, ALL).clamp(-5, 5).float())
    grouped = group_relative(both, AdvantageSettings(advantage="group_std", std_estimator="unbiased", std_delta=0.5))
    assert torch.allclose(grouped, group_std(total, ALL, Std(unbiased=True, delta=0.5)).float())
    aggregated = group_relative(both, AdvantageSettings(advantage="advantage_aggr"))
    assert torch.allclose(aggregated, advantage_aggr([REWARDS, REWARDS.square()], [1.0, 0.5], ALL, Std()).float())


def test_win_rates_by_hand():
    rewards = torch.tensor([[1.0, 100.0, 2.0, 2.0], [7.0, 7.0, 7.0, 7.0]], dtype=torch.float64)
    assert close(winrate(rewards, ALL), [[0, 1, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]])
    valid = torch.tensor([[True, False, True, True], [True, False, False, False]])
    assert close(winrate(torch.where(valid, rewards, torch.nan), valid), [[0, 0, 0.75, 0.75], [0, 0, 0, 0]])


def test_win_rates_do_not_see_margins_and_add_up_over_rewards():
    near, far = torch.tensor([[1.0, 2.0, 3.0, 6.0]]), torch.tensor([[-40.0, 2.0, 3.0, 9000.0]])
    ok = torch.ones(1, 4, dtype=torch.bool)
    settings = AdvantageSettings(advantage="center", rewards_as="winrate")
    one, two = (group_relative(Scores({"r": RewardScores(r, ok, "train", 1.0)}), settings) for r in (near, far))
    assert torch.equal(one, two)
    assert close(one, [[-1 / 2, -1 / 6, 1 / 6, 1 / 2]])
    against = {"r": RewardScores(near, ok, "train", 1.0), "s": RewardScores(-far, ok, "train", 2.0)}
    assert close(group_relative(Scores(against), settings), [[1 / 2, 1 / 6, -1 / 6, -1 / 2]])


def test_the_best_and_the_worst():
    valid = torch.tensor([[True, True, True, True], [True, False, True, True]])
    values = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 9.0, 5.0, 5.0]])
    assert extremes(values, valid, 1).tolist() == [[True, False, False, True], [True, False, True, False]]
    assert torch.equal(extremes(values, valid, 2), valid)


def test_selected_samples_keep_their_advantage():
    scores = Scores({"r": RewardScores(REWARDS.float(), ALL, "train", 1.0)})
    settings = AdvantageSettings(advantage="center", select="top_bottom", select_count=1)
    assert close(group_relative(scores, settings), [[-2, 0, 0, 3], [0, 0, 0, 0]])


def test_the_pareto_front_by_hand():
    first = torch.tensor([[1.0, 2.0, 3.0, 3.0], [1.0, 1.0, 0.0, 2.0]])
    second = torch.tensor([[5.0, 4.0, 1.0, 0.0], [1.0, 1.0, 0.0, 9.0]])
    valid = torch.tensor([[True, True, True, True], [True, True, True, False]])
    assert pareto_front([first, second], valid).tolist() == [[True, True, True, False], [True, True, False, False]]
    assert pareto_front([first], valid).tolist() == [[False, False, True, True], [True, True, False, False]]


def test_off_the_front_there_is_no_advantage():
    ok = torch.ones(1, 3, dtype=torch.bool)
    first, cost = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0, 2.0, 3.0]])  # a cost has a negative weight
    scores = Scores({"r": RewardScores(first, ok, "train", 1.0), "s": RewardScores(cost, ok, "train", -1.0)})
    computed = group_relative(scores, AdvantageSettings(advantage="center", select="pareto"))
    assert close(computed, [[0, 4 / 3, 4 / 3]])  # totals -4, 0, 0; the first is beaten in both


def constrained(mean: float) -> Scores:
    ok = torch.ones(1, 2, dtype=torch.bool)
    values = {"liked": torch.tensor([[0.0, 1.0]]), "legible": torch.tensor([[mean, mean + 0.5]])}
    return Scores({name: RewardScores(r, ok, "train", 3.0) for name, r in values.items()})


def test_a_constraint_weighs_more_while_it_is_missed_and_less_once_it_holds():
    multipliers = Multipliers({"legible": 0.75}, rate=2.0)
    first = multipliers.weighted(constrained(0.0)).rewards  # mean 0.25, 0.5 short: λ = 1
    assert [reward.weight for reward in first.values()] == [1.5, 0.5]
    multipliers.weighted(constrained(0.0))
    assert multipliers.values == {"legible": 2.0}
    last = multipliers.weighted(constrained(2.0)).rewards
    assert multipliers.values == {"legible": 0.0}
    assert [reward.weight for reward in last.values()] == [3.0, 0.0]


def test_dual_ascent_ends_where_the_constraint_just_holds():
    """Maximise -(x - 1)²/2 with -x ≥ -0.4: to each λ the best x is 1 - λ, and λ = 0.6 makes it 0.4."""
    multipliers, x, ok = Multipliers({"small": -0.4}, rate=0.3), 1.0, torch.ones(1, 1, dtype=torch.bool)
    for _ in range(100):
        scores = Scores({"small": RewardScores(torch.tensor([[-x]]), ok, "train", 1.0)})
        multipliers.weighted(scores)
        x = 1 - multipliers.values["small"]
    assert (x, multipliers.values["small"]) == pytest.approx((0.4, 0.6), abs=1e-5)


def test_failed_rewards_do_not_move_a_constraint_and_unknown_ones_are_refused():
    multipliers = Multipliers({"legible": 0.75}, rate=2.0)
    scores = constrained(0.0)
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    failed = {**scores.rewards, "legible": RewardScores(torch.zeros(1, 2), nothing, "train", 3.0)}
    multipliers.weighted(Scores(failed))
    assert multipliers.values == {"legible": 0.0}
    with pytest.raises(ValueError, match="no reward with role train is called 'readable'"):
        Multipliers({"readable": 1.0}, rate=1.0).weighted(scores)


# --- diversity


def test_good_advantages_are_multiplied_by_their_distance():
    """Over the group's mean distance, 2; bad ones and groups that are all alike stay as they are."""
    advantages = torch.tensor([[2.0, 1.0, 0.0, -3.0], [1.0, 2.0, -1.0, -2.0]], dtype=torch.float64)
    distances = torch.tensor([[3.0, 0.0, 1.0, 4.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert close(diverse(advantages, distances, ALL), [[3.0, 0.0, 0.0, -3.0], [1.0, 2.0, -1.0, -2.0]])
    some = torch.tensor([[True, True, True, False], [True] * 4])  # mean distance 4 / 3
    assert close(diverse(advantages, distances, some)[:1], [[4.5, 0.0, 0.0, -3.0]])


def test_distances_are_those_of_pixels_or_a_reward():
    rewards, ones = torch.tensor([[1.0, 2.0, 3.0, 6.0]]), torch.ones(1, 4, dtype=torch.bool)
    features = torch.tensor([[1.0, 1.0, 2.0, 4.0]])
    entries = {
        "first": RewardScores(rewards, ones, "train", 1.0),
        "dino": RewardScores(features, ones, "train", 0.0),
    }
    scores = Scores(entries, nearest=torch.tensor([[1.0, 1.0, 1.0, 5.0]]))
    plain = AdvantageSettings(advantage="center")
    assert close(group_relative(scores, plain), [[-2, -1, 0, 3]])
    for feature, expected in (("pixels", 5 / 2 * 3), ("dino", 4 / 2 * 3)):
        settings = plain.model_copy(update={"diversity": feature, "adv_clip": 10.0})
        assert close(group_relative(scores, settings), [[-2, -1, 0, expected]])
    with pytest.raises(ValueError, match="no reward with role train is called 'clip'"):
        group_relative(scores, plain.model_copy(update={"diversity": "clip"}))


def test_a_reward_of_weight_0_is_not_on_the_pareto_front():
    ones = torch.ones(1, 3, dtype=torch.bool)
    first, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 0.0, 1.0]])
    settings = AdvantageSettings(advantage="center", select="pareto")

    def kept(weight: float) -> list[bool]:
        entries = {"a": RewardScores(first, ones, "train", 1.0), "b": RewardScores(other, ones, "train", weight)}
        return (group_relative(Scores(entries), settings) != 0).flatten().tolist()

    assert kept(0.0) == [False, False, True]
    assert kept(0.1) == [True, False, True]


RELATIVE = [
    name for name in plugins.names("algorithm") if issubclass(plugins.load("algorithm", name).Algorithm, GroupRelative)
]


@pytest.mark.parametrize("name", RELATIVE)
def test_every_group_relative_algorithm_finds_and_keeps_weights_of_constraints(name: str):
    """λ = 3 after one step: the totals (liked + 3 legible) / 4 are 1.5, 0.25, 1.25, and the first sample the best."""
    ok, module = torch.ones(1, 3, dtype=torch.bool), plugins.load("algorithm", name)
    values = {"liked": torch.tensor([[0.0, 1.0, 2.0]]), "legible": torch.tensor([[2.0, 0.0, 1.0]])}
    scores = Scores({key: RewardScores(r, ok, "train", 1.0) for key, r in values.items()})
    config = module.Config(advantage="center", constraints={"legible": 4.0}, constraint_rate=1.0)
    algorithm, free = module.Algorithm(config), module.Algorithm(module.Config(advantage="center"))
    found = algorithm.advantages(scores)[0]
    assert found.argmax() == 0 and free.advantages(scores)[0].argmax() == 2  # 2, 1 and 3 in all
    if name == "grpo":
        assert found.tolist() == pytest.approx([0.5, -0.75, 0.25])
    again = module.Algorithm(config)
    again.load_state_dict(algorithm.state_dict())
    assert again.multipliers.values == {"legible": 3.0}
    assert torch.equal(again.advantages(scores), algorithm.advantages(scores))
    assert not free.state_dict().values


@pytest.mark.parametrize(
    ("name", "config"), [("rwr", {"of": "reward"}), ("kto", {"liked": "positive"}), ("dpo", {"unanimous": True})]
)
def test_rewards_that_are_not_made_advantages_of_are_constrained_too(name: str, config: dict[str, Any]):
    """λ = 1 and all weights are halved: liked counts 1/2, and legible, of weight 0 in the run file, 1/2."""
    ok, module = torch.ones(1, 3, dtype=torch.bool), plugins.load("algorithm", name)
    values = {"liked": torch.tensor([[3.0, 0.0, -2.0]]), "legible": torch.tensor([[-1.0, 0.0, 4.0]])}
    weights = {"liked": 1.0, "legible": 0.0}
    scores = Scores({key: RewardScores(r, ok, "train", weights[key]) for key, r in values.items()})
    algorithm = module.Algorithm(module.Config(constraints={"legible": 2.0}, constraint_rate=1.0, **config))
    expected = {"rwr": torch.softmax(torch.tensor([[1.0, 0.0, 1.0]]), 1) * 3, "kto": [[1, -1, 1]], "dpo": [[0, 0, 0]]}
    assert torch.allclose(algorithm.advantages(scores), torch.as_tensor(expected[name], dtype=torch.float32))
    assert algorithm.multipliers.values == {"legible": 1.0}
    with pytest.raises(ValueError, match="no reward with role train is called 'readable'"):
        module.Algorithm(module.Config(constraints={"readable": 2.0}, **config)).advantages(scores)


def test_group_relative_algorithms_are_most():
    assert {"grpo", "nft", "awm", "dpo", "kto", "rwr", "flow_dppo"} <= {*RELATIVE} and len(RELATIVE) >= 15
