"""What a run asks of machines, and whether they have it: arithmetic without Ray."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlalign.runtime.config import Labels, RuntimeConfig

PAIR = "learner-sampler pair"
TINY = 1e-6  # thirds of a GPU add up to one


@dataclass(frozen=True, slots=True)
class Machine:
    id: str
    name: str
    cpus: float
    gpus: int
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Group:
    """Workers that are placed together: ``count`` seats of so many CPUs and GPUs, on machines with the labels."""

    name: str
    noun: str  # who sits here, for people
    count: int
    cpus: float
    gpus: float
    labels: Labels
    required: bool = True  # the run cannot start without it


Plan = dict[str, list[str]]
"""Machine of every seat of a group; fewer than the group has where there is no room."""


def groups_of(config: RuntimeConfig, with_gpus: bool) -> list[Group]:
    """One group of learner ranks, and one of its own for every other worker; ``with_gpus``: the cluster has some."""
    gpus, cpus = gpu_shares(config, with_gpus), config.cpus_per_worker
    learners = Group("learners", "learner", config.learners, cpus, gpus["learner"], config.learner_labels)
    least = config.samplers if config.min_samplers is None else config.min_samplers
    samplers = [
        Group(f"sampler {i}", "sampler", 1, cpus, gpus["sampler"], config.sampler_labels, i < least)
        for i in range(config.samplers)
    ]
    scorers = [
        Group(f"scorer {i}", "scorer", 1, cpus, gpus["scorer"], config.scorer_labels) for i in range(config.scorers)
    ]
    if config.placement == "disaggregated":
        return [learners, *samplers, *scorers]
    both = gpus["learner"] + gpus["sampler"]
    return [Group("learners", PAIR, config.learners, 2 * cpus, both, _pair_labels(config)), *scorers]


def gpu_shares(config: RuntimeConfig, with_gpus: bool) -> dict[str, float]:
    """GPUs of a worker of each role; colocated, what is left open is shared half and half."""
    learner, sampler = config.gpus_per_learner, config.gpus_per_sampler
    whole = 1.0 if (with_gpus if config.device == "auto" else config.device.startswith("cuda")) else 0.0
    colocated = config.placement == "colocated"
    if not colocated:
        learner, sampler = (whole if share is None else share for share in (learner, sampler))
    elif learner is None:
        learner = whole / 2 if sampler is None else max(0.0, whole - sampler)
    if sampler is None:
        sampler = max(0.0, whole - learner)
    shares = {"learner": learner, "sampler": sampler, "scorer": config.gpus_per_scorer}
    for role, share in shares.items():
        if share > 1 and share != int(share):
            raise ValueError(f"runtime.gpus_per_{role} is {share:g}: above 1, only whole GPUs can be given")
    if colocated:
        _refuse_bad_pairs(config, shares["learner"], shares["sampler"])
    return shares


def _refuse_bad_pairs(config: RuntimeConfig, learner: float, sampler: float) -> None:
    if config.samplers != config.learners:
        raise ValueError(
            f"runtime.placement is colocated, but {_s(config.samplers, 'sampler')} cannot share pair by pair with"
            f" {_s(config.learners, 'learner')}: set runtime.samplers to {config.learners}, or runtime.placement to"
            " disaggregated"
        )
    if learner + sampler > 1 + TINY:
        raise ValueError(
            f"runtime.placement is colocated, and gpus_per_learner {learner:g} and gpus_per_sampler {sampler:g} add up"
            f" to {learner + sampler:g}: one GPU is shared, so set them to at most 1 together"
        )


def _pair_labels(config: RuntimeConfig) -> Labels:
    learner, sampler = config.learner_labels, config.sampler_labels
    for label in learner.keys() & sampler.keys():
        if learner[label] != sampler[label]:
            raise ValueError(
                f"runtime.placement is colocated, but learner_labels ask for {label}={learner[label]}"
                f" and sampler_labels for {label}={sampler[label]}"
            )
    return {**sampler, **learner}


def matches(labels: Mapping[str, str], selector: Labels) -> bool:
    """As Ray reads selectors: h100, !h100, in(h100, a100), !in(h100, a100); what is not there differs from all."""

    def one(label: str, wanted: str) -> bool:
        value = wanted.removeprefix("!")
        values = re.split(r",\s*", value[3:-1]) if value.startswith("in(") else [value]
        return (labels.get(label) in values) != wanted.startswith("!")

    return all(one(label, wanted) for label, wanted in selector.items())


class Room:
    """What is left of a machine. A share of a GPU is on one GPU, so every GPU is counted by itself."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.cpus, self.gpus = machine, machine.cpus, [1.0] * machine.gpus

    def seats(self, group: Group) -> int:
        """How many of the group's seats fit."""
        if not matches(self.machine.labels, group.labels):
            return 0
        by_cpu = int(self.cpus / group.cpus + TINY) if group.cpus else group.count
        if group.gpus == 0:
            by_gpu = group.count
        elif group.gpus <= 1:
            by_gpu = sum(int(free / group.gpus + TINY) for free in self.gpus)
        else:
            by_gpu = int(sum(free > 1 - TINY for free in self.gpus) / group.gpus)
        return min(by_cpu, by_gpu, group.count)

    def take(self, group: Group) -> None:
        self.cpus -= group.cpus
        if group.gpus > 1:
            for _ in range(int(group.gpus)):
                self.gpus[self.gpus.index(max(self.gpus))] = 0.0
        elif group.gpus:
            fullest = min(free for free in self.gpus if free > group.gpus - TINY)
            self.gpus[self.gpus.index(fullest)] -= group.gpus


