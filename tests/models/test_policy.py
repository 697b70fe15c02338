"""The policy: replay is the rollout again, bit for bit, and weights come and go under their names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.mdp.noise import Noise
from rlalign.models import analytic
from rlalign.models.lora import full
from rlalign.policy import Policy, RolloutConfig, Variant, Window, draw_steps
from rlalign.types import Cond, Prompt, Trajectory
from rlalign.workers.sampler import Sampler
from tests import small
from tests.tiny import sd3_folder, sd3_policy, shaken

PROMPTS = [Prompt("red cat"), Prompt("two", negative="blue"), Prompt("a dog")]
NOISE = Noise(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return sd3_folder(tmp_path_factory.mktemp("sd3"))


def rolled_out(policy: Policy, stochastic: Tensor, kept: Tensor) -> Trajectory:
    """One row a prompt; stochastic [P, N], kept [P, K]."""
    cond, uncond = policy.family.encode(PROMPTS)
    guided = uncond if policy.settings.guidance_scale != 1 else None
    address = torch.tensor([[0, row, 0] for row in range(len(PROMPTS))])
    schedule = policy.schedule(policy.settings)

    def noise(k: int) -> Tensor:
        return NOISE.normal("step", address, k, policy.latent_shape)

    x = NOISE.normal("initial", address, 0, policy.latent_shape)
    with torch.no_grad():
        chain = policy.roll_out(x, cond, guided, schedule, stochastic, kept, noise, policy.settings)
    return Trajectory(
        cond, guided, schedule, kept, chain.x, chain.x_next, chain.log_probs, chain.final, torch.zeros(3), address
    )


def sample(policy: Policy, groups: tuple[int, ...] = (0, 1, 2)) -> Trajectory:
    drawn = [draw_steps(policy.settings, True, NOISE, 0, group) for group in groups]
    stochastic, kept = (torch.stack(part) for part in zip(*drawn, strict=True))
    return rolled_out(policy, stochastic, kept)


GUIDANCE = {
    "no guidance": {"guidance_scale": 1.0},
    "one doubled pass": {"guidance_scale": 4.5},
    "two passes": {"guidance_scale": 4.5, "uncond_grad": False},
}
WINDOW = {"size": 2, "range": (0, 4)}
KERNELS = [
    ("flow_sde", 0.7, None),
    ("flow_sde", 0.7, WINDOW),
    ("dance_sde", 0.3, WINDOW),
    ("cps", 0.7, WINDOW),
    ("ddim", 1.0, None),
    ("precise", 1.0, None),
]


@pytest.mark.parametrize("guidance", GUIDANCE.values(), ids=GUIDANCE)
@pytest.mark.parametrize(("kernel", "noise_level", "window"), KERNELS)
def test_replay_is_the_rollout(
    folder: Path, kernel: str, noise_level: float, window: dict[str, Any] | None, guidance: dict[str, Any]
):
    policy = sd3_policy(
        folder, shake=0.1, kernel=kernel, noise_level=noise_level, window=window, num_steps=5, micro_batch=3, **guidance
    )
    trajectory = sample(policy)
    assert trajectory.num_kept == (2 if window else 4)
    micro = trajectory.take(torch.arange(3))
    for slot in range(trajectory.num_kept):
        step = policy.replay(micro, slot)
        log_prob = policy.log_prob(step.gaussian, micro.x_next[:, slot])
        assert torch.equal(log_prob.detach(), micro.log_probs[:, slot])
        assert log_prob.requires_grad


@pytest.mark.parametrize("name", ["size 1", "size 3"])
def test_windows_of_rows_may_differ(folder: Path, name: str):
    policy = sd3_policy(folder, shake=0.1, guidance_scale=4.5, num_steps=6, micro_batch=3)
    size = int(name[-1])
    kept = torch.stack([torch.arange(start, start + size) for start in (0, 2, 1)])
    stochastic = torch.zeros(3, 6, dtype=torch.bool).scatter(1, kept, True)
    trajectory = rolled_out(policy, stochastic, kept)
    for slot in range(size):
        step = policy.replay(trajectory, slot)
        assert torch.equal(policy.log_prob(step.gaussian, trajectory.x_next[:, slot]), trajectory.log_probs[:, slot])


def test_unscaled_and_summed_log_probs(folder: Path):
    cases: list[dict[str, Any]] = [{"logprob_reduction": "sum"}, {"kernel": "cps", "cps_logprob": "unscaled"}]
    for settings in cases:
        policy = sd3_policy(folder, shake=0.1, micro_batch=3, **settings)
        trajectory = sample(policy)
        step = policy.replay(trajectory, 1)
        assert torch.equal(policy.log_prob(step.gaussian, trajectory.x_next[:, 1]), trajectory.log_probs[:, 1])


def test_a_policy_computes_in_the_precision_of_most_weights(folder: Path):
    """Libraries keep a table or two in float32, as Wan's, and adapters are float32."""
    family = sd3_policy(folder).family
    net = next(iter(family.nets.values())).to(torch.bfloat16)
    first = next(net.parameters())
    first.data = first.data.float()
    parameters = {"all": first}
    assert Policy(family, sd3_policy(folder).settings, parameters, lora=True).dtype == torch.bfloat16


