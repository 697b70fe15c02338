"""Several learner ranks publish what they hold together."""

import torch
from torch import Tensor

from rlalign.mdp.noise import Noise
from rlalign.workers.group import Group
from rlalign.workers.sampler import Sampler
from rlalign.workers.weights import Manifest
from tests.workers import training
from tests.workers.ranks import Ranks
from tests.workers.training import Case


def publish(group: Group) -> tuple[Manifest, list[Tensor]]:
    return training.HELD["it"].publish(4, ["policy", "ema"], canary=True)


def test_a_sampler_gets_whole_weights_of_which_two_ranks_have_parts() -> None:
    case = Case()
    with Ranks(2) as ranks:
        ranks.do(training.hold, case, 2)
        (manifest, buckets), (nothing, none) = ranks.do(publish)
        state = ranks.do(training.held)[0].tensors
    assert (nothing, none) == (Manifest(4), [])
    sampler = Sampler(training._policy(case), Noise(0), "policy", keep_steps=True, shares=False)
    assert manifest.canary is not None and sampler.receive(manifest, buckets)["version"] == 4
    for name in ("policy", "ema"):
        for key, tensor in sampler.policy.weights(name).items():
            assert torch.equal(tensor, state[f"{name}/{key}"])
