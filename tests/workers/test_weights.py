import pytest
import torch

from rlalign.workers.weights import Weights


def packed() -> Weights:
    return Weights.pack(3, {"policy": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}})


def test_a_version_carries_count_bytes_and_checksum() -> None:
    weights = packed()
    weights.verify()
    assert (weights.version, weights.count, weights.num_bytes) == (3, 2, 28)
    assert weights.checksum == packed().checksum


@pytest.mark.parametrize("change", ["value", "name", "variant", "missing"])
def test_damage_is_seen(change: str) -> None:
    weights = packed()
    tensors = weights.variants["policy"]
    if change == "value":
        tensors["a"][0, 0] = 7
    if change == "name":
        tensors["c"] = tensors.pop("b")
    if change == "variant":
        weights.variants["old"] = weights.variants.pop("policy")
    if change == "missing":
        del tensors["b"]
    with pytest.raises(ValueError, match="damaged on the way"):
        weights.verify()


def test_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="hold no tensors"):
        Weights.pack(0, {"policy": {}}).verify()
