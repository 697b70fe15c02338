"""Two learner ranks: the same update as one, and checkpoints that either number of ranks goes on from."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from rlalign import checkpoint
from rlalign.checkpoint import Files
from rlalign.sharding import blocks
from rlalign.types import State
from rlalign.workers.group import Group, exchange_failed
from tests.tiny import sd3_folder, transformer
from tests.workers import training
from tests.workers.ranks import Ranks
from tests.workers.training import Case, Trained

CONFIG = "c" * 64
SD3 = Path("the tiny one")
"""Stands for the folder in the cases below."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(2) as two:
        yield two


@pytest.fixture(scope="module")
def trained(ranks: Ranks, folder: Path) -> Callable[[str], list[Trained]]:
    """What two ranks make of a case, the first time that it is asked for."""
    return cache(lambda name: ranks.do(training.train, placed(CASES[name], folder)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return sd3_folder(tmp_path_factory.mktemp("sd3"))


def placed(case: Case, folder: Path) -> Case:
    return replace(case, folder=case.folder and folder)


def furthest(ones: dict[str, Tensor], others: dict[str, Tensor], relative: bool) -> float:
    """The largest difference; ``relative`` to the largest number of each tensor."""
    assert ones.keys() == others.keys()
    scales = {key: float(tensor.abs().max()) if relative else 1.0 for key, tensor in others.items()}
    return max(float((ones[key] - other).abs().max()) / (scales[key] or 1.0) for key, other in others.items())


def equal(ones: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return ones.keys() == others.keys() and all(torch.equal(ones[key], other) for key, other in others.items())


MOVES: dict[str, Any] = {
    "kl_weight": 0.1,
    "penalty": {"reset_every": 1, "target": 1e-3, "gate": ["doubter"], "gate_share": 0.3},
}
CASES = {
    "full, uneven parts": Case(),
    "full, a part of nothing": Case(dims=1),
    "full, several optimizer steps": Case(updates=3, groups=7),
    "full, a rank without groups": Case(updates=2, groups=2),
    "full, nft": Case(algorithm="nft"),
    "full, a penalty that moves": Case(algorithm="nft", settings=MOVES),
    "full SD3": Case(SD3, settings={"kl_weight": 0.1}, updates=2),
    "full SD3, activations made again": Case(SD3, checkpointing=True),
    "full SD3, nft": Case(SD3, algorithm="nft"),
    "adapters of SD3": Case(SD3, lora=True, updates=2),
    "adapters of SD3, nft": Case(SD3, lora=True, algorithm="nft"),
    "adapters of SD3, a rank without groups": Case(SD3, lora=True, groups=2, updates=2),
    "adapters of SD3, the default eps": Case(SD3, lora=True, eps=1e-15),
}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_update_of_one(trained: Callable[[str], list[Trained]], folder: Path, name: str) -> None:
    case = placed(CASES[name], folder)
    alone, (one, other) = training.train(Group(), case), trained(name)
    assert furthest(one.gradients[0], alone.gradients[0], relative=True) < 1e-6  # later ones are at other weights
    assert len(one.gradients) == len(alone.gradients) == 2 * case.updates
    assert furthest(one.weights, alone.weights, relative=False) < (1e-6 if case.lora else 1e-5)
    assert equal(one.weights, other.weights) and one.metrics == other.metrics
    for row, expected in zip(one.metrics, alone.metrics, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["full SD3", "adapters of SD3", "full, several optimizer steps"])
def test_two_ranks_rerun_to_the_bit(
    ranks: Ranks, trained: Callable[[str], list[Trained]], folder: Path, name: str
) -> None:
    (once, _), (again, _) = trained(name), ranks.do(training.train, placed(CASES[name], folder))
    assert equal(once.weights, again.weights) and once.metrics == again.metrics
    assert all(equal(one, other) for one, other in zip(once.gradients, again.gradients, strict=True))


Do = Callable[..., list[Any]]


def alone(function: Callable[..., Any], *args: Any) -> list[Any]:
    return [function(Group(), *args)]


def saved(do: Do, folder: Path) -> Path:
    def others(place: Path) -> Files:
        return {name: record for files in do(training.save, place) for name, record in files.items()}

    return checkpoint.save(folder, 2, State({}, {"step": 2}), 1, CONFIG, others=others)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("writers", [1, 2])
def test_a_checkpoint_goes_on_with_any_number_of_ranks(
    ranks: Ranks, folder: Path, tmp_path: Path, lora: bool, writers: int
) -> None:
    case = Case(folder, lora=lora, algorithm="nft", settings={"kl_weight": 0.1})
    write = ranks.do if writers == 2 else alone
    write(training.hold, case, 2)
    path = saved(write, tmp_path)
    sharded = writers == 2 and not lora
    names = {file.name for file in path.iterdir()}
    assert names == {"learner.json", "learner" if sharded else "learner.safetensors", "state.json", "manifest.json"}
    state = write(training.held)[0]
    unbroken: Trained = write(training.prolong, case, range(2, 3))[0]
    for read in (alone, ranks.do):
        for found in read(training.load, case, path):
            assert found.values == state.values == {"updates": 2} and equal(found.tensors, state.tensors)
        resumed = read(training.prolong, case, range(2, 3))[0]
        assert furthest(resumed.gradients[0], unbroken.gradients[0], relative=True) < 1e-6
        assert furthest(resumed.weights, unbroken.weights, relative=False) < (1e-6 if lora else 1e-5)
        if read == write:
            assert equal(resumed.weights, unbroken.weights) and resumed.metrics == unbroken.metrics


def test_masters_of_cut_weights_are_in_the_checkpoint(ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    case = Case(folder, dtype=torch.bfloat16)
    ranks.do(training.hold, case, 2)
    path = saved(ranks.do, tmp_path)
    state, unbroken = ranks.do(training.held)[0], ranks.do(training.prolong, case, range(2, 3))[0]
    masters = state.part("master").tensors
    assert masters and {master.dtype for master in masters.values()} == {torch.float32}
    assert equal({key: master.bfloat16() for key, master in masters.items()}, state.part("policy").tensors)
    assert equal(ranks.do(training.load, case, path)[0].tensors, state.tensors)
    assert equal(ranks.do(training.prolong, case, range(2, 3))[0].weights, unbroken.weights)


@pytest.mark.parametrize("dims", [1, 3])
def test_a_sharded_checkpoint_is_read_whole_by_those_who_have_no_ranks(ranks: Ranks, tmp_path: Path, dims: int) -> None:
    ranks.do(training.hold, Case(dims=dims), 2)  # of one dimension the second rank has no part
    path, held = saved(ranks.do, tmp_path), ranks.do(training.held)[0]
    assert len([name for name in checkpoint.read_manifest(path).files if name.startswith("learner/")]) == 2
    assert equal(checkpoint.load(path).part("learner").tensors, held.tensors)
    assert equal(checkpoint.read_part(path, "learner").tensors, held.tensors)
    assert checkpoint.load(path, without="learner") == State({}, {"step": 2})
    for file in path.rglob("*"):
        assert file.is_dir() or file.suffix in (".json", ".safetensors")
    shard = next((path / "learner").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in str(checkpoint.fault(path))


def test_what_the_disk_refuses_a_rank_is_said_on_all(ranks: Ranks, tmp_path: Path) -> None:
    ranks.do(training.hold, Case(), 1)
    (tmp_path / "learner").write_text("in the way")
    with pytest.raises(AssertionError, match=r"(FileExists|NotADirectory)Error"):
        ranks.do(training.save, tmp_path)
    assert ranks.do(training.held)[0].values == {"updates": 1}  # the ranks are still together


def test_weights_come_and_go_under_their_names(ranks: Ranks) -> None:
    ranks.do(training.hold, Case(), 2)
    for before, inside, after, average, still in ranks.do(training.borrowed):
        assert equal(inside, average) and not equal(inside, before)
        assert equal(after, before) and equal(still, average)


def test_the_distance_from_the_reference_is_the_same(ranks: Ranks) -> None:
    case = Case()
    training.hold(Group(), case, 2)
    ranks.do(training.hold, case, 2)
    expected = training.drift(Group(), case)
    assert expected > 0 and ranks.do(training.drift, case) == [pytest.approx(expected, rel=1e-4)] * 2


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapters"])
def test_a_gradient_that_is_not_a_number_stops_all_ranks(ranks: Ranks, folder: Path, lora: bool) -> None:
    case = Case(folder, lora=True) if lora else Case()
    ranks.do(training.hold, case, 1)
    for words, unchanged in ranks.do(training.spoilt, case):
        assert "were not changed" in words and unchanged


def test_exchanges(ranks: Ranks) -> None:
    for whole, half, gradients, gathered in ranks.do(training.summed):
        assert torch.equal(whole, torch.full((2, 3), 3.0))
        assert torch.equal(half, torch.full((5,), 2.0, dtype=torch.bfloat16))
        assert gradients[0].tolist() == [2.0, 5.0] and gradients[1].tolist() == [1.0, 1.0] and gradients[2] is None
        assert gathered == [{"rank": 0}, {"rank": 1}]


def test_one_rank_needs_no_group() -> None:
    group = Group.join("nowhere:1", 0, 1, "cpu")
    tensor = torch.ones(2)
    group.sum([tensor])
    assert tensor.tolist() == [1.0, 1.0] and group.gather("mine") == ["mine"] and group.size == 1
    group.leave()
    assert not distributed.is_initialized()


def test_at_an_address_somebody_listens_from_then_on() -> None:
    """Else another program could take the port before the ranks come."""
    host, _, port = Group.address().rpartition(":")
    with socket.create_connection((host, int(port)), 5.0):
        pass
    assert Group.address("127.0.0.1").startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (distributed.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_ranks_that_lose_each_other_are_told_from_those_that_cannot_compute(error: Exception, lost: bool) -> None:
    assert exchange_failed(error) is lost


def test_a_net_is_cut_at_its_blocks() -> None:
    net = transformer(2, 2, 8, 4, 8)
    assert list(blocks(net)) == list(net.transformer_blocks)  # not at the lists within a block
