from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlalign.workers.sampler import Sampler
from rlalign.workers.weights import Manifest, Memory, pack
from tests.small import PROMPTS, algorithm, policy, sample, workers


def tensors() -> dict[str, dict[str, Tensor]]:
    noise = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    many = {f"layer.{i}": torch.randn(3, 2 * i + 1, generator=noise).to(dtypes[i % 4]) for i in range(9)}
    return {"policy": {**many, "scale": torch.tensor(0.5)}, "old": {"a": torch.ones(5)}}


def packed(bucket_bytes: int = 256) -> tuple[Manifest, list[Tensor]]:
    return pack(3, tensors(), Memory(), bucket_bytes=bucket_bytes)


@pytest.mark.parametrize("bucket_bytes", [1, 256, 2**20])
def test_every_dtype_comes_out_as_it_went_in(bucket_bytes: int) -> None:
    manifest, buckets = packed(bucket_bytes)
    manifest.verify(buckets)
    unpacked = {variant: {name: torch.zeros_like(t) for name, t in ones.items()} for variant, ones in tensors().items()}
    manifest.require_fit(unpacked)
    manifest.copy(buckets, unpacked)
    for variant, ones in tensors().items():
        for name, tensor in ones.items():
            torch.testing.assert_close(unpacked[variant][name], tensor, rtol=0, atol=0)
    assert (manifest.version, manifest.count) == (3, 11)
    assert manifest.num_bytes == sum(t.nbytes for ones in tensors().values() for t in ones.values())


def test_buckets_are_bounded_and_no_tensor_is_in_two() -> None:
    manifest, buckets = packed(512)
    assert len(buckets) > 1 and max(manifest.sizes) <= 512
    assert [bucket.nbytes for bucket in buckets] == [*manifest.sizes]
    assert all({kind.dtype for kind in layout.kinds} == {layout.dtype} for layout in manifest.layouts)
    large, buckets = packed(1)  # every tensor is larger than that, and has a bucket of its own
    assert len(buckets) == large.count


def test_the_checksum_is_of_the_weights_alone() -> None:
    """Not of what lay in the memory before, nor of the pieces in which they were copied."""
    memory = Memory()
    memory.take(packed()[0].sizes[0]).fill_(7)
    assert pack(3, tensors(), memory, bucket_bytes=256)[0] == packed()[0]
    large = {"policy": {f"{i}": torch.full((3 * 2**17,), float(i)) for i in range(4)}}
    manifest, buckets = pack(0, large, memory)
    manifest.verify(buckets)
    assert torch.equal(buckets[0].view(torch.float32), torch.cat([*large["policy"].values()]))


def test_memory_is_used_again_only_when_nobody_looks_at_it() -> None:
    memory = Memory()
    first = memory.take(256)
    address, view = first.data_ptr(), first[64:128].view(torch.float32).view(4, 4)
    del first
    second = memory.take(256)
    assert second.data_ptr() != address
    del view
    assert memory.take(256).data_ptr() == address


@pytest.mark.parametrize("change", ["value", "name", "bucket", "size"])
def test_damage_is_seen(change: str) -> None:
    manifest, buckets = packed()
    before = manifest.checksum
    if change == "value":
        buckets[1][3] += 1
    if change == "name":
        assert replace(manifest, table=manifest.table.replace(b"layer.0", b"layer.O")).checksum != before
        return
    if change == "bucket":
        del buckets[-1]
    if change == "size":
        buckets[0] = buckets[0][:-1]
    with pytest.raises(ValueError, match="damaged on the way"):
        manifest.verify(buckets)
    with pytest.raises(ValueError, match="damaged on the way"):
        manifest.copy(buckets, tensors())


def test_nothing_is_an_error_at_once() -> None:
    for variants in ({}, {"policy": {}}, {**tensors(), "ema": {}}):
        with pytest.raises(ValueError, match="hold no tensors"):
            pack(0, variants, Memory())
    for sampler in (workers(algorithm())[0], alone()):
        with pytest.raises(ValueError, match="hold no tensors"):
            sampler.receive(Manifest(0), [])


def alone() -> Sampler:
    """A sampler with a network of its own."""
    sampler, _ = workers(algorithm())
    return Sampler(policy(), sampler.noise, "policy", keep_steps=True, shares=False)


def test_a_sampler_refuses_to_sample_before_it_has_verified_weights() -> None:
    sampler, (_, learner) = alone(), workers(algorithm())
    with pytest.raises(RuntimeError, match="verified no published weights"):
        sample(sampler)
    manifest, buckets = learner.publish(4, ["policy"])
    held = sampler.receive(manifest, buckets)
    assert held == {"version": 4, "checksum": manifest.checksum, "tensors": len(learner.policy.parameters)}
    assert all(trajectory.version.eq(4).all() for trajectory in sample(sampler))


def test_several_variants_reach_the_network() -> None:
    sampler, (_, learner) = alone(), workers(algorithm("nft"))
    for number, name in enumerate(("policy", "old")):
        for tensor in learner.policy.weights(name).values():
            tensor.fill_(number + 1.0)
    sampler.receive(*learner.publish(1, ["policy", "old"]))
    assert all(t.eq(1).all() for t in sampler.policy.weights("policy").values())
    assert all(t.eq(2).all() for t in sampler.policy.weights("old").values())


def test_a_sampler_whose_weights_were_damaged_on_the_way_samples_no_more() -> None:
    sampler, (_, learner) = alone(), workers(algorithm())
    sampler.receive(*learner.publish(1, ["policy"]))
    manifest, buckets = learner.publish(2, ["policy"])
    buckets[0][0] += 1
    with pytest.raises(ValueError, match="of version 2 were damaged"):
        sampler.receive(manifest, buckets)
    with pytest.raises(RuntimeError, match="verified no published weights"):
        sample(sampler)
    sampler.receive(*learner.publish(3, ["policy"]))
    assert sampler.version == 3 and len(sample(sampler)) == len(PROMPTS) // 4


@pytest.mark.parametrize("fault", ["name", "strange", "shape", "dtype"])
def test_weights_that_do_not_fit_change_nothing(fault: str) -> None:
    """Not even the variants that would fit."""
    sampler, (_, learner) = alone(), workers(algorithm())
    sampler.receive(*learner.publish(1, ["policy"]))
    good = {name: t + 1 for name, t in learner.policy.weights("policy").items()}
    bad, (first, *_) = dict(good), good
    if fault == "name":
        bad["other"] = bad.pop(first)
    if fault == "strange":
        bad["strange"] = torch.ones(1)
    if fault == "shape":
        bad[first] = bad[first][:1]
    if fault == "dtype":
        bad[first] = bad[first].half()
    manifest, buckets = pack(2, {"old": good, "policy": bad}, Memory())
    with pytest.raises(ValueError, match="of version 2"):
        sampler.receive(manifest, buckets)
    held = sampler.policy.weights("policy")
    assert all(torch.equal(held[name], t) for name, t in learner.policy.weights("policy").items())
    assert "old" not in sampler.policy.copies
    assert sampler.version == 1 and len(sample(sampler)) == len(PROMPTS) // 4


def test_samplers_on_the_learners_network_are_sent_no_bytes() -> None:
    sampler, learner = workers(algorithm("nft"))
    manifest, buckets = learner.publish(5, ["policy", "old"], send=False)
    assert buckets == [] and manifest.checksums == () and not learner.memory.blocks
    assert sampler.receive(manifest, buckets)["tensors"] == 2 * len(learner.policy.parameters)
    assert sampler.version == 5
