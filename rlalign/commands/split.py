"""How many samplers, scorers and learners: pure functions from the work of a step to its length and who idles.

With R, W and U what sampling, scoring and updating take when each is shared by its workers, a step takes about

    max(R, W) + U       one after the other: max_staleness 0; pictures are scored while others are sampled
    max(R, W, U)        max_staleness 1 and more: the next batch is sampled during the update

Work is shared in whole units (rollouts, rewards) or whole groups (updates), so 3 units on 2 samplers take as long as 4.
Colocated, sampler and learner rank take turns on one GPU, so that both have all of them. Publishing is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rlalign.reporting.timing import kind, step_windows, within
from rlalign.runtime.config import RuntimeConfig
from rlalign.types import Span

MEASURED_STEPS = 20


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step, if one worker did it: in seconds, or in passes of the network."""

    rollout: float
    reward: float
    update: float
    units: int
    groups: int


@dataclass(frozen=True, slots=True)
class Team:
    samplers: int
    scorers: int
    learners: int
    colocated: bool = False

    def __str__(self) -> str:
        counts = {"sampler": self.samplers, "scorer": self.scorers, "learner": self.learners}
        words = ", ".join(f"{count} {role}{'s' if count > 1 else ''}" for role, count in counts.items())
        return f"{words}{', colocated' if self.colocated else ''}"


@dataclass(frozen=True, slots=True)
class Places:
    """What there is to divide; samplers and learners take one each."""

    count: int
    name: str
    scorer: float = 0.0
    """What a scorer takes."""


def parts(work: Work, team: Team) -> tuple[float, float, float]:
    """R, W and U."""
    return (
        work.rollout * _most(work.units, team.samplers),
        work.reward * _most(work.units, team.scorers),
        work.update * _most(work.groups, team.learners),
    )


def step_time(work: Work, team: Team, max_staleness: int) -> float:
    rollout, reward, update = parts(work, team)
    if team.colocated and max_staleness:
        return max(rollout + update, reward)
    return max(rollout, reward, update) if max_staleness else max(rollout, reward) + update


def idle(work: Work, team: Team, max_staleness: int) -> dict[str, float]:
    """By role: the share of a step in which a worker has nothing to do, mean over them."""
    length = step_time(work, team, max_staleness)
    mean = (work.rollout / team.samplers, work.reward / team.scorers, work.update / team.learners)
    return {f"{role}s": 1 - own / length for role, own in zip(("sampler", "scorer", "learner"), mean, strict=True)}


def best(work: Work, places: Places, max_staleness: int) -> Team:
    """The shortest step, and among those with the fewest workers."""
    return min(_teams(work, places, max_staleness), key=lambda team: _price(work, team, max_staleness))


def measured(spans: Sequence[Span], units: int, groups: int) -> Work | None:
    """Worker-seconds of a step in a run's last steps; None where it has none yet."""
    windows = step_windows(spans, last=MEASURED_STEPS)
    seconds: dict[str, float] = {"rollout": 0.0, "reward": 0.0, "update": 0.0}
    for span in within(spans, windows):
        if kind(span) in seconds:
            seconds[kind(span)] += span.end - span.start
    if not seconds["rollout"] or not seconds["update"]:
        return None
    each = {name: total / len(windows) for name, total in seconds.items()}
    return Work(each["rollout"], each["reward"], each["update"], units, groups)


def lines(work: Work, runtime: RuntimeConfig, places: Places) -> Iterator[str]:
    """What is configured, and what would be best for these places without and with overlap."""
    now = Team(runtime.samplers, runtime.scorers, runtime.learners, runtime.placement == "colocated")
    now = replace(now, colocated=now.colocated or places.count == 1)
    length = step_time(work, now, runtime.max_staleness)
    yield f"as configured, max_staleness {runtime.max_staleness}: {_describe(work, now, runtime.max_staleness)}"
    for staleness in (0, 1):
        team = best(work, places, staleness)
        gain = length / step_time(work, team, staleness)
        faster = f"{gain:.1f} times as fast" if gain >= 1.05 else "no faster"
        many = f"{places.count} {places.name}{'s' if places.count > 1 else ''}"
        yield f"{many}, max_staleness {staleness}: {_describe(work, team, staleness)}; {faster}"


def in_words(work: Work) -> str:
    shares = f"{work.rollout:.2f} s of sampling, {work.reward:.2f} s of scoring, {work.update:.2f} s of updating"
    return f"a step is {shares}, as this run measured; of one worker each"


def estimated_in_words(rollout: float, update: float) -> str:
    share = rollout / (rollout + update)
    return f"sampling {share:.0%}, updating {1 - share:.0%}, by passes (a backward one counts twice); rewards unknown"


def _describe(work: Work, team: Team, max_staleness: int) -> str:
    shares = [f"{role} {share:.0%}" for role, share in idle(work, team, max_staleness).items()]
    known = shares if work.reward else [shares[0], shares[2]]
    return f"{team} (idle: {', '.join(known)})"


def _teams(work: Work, places: Places, max_staleness: int) -> Iterator[Team]:
    """Every sensible one; more samplers than units or learners than groups would have nothing to do."""
    if not max_staleness or places.count == 1:
        for learners in range(1, min(places.count, work.groups) + 1):
            together = Team(min(learners, work.units), 1, learners, colocated=True)
            yield from _with_scorers(work, together, places, learners, max_staleness)
    for learners in range(1, min(places.count - 1, work.groups) + 1):
        for samplers in range(1, min(places.count - learners, work.units) + 1):
            yield from _with_scorers(work, Team(samplers, 1, learners), places, samplers + learners, max_staleness)


def _with_scorers(work: Work, team: Team, places: Places, taken: int, max_staleness: int) -> Iterator[Team]:
    """The fewest scorers that nobody waits for, as far as there is room; the first always has some."""
    room = (places.count - taken) / places.scorer if places.scorer else work.units
    most = max(1, min(work.units, int(room)))
    if most > room and places.count > 2:
        return
    rollout, _, update = parts(work, team)
    limit = max(rollout, update) if max_staleness and not team.colocated else rollout
    enough = (n for n in range(1, most) if work.reward * _most(work.units, n) <= limit)
    yield replace(team, scorers=next(enough, most))


def _price(work: Work, team: Team, max_staleness: int) -> tuple[float, int]:
    return round(step_time(work, team, max_staleness), 9), team.samplers + team.scorers + team.learners


def _most(pieces: int, workers: int) -> float:
    """The share of all pieces that the busiest worker gets."""
    return -(-pieces // workers) / pieces
