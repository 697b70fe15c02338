"""What the driver knows of the calls that it made: their arguments, where they stand, and what came of them."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray

from rlalign.runtime.host import Failure, Report, Slot
from rlalign.types import Unit

SMALL = 2**16
"""Bytes up to which the driver takes a call's only value to itself: scores, metrics. Payloads stay where they are."""


class Ledger:
    """Bytes of a pool's values that someone still wants; for back-pressure."""

    def __init__(self) -> None:
        self.bytes_in_flight = 0


@dataclass(eq=False)
class Ref:
    """One value of a call."""

    call: "Call"
    index: int
    value: Any = None  # once the driver holds it
    object: "ray.ObjectRef[Any] | None" = None  # where it is else
    num_bytes: int = 0

    def __del__(self) -> None:
        self.call.ledger.bytes_in_flight -= self.num_bytes


@dataclass(eq=False)
class Hold:
    """A call that every worker must have made before the calls that were submitted after it."""

    method: str
    args: tuple[Any, ...]


@dataclass(eq=False)
class Call:
    """A call by its address: whichever worker makes it, and however often, the values are the same."""

    method: str
    args: tuple[Any, ...]
    returns: int
    order: int
    ledger: Ledger
    enqueue: "Callable[[Call], None]"  # of its pool
    worker: int | None = None  # the only one that may make it
    hold: Hold | None = None  # what its worker must hold
    sets: Hold | None = None  # what its worker holds afterwards
    outputs: "list[weakref.ref[Ref]]" = field(default_factory=list)
    done: bool = False
    wanted: bool = False
    failure: Failure | None = None
    dependents: "list[Call]" = field(default_factory=list)
    missing: int = 0  # values it still waits for
    deaths: int = 0  # fresh workers that died of it
    losses: int = 0  # times that its arguments were lost
    dropped: bool = False  # nobody waits for it any more
    node: str = ""  # where its values lie

    def __lt__(self, other: "Call") -> bool:
        return self.order < other.order

    @property
    def unit(self) -> Unit | None:
        return next((arg for arg in self.args if isinstance(arg, Unit)), None)

    def new_refs(self) -> list[Ref]:
        refs = [Ref(self, index) for index in range(self.returns)]
        self.outputs = [weakref.ref(ref) for ref in refs]
        return refs

    def finish(self, failure: Failure | None = None) -> None:
        """Done, with or without success; the calls that waited for it may go on."""
        self.done, self.failure = True, failure
        waiting, self.dependents = self.dependents, []
        for call in waiting:
            call.missing -= 1
            if call.missing == 0:
                call.enqueue(call)

    def keep(self, report: Report, objects: "list[ray.ObjectRef[Any]]", node: str) -> None:
        """Takes over its values."""
        self.node, refs = node, [ref() for ref in self.outputs] or [None] * self.returns
        if self.returns == 1 and sum(report.num_bytes) <= SMALL:
            self.args = ()  # never made again, so what it worked on may go
            if refs[0] is not None:
                refs[0].value = ray.get(objects[0])
            return
        for ref, size, found in zip(refs, report.num_bytes, objects, strict=True):
            if ref is not None:
                ref.object = found
                self.ledger.bytes_in_flight += size - ref.num_bytes
                ref.num_bytes = size

    def wait_for(self, inputs: "Iterable[Call]") -> None:
        """Goes to its pool's queue when these are done."""
        for call in {id(call): call for call in inputs if not call.done}.values():
            call.dependents.append(self)
            self.missing += 1
        if self.missing == 0:
            self.enqueue(self)

    def again(self) -> None:
        """Its values were lost."""
        self.done = False
        self.wait_for(ref.call for ref in self.inputs())

    def inputs(self) -> Iterator[Ref]:
        return refs_in(self.args)

    def describe(self) -> str:
        """For the user: the method, and which prompts and seeds it works on."""
        unit = self.unit
        if unit is None:
            return self.method
        prompts = ", ".join(repr(prompt.text) for prompt in unit.prompts[:3])
        more = f" and {len(unit.prompts) - 3} more" if len(unit.prompts) > 3 else ""
        groups = ", ".join(map(str, unit.groups[:3])) + (" ..." if len(unit.groups) > 3 else "")
        return f"{self.method} of {unit.purpose} step {unit.step}, groups {groups}, prompts {prompts}{more}"


def refs_in(value: Any) -> Iterator[Ref]:
    """References in arguments, also inside lists and tuples."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from refs_in(item)


def makers_of_lost(refs: Iterable[Ref]) -> list[Call]:
    """The calls whose values lay on a machine that is gone; all of them where that cannot be told."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    makers = {id(ref.call): ref.call for ref in refs if ref.object is not None}
    return [maker for maker in makers.values() if maker.node not in alive] or [*makers.values()]


def with_slots(value: Any, objects: list[Any]) -> Any:
    """Arguments with `Slot`s for references, whose values Ray hands over beside them; fills ``objects``."""
    if isinstance(value, Ref):
        objects.append(value.value if value.object is None else value.object)
        return Slot(len(objects) - 1)
    if isinstance(value, list | tuple):
        return type(value)(with_slots(item, objects) for item in value)
    return value
