from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlalign.runtime.capacity import Group, Machine, complaint, gpu_shares, groups_of, hardest_first, matches, plan
from rlalign.runtime.config import RuntimeConfig

HEAD = Machine("head", "head", cpus=8, gpus=0, labels={"pool": "head"})
A100 = Machine("a100", "a100", cpus=16, gpus=8, labels={"gpu": "a100"})
H100 = Machine("h100", "h100", cpus=16, gpus=8, labels={"gpu": "h100"})
CLUSTER = [HEAD, A100, H100]


def runtime(**options: object) -> RuntimeConfig:
    return RuntimeConfig(kind="ray", **options)


def asked(**options: object) -> list[Group]:
    return groups_of(runtime(**options), with_gpus=True)


def seats(groups: list[Group]) -> dict[str, Counter[str]]:
    """How many of each kind on which machine."""
    planned, found = plan(groups, CLUSTER), {}
    for group in groups:
        found.setdefault(group.noun, Counter()).update(planned[group.name])
    return found


def test_every_worker_has_a_group_of_its_own_but_the_learners_are_together() -> None:
    groups = asked(learners=4, samplers=2, scorers=1, min_samplers=1, gpus_per_scorer=0.25)
    assert [(group.name, group.count, group.gpus, group.required) for group in groups] == [
        ("learners", 4, 1, True),
        ("sampler 0", 1, 1, True),
        ("sampler 1", 1, 1, False),
        ("scorer 0", 1, 0.25, True),
    ]
    assert seats(groups) == {"learner": {"a100": 4}, "sampler": {"a100": 2}, "scorer": {"a100": 1}}


def test_sixteen_gpus_are_filled_to_the_last_share() -> None:
    groups = asked(learners=4, samplers=11, scorers=4, gpus_per_scorer=0.25)
    assert complaint(groups, CLUSTER) is None
    assert sum(seats(groups)["sampler"].values()) == 11
    assert seats(groups)["scorer"].total() == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"learners": 4, "samplers": 13},
            "13 samplers need 13 GPUs and 13 CPUs (1 GPU and 1 CPU each), but there is room for 12: the cluster's"
            " 3 machines have 16 GPUs and 40 CPUs, of which 4 learners take 4 GPUs and 4 CPUs; lower runtime.samplers"
            " (or runtime.min_samplers, to start with fewer), or what each takes, or add machines",
        ),
        (
            {"samplers": 20, "gpus_per_sampler": 0.6},  # three of 0.6 need three GPUs
            "20 samplers need 12 GPUs and 20 CPUs (0.6 GPUs and 1 CPU each), but there is room for 15: the cluster's"
            " 3 machines have 16 GPUs and 40 CPUs, of which 1 learner takes 1 GPU and 1 CPU; lower runtime.samplers"
            " (or runtime.min_samplers, to start with fewer), or what each takes, or add machines",
        ),
        (
            {"scorers": 9, "scorer_labels": {"pool": "head"}},
            "9 scorers need 9 CPUs (1 CPU each), but there is room for 8: the cluster's 1 machine with pool=head has"
            " 0 GPUs and 8 CPUs; lower runtime.scorers, or what each takes, or add machines",
        ),
        (
            {"learner_labels": {"gpu": "b200"}},
            "1 learner needs 1 GPU and 1 CPU, but there is room for none: the cluster has no machine with gpu=b200;"
            " lower runtime.learners, or what each takes, or add machines",
        ),
        (
            {"gpus_per_sampler": 9},
            "1 sampler needs 9 GPUs and 1 CPU, but there is room for none: the cluster's 3 machines have 16 GPUs and"
            " 40 CPUs, but none so much by itself; lower runtime.samplers (or runtime.min_samplers, to start with"
            " fewer), or what each takes, or add machines",
        ),
        (
            {"learners": 17, "samplers": 17, "placement": "colocated"},
            "17 learner-sampler pairs need 17 GPUs and 34 CPUs (1 GPU and 2 CPUs each), but there is room for 16: the"
            " cluster's 3 machines have 16 GPUs and 40 CPUs; lower runtime.learners, or what each takes, or add"
            " machines",
        ),
    ],
)
def test_a_complaint_sets_what_is_needed_against_what_is_there(options: dict[str, object], said: str) -> None:
    assert complaint(asked(**options), CLUSTER) == said


