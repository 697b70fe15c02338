"""Publishing from the driver's side: in this process through the store, and to real processes through the broadcast."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from rlalign.mdp.noise import Noise
from rlalign.runtime.collective import Collective
from rlalign.runtime.local import LocalPool
from rlalign.runtime.weights import ObjectStore
from rlalign.workers.canary import Mismatch
from rlalign.workers.sampler import Sampler
from tests.runtime import members
from tests.runtime.members import ProcessPool
from tests.small import algorithm, policy, workers

TIMEOUT_S = 20.0  # nothing here takes so long
SHORT_S = 4.0  # of a group that loses a member: the others wait so long


@pytest.fixture
def pools() -> Iterator[tuple[LocalPool, LocalPool]]:
    """A learner, and two samplers with networks of their own."""
    _, learner = workers(algorithm())
    samplers = [Sampler(policy(), Noise(0), "policy", keep_steps=True, shares=False) for _ in range(2)]
    made = LocalPool("learner", [learner], 1), LocalPool("sampler", samplers, 1)
    yield made
    for pool in made:
        pool.close()


def versions(samplers: LocalPool) -> list[int | None]:
    return [sampler.version for sampler in samplers.workers]


def test_every_sampler_holds_what_was_published(pools: tuple[LocalPool, LocalPool]) -> None:
    learners, samplers = pools
    publisher = ObjectStore(["policy"])
    for version in (3, 4):
        (weights,) = learners.workers[0].policy.weights("policy").values()
        weights.fill_(version)
        publisher.publish(learners, samplers, version)
        assert versions(samplers) == [version] * 2
        held = [next(iter(sampler.policy.weights("policy").values())) for sampler in samplers.workers]
        assert all(torch.equal(tensor, weights) for tensor in held)


def test_the_learner_packs_into_the_same_memory_again(pools: tuple[LocalPool, LocalPool]) -> None:
    learners, samplers = pools
    publisher = ObjectStore(["policy"])
    for version in range(4):
        publisher.publish(learners, samplers, version)
    assert len(learners.workers[0].memory.blocks) <= 2


@pytest.mark.parametrize(("every", "checked"), [(0, [5]), (2, [5, 6, 8]), (3, [5, 6, 9])])
def test_the_canary_sings_first_and_then_now_and_then(
    pools: tuple[LocalPool, LocalPool], every: int, checked: list[int]
) -> None:
    learners, samplers = pools
    publisher, sung = ObjectStore(["policy"], canary_every=every), []
    for version in range(5, 10):
        samplers.workers[0].canary.check = lambda expected, variant, version=version: sung.append(version)
        publisher.publish(learners, samplers, version)
    assert sung == checked


@pytest.mark.parametrize("joins", [True, False])
def test_a_sampler_that_joins_later_compares_its_first_version(pools: tuple[LocalPool, LocalPool], joins: bool) -> None:
    learners, samplers = pools
    publisher, sung = ObjectStore(["policy"], canary_every=10, joins=joins), []
    publisher.publish(learners, samplers, 3)
    given = samplers.workers[0].receive
    samplers.workers[0].receive = lambda *version: sung.append(version) or given(*version)
    samplers.workers[0].canary.check = lambda expected, variant: pytest.fail("it compared one before")
    publisher.publish(learners, samplers, 4)
    ((manifest, buckets),) = sung
    stranger = Sampler(policy(), Noise(1), "policy", keep_steps=True, shares=False)
    if not joins:
        assert manifest.canary is None
        return
    with pytest.raises(Mismatch):  # as would another base model
        stranger.receive(manifest, buckets)
    assert stranger.version is None
    late = Sampler(policy(), Noise(0), "policy", keep_steps=True, shares=False)
    assert late.receive(manifest, buckets)["version"] == 4


def test_a_sampler_that_holds_something_else_is_named(pools: tuple[LocalPool, LocalPool]) -> None:
    learners, samplers = pools
    samplers.workers[1].receive = lambda manifest, buckets: {"version": 1, "checksum": 0, "tensors": 1}
    with pytest.raises(RuntimeError, match="samplers do not hold version 1"):
        ObjectStore(["policy"]).publish(learners, samplers, 1)


def test_a_sampler_that_died_meanwhile_is_not_waited_for(pools: tuple[LocalPool, LocalPool]) -> None:
    learners, samplers = pools
    samplers.workers[1].receive = lambda manifest, buckets: None  # what a pool says of it
    ObjectStore(["policy"]).publish(learners, samplers, 1)


def test_acknowledgements_may_lag_by_the_staleness(pools: tuple[LocalPool, LocalPool]) -> None:
    learners, samplers = pools
    publisher, asked = ObjectStore(["policy"], max_staleness=2), []
    get = samplers.get
    samplers.get = lambda refs: asked.append(publisher.waiting and publisher.waiting[0][0].version) or get(refs)
    seen = []
    for version in range(5):
        publisher.publish(learners, samplers, version)
        seen.append(len(publisher.waiting))
    assert seen == [0, 1, 2, 2, 2]  # the first is waited for, since nobody samples yet
    publisher.settle(samplers)
    assert not publisher.waiting and versions(samplers) == [4, 4]


def test_a_failure_that_came_late_is_raised(pools: tuple[LocalPool, LocalPool]) -> None:
    learners, samplers = pools
    publisher = ObjectStore(["policy"], max_staleness=1)
    publisher.publish(learners, samplers, 0)
    samplers.workers[0].receive = lambda manifest, buckets: {"version": 0, "checksum": 0, "tensors": 0}
    publisher.publish(learners, samplers, 1)
    with pytest.raises(RuntimeError, match="do not hold version 1"):
        publisher.settle(samplers)
    publisher.publish(learners, samplers, 2)
    publisher.forget()
    publisher.settle(samplers)


def test_to_the_learners_own_network_goes_a_version_alone() -> None:
    sampler, learner = workers(algorithm())
    learners, samplers = LocalPool("learner", [learner], 1), LocalPool("sampler", [sampler], 1)
    ObjectStore(["policy"], shares=True).publish(learners, samplers, 7)
    assert sampler.version == 7 and not learner.memory.blocks


# --- by broadcast


@pytest.fixture(scope="module")
def learners() -> Iterator[ProcessPool]:
    """One for all tests: its last group is gone whenever a new one forms."""
    pool = ProcessPool(members.make_learner)
    yield pool
    pool.close()


@pytest.fixture
def samplers() -> Iterator[Callable[..., ProcessPool]]:
    pools: list[ProcessPool] = []

    def start(*make: Callable[[], Any]) -> ProcessPool:
        pools.append(ProcessPool(*make))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


def from_store(ref: Any) -> Callable[[], Any]:
    return partial(list, members.value(ref))


def no_store(ref: Any) -> Callable[[], Any]:
    """Whoever needs the store fails."""
    return partial(int, "the store was read")


def publisher(later: Callable[[Any], Any] = no_store, timeout_s: float = TIMEOUT_S) -> Collective:
    return Collective(["policy", "old"], timeout_s=timeout_s, later=later)


def holds(learners: ProcessPool, samplers: ProcessPool) -> bool:
    """Whether every live sampler has the learner's weights."""
    for name in ("policy", "old"):
        (own,) = learners.get(learners.broadcast("policy.weights", name))
        held = samplers.get(samplers.broadcast("policy.weights", name))
        if not all(torch.equal(tensors[key], own[key]) for tensors in held for key in own):
            return False
    return True


