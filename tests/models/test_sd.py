"""Stable Diffusion 1: its levels are diffusers', and forward-process losses are those of the papers, on the noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from rlalign.algorithms import crd, dpo, grpo, grpo_guard, kto, nft, ram
from rlalign.algorithms.base import Algorithm
from rlalign.algorithms.forward import TimeSettings, at_times, draw_times, likelihood
from rlalign.mdp.noise import Noise
from rlalign.models.base import Unusable
from rlalign.policy import Policy
from rlalign.types import Prompt, Size, Trajectory
from rlalign.workers.sampler import Sampler
from tests.models.stable_diffusion import sd_folder, sd_policy

NOISE, ROWS = Noise(3), 4
SIGN = torch.tensor([1.0, -1.0, -1.0, 1.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return sd_folder(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    """Away from its reference, with a third set of weights between."""
    policy = sd_policy(folder, shake=0.1)
    policy.keep("old")
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.mul_(1.5)
    return policy


@pytest.fixture(scope="module")
def batch(policy: Policy) -> Trajectory:
    """Two groups of two."""
    cond, _ = policy.family.encode([Prompt("red cat"), Prompt("two")])
    address = torch.tensor([[5, 0, 0], [5, 0, 1], [5, 1, 0], [5, 1, 1]])
    final = torch.randn(ROWS, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    nothing, steps = final.new_zeros(ROWS, 0), torch.zeros(ROWS, 0, dtype=torch.int64)
    own = {name: tensor.repeat_interleave(2, 0) for name, tensor in cond.items()}
    return Trajectory(
        own, None, policy.schedule(policy.settings), steps, nothing, nothing, nothing, final, address[:, 0], address
    )


class Plain:
    """The papers' way: DDPM's noise at integer times, and what the UNet says of it."""

    def __init__(self, policy: Policy, batch: Trajectory, index: Tensor, epsilon: Tensor) -> None:
        self.policy, self.batch, self.index, self.epsilon = policy, batch, index, epsilon
        self.scheduler = DDPMScheduler.from_config(policy.family.pipeline.scheduler.config)  # pyright: ignore[reportAttributeAccessIssue]
        self.noisy = self.scheduler.add_noise(batch.final, epsilon, index)

    @torch.no_grad()
    def says(self, name: Any) -> Tensor:
        unet, prompts = self.policy.family.nets["unet"], self.batch.cond["prompt_embeds"]
        with self.policy.using(name):
            return unet(self.noisy, self.index, prompts, return_dict=False)[0]

    def error(self, name: Any) -> Tensor:
        return (self.says(name) - self.epsilon).square().mean((1, 2, 3))

    def clean(self, epsilon: Tensor) -> Tensor:
        signal = self.scheduler.alphas_cumprod[self.index].reshape(-1, 1, 1, 1)
        return (self.noisy - (1 - signal).sqrt() * epsilon) / signal.sqrt()


def drawn(policy: Policy, batch: Trajectory, shared: bool = True) -> Plain:
    """At one of all 1000 times alike, drawn by group."""
    places = batch.address * torch.tensor([1, 1, 0]) if shared else batch.address
    index = (1000 * NOISE.uniform("train/times", places, 0, (1,))[:, 0]).long()
    return Plain(policy, batch, index, NOISE.normal("train/noise", places, 0, policy.latent_shape))


def test_the_levels_are_those_of_ddim(policy: Policy):
    scheduler = DDIMScheduler.from_config(policy.family.pipeline.scheduler.config)  # pyright: ignore[reportAttributeAccessIssue]
    scheduler.set_timesteps(10)
    schedule = policy.family.schedule(10, Size(16, 16))
    assert torch.equal(schedule.time[:-1], scheduler.timesteps.float())
    torch.testing.assert_close(schedule.alpha[:-1].square(), scheduler.alphas_cumprod[scheduler.timesteps])
    torch.testing.assert_close(schedule.alpha.square() + schedule.sigma.square(), torch.ones(11))
    assert schedule.table is not None
    torch.testing.assert_close(schedule.table.square().float(), scheduler.alphas_cumprod)


def test_every_training_time_is_found_again_and_gets_ddpms_noise(policy: Policy, batch: Trajectory):
    """Through the flow path and back."""
    schedule, seen = batch.schedule, list[tuple[Tensor, Tensor]]()
    epsilon = torch.randn(batch.final.shape, generator=torch.Generator().manual_seed(1))
    net = policy.family.nets["unet"]
    hook = net.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[1])))
    with torch.no_grad():
        for index in torch.tensor([0, 1, 2, 17, 250, 500, 750, 998, 999, 640, 3, 4]).split(ROWS):
            t = schedule.flow_times[index].float()
            wide = t.reshape(-1, 1, 1, 1)
            policy.predict_noised(batch, (1 - wide) * batch.final + wide * epsilon, t)
            x, time = seen[-1]
            assert torch.equal(time.long(), index)
            torch.testing.assert_close(x, Plain(policy, batch, index, epsilon).noisy, rtol=1e-5, atol=1e-6)
    hook.remove()
    times = (torch.arange(1000), schedule.flow_times.float())
    found = torch.bucketize(times[1].double(), (schedule.flow_times[1:] + schedule.flow_times[:-1]) / 2)
    assert torch.equal(found, times[0])


def test_times_are_training_times_and_their_range_is_a_share_of_them(batch: Trajectory):
    """The rollout's are 751, 501, 251 and 1."""
    places = batch.schedule.flow_times.float()

    def drawn_at(**settings: Any) -> Tensor:
        t = draw_times(TimeSettings(**settings), batch, NOISE)
        index = (places - t[..., None]).abs().argmin(-1)
        torch.testing.assert_close(places[index], t, rtol=0, atol=1e-6)
        return index.sort(1).values

    assert drawn_at(num_times=4).tolist() == [[1, 251, 501, 751]] * ROWS
    assert drawn_at(num_times=2, time_range=(0.5, 1.0)).tolist() == [[501, 751]] * ROWS
    strata = drawn_at(times="uniform", num_times=2, time_range=(0.2, 0.6))
    assert ((strata >= torch.tensor([200, 400])) & (strata < torch.tensor([400, 600]))).all()


