"""Pools that share GPUs: who leaves before whom, in the order of a training step."""

from typing import Any

import pytest

from rlalign.runtime.config import RuntimeConfig
from rlalign.runtime.local import LocalPool
from rlalign.runtime.turns import taking_turns


class Worker:
    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def rest(self) -> None:
        self.told.append(f"{self.name} rests")

    def __getattr__(self, method: str) -> Any:
        return lambda *args: self.told.append(f"{self.name} {method}")


def test_workers_leave_before_the_others_begin():
    told: list[str] = []
    samplers, learners = taking_turns(
        LocalPool("sampler", [Worker("sampler", told)], 1), LocalPool("learner", [Worker("learner", told)], 1)
    )
    learners.get(learners.broadcast("publish"))
    samplers.get(samplers.hold("receive"))
    samplers.get([samplers.submit("sample"), samplers.submit("sample")])
    learners.get(learners.scatter("update", [()]))
    learners.get(learners.broadcast("publish"))
    samplers.get(samplers.hold("receive"))
    learners.get(learners.broadcast("save"))
    samplers.get([samplers.submit("sample")])
    assert told == [
        *("learner publish", "learner rests", "sampler receive", "sampler sample", "sampler sample", "sampler rests"),
        *("learner update", "learner publish", "learner rests", "sampler receive", "learner save", "sampler sample"),
    ]
    assert samplers.size == 1 and "publish" in [span.method for span in learners.spans()]
    assert samplers.counters() == {"runtime/workers/sampler": 1.0}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"placement": "colocated"}, "offload_idle needs kind: ray"),
        ({"kind": "ray"}, "placement: colocated"),
        ({"kind": "ray", "placement": "colocated", "transport": "collective"}, "transport: object_store"),
        ({"kind": "ray", "placement": "colocated", "max_staleness": 1}, "max_staleness 0"),
    ],
)
def test_where_there_are_no_turns(settings: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        RuntimeConfig(offload_idle=True, **settings)