def change(learners: ProcessPool) -> None:
    learners.get(learners.broadcast("policy.blend", "old", 3.0))
    (state,) = learners.get(learners.broadcast("policy.weights", "policy"))
    learners.get(learners.broadcast("policy.load", "policy", {name: t + 1 for name, t in state.items()}))


def test_the_broadcast_reaches_every_sampler(learners: ProcessPool, samplers: Callable[..., ProcessPool]) -> None:
    pool, collective = samplers(members.make_sampler, members.make_sampler), publisher()
    for version in range(3):
        change(learners)
        collective.publish(learners, pool, version)
        assert holds(learners, pool)
    assert (collective.generation, collective.size) == (1, 3)


def test_who_comes_later_reads_the_store_and_joins_the_next_group(
    learners: ProcessPool, samplers: Callable[..., ProcessPool]
) -> None:
    pool, collective = samplers(members.make_sampler), publisher(from_store)
    collective.publish(learners, pool, 0)
    assert pool.add(members.make_sampler)["version"] == 0 and holds(learners, pool)
    collective.later = no_store
    change(learners)
    collective.publish(learners, pool, 1)
    assert (collective.generation, collective.size) == (2, 3) and holds(learners, pool)


@pytest.mark.parametrize("unlucky", [members.make_doomed_sampler, members.make_stopping_sampler])
def test_a_member_that_is_killed_or_stopped_in_a_broadcast_costs_one_fallback(
    learners: ProcessPool,
    samplers: Callable[..., ProcessPool],
    caplog: pytest.LogCaptureFixture,
    unlucky: Callable[[], Any],
) -> None:
    pool = samplers(members.make_sampler, members.make_sampler, unlucky)

    def later(ref: Any) -> Callable[[], Any]:
        pool.end_stopped()  # it did not answer its pings meanwhile
        return from_store(ref)

    collective = publisher(later, SHORT_S)
    with caplog.at_level(logging.WARNING):
        change(learners)
        collective.publish(learners, pool, 0)
    assert len(pool.alive) == 2 and holds(learners, pool)
    assert [record.message.split(" (")[0] for record in caplog.records] == ["the broadcast of version 0 failed"]
    collective.timeout_s, collective.later = TIMEOUT_S, no_store
    change(learners)
    collective.publish(learners, pool, 1)
    assert (collective.generation, collective.size) == (2, 3) and holds(learners, pool)


def test_a_member_that_is_gone_before_the_broadcast_is_left_out(
    learners: ProcessPool, samplers: Callable[..., ProcessPool]
) -> None:
    pool, collective = samplers(members.make_sampler, members.make_sampler), publisher()
    collective.publish(learners, pool, 0)
    pool.members[0].process.kill()
    pool.members[0].process.join()
    change(learners)
    collective.publish(learners, pool, 1)
    assert (collective.generation, collective.size) == (2, 2) and holds(learners, pool)


def test_what_the_broadcast_damaged_comes_from_the_store(
    learners: ProcessPool, samplers: Callable[..., ProcessPool]
) -> None:
    pool, collective = samplers(members.make_sampler, members.make_deaf_sampler), publisher(from_store)
    change(learners)
    collective.publish(learners, pool, 0)
    assert holds(learners, pool) and collective.size == 0


def test_no_sampler_stands_for_learners_that_are_not_back(
    learners: ProcessPool, samplers: Callable[..., ProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, collective = samplers(members.make_sampler, members.make_sampler), publisher(from_store, SHORT_S)
    monkeypatch.setattr(learners, "aside", lambda method, *args: [])
    collective.publish(learners, pool, 0)
    assert (collective.generation, collective.size) == (0, 0) and holds(learners, pool)


def test_without_samplers_there_is_no_group(learners: ProcessPool, samplers: Callable[..., ProcessPool]) -> None:
    collective = publisher(from_store)
    collective.publish(learners, samplers(), 0)
    assert (collective.generation, collective.size) == (0, 1)