def test_a_family_that_does_not_say_how_noisy_its_times_are_is_refused(policy: Policy, batch: Trajectory):
    blind = replace(batch, schedule=replace(batch.schedule, table=None))
    with pytest.raises(Unusable, match="in the table of its schedule"):
        policy.predict_noised(blind, batch.final, torch.full((ROWS,), 0.5))


def test_kernels_of_flow_models_are_refused_where_steps_are_stochastic(folder: Path):
    other = sd_policy(folder, kernel="flow_sde")
    with pytest.raises(ValueError, match=r"rollout\.kernel flow_sde is for flow-matching models.* set it to ddim"):
        Sampler(other, NOISE, "policy", keep_steps=True, shares=True)
    Sampler(other, NOISE, "policy", keep_steps=False, shares=True)
    with pytest.raises(Unusable, match=r"rollout\.shift is for flow-matching models"):
        other.schedule(other.settings.model_copy(update={"shift": 3.0}))


def test_the_error_is_that_of_the_noise(policy: Policy, batch: Trajectory):
    plain = drawn(policy, batch)
    (at,) = at_times(dpo.Config(times="uniform", num_times=1), batch, NOISE, by_group=True)
    v = policy.predict_noised(batch, at.x, at.t).velocity.detach()
    torch.testing.assert_close(-likelihood(v, at, "uniform"), plain.error("policy"), rtol=1e-4, atol=1e-6)
    with pytest.raises(Unusable, match="elbo is for flow-matching models; set it to uniform"):
        likelihood(v, at, "elbo")


