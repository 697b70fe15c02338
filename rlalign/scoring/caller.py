"""One reward with its retries, its failure policy and its circuit breaker."""

import logging
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlalign.scoring.answer import Answer, CallFailed
from rlalign.scoring.call import Spent, TimedOut, call, spends
from rlalign.scoring.protocol import Reward, RewardError
from rlalign.types import Prompt, RewardScores, Unit

GIVE_UP_AFTER = 10
"""This many failed calls in a row end the run under any policy: there is nothing left to learn from."""

_LONGEST_PAUSE_S = 60.0
_LONGEST_TEXT = 80  # characters of a prompt in a message
_log = logging.getLogger("rlalign")


@dataclass(frozen=True, slots=True)
class Rows:
    """A unit's pictures and, for each, its prompt and address."""

    images: Tensor  # [B, ...] uint8
    unit: Unit

    def __len__(self) -> int:
        return len(self.images)

    def prompt(self, row: int) -> Prompt:
        return self.unit.prompts[row // self.unit.samples]

    def where(self, row: int) -> str:
        slot, sample = divmod(row, self.unit.samples)
        text = self.prompt(row).text
        text = text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 3]}..."
        address = f"step {self.unit.step}, group {self.unit.groups[slot]}, sample {sample}"
        return f"the prompt {text!r} ({address} of the {self.unit.purpose})"


@dataclass(slots=True)
class Tally:
    """What the calls cost since the counters were last read."""

    calls: int = 0  # every try is one
    seconds: float = 0.0
    errors: int = 0
    timeouts: int = 0
    dropped: int = 0  # pictures left without a number


class Caller:
    """Owns one reward's counters; everything else of it is in its `config`.

    ``replaceable``: whoever reads `Spent` does the unit again in a new process.
    """

    def __init__(self, reward: Reward, replaceable: bool = False) -> None:
        self.config, self.of_recordings = reward.config, reward.of_recordings
        self._reward = reward
        self.tally = Tally()
        self._failed_in_a_row = 0
        self._replaceable = replaceable
        self._worked = False  # for a whole unit, in this process

    def score(self, rows: Rows) -> RewardScores:
        """RewardError where the policy is `fail` or nothing has worked for long; `Spent`."""
        start = time.perf_counter()
        try:
            return self._score(rows)
        finally:
            self.tally.seconds += time.perf_counter() - start

    def _score(self, rows: Rows) -> RewardScores:
        values = torch.full((len(rows),), torch.nan)  # [B]
        details: dict[str, Tensor] = {}  # each [B]
        worked = True
        for chunk in self._chunks(rows):
            answer = self._ask(rows, chunk)
            worked &= isinstance(answer, Answer)
            self._judge(answer, rows, chunk)
            if isinstance(answer, Answer):
                values[chunk] = answer.score
                for key, detail in answer.details.items():
                    details.setdefault(key, torch.full_like(values, torch.nan))[chunk] = detail
            if self._is_open():
                _log.warning("reward %r is not called again for this batch", self.config.name)
                break
        self._worked |= worked
        return self._scores(values, details, rows.unit)

    def _chunks(self, rows: Rows) -> Iterator[slice]:
        size = rows.unit.samples if self._reward.groupwise else self.config.batch_size or len(rows)
        return (slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size))

    def _ask(self, rows: Rows, chunk: slice) -> Answer | Exception:
        """The checked answer, which may hold NaN, or what went wrong at the last try."""
        num_tries = 1 if self._is_open() else 1 + self.config.retries
        attempt = 1
        while True:
            try:
                return self._call(rows, chunk)
            except Exception as error:
                self._count(error)
                _log.warning("reward %r, try %d of %d: %s", self.config.name, attempt, num_tries, in_words(error))
                if attempt == num_tries:
                    return error
            time.sleep(min(self.config.backoff_s * 2 ** (attempt - 1), _LONGEST_PAUSE_S))
            attempt += 1

    def _call(self, rows: Rows, chunk: slice) -> Answer:
        """Fills the call up to the batch size with copies of its last picture and cuts the answer."""
        wanted = chunk.stop - chunk.start
        size = wanted if self._reward.groupwise else self.config.batch_size or wanted
        index = [min(row, chunk.stop - 1) for row in range(chunk.start, chunk.start + size)]
        self.tally.calls += 1
        answer = call(self._reward, rows.images[index], [rows.prompt(row) for row in index])
        return Answer(answer.score[:wanted], {key: detail[:wanted] for key, detail in answer.details.items()})

    def _count(self, error: Exception) -> None:
        if isinstance(error, TimedOut):
            self.tally.timeouts += 1
        else:
            self.tally.errors += 1

    def _judge(self, answer: Answer | Exception, rows: Rows, chunk: slice) -> None:
        """Moves the circuit breaker; raises when the run must not go on."""
        failed = isinstance(answer, Exception)
        if failed and self._replaceable and self._worked and spends(answer):
            raise Spent(self._failed(answer, rows, chunk))
        self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
        complaint = self._failed(answer, rows, chunk) if failed else self._not_finite(answer, rows, chunk)
        if not complaint:
            return
        cause = answer if failed else None
        if self.config.on_failure == "fail":
            raise RewardError(f"{complaint}; mend it, or set its on_failure to drop_sample or drop_group") from cause
        if self._failed_in_a_row >= GIVE_UP_AFTER:
            raise RewardError(f"{complaint}; given up after {GIVE_UP_AFTER} failed calls in a row") from cause
        _log.warning("%s; %s", complaint, self.config.on_failure)

    def _failed(self, error: Exception, rows: Rows, chunk: slice) -> str:
        which = f"{chunk.stop - chunk.start} pictures, the first of {rows.where(chunk.start)}"
        return f"reward {self.config.name!r} failed on {which}: {in_words(error)}"

    def _not_finite(self, answer: Answer, rows: Rows, chunk: slice) -> str:
        """'' where every picture has its number. Others are the policy's affair, not the breaker's: it did answer."""
        bad = (~answer.score.isfinite()).nonzero().flatten().tolist()
        if not bad:
            return ""
        self.tally.errors += 1
        which = f"{len(bad)} of {len(answer.score)} pictures, the first of {rows.where(chunk.start + bad[0])}"
        return f"reward {self.config.name!r} gave {answer.score[bad[0]]:g} for {which}"

    def _is_open(self) -> bool:
        return self._failed_in_a_row >= self.config.breaker_after

    def _scores(self, values: Tensor, details: dict[str, Tensor], unit: Unit) -> RewardScores:
        shape = (len(unit.prompts), unit.samples)
        values = values.reshape(shape)
        valid = values.isfinite()  # [P, G]
        if self.config.on_failure == "drop_group":
            valid = valid.all(1, keepdim=True).expand(shape).clone()
        return RewardScores(
            values=values.where(valid, 0.0),
            valid=valid,
            role=self.config.role,
            weight=self.config.weight,
            details={key: detail.reshape(shape) for key, detail in details.items()},
        )


def in_words(error: Exception) -> str:
    """Our own complaint, or the last line of a reward's traceback and where it was raised."""
    if isinstance(error, CallFailed):
        return str(error)
    line = traceback.format_exception_only(error)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)
    return f"{line} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else line
