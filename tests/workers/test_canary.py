import pytest
import torch

from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.workers.canary import TOLERANCE, Canary, Mismatch
from rlalign.workers.sampler import Sampler
from tests.small import algorithm, policy, rollout_config, workers


def sampler(own: Policy | None = None) -> Sampler:
    return Sampler(own or policy(), Noise(0), "policy", keep_steps=True, shares=False)


def test_equal_networks_predict_the_same_bits() -> None:
    _, learner = workers(algorithm())
    manifest, buckets = learner.publish(0, ["policy"], canary=True)
    other = sampler()
    other.receive(manifest, buckets)
    assert manifest.canary is not None and manifest.canary.shape == other.policy.latent_shape
    assert torch.equal(other.canary.predict("policy"), manifest.canary)


def test_another_base_model_is_seen_and_nothing_is_sampled_with_it() -> None:
    _, learner = workers(algorithm())
    other = sampler()
    other.policy.family.nets["velocity"].means.add_(0.5)  # pyright: ignore[reportCallIssue]
    with pytest.raises(Mismatch, match=r"relative difference .* Likely causes: another base model"):
        other.receive(*learner.publish(0, ["policy"], canary=True))
    assert other.version is None


def test_a_prediction_that_is_no_number_is_a_mismatch() -> None:
    own = sampler()
    expected = own.canary.predict("policy")
    own.policy.family.nets["velocity"].means.fill_(torch.nan)  # pyright: ignore[reportCallIssue]
    with pytest.raises(Mismatch):
        own.canary.check(expected, "policy")


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_rounding_is_allowed_for(guidance: float) -> None:
    own = Canary(policy(rollout_config(guidance_scale=guidance)), Noise(0))
    expected = own.predict("policy")
    own.check(expected * (1 + 0.5 * TOLERANCE[torch.float32]), "policy")
    with pytest.raises(Mismatch):
        own.check(expected * (1 + 2 * TOLERANCE[torch.float32]), "policy")


def test_the_weights_that_sample_are_checked() -> None:
    _, learner = workers(algorithm("nft"))
    for tensor in learner.policy.weights("policy").values():
        tensor.add_(1.0)
    manifest, buckets = learner.publish(0, ["policy", "old"], canary=True)
    other = Sampler(policy(), Noise(0), "old", keep_steps=False, shares=False)
    other.receive(manifest, buckets)
    assert manifest.canary is not None
    with pytest.raises(Mismatch):
        other.canary.check(manifest.canary, "policy")


def test_it_moves_no_generator_and_no_weights() -> None:
    own, before = policy(), torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in own.weights("policy").items()}
    first = Canary(own, Noise(0)).predict("policy")
    assert torch.equal(torch.get_rng_state(), before) and not first.requires_grad
    assert all(torch.equal(weights[name], tensor) for name, tensor in own.weights("policy").items())