def test_dpo_is_the_papers(policy: Policy, batch: Trajectory):
    """arXiv 2311.12908: h = -β/2 [(e_w - e_w^ref) - (e_l - e_l^ref)], e = mean (ε_θ - ε)²."""
    config = dpo.Config(times="uniform", num_times=1, beta=2000.0)
    (loss,) = dpo.Algorithm(config).losses(policy, batch, SIGN, NOISE)
    plain = drawn(policy, batch)
    better = plain.error("policy") - plain.error("reference")
    h = -1000 * torch.stack([better[0] - better[1], better[3] - better[2]])
    assert (h.abs() > 0.1).all()
    torch.testing.assert_close(loss.means["margin"][[0, 3]], h, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(loss.rows.detach()[[0, 3]], -torch.nn.functional.logsigmoid(h), rtol=1e-3, atol=1e-3)


def test_kto_is_the_papers(policy: Policy, batch: Trajectory):
    """arXiv 2404.04465, with z of a group."""
    config = kto.Config(times="uniform", num_times=1, beta=100.0)
    (loss,) = kto.Algorithm(config).losses(policy, batch, SIGN, NOISE)
    plain = drawn(policy, batch)
    gain = plain.error("reference") - plain.error("policy")
    z = gain.view(2, 2).mean(1, keepdim=True).clamp(min=0).expand(2, 2).flatten()
    expected = 1 - (SIGN * 100 * (gain - z)).sigmoid()
    assert expected.std() > 0.01
    torch.testing.assert_close(loss.rows.detach(), expected, rtol=1e-3, atol=1e-4)


def test_nft_is_the_papers_on_clean_latents(policy: Policy, batch: Trajectory):
    """arXiv 2509.16117 with x̂0 = (x_t - σ ε) / α of the mixed predictions; at the rollout's own times."""
    config = nft.Config(num_times=1, kl_weight=0.0, beta=0.7)
    (loss,) = nft.Algorithm(config).losses(policy, batch, SIGN, NOISE)
    own = batch.schedule.time[:-1].long()
    orders = [NOISE.permutation("train/times", tuple(place.tolist()), 4) for place in batch.address]
    index = torch.stack([own[order[0]] for order in orders])
    plain = Plain(policy, batch, index, NOISE.normal("train/noise", batch.address, 0, policy.latent_shape))
    new, old = plain.says("policy"), plain.says("old")

    def error(epsilon: Tensor) -> Tensor:
        missed = plain.clean(epsilon) - batch.final
        return missed.square().mean((1, 2, 3)) / missed.abs().mean((1, 2, 3))

    rho = (SIGN / 10 + 0.5).clamp(0, 1)
    parts = rho * error(0.7 * new + 0.3 * old) + (1 - rho) * error(1.7 * old - 0.7 * new)
    torch.testing.assert_close(loss.rows.detach(), 5 * parts / 0.7, rtol=1e-4, atol=1e-5)


def at_one_time(policy: Policy, batch: Trajectory) -> Plain:
    """A time of the 1000 and a noise of its own for each row, as uniform times are drawn."""
    return drawn(policy, batch, shared=False)


def test_penalties_and_regressions_count_the_noise(policy: Policy, batch: Trajectory):
    """mean (ε - ε')², for NFT at the rollout's own times and for RAM, whose target without advantage is v_ref."""
    (loss,) = nft.Algorithm(nft.Config(num_times=1, kl_weight=0.1)).losses(policy, batch, SIGN, NOISE)
    own = batch.schedule.time[:-1].long()
    orders = [NOISE.permutation("train/times", tuple(place.tolist()), 4) for place in batch.address]
    index = torch.stack([own[order[0]] for order in orders])
    noise = NOISE.normal("train/noise", batch.address, 0, policy.latent_shape)
    on_grid, plain = Plain(policy, batch, index, noise), at_one_time(policy, batch)
    expected = (on_grid.says("policy") - on_grid.says("reference")).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.means["kl"], expected, rtol=1e-3, atol=1e-6)

    (loss,) = ram.Algorithm(ram.Config(num_times=1)).losses(policy, batch, torch.zeros(ROWS), NOISE)
    expected = (plain.says("policy") - plain.says("reference")).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.rows.detach(), expected, rtol=1e-3, atol=1e-6)


def test_crds_normalized_error_is_that_of_the_noise(policy: Policy, batch: Trajectory):
    policy.keep("teacher")
    config = crd.Config(num_times=1, times="uniform", kl_weight=0.0)
    (at,) = at_times(config, batch, NOISE)
    plain = at_one_time(policy, batch)
    missed = plain.says("policy") - plain.epsilon
    expected = missed.square().mean((1, 2, 3)) / missed.abs().mean((1, 2, 3))
    v = policy.predict_noised(batch, at.x, at.t).velocity.detach()
    torch.testing.assert_close(crd.self_normalized_error(v, at), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "algorithm",
    [grpo_guard.Algorithm(grpo_guard.Config()), grpo.Algorithm(grpo.Config(kl_weight=0.1, kl_form="no_tau"))],
    ids=["1/tau", "no_tau"],
)
def test_the_length_of_a_step_is_of_flow_models(policy: Policy, batch: Trajectory, algorithm: Algorithm):
    """The levels of other paths are no times. Without it both are right for any model."""
    other = Policy(policy.family, policy.settings.model_copy(update={"kernel": "ddim"}), policy.parameters, lora=True)
    steps = torch.tensor([[1], [1], [2], [2]])
    x = torch.randn(ROWS, 1, *policy.latent_shape, generator=torch.Generator().manual_seed(5))
    kept = replace(batch, steps=steps, x=x, x_next=x.clone(), log_probs=torch.zeros(ROWS, 1))
    with pytest.raises(Unusable, match="belongs to flow-matching models"):
        list(algorithm.losses(other, kept, SIGN, NOISE))
    config = algorithm.config.model_copy(update={"guard_div_tau": False, "kl_form": "gaussian"})
    (loss,) = type(algorithm)(config).losses(other, kept, SIGN, NOISE)  # pyright: ignore[reportCallIssue]
    assert loss.rows.isfinite().all()


def test_images_are_encoded_as_diffusers_does(policy: Policy):
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    vae = policy.family.pipeline.vae  # pyright: ignore[reportAttributeAccessIssue]
    latents = policy.family.encode_images(pixels, Size(16, 16))  # pyright: ignore[reportAttributeAccessIssue]
    expected = 0.18215 * vae.encode(policy.family.pipeline.image_processor.preprocess(pixels)).latent_dist.mode()  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(latents, expected)
    assert latents.shape == (2, *policy.latent_shape)


def test_a_folder_that_is_none_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no StableDiffusionPipeline could be loaded from"):
        sd_policy(tmp_path)