def test_samplers_beyond_the_least_are_no_reason_to_complain() -> None:
    groups = asked(learners=4, samplers=20, min_samplers=12)
    assert complaint(groups, CLUSTER) is None
    assert seats(groups)["sampler"].total() == 12
    assert all(group.required for group in hardest_first(groups, CLUSTER)[:13])


def test_those_with_little_choice_are_seated_first() -> None:
    groups = asked(learners=8, samplers=8, sampler_labels={"gpu": "a100"})
    assert seats(groups) == {"learner": {"h100": 8}, "sampler": {"a100": 8}, "scorer": {"head": 1}}


def test_learners_are_on_as_few_machines_as_can_be() -> None:
    assert seats(asked(learners=10, samplers=1))["learner"] == {"a100": 8, "h100": 2}


def test_without_gpus_workers_take_cpus_only() -> None:
    groups = groups_of(runtime(learners=2, samplers=2, gpus_per_scorer=0), with_gpus=False)
    assert {group.gpus for group in groups} == {0}
    assert complaint(groups, [HEAD]) is None


@pytest.mark.parametrize(
    ("options", "learner", "sampler"),
    [
        ({}, 1, 1),
        ({"device": "cpu"}, 0, 0),
        ({"gpus_per_sampler": 0.5}, 1, 0.5),
        ({"placement": "colocated"}, 0.5, 0.5),
        ({"placement": "colocated", "gpus_per_sampler": 0.3}, 0.7, 0.3),
        ({"placement": "colocated", "gpus_per_learner": 0.8, "gpus_per_sampler": 0.1}, 0.8, 0.1),
    ],
)
def test_shares_that_are_left_open(options: dict[str, object], learner: float, sampler: float) -> None:
    shares = gpu_shares(runtime(**options), with_gpus=True)
    assert (shares["learner"], shares["sampler"]) == pytest.approx((learner, sampler))


def test_whoever_asks_for_cuda_does_not_get_a_cpu_in_silence() -> None:
    groups = groups_of(runtime(device="cuda"), with_gpus=False)
    assert (complaint(groups, [HEAD]) or "").startswith("1 learner needs 1 GPU and 1 CPU, but there is room for none")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"placement": "colocated", "learners": 2, "samplers": 3}, "set runtime.samplers to 2"),
        ({"placement": "colocated", "gpus_per_learner": 0.7, "gpus_per_sampler": 0.5}, "add up to 1.2"),
        (
            {"placement": "colocated", "learner_labels": {"gpu": "a100"}, "sampler_labels": {"gpu": "h100"}},
            "gpu=a100 and sampler_labels for gpu=h100",
        ),
        ({"gpus_per_learner": 1.5}, "only whole GPUs"),
    ],
)
def test_impossible_combinations_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        asked(**options)


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ({}, [HEAD, A100, H100]),
        ({"gpu": "a100"}, [A100]),
        ({"gpu": "!a100"}, [HEAD, H100]),
        ({"gpu": "in(a100, h100)"}, [A100, H100]),
        ({"gpu": "!in(a100,h100)"}, [HEAD]),
        ({"gpu": "a100", "pool": "head"}, []),
    ],
)
def test_selectors_read_as_ray_reads_them(selector: dict[str, str], found: list[Machine]) -> None:
    assert [machine for machine in CLUSTER if matches(machine.labels, selector)] == found


@given(
    learners=st.integers(1, 6),
    samplers=st.integers(1, 12),
    scorers=st.integers(1, 12),
    shares=st.tuples(*[st.sampled_from([0.0, 0.25, 1 / 3, 0.6, 1.0, 2.0])] * 3),
)
def test_no_machine_is_given_more_than_it_has(learners, samplers, scorers, shares) -> None:
    gpus = dict(zip(("gpus_per_learner", "gpus_per_sampler", "gpus_per_scorer"), shares, strict=True))
    groups = asked(learners=learners, samplers=samplers, scorers=scorers, **gpus)
    taken: dict[str, list[Group]] = {machine.id: [] for machine in CLUSTER}
    for group, machines in ((group, plan(groups, CLUSTER)[group.name]) for group in groups):
        for machine in machines:
            taken[machine].append(group)
    for machine in CLUSTER:
        assert sum(group.cpus for group in taken[machine.id]) <= machine.cpus
        assert sum(group.gpus for group in taken[machine.id]) <= machine.gpus + 1e-9