def hardest_first(groups: Iterable[Group], machines: Sequence[Machine]) -> list[Group]:
    """Required before others, few machines before many, large before small: what fits in some order fits in this one.

    Groups are also made in this order, since Ray spreads single seats and would break up the room for larger ones."""

    def hardness(group: Group) -> tuple[float, ...]:
        choice = sum(matches(machine.labels, group.labels) for machine in machines)
        return (not group.required, choice, -group.gpus, -group.cpus, -group.count)

    return sorted(groups, key=hardness)


def plan(groups: Iterable[Group], machines: Sequence[Machine]) -> Plan:
    """Seats on empty machines; each group on as few machines, and those as full, as can be."""
    rooms, seated = [Room(machine) for machine in machines], Plan()
    for group in hardest_first(groups, machines):
        seated[group.name] = []
        for left in range(group.count, 0, -1):
            open_rooms = [room for room in rooms if room.seats(group)]
            if not open_rooms:
                break
            holds_all = [room for room in open_rooms if room.seats(group) >= left]
            if holds_all:
                room = min(holds_all, key=lambda room: (sum(room.gpus), room.cpus))
            else:
                room = max(open_rooms, key=lambda room: room.seats(group))
            room.take(group)
            seated[group.name].append(room.machine.id)
    return seated


def complaint(groups: Sequence[Group], machines: Sequence[Machine]) -> str | None:
    """One sentence, needed against available, about the first workers for which there is no room."""
    seated = plan(groups, machines)
    required = [group for group in hardest_first(groups, machines) if group.required]
    short = next((group for group in required if len(seated[group.name]) < group.count), None)
    if short is None:
        return None
    alike = [group for group in required if group.noun == short.noun]
    total, room = sum(group.count for group in alike), sum(len(seated[group.name]) for group in alike)
    usable = [machine for machine in machines if matches(machine.labels, short.labels)]
    return (
        f"{_s(total, short.noun)} {'needs' if total == 1 else 'need'} {amounts(total * short.gpus, total * short.cpus)}"
        f"{f' ({each(short)} each)' if total > 1 else ''}, but there is room for {room or 'none'}:"
        f" {_stock(short, usable)}{_taken(short, required, seated, usable)}; {_remedy(short)}"
    )


def _stock(short: Group, usable: Sequence[Machine]) -> str:
    which = f" with {spoken(short.labels)}" if short.labels else ""
    if not usable:
        return f"the cluster has no machine{which}"
    has = amounts(sum(machine.gpus for machine in usable), sum(machine.cpus for machine in usable), always=True)
    alone = "" if any(Room(machine).seats(short) for machine in usable) else ", but none so much by itself"
    return f"the cluster's {_s(len(usable), 'machine')}{which} {'has' if len(usable) == 1 else 'have'} {has}" + (
        alone if len(usable) > 1 else ""
    )


def _taken(short: Group, required: Sequence[Group], seated: Plan, usable: Sequence[Machine]) -> str:
    """What those who were seated before take of these machines."""
    there, seats, kinds = {machine.id for machine in usable}, Counter[str](), dict[str, Group]()
    for group in required[: required.index(short)]:
        if group.noun != short.noun:
            kinds[group.noun] = group
            seats[group.noun] += sum(machine in there for machine in seated[group.name])
    said = [
        f"{_s(n, noun)} {'takes' if n == 1 else 'take'} {amounts(n * kinds[noun].gpus, n * kinds[noun].cpus)}"
        for noun, n in seats.items()
        if n
    ]
    return f", of which {' and '.join(said)}" if said else ""


def _remedy(short: Group) -> str:
    counts = {"sampler": "runtime.samplers (or runtime.min_samplers, to start with fewer)", "scorer": "runtime.scorers"}
    return f"lower {counts.get(short.noun, 'runtime.learners')}, or what each takes, or add machines"


def each(group: Group) -> str:
    return amounts(group.gpus, group.cpus)


def amounts(gpus: float, cpus: float, always: bool = False) -> str:
    said = [_s(gpus, "GPU")] * bool(gpus or always) + [_s(cpus, "CPU")] * bool(cpus or always)
    return " and ".join(said) or "nothing"


def spoken(labels: Labels) -> str:
    return ", ".join(f"{label}={value}" for label, value in labels.items())


def _s(count: float, noun: str) -> str:
    return f"{round(count, 4):g} {noun}{'' if count == 1 else 's'}"
