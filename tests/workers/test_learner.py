"""The learner on analytic data: what an update may and may not depend on."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import ddpo, fpo, grpo
from rlalign.workers.learner import Diverged, EmaConfig, Learner
from tests.small import algorithm, rollout_config, sample, scored, workers


def one_update(micro_batch: int = 8, name: str = "grpo", **more: Any) -> tuple[Learner, dict[str, float]]:
    chosen = algorithm(name)
    sampler, learner = workers(chosen, rollout_config(micro_batch=micro_batch), **more)
    trajectories = sample(sampler)
    return learner, learner.update(trajectories, chosen.advantages(scored(trajectories)), 0)


def gradients(micro_batch: int, name: str) -> list[Tensor]:
    """The gradient of a whole batch, caught on its way to the optimizer."""
    chosen = algorithm(name)
    sampler, learner = workers(chosen, rollout_config(micro_batch=micro_batch))
    caught: list[Tensor] = []
    optimizer: Any = learner.optimizer
    optimizer.step = lambda: caught.extend(p.grad for p in learner.policy.parameters.values() if p.grad is not None)
    optimizer.zero_grad = lambda: None
    trajectories = sample(sampler)
    learner.update(trajectories, chosen.advantages(scored(trajectories)), 0)
    return caught


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_the_scale_of_the_loss_does_not_depend_on_micro_batching(name: str) -> None:
    whole, many, ragged = gradients(24, name), gradients(8, name), gradients(7, name)  # 7: a padded tail of 3 rows
    for one, other, third in zip(whole, many, ragged, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one, third, rtol=1e-4, atol=1e-6)


def test_first_ratios_are_exactly_one_at_every_step() -> None:
    chosen = algorithm("grpo", updates_per_step=2)
    sampler, learner = workers(chosen, updates_per_step=2)
    for step in range(4):
        sampler.version = step
        trajectories = sample(sampler, step)
        metrics = learner.update(trajectories, chosen.advantages(scored(trajectories)), step)
        assert metrics["ratio/max_abs_dev"] == 0.0
        assert metrics["staleness"] == 0
        assert metrics["clip_fraction"] > 0 or step == 0  # the second update is off-policy


def test_updates_of_a_step_take_disjoint_groups() -> None:
    chosen = algorithm()
    sampler, learner = workers(chosen, updates_per_step=2)
    trajectories = sample(sampler)
    advantages = chosen.advantages(scored(trajectories))
    advantages[2:] = 0  # the second update has no signal
    seen: list[int] = []
    original, spied = learner.algorithm.losses, cast(Any, learner.algorithm)
    spied.losses = lambda policy, sample, adv, noise: (
        seen.append(int((adv != 0).sum())),
        original(policy, sample, adv, noise),
    )[1]
    learner.update(trajectories, advantages, 0)
    assert learner.updates == 2
    assert sum(seen) >= int((advantages != 0).sum())
    assert seen[-1] == 0


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_a_second_pass_is_a_second_update_with_the_same_samples(name: str) -> None:
    """Of the old weights then: what an algorithm does after a step comes once, after both."""

    def trained(epochs: int) -> tuple[Learner, list[dict[str, float]]]:
        chosen = algorithm(name, **({"old_decay": 0} if name == "nft" else {}))
        sampler, learner = workers(chosen, epochs=epochs, updates_per_step=2, ema=EmaConfig(every=1))
        trajectories = sample(sampler)
        advantages = chosen.advantages(scored(trajectories))
        after_step, cast(Any, chosen).after_step = chosen.after_step, lambda policy, updates: {}
        metrics = [learner.update(trajectories, advantages, 0) for _ in range(2 // epochs)]
        after_step(learner.policy, learner.updates)
        return learner, metrics

    (one, (both,)), (two, halves) = trained(epochs=2), trained(epochs=1)
    assert one.updates == two.updates == 4
    own, others = one.state_dict().tensors, two.state_dict().tensors
    assert own.keys() == others.keys() and all(torch.equal(own[key], others[key]) for key in own)
    assert both["policy_loss"] == pytest.approx((halves[0]["policy_loss"] + halves[1]["policy_loss"]) / 2)
    if name == "grpo":
        assert both["ratio/max_abs_dev"] == halves[0]["ratio/max_abs_dev"] == 0 < halves[1]["ratio/max_abs_dev"]
        assert both["clip_fraction"] > 0


def test_fpo_compares_all_its_passes_with_where_the_step_began() -> None:
    chosen = fpo.Algorithm(fpo.Config(updates_per_step=1, epochs_per_step=3))
    assert chosen.needs.copies == ("start",) and fpo.Algorithm(fpo.Config(updates_per_step=1)).needs.copies == ()
    sampler, learner = workers(chosen, epochs=3)
    began: list[bool] = []
    losses, start = chosen.losses, {key: p.detach().clone() for key, p in learner.policy.parameters.items()}

    def watched(policy: Any, *given: Any) -> Any:
        began.append(all(torch.equal(policy.copies["start"][key], tensor) for key, tensor in start.items()))
        return losses(policy, *given)

    cast(Any, chosen).losses = watched
    trajectories = sample(sampler)
    metrics = learner.update(trajectories, chosen.advantages(scored(trajectories)), 0)
    assert learner.updates == 3 and all(began)
    assert metrics["ratio/max_abs_dev"] == 0 and metrics["ratio/mean"] != 1
    assert all(torch.equal(learner.policy.copies["start"][key], p) for key, p in learner.policy.parameters.items())


def test_rows_without_signal_go_unvisited_and_leave_no_gradient() -> None:
    chosen = algorithm()
    sampler, learner = workers(chosen, lr=1e-2)
    trajectories = sample(sampler)
    before = {key: p.detach().clone() for key, p in learner.policy.parameters.items()}
    metrics = learner.update(trajectories, torch.zeros(4, 6), 0)
    assert metrics["grad_norm"] == 0
    for key, parameter in learner.policy.parameters.items():
        assert torch.equal(parameter, before[key])


def test_a_gradient_that_is_not_a_number_changes_nothing() -> None:
    chosen = algorithm()
    sampler, learner = workers(chosen)
    trajectories = sample(sampler)
    before = {key: p.detach().clone() for key, p in learner.policy.parameters.items()}
    with pytest.raises(Diverged, match="were not changed"):
        learner.update(trajectories, torch.full((4, 6), torch.nan), 0)
    assert all(torch.equal(parameter, before[key]) for key, parameter in learner.policy.parameters.items())


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_a_restored_learner_goes_on_bit_for_bit(name: str) -> None:
    def run(break_at: int | None) -> dict[str, Tensor]:
        chosen = algorithm(name)
        sampler, learner = workers(chosen, ema=EmaConfig(decay=0.9, every=2))
        for step in range(4):
            if step == break_at:
                state = learner.state_dict()
                sampler, learner = workers(chosen, ema=EmaConfig(decay=0.9, every=2))
                learner.load_state_dict(state)
            trajectories = sample(sampler, step)
            learner.update(trajectories, chosen.advantages(scored(trajectories)), step)
        return learner.state_dict().tensors

    unbroken, broken = run(None), run(2)
    assert unbroken.keys() == broken.keys()
    assert any(name.startswith("ema/") for name in unbroken)
    assert all(torch.equal(unbroken[key], broken[key]) for key in unbroken)


def test_the_average_follows_the_policy_after_its_warm_up() -> None:
    learner, _ = one_update(ema=EmaConfig(decay=0.9, every=1))
    decay = 1 / 10  # min((1 + n) / (10 + n), 0.9) at n = 0
    for key, parameter in learner.policy.parameters.items():
        reference = learner.policy.copies["reference"][key]
        torch.testing.assert_close(learner.policy.copies["ema"][key], decay * reference + (1 - decay) * parameter)


def test_published_weights_are_copies() -> None:
    learner, _ = one_update()
    manifest, buckets = learner.publish(1, ["policy"])
    next(iter(learner.policy.parameters.values())).data.add_(1)
    manifest.verify(buckets)
    assert manifest.version == 1 and manifest.count == len(learner.policy.parameters)


ON_CHAINS = {"grpo": grpo.Config(), "is": ddpo.Config(), "sf": ddpo.Config(mode="sf")}


def update_after(config: grpo.Config | ddpo.Config, **settings: Any) -> tuple[list[Tensor], int, bool]:
    """The gradient of one update, how often a step was replayed, and whether anything was kept of the rollout."""
    chosen = grpo.Algorithm(config) if isinstance(config, grpo.Config) else ddpo.Algorithm(config)
    sampler, learner = workers(chosen, rollout_config(**settings))
    found: list[Tensor] = []
    optimizer: Any = learner.optimizer
    optimizer.step = lambda: found.extend(p.grad.clone() for p in learner.policy.parameters.values())
    trajectories = sample(sampler)
    assert all(not trajectory.x_next.requires_grad for trajectory in trajectories)
    replays: list[int] = []
    again = learner.policy.replay
    learner.policy.replay = lambda *given: (replays.append(1), again(*given))[1]
    learner.update(trajectories, chosen.advantages(scored(trajectories)), 0)
    return found, len(replays), all(trajectory.graphs for trajectory in trajectories)


@pytest.mark.parametrize(("bitwise", "micro_batch"), [(True, 6), (False, 8), (False, 5)])
@pytest.mark.parametrize("name", ON_CHAINS)
def test_a_retained_graph_gives_the_gradient_of_the_replay(name: str, bitwise: bool, micro_batch: int) -> None:
    """To the bit where the learner's micro-batches are those of the rollout."""
    plain, replays, kept = update_after(ON_CHAINS[name], micro_batch=micro_batch)
    assert replays and not kept
    retained, replays, kept = update_after(ON_CHAINS[name], micro_batch=micro_batch, retain=True)
    assert not replays and kept
    assert any(gradient.any() for gradient in plain)
    for one, other in zip(plain, retained, strict=True):
        if bitwise:
            assert torch.equal(one, other)
        assert cosine(one, other) > 0.9999


@pytest.mark.parametrize("micro_batch", [6, 8, 5, 1])
@pytest.mark.parametrize("name", ON_CHAINS)
def test_retained_gradients_of_rows_give_the_gradient_of_the_replay(name: str, micro_batch: int) -> None:
    plain, _, _ = update_after(ON_CHAINS[name], micro_batch=micro_batch)
    weighed, replays, kept = update_after(ON_CHAINS[name], micro_batch=micro_batch, retain="gradients")
    assert not replays and kept
    for one, other in zip(plain, weighed, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_steps_that_weigh_more_do_so_with_retained_gradients_too() -> None:
    config = grpo.Config(step_weight="tempflow")
    plain, weighed = (update_after(config, micro_batch=6, retain=retain)[0] for retain in (False, "gradients"))
    for one, other in zip(plain, weighed, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.flatten().double(), other.flatten().double(), 0))
