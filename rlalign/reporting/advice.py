"""One sentence on what to change next, from how busy the workers are."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from rlalign.reporting.timing import Split
from rlalign.runtime.pool import DRIVER

FULL = 0.85
"""A role above this share is what a step waits for."""
LOOSE = 0.6
"""A role below this share has time left."""
UNEVEN = 0.3
SLOW_DRIVER = 0.1

MORE = {
    "sampler": "add samplers (runtime.samplers)",
    "scorer": "add scorers (runtime.scorers)",
    "learner": "add learner ranks (runtime.learners, with runtime.kind ray)",
}


def advice(workers: Mapping[str, Sequence[Split]], max_staleness: int) -> str | None:
    """``workers`` by role, the driver among them; None where nothing is known of samplers and learners."""
    busy = {role: fmean(one.busy for one in workers[role]) for role in (DRIVER, *MORE) if role in workers}
    loop = busy.pop(DRIVER, 0.0)
    if not {"sampler", "learner"} <= busy.keys():
        return None
    full = max(busy, key=lambda role: busy[role])
    shown = _shares(busy)
    samplers = [one.busy for one in workers["sampler"]]
    if loop > SLOW_DRIVER:
        return f"The loop itself is at work {loop:.0%} of the time, and all workers wait for it ({shown})."
    if max_staleness == 0:
        return f"Roles work one after the other ({shown}): runtime.max_staleness 1 lets them overlap; or {MORE[full]}."
    if max(samplers) - min(samplers) > UNEVEN:
        spread = f"Samplers are busy from {min(samplers):.0%} to {max(samplers):.0%} of the time"
        return f"{spread}: a step's units should divide among them evenly (fewer samplers, or smaller units)."
    if busy[full] < FULL:
        return f"No role is busy all the time ({shown}): they wait for each other; a higher max_staleness may help."
    others = {role: share for role, share in busy.items() if role != full}
    loose = [role for role, share in others.items() if share < LOOSE and len(workers[role]) > 1]
    fewer = f"; or fewer {loose[0]}s do as well" if loose else ""
    return f"{full.capitalize()}s are busy {busy[full]:.0%} of the time ({_shares(others)}): {MORE[full]}{fewer}."


def _shares(busy: Mapping[str, float]) -> str:
    return ", ".join(f"{role}s {share:.0%}" for role, share in busy.items())