def test_rounded_states_are_scored_as_they_are_kept():
    """In the net's precision, before the log-prob: replay finds the same bits, and no ratio is off."""
    trajectories: list[Trajectory] = []
    for store in ("fp32", "model_round_first"):
        family = analytic.Family.load(analytic.Config(means=[[0.0, 0.0]]), "", torch.bfloat16, "cpu")
        settings = small.rollout_config(latent_store=store)
        policy = Policy(family, settings, full(family.nets, ["velocity"]), lora=False)
        trajectory = Trajectory.concat(small.sample(Sampler(policy, Noise(0), "policy", keep_steps=True, shares=True)))
        micro = trajectory.take(torch.arange(settings.micro_batch))
        for slot in range(micro.num_kept):
            step = policy.replay(micro, slot)
            assert torch.equal(policy.log_prob(step.gaussian, micro.x_next[:, slot]), micro.log_probs[:, slot])
        trajectories.append(trajectory)
    exact, rounded = (torch.stack([trajectory.x, trajectory.x_next]) for trajectory in trajectories)
    assert exact.dtype == rounded.dtype == torch.float32
    assert torch.equal(rounded, rounded.bfloat16().float()) and not torch.equal(exact, exact.bfloat16().float())


def test_other_weights_give_other_log_probs(folder: Path):
    policy = sd3_policy(folder, micro_batch=3)
    trajectory = sample(policy)
    shaken(policy, 0.1)
    step = policy.replay(trajectory, 0)
    assert not torch.equal(policy.log_prob(step.gaussian, trajectory.x_next[:, 0]), trajectory.log_probs[:, 0])


def test_detached_unconditional_half_has_the_same_value_and_another_gradient(folder: Path):
    policies = [sd3_policy(folder, shake=0.1, guidance_scale=4.5, uncond_grad=grad) for grad in (True, False)]
    trajectory = sample(policies[0])
    steps = [policy.replay(trajectory, 0) for policy in policies]
    torch.testing.assert_close(steps[0].gaussian.mean, steps[1].gaussian.mean)
    for step in steps:
        step.gaussian.mean.square().mean().backward()
    first, second = (
        torch.cat([p.grad.flatten() for p in policy.parameters.values() if p.grad is not None]) for policy in policies
    )
    assert second.any() and not torch.allclose(first, second)


def test_time_to_net_int_truncates(folder: Path):
    seen: list[Tensor] = []
    policy = sd3_policy(folder, time_to_net="int", num_steps=3)

    def predict(x: Tensor, time: Tensor, cond: Cond, size: object) -> Tensor:
        seen.append(time)
        return torch.zeros_like(x)

    policy.family.predict = predict
    sample(policy)
    times = policy.family.schedule(3, policy.size).time[:-1]
    assert torch.stack(seen)[:, 0].tolist() == times.trunc().tolist() != times.tolist()


def test_own_shift_replaces_the_model_s_schedule(folder: Path):
    policy = sd3_policy(folder)
    own = policy.schedule(RolloutConfig(size=(16, 16), num_steps=4, shift=1.0))
    assert own.sigma.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert policy.schedule(policy.settings).sigma.tolist() != own.sigma.tolist()


def test_predict_noised_is_predict_on_the_flow_path(folder: Path):
    policy = sd3_policy(folder, shake=0.1)
    trajectory = sample(policy)
    t = torch.tensor([0.9, 0.5, 0.1])
    prediction = policy.predict_noised(trajectory, trajectory.final, t)
    velocity = policy.family.predict(trajectory.final, 1000 * t, trajectory.cond, policy.size)
    sigma = t.reshape(3, 1, 1, 1)
    torch.testing.assert_close(prediction.x0, trajectory.final - sigma * velocity)
    torch.testing.assert_close(prediction.eps, trajectory.final + (1 - sigma) * velocity)


# --- weights under several names


@pytest.fixture(params=["lora", "full"])
def policy(request: pytest.FixtureRequest, folder: Path) -> Policy:
    return sd3_policy(folder, lora=request.param == "lora")


def predicted(policy: Policy) -> Tensor:
    cond, _ = policy.family.encode(PROMPTS[:1])
    x = NOISE.normal("x", torch.tensor([[0, 0, 0]]), 0, policy.latent_shape)
    return policy.family.predict(x, torch.tensor([500.0]), cond, policy.size)


