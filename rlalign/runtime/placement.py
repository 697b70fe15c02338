"""Who sits where on a Ray cluster.

The learner ranks have one placement group, which Ray packs onto as few machines as it can; every sampler and every
scorer has a small one of its own, so that a lost machine takes nobody else along and an autoscaler can add them one by
one. Colocated, sampler i has no group and shares the seat of learner rank i: both are on one GPU.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlalign.runtime import capacity
from rlalign.runtime.capacity import Group, Machine
from rlalign.runtime.config import RuntimeConfig

BUSY_S = 10.0  # what an earlier run held is free again by then


class Placement:
    """Reserves what the workers of a run need; made after `ray.init`."""

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        with_gpus = any(machine.gpus for machine in machines())
        self.shares = capacity.gpu_shares(config, with_gpus)
        self.groups = {group.name: group for group in capacity.groups_of(config, with_gpus)}
        self.made: dict[str, PlacementGroup] = {}
        self.ranks = list(range(config.learners))  # seat of each learner rank in their group

    def reserve(self, wait_s: float = BUSY_S, join_s: float = 0.0) -> None:
        """Returns when all that the run must have is placed; samplers beyond ``min_samplers`` may still come.

        What the machines of the cluster could never hold is refused at once, or where machines may still join (an
        autoscaler, a Slurm job that starts) after ``join_s``; what others hold is waited for until ``wait_s``.
        """
        lacking = self.complaint()
        if lacking and not join_s:
            raise ValueError(f"runtime: {lacking}")
        seconds = join_s if lacking else wait_s
        try:
            # All at once: an autoscaler goes by the groups that have no place.
            for group in capacity.hardest_first(self.groups.values(), machines()):
                self._make(group)
            if not self._await(seconds):
                raise ValueError(f"runtime: {self.complaint() or self._busy(seconds)}")
        except BaseException:
            self.release()
            raise
        where = self._where("learners")
        self.ranks.sort(key=lambda seat: (where[seat], seat))  # neighbours in rank are on one machine

    def options(self, role: str, index: int) -> dict[str, object]:
        """For `ActorClass.options` of a worker."""
        name, seat = self._seat(role, index)
        wanted: dict[str, object] = {"num_cpus": self.config.cpus_per_worker, "num_gpus": self.shares[role]}
        if name in self.made:
            return {**wanted, "scheduling_strategy": PlacementGroupSchedulingStrategy(self.made[name], seat)}
        return {**wanted, "label_selector": self.groups[name].labels or None}  # takes nothing, so nothing is reserved

    def gpus(self, role: str) -> float:
        """Of each worker of this role."""
        return self.shares[role]

    def machine(self, role: str, index: int) -> str:
        """On which its seat is, "" where it has none."""
        name, seat = self._seat(role, index)
        return self._where(name)[seat]

    def ready(self, role: str, index: int) -> bool:
        """Whether its seat is on a machine that is up, as far as the cluster knows; all seats, for learners."""
        name, seat = self._seat(role, index)
        alive = {machine.id for machine in machines()}
        seats = self._where(name)
        return alive.issuperset(seats if role == "learner" else seats[seat : seat + 1])

    def renew(self, role: str, index: int) -> bool:
        """After the worker died: whether its group had to be made again.

        Ray itself moves the seats of a dead machine, before it places any new group; actors that were made with the old
        options find them. Only a group that somebody removed needs more.
        """
        name, _ = self._seat(role, index)
        if name not in self.made or placement_group_table(self.made[name]).get("state", "REMOVED") != "REMOVED":
            return False
        self._make(self.groups[name])
        return True

    def complaint(self) -> str | None:
        """What the run must have and the machines that are up now could never hold, as one sentence."""
        return capacity.complaint([*self.groups.values()], machines())

    def release(self) -> None:
        for made in self.made.values():
            remove_placement_group(made)
        self.made.clear()

    def describe(self) -> list[str]:
        """A line for each kind of worker: how many, what each takes and where; before `reserve`, where it would be."""
        cluster = {machine.id: machine for machine in machines()}
        planned = capacity.plan(self.groups.values(), [*cluster.values()])
        kinds: dict[str, list[Group]] = {}
        for group in self.groups.values():
            kinds.setdefault(group.noun, []).append(group)
        return [
            _line(kind, [id for g in kind for id in (self._where(g.name) if self.made else planned[g.name])], cluster)
            for kind in kinds.values()
        ]

    def _seat(self, role: str, index: int) -> tuple[str, int]:
        if role == "learner" or (role == "sampler" and self.config.placement == "colocated"):
            return "learners", self.ranks[index]
        return f"{role} {index}", 0

    def _make(self, group: Group) -> None:
        seat = {resource: share for resource, share in (("CPU", group.cpus), ("GPU", group.gpus)) if share}
        if seat:  # Ray refuses empty ones
            labels = [group.labels] * group.count
            name = f"rlalign {group.name}"
            self.made[group.name] = placement_group([seat] * group.count, "PACK", name, bundle_label_selector=labels)

    def _where(self, name: str) -> list[str]:
        """Machine of each seat of a group, "" where it has none."""
        group = self.groups[name]
        if name in self.made:
            seats = placement_group_table(self.made[name]).get("bundles_to_node_id", {})
            return [seats.get(seat, "") for seat in range(group.count)]
        usable = [machine.id for machine in machines() if capacity.matches(machine.labels, group.labels)]
        return [*usable, ""][:1] * group.count

    def _await(self, seconds: float) -> bool:
        """Whether the groups that the run must have are placed in time."""
        end = time.monotonic() + seconds
        while self._waiting():
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def _waiting(self) -> list[Group]:
        return [group for group in self.groups.values() if group.required and "" in self._where(group.name)]

    def _busy(self, seconds: float) -> str:
        """As `complaint`, where the machines are there and others use them."""
        waiting = self._waiting()
        first, free, cluster = waiting[0], ray.available_resources(), machines()
        kind = [group for group in self.groups.values() if group.required and group.noun == first.noun]
        ours = [
            group for group in self.groups.values() if group.name in self.made and "" not in self._where(group.name)
        ]
        gpus = free.get("GPU", 0.0) + sum(group.gpus * group.count for group in ours)
        cpus = free.get("CPU", 0.0) + sum(group.cpus * group.count for group in ours)
        has = capacity.amounts(sum(m.gpus for m in cluster), sum(m.cpus for m in cluster), always=True)
        total, short = (sum(g.count for g in groups) for groups in (kind, [g for g in waiting if g in kind]))
        where = f" on machines with {capacity.spoken(first.labels)}" if first.labels else ""
        left = capacity.amounts(gpus, cpus, always=True)
        return (
            f"{short} of {total} {first.noun}s, which need {capacity.each(first)} each{where}, found no place within"
            f" {seconds:g} s: of the cluster's {has}, {left} are free"
            " for this run; wait until others end, or ask for less"
        )


def _line(groups: Sequence[Group], seats: Sequence[str], cluster: Mapping[str, Machine]) -> str:
    total, least = (sum(g.count for g in chosen) for chosen in (groups, [g for g in groups if g.required]))
    first, found = groups[0], Counter(seat for seat in seats if seat)
    names = [f"{n} on {cluster[seat].name} ({seat[:6]})" for seat, n in found.items() if seat in cluster]
    lacking = total - found.total()
    return (
        f"{total} {first.noun}{'' if total == 1 else 's'}{f' (at least {least})' if least < total else ''}"
        f"{f' with {capacity.spoken(first.labels)}' if first.labels else ''}, {capacity.each(first)} each: "
        + ", ".join([*names, *([f"{lacking} without a place"] if lacking else [])])
    )


def machines() -> list[Machine]:
    """That are up, as far as the cluster knows."""
    return [
        Machine(
            node["NodeID"],
            node["NodeName"] or node["NodeManagerAddress"],
            node["Resources"].get("CPU", 0.0),
            int(node["Resources"].get("GPU", 0)),
            node["Labels"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
