"""What a penalty holds on to, how strongly and in which samples: by hand, against plain updates, and over a break."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlalign import plugins
from rlalign.algorithms import dpo, grpo, nft, rvm
from rlalign.algorithms.base import Algorithm
from rlalign.algorithms.forward import group_index
from rlalign.algorithms.prdp import mean_over_pairs, pair_errors
from rlalign.algorithms.regularise import Anchor, Penalised, Penalty, adapted, doubt, gated, weighed
from rlalign.mdp.noise import Noise
from rlalign.pipeline import Batch, deal
from rlalign.types import Prompt, RewardScores, Scores, State, Trajectory, Unit
from rlalign.workers.learner import Learner
from rlalign.workers.sampler import Sampler
from tests import small
from tests.test_loop import place as place
from tests.test_loop import run

from .gaussians import GRID, in_errors, tilted

KL = 0.05
TIMES = 5  # nft's, of six levels


def algorithm(**penalty: Any) -> Algorithm:
    return nft.Algorithm(nft.Config(kl_weight=KL, penalty=Penalty(**penalty)))


def step(sampler: Sampler, learner: Learner, number: int) -> dict[str, float]:
    trajectories = small.sample(sampler, number)
    return learner.update(trajectories, learner.algorithm.advantages(small.scored(trajectories)), number)


def batch(sampler: Sampler, number: int = 9) -> Trajectory:
    whole = Trajectory.concat(small.sample(sampler, number))
    return whole.take(torch.arange(whole.num_rows))


def kls(learner: Learner, sample: Trajectory) -> Tensor:
    """[T, B] the metric of a loss of the whole batch."""
    advantages = torch.zeros(sample.num_rows)
    return torch.stack([o.means["kl"] for o in learner.algorithm.losses(learner.policy, sample, advantages, Noise(0))])


def velocity(learner: Learner, weights: dict[str, Tensor], sample: Trajectory, x: Tensor, t: Tensor) -> Tensor:
    """Under these weights, whatever name they go by."""
    policy = learner.policy
    own = {key: parameter.data.clone() for key, parameter in policy.parameters.items()}
    policy.load("policy", weights)
    with torch.no_grad():
        found = policy.predict_noised(sample, x, t).velocity
    policy.load("policy", own)
    return found


def distances(learner: Learner, weights: dict[str, Tensor], sample: Trajectory) -> Tensor:
    """[T, B] mean (v - v')² at the places where nft looks, v' under the weights."""
    chosen, noise, own = learner.algorithm, Noise(0), learner.policy.weights("policy")
    assert isinstance(chosen, nft.Algorithm)
    found: list[Tensor] = []
    for index, t in enumerate(chosen.times(sample, noise).unbind(1)):
        at = nft.noised(sample, t, noise, index)
        own = {key: tensor.clone() for key, tensor in learner.policy.weights("policy").items()}
        both = (velocity(learner, w, sample, at.x, at.t) for w in (own, weights))
        found.append(torch.stack([*both]).diff(dim=0)[0].square().flatten(1).mean(1))
    return torch.stack(found)


# --- the anchor


def test_an_average_is_what_the_policy_is_held_to():
    """It follows θ_a <- d θ_a + (1 - d) θ, and the penalty is the distance from it."""
    sampler, learner = small.workers(algorithm(anchor="average", decay=0.7))
    policy = learner.policy
    expected = {key: parameter.detach().clone() for key, parameter in policy.parameters.items()}
    for number in range(3):
        step(sampler, learner, number)
        expected = {key: 0.7 * t + 0.3 * policy.parameters[key].detach() for key, t in expected.items()}
    for key, tensor in expected.items():
        torch.testing.assert_close(policy.copies["anchor"][key], tensor)
    sample = batch(sampler)
    torch.testing.assert_close(kls(learner, sample), distances(learner, expected, sample), rtol=1e-4, atol=1e-7)
    from_start = distances(learner, policy.copies["reference"], sample)
    assert (kls(learner, sample).mean() < 0.7 * from_start.mean()).item()


def test_the_reference_becomes_the_policy_after_so_many_steps():
    sampler, learner = small.workers(algorithm(reset_every=2))
    ages: list[float] = []
    for number in range(5):
        reset = number in (2, 4)
        sample = batch(sampler)
        assert (kls(learner, sample) == 0).all().item() is (reset or number == 0)
        ages.append(step(sampler, learner, number)["anchor_age"])
    assert ages == [0, 1, 0, 1, 0]


def test_the_reference_becomes_the_policy_when_it_is_too_far():
    sampler, learner = small.workers(algorithm(reset_above=1e-4))
    seen = [step(sampler, learner, number) for number in range(6)]
    far = [metrics["kl"] > 1e-4 for metrics in seen]
    assert any(far) and not all(far)
    for metrics, was_far in zip(seen[1:], far, strict=False):
        assert (metrics["anchor_age"] == 0) is was_far
        assert not was_far or metrics["kl"] == 0  # one update a step, looked at before it moves


def test_the_distance_from_the_start_of_the_run_is_still_that():
    sampler, learner = small.workers(algorithm(reset_every=1))
    trajectories = small.sample(sampler)
    step(sampler, learner, 0)
    assert (kls(learner, batch(sampler)) == 0).all()
    assert learner.drift(trajectories) > 0


def test_the_anchor_holds_a_denoising_step_too():
    chosen = grpo.Algorithm(grpo.Config(kl_weight=KL, penalty=Penalty(reset_every=1)))
    sampler, learner = small.workers(chosen)
    step(sampler, learner, 0)
    for loss in chosen.losses(learner.policy, batch(sampler), torch.ones(24), Noise(0)):
        assert (loss.means["kl"] == 0).all()


@pytest.mark.parametrize(
    ("name", "metric"),
    [("dpo", "margin"), ("kto", "liked_gain"), ("d3po", "margin"), ("spo", "margin"), ("prdp", "policy_loss")],
)
def test_what_preferences_compare_with_moves_too(name: str, metric: str):
    """After a reset the policy has gained nothing on the reference, as at the start of the run; else it has."""
    module, seen = plugins.load("algorithm", name), dict[int | None, Tensor]()
    for every in (None, 1):
        chosen = module.Algorithm(module.Config(reference={"reset_every": every}))
        sampler, learner = small.workers(chosen)
        metrics = step(sampler, learner, 0)
        assert metrics.get("anchor_age") == (None if every is None else 0)
        trajectories = small.sample(sampler, 1)
        advantages = chosen.advantages(small.scored(trajectories)).flatten()
        whole = Trajectory.concat(trajectories)
        rows = whole.take(torch.arange(whole.num_rows))
        (first, *_) = chosen.losses(learner.policy, rows, advantages, Noise(0))
        expected = torch.zeros_like(first.means[metric])
        if name == "prdp":  # all of the rewards' differences is left to be explained
            expected = mean_over_pairs(pair_errors(expected, advantages / chosen.config.beta), group_index(rows))
        seen[every] = first.means[metric] - expected
    assert (seen[1] == 0).all()
    assert (seen[None] != 0).any()


def test_a_preference_resumes_with_the_reference_that_it_had():
    def finals(broken: bool) -> dict[str, Tensor]:
        def start() -> tuple[Sampler, Learner]:
            return small.workers(dpo.Algorithm(dpo.Config(reference=Anchor(reset_every=2))))

        sampler, learner = start()
        for number in range(5):
            if broken and number == 3:
                state = learner.state_dict()
                sampler, learner = start()
                learner.load_state_dict(state)
            step(sampler, learner, number)
        return {**learner.policy.copies["anchor"], **{f"own {k}": p.data for k, p in learner.policy.parameters.items()}}

    whole, broken = finals(False), finals(True)
    assert all(torch.equal(tensor, broken[key]) for key, tensor in whole.items())


def errors_at_rest(mean: float, anchor: float | None) -> float:
    """Of the gradient on samples of N(mean, 1), held to N(anchor, 1) or to where the run began, N(0, 1)."""
    policy = tilted(mean)
    if anchor is not None:
        policy.copies["anchor"] = {key: t.clone() for key, t in tilted(anchor).weights("policy").items()}
        policy.anchor = "anchor"
    slope, strength = 0.5, 1.0  # of the reward, and of the penalty: a tilt moves the mean by their ratio
    chosen = rvm.Algorithm(rvm.Config(kl_weight=strength, **GRID))
    return in_errors(chosen, policy, lambda x0: slope * (x0 - mean), mean=mean)


def test_after_a_reset_it_rests_one_tilt_further():
    """p e^(r/β) from the start, p e^(2r/β) from there: resets lift the bound of a penalty, one step at a time."""
    assert errors_at_rest(0.5, anchor=None) < 3
    assert errors_at_rest(1.0, anchor=0.5) < 3
    assert errors_at_rest(1.0, anchor=None) > 6
    assert errors_at_rest(0.5, anchor=0.5) > 6


# --- the weight


def test_the_weight_by_hand():
    assert adapted(0.5, kl=0.011, target=0.01, rate=0.1) == pytest.approx(0.505)
    assert adapted(0.5, kl=1.0, target=0.01, rate=0.1) == pytest.approx(0.51)
    assert adapted(0.5, kl=0.0, target=0.01, rate=1.0) == pytest.approx(0.4)
    assert adapted(0.5, kl=0.01, target=0.01, rate=0.1) == 0.5


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_the_weight_rests_where_the_target_is_met(start: float):
    """A tilt is at a divergence that falls as 1 / β²."""
    weight = start
    for _ in range(2000):
        weight = adapted(weight, kl=3 / weight**2, target=0.5, rate=0.1)
    assert 3 / weight**2 == pytest.approx(0.5)


def test_the_weight_in_use_is_the_one_that_is_logged():
    sampler, learner = small.workers(algorithm(target=1e-5, target_rate=1.0))
    logged = [step(sampler, learner, number) for number in range(4)]
    assert [metrics["kl_weight"] for metrics in logged][:2] == [KL, pytest.approx(KL * 0.8)]  # no distance at first
    assert logged[3]["kl_weight"] == pytest.approx(logged[2]["kl_weight"] * 1.2)  # and then more than asked for
    config = learner.algorithm.config
    assert isinstance(config, nft.Config) and config.kl_weight > logged[3]["kl_weight"]
    for loss in learner.algorithm.losses(learner.policy, batch(sampler), torch.ones(24), Noise(0)):
        whole = (loss.means["policy_loss"] + config.kl_weight * loss.means["kl"]) / TIMES
        torch.testing.assert_close(loss.rows.detach(), whole)


# --- over a break


@pytest.mark.parametrize(
    "penalty",
    [{"anchor": "average"}, {"reset_every": 3}, {"reset_above": 1e-4}, {"target": 1e-3}],
    ids=["average", "every", "above", "target"],
)
def test_a_restored_learner_goes_on_bit_for_bit(penalty: dict[str, Any]):
    def trained(break_at: int | None) -> tuple[State, list[dict[str, float]]]:
        sampler, learner = small.workers(algorithm(**penalty))
        seen: list[dict[str, float]] = []
        for number in range(5):
            if number == break_at:
                state = learner.state_dict()
                sampler, learner = small.workers(algorithm(**penalty))
                learner.load_state_dict(State(state.tensors, json.loads(json.dumps(state.values))))
            seen.append(step(sampler, learner, number))
        return learner.state_dict(), seen

    (unbroken, metrics), (broken, others) = trained(None), trained(2)
    assert unbroken.values == broken.values and metrics == others
    assert all(torch.equal(unbroken.tensors[key], tensor) for key, tensor in broken.tensors.items())
    assert any(key.startswith("anchor/") for key in unbroken.tensors) is (penalty.keys() != {"target"})


def test_without_these_keys_a_checkpoint_is_what_it_was():
    sampler, learner = small.workers(algorithm())
    step(sampler, learner, 0)
    assert learner.state_dict().values == {"updates": 1}
    assert "anchor" not in learner.policy.copies


# --- the gate


def scores(values: dict[str, list[list[float]]], valid: Tensor | None = None) -> Scores:
    tensors = {name: torch.tensor(rows) for name, rows in values.items()}
    weights = {name: 1.0 if number == 0 else 0.0 for number, name in enumerate(values)}
    counted = torch.ones_like(next(iter(tensors.values())), dtype=torch.bool) if valid is None else valid
    rewards = {name: RewardScores(tensor, counted, "train", weights[name]) for name, tensor in tensors.items()}
    return Scores(rewards, prompts=tuple(f"prompt {number}" for number in range(len(counted))))


OCR: dict[str, list[list[float]]] = {
    "ocr": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],  # win rates 0, 0.2, .. 1
    "taste": [[5.0, 4.0, 3.0], [2.0, 1.0, 0.0]],
    "looks": [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],  # all tie: one half each
}


def test_doubt_by_hand():
    found = doubt(scores(OCR), ("taste", "looks"))
    assert found.flatten().tolist() == pytest.approx([-0.75, -0.45, -0.15, 0.15, 0.45, 0.75])
    assert doubt(scores(OCR), ("taste",)).flatten().tolist() == pytest.approx([-1.0, -0.6, -0.2, 0.2, 0.6, 1.0])


def test_invalid_samples_are_compared_with_nothing():
    valid = torch.tensor([[True, True, True], [True, True, False]])
    found = doubt(scores(OCR, valid), ("taste",))
    assert found[valid].tolist() == pytest.approx([-1.0, -0.5, 0.0, 0.5, 1.0])
    assert gated(torch.full((2, 3), 9.0), valid, 1.0)[1, 2] == 0


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.17, [0, 0, 0, 0, 0, 6]), (0.34, [0, 0, 0, 0, 3, 3]), (1.0, [0, 0, 0, 2, 2, 2]), (0.1, [0] * 6)],
)
def test_the_gate_by_hand(share: float, expected: list[float]):
    """So many of the batch at most, and none that the others like as well; the mean is 1 where there is one."""
    weights = gated(doubt(scores(OCR), ("taste",)), torch.ones(2, 3, dtype=torch.bool), share)
    assert weights.flatten().tolist() == expected


def test_a_gate_weighs_the_penalty_and_leaves_advantages_alone():
    chosen = rvm.Algorithm(rvm.Config(kl_weight=KL, penalty=Penalty(gate=("taste",), gate_share=0.5)))
    told, metrics = weighed(chosen, scores(OCR))
    plain, none = weighed(rvm.Algorithm(rvm.Config(kl_weight=KL)), scores(OCR))
    assert torch.equal(told[..., 0], plain) and plain.shape == (2, 3)
    assert told[..., 1].flatten().tolist() == [0, 0, 0, 2, 2, 2]
    assert metrics == {"advantage/gated": 0.5} and none == {}


ALIKE: dict[str, list[list[float]]] = {"ocr": [[1.0, 0.0, -1.0, 0.0], [2.0, 2.0, 2.0, 2.0]]}


def test_groups_that_teach_nothing_are_dropped_as_groups():
    """A sample of average reward in a group that does teach is held like its like."""
    chosen = grpo.Algorithm(grpo.Config(kl_weight=KL, advantage="center", select="top_bottom", select_count=1))
    told, _ = weighed(chosen, scores(ALIKE))
    assert told[..., 0].tolist() == [[1, 0, -1, 0], [0, 0, 0, 0]]
    assert told[..., 1].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    for other in ({"zero_std_groups": "keep", "kl_weight": KL}, {"kl_weight": 0.0}):
        told, _ = weighed(grpo.Algorithm(grpo.Config(**other)), scores(ALIKE))
        assert told.shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "plain"), [("grpo", {"advantage": "center"}), ("dpok", {}), ("rvm", {"advantage": "loo"})]
)
def test_a_dropped_group_is_no_part_of_the_gradient_and_counts_nothing_in_kl(name: str, plain: dict[str, str]):
    """As if it had not been there, but for the number of rows that everything is divided by."""
    module = plugins.load("algorithm", name)

    def moved(drop: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
        chosen = module.Algorithm(module.Config(kl_weight=1.0, zero_std_groups="drop" if drop else "keep", **plain))
        sampler, learner = small.workers(chosen)
        step(sampler, learner, 0)
        trajectories = small.sample(sampler, 1)
        rewards = small.scored(trajectories).total
        rewards[2] = 5.0
        rewards[1, 3] = rewards[1, 4]
        valid = torch.ones_like(rewards, dtype=torch.bool)
        valid[2] = drop
        texts = tuple(prompt.text for prompt in small.PROMPTS)
        told, _ = weighed(chosen, Scores({"first": RewardScores(rewards, valid, "train", 1.0)}, texts))
        caught: dict[str, Tensor] = {}
        optimizer: Any = learner.optimizer
        optimizer.step = lambda: caught.update({k: p.grad.clone() for k, p in learner.policy.parameters.items()})
        metrics = learner.update(trajectories, told, 1, valid=valid)
        return caught, metrics

    (dropped, seen), (subset, alone) = moved(True), moved(False)
    for key, gradient in dropped.items():
        assert gradient.any()
        torch.testing.assert_close(gradient, subset[key] * 18 / 24, rtol=1e-4, atol=1e-7)
    assert seen["kl"] == pytest.approx(alone["kl"] * 18 / 24, rel=1e-5)


def test_the_learners_of_a_group_get_their_share_of_both():
    told = torch.arange(4 * 3 * 2.0).reshape(4, 3, 2)
    units = [Unit(0, (group,), (Prompt("a"),), 3) for group in range(4)]
    shares = deal(Batch(0, units, [0, 1, 2, 3], []), told, torch.ones(4, 3, dtype=torch.bool), 2, 1)
    assert [torch.equal(share[1], told[first::2]) for first, share in enumerate(shares)] == [True, True]


@pytest.mark.parametrize("name", ["nft", "rvm", "rwr", "crd", "awm", "fpo", "epg", "dgpo", "ram", "grpo", "dpok"])
def test_held_samples_alone_feel_the_penalty(name: str):
    """All else as without a gate; the penalty is the mean over those that are held."""
    module = plugins.load("algorithm", name)
    chosen = module.Algorithm(module.Config(kl_weight=KL))
    sampler, learner = small.workers(chosen)
    step(sampler, learner, 0)
    sample, held = batch(sampler), torch.tensor([0.0, 4.0] * 12)
    advantages = chosen.advantages(small.scored(small.sample(sampler, 9))).flatten()

    def losses(weights: Tensor | None) -> Sequence[Any]:
        rows = replace(sample, held=weights)
        return list(chosen.losses(learner.policy, rows, advantages, Noise(0)))

    number = len(losses(None))
    for plain, some in zip(losses(None), losses(held), strict=True):
        assert (plain.means["kl"] != 0).all()
        torch.testing.assert_close(some.means["kl"], held * plain.means["kl"])
        assert torch.equal(some.means["policy_loss"], plain.means["policy_loss"])
        whole = plain.means["policy_loss"] + KL * held * plain.means["kl"]
        torch.testing.assert_close(some.rows.detach() * number, whole)


def test_a_gated_update_is_that_of_the_held_samples():
    def moved(gate: bool) -> dict[str, Tensor]:
        chosen = rvm.Algorithm(rvm.Config(kl_weight=1.0))  # without advantages there is nothing but the penalty
        sampler, learner = small.workers(chosen)
        step(sampler, learner, 0)
        caught: dict[str, Tensor] = {}
        trajectories, zeros = small.sample(sampler, 1), torch.zeros(4, 6)
        held = torch.tensor([[0.0, 0.0, 3.0, 0.0, 3.0, 3.0]] * 3 + [[0.0, 3.0, 0.0, 0.0, 0.0, 0.0]]) * 0.8
        optimizer: Any = learner.optimizer
        optimizer.step = lambda: caught.update({k: p.grad.clone() for k, p in learner.policy.parameters.items()})
        if gate:
            learner.update(trajectories, torch.stack([zeros, held], 2), 1)
        else:
            learner.update(trajectories, zeros, 1, valid=held > 0)
        return caught

    gate, subset = moved(True), moved(False)
    for key, gradient in gate.items():
        assert gradient.any()
        torch.testing.assert_close(gradient, subset[key], rtol=1e-4, atol=1e-7)


# --- in words


@pytest.mark.parametrize("config", [nft.Config, rvm.Config])
def test_a_penalty_without_weight_is_refused(config: Any):
    with pytest.raises(ValidationError, match="set kl_weight above 0"):
        config(kl_weight=0, penalty={"target": 0.1})


def test_an_average_is_not_reset():
    with pytest.raises(ValidationError, match="an average follows by itself"):
        Penalty(anchor="average", reset_every=2)


def test_a_gate_names_rewards_that_are_there_and_leaves_one_to_train():
    with pytest.raises(ValueError, match="no reward with role train is called 'style'"):
        doubt(scores(OCR), ("style",))
    with pytest.raises(ValueError, match="names all rewards with role train"):
        doubt(scores(OCR), tuple(OCR))


def test_all_algorithms_with_a_penalty_have_the_keys():
    configs = [plugins.load("algorithm", name).Config for name in plugins.names("algorithm")]
    penalised = [config for config in configs if "kl_weight" in config.model_fields]
    assert len(penalised) >= 14
    assert all(issubclass(config, Penalised) for config in penalised)


def test_multipliers_of_constraints_are_logged():
    chosen = grpo.Algorithm(grpo.Config(constraints={"taste": 3.0}, constraint_rate=0.5))
    _, metrics = weighed(chosen, scores(OCR))
    assert metrics == {"advantage/lambda/taste": pytest.approx(0.25)}  # 0.5 (3 - 2.5)


# --- from a run file

GATED = """
def first(images, prompts):
    return images[:, 0, 0, 0].double() / 255


def second(images, prompts):
    return images[:, 0, 0, 1].double() / 255
"""


def test_a_gated_reset_and_adapted_run_goes_on_as_if_never_broken(place: Path):
    (place / "reward.py").write_text(GATED)
    settings: dict[str, Any] = {
        "algorithm": "nft",
        "algorithm__kl_weight": 0.1,
        "algorithm__diversity": "pixels",
        "algorithm__penalty": {"reset_every": 2, "target": 1e-3, "gate": ["second"], "gate_share": 0.25},
        "rewards": [{"use": "reward.py:first"}, {"use": "reward.py:second", "weight": 0.0}],
    }
    rows, weights = run(place, "whole", **settings)
    run(place, "broken", stop_at=3, **settings)
    others, again = run(place, "broken", **settings)
    assert rows == others
    assert all(torch.equal(tensor, again[key]) for key, tensor in weights.items())
    assert [row["anchor_age"] for row in rows] == [0, 1, 0, 1, 0]
    assert all(0 < row["advantage/gated"] <= 0.25 for row in rows)
    assert len({row["kl_weight"] for row in rows}) == 5