def test_using_computes_with_those_weights_and_restores_exactly(policy: Policy):
    at_start = predicted(policy)
    shaken(policy, 0.1)
    policy.keep("old")
    with_old = predicted(policy)
    shaken(policy, 0.1)
    policy.keep("ema")
    with_ema = predicted(policy)
    shaken(policy, 0.1)
    now, tensors = predicted(policy), {key: tensor.clone() for key, tensor in policy.weights("policy").items()}
    expected: dict[Variant, Tensor] = {"policy": now, "old": with_old, "ema": with_ema, "reference": at_start}
    assert len({float(output.detach().sum()) for output in expected.values()}) == 4
    for name, output in expected.items():
        with policy.using(name):
            assert torch.equal(predicted(policy), output), name
        assert torch.equal(predicted(policy), now), name
    assert all(torch.equal(tensors[key], tensor) for key, tensor in policy.weights("policy").items())
    assert all(parameter.requires_grad for parameter in policy.parameters.values())


@pytest.mark.parametrize("name", ["old", "reference"])
def test_weights_come_back_after_an_error(policy: Policy, name: Variant):
    policy.keep("old")
    shaken(policy, 0.1)
    now = predicted(policy)
    with pytest.raises(RuntimeError, match="inside"), policy.using(name):
        raise RuntimeError("inside")
    assert torch.equal(predicted(policy), now)


@pytest.mark.parametrize("name", ["old", "reference"])
def test_a_graph_survives_a_pass_with_other_weights(policy: Policy, name: Variant):
    """The policy's pass, another's without gradient, then backward: as DiffusionNFT and the KL term do."""
    policy.keep("old")
    shaken(policy, 0.1)
    predicted(policy).square().mean().backward()
    alone = {key: p.grad.clone() for key, p in policy.parameters.items() if p.grad is not None}
    for parameter in policy.parameters.values():
        parameter.grad = None
    output = predicted(policy)
    with torch.no_grad(), policy.using(name):
        predicted(policy)
    output.square().mean().backward()
    between = {key: p.grad for key, p in policy.parameters.items() if p.grad is not None}
    assert alone.keys() == between.keys() and len(alone) > 0
    assert all(torch.equal(alone[key], between[key]) for key in alone)


def test_blend(policy: Policy):
    policy.keep("old")
    before = {key: tensor.clone() for key, tensor in policy.weights("old").items()}
    shaken(policy, 0.1)
    policy.blend("old", 0.75)
    for key, tensor in policy.weights("old").items():
        torch.testing.assert_close(tensor, 0.75 * before[key] + 0.25 * policy.weights("policy")[key])
    policy.blend("old", 0.0)
    for key, tensor in policy.weights("old").items():
        torch.testing.assert_close(tensor, policy.weights("policy")[key])


@pytest.mark.parametrize("name", ["policy", "old"])
def test_load(policy: Policy, name: str):
    tensors = {key: tensor + 1 for key, tensor in policy.weights("policy").items()}
    policy.load(name, tensors)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in policy.weights(name).items())
    assert not any(tensors[key] is tensor for key, tensor in policy.weights(name).items())


def test_load_refuses_what_does_not_fit(policy: Policy):
    tensors = dict(policy.weights("policy"))
    *rest, last = tensors
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"1 missing .*, 0 strange"):
        policy.load("policy", {key: tensors[key] + 1 for key in rest})
    with pytest.raises(ValueError, match=r"0 missing .*, 1 strange \['more'\]"):
        policy.load("policy", {**tensors, "more": tensors[last]})
    with pytest.raises(ValueError, match=f"{last} is "):
        policy.load("policy", {**{key: tensor + 1 for key, tensor in tensors.items()}, last: tensors[last][:1]})
    assert all(torch.equal(before[key], tensor) for key, tensor in policy.weights("policy").items())


def test_impossible_rollouts_are_refused():
    with pytest.raises(ValueError, match="window of 3 steps does not fit"):
        RolloutConfig(size=(16, 16), window=Window(size=3, range=(0, 2)))
    with pytest.raises(ValueError, match="last step is always deterministic"):
        RolloutConfig(size=(16, 16), num_steps=4, window=Window(size=1, range=(0, 4)))
    with pytest.raises(ValueError, match="belongs to kernel: cps"):
        RolloutConfig(size=(16, 16), cps_logprob="unscaled")


def test_draw_steps():
    settings = RolloutConfig(size=(16, 16), num_steps=10, window=Window(size=3, range=(0, 5)))
    starts = set()
    for group in range(50):
        stochastic, kept = draw_steps(settings, True, NOISE, 0, group)
        assert kept.tolist() == stochastic.nonzero().flatten().tolist() == list(range(kept[0], kept[0] + 3))
        starts.add(int(kept[0]))
    assert starts == {0, 1, 2}
    part = RolloutConfig(size=(16, 16), num_steps=10, train_fraction=0.6, last_step="sde_untrained")
    stochastic, kept = draw_steps(part, True, NOISE, 0, 0)
    assert stochastic.all() and len(kept) == 5 and 9 not in kept
    stochastic, kept = draw_steps(part, False, NOISE, 0, 0)
    assert not stochastic.any() and len(kept) == 0
