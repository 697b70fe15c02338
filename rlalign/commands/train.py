"""train and resume: the same thing, told from where."""

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rlalign.algorithms.base import epochs_of
from rlalign.build import build, make_algorithm
from rlalign.checks import warnings
from rlalign.commands.problems import in_preparation, in_training
from rlalign.commands.runs import config_of_run
from rlalign.config import RunConfig, find, load
from rlalign.loop import LoopSettings, Parts, Stopped
from rlalign.loop import train as run_loop
from rlalign.reporting.grids import before_after
from rlalign.reporting.metrics import read
from rlalign.reporting.progress import Progress
from rlalign.reporting.recorder import Recorder
from rlalign.reporting.report import write_report
from rlalign.reporting.sinks import make_sinks
from rlalign.reporting.watch import Watch, WatchConfig
from rlalign.rundir import Run, RunDir, open_run
from rlalign.runtime.pool import LearnersLost, Runtime

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def train(name: str, overrides: Sequence[str], folder: Path | None, fresh: bool) -> int:
    """Starts the run, goes on with it, or says that it is finished; the exit code."""
    with in_preparation():
        path = find(name)
        config = load(path, overrides)
    return run(config, folder or Path("runs") / path.stem, fresh)


def resume(folder: Path, overrides: Sequence[str]) -> int:
    """Goes on with the run in ``folder``."""
    with in_preparation():
        config = config_of_run(folder, overrides)
    return run(config, folder, fresh=False)


def run(config: RunConfig, folder: Path, fresh: bool) -> int:
    """One run in its folder, from wherever it stands."""
    with ExitStack() as stack:
        asked = stack.enter_context(Interrupts())
        with in_preparation():
            opened = _open(config, folder, fresh=False) if RunDir(folder).info.exists() and not fresh else None
            if opened is not None:
                stack.enter_context(opened)
                if opened.finished:
                    return _say_finished(folder, opened.info.step)
            for doubt in warnings(config):
                print(f"warning: {doubt}", file=sys.stderr)
            parts, settings = build(config)
            stack.callback(parts.runtime.close)
            current = opened or stack.enter_context(_open(config, folder, fresh))
        return _train(config, parts, settings, current, asked)


def _open(config: RunConfig, folder: Path, fresh: bool) -> Run:
    return open_run(folder, config.tree(), config.hashed(), sys.argv, fresh)


def _train(config: RunConfig, parts: Parts, settings: LoopSettings, current: Run, asked: "Interrupts") -> int:
    folder = current.files.path
    verb = "going on" if current.step else "starting"
    print(f"{verb} at step {current.step} of {config.steps} in {folder}", flush=True)
    _say_inexact(config, current.step)
    try:
        _loop(config, parts, settings, current, asked)
    except Stopped:
        done = current.info.step
        current.mark("interrupted", done)
        print(f"stopped after step {done} of {config.steps}; to go on: rlalign resume {folder}", flush=True)
        write_pages(folder)
        return EXIT_CODES[asked.signal or signal.SIGINT]
    except BaseException:
        with suppress(OSError, ValueError):  # a full disk must not hide what went wrong
            current.mark("failed", current.info.step)
        raise
    with in_training():
        current.mark("finished", config.steps)  # first: the report shows it
        write_pages(folder)
    _say_results(folder)
    return 0


def _loop(config: RunConfig, parts: Parts, settings: LoopSettings, current: Run, asked: "Interrupts") -> None:
    with Progress(config.steps, current.step) as progress, in_training(), asked.patiently():
        display = Display(progress, current, parts.runtime)
        parts.runtime.follow(current.files.logs, display.workers_changed)
        losses = 0
        while True:
            recorder = _recorder(config, current, display)
            try:
                if losses:
                    parts = _recovered(config, parts)
                return run_loop(parts, settings, recorder, asked.stop)
            except LearnersLost as error:
                losses = losses + 1 if current.go_back() == 0 else 1
                if losses > config.runtime.restarts:
                    raise
                print(f"warning: {error}; going on from step {current.step} with new learners", file=sys.stderr)
                _say_inexact(config, current.step)
            finally:
                recorder.close()


def _recovered(config: RunConfig, parts: Parts) -> Parts:
    """With new learners, which may be lost again before they are up."""
    parts.runtime.recover()
    parts.publisher.forget()
    return replace(parts, algorithm=make_algorithm(config))


def _say_inexact(config: RunConfig, step: int) -> None:
    """On going on after a break: the weights that batches under way were sampled under are not in checkpoints."""
    stale = config.runtime.max_staleness
    if stale and step:
        print(
            f"warning: with runtime.max_staleness {stale} the steps after a break, {stale} of them, are sampled under"
            " newer weights than in an unbroken run, so the numbers are not those of one",
            file=sys.stderr,
        )


def _recorder(config: RunConfig, current: Run, display: "Display") -> Recorder:
    clip = getattr(config.algorithm, "clip_range", None)  # algorithms without a ratio have none
    heldout = tuple(reward.name for reward in config.rewards if reward.role == "heldout")
    clip = min(clip) if isinstance(clip, tuple) else clip
    updates = config.updates_per_step * epochs_of(config.algorithm)
    watch = Watch(WatchConfig(), clip, config.optimizer.eps, heldout, updates)
    sinks = make_sinks(config.reporting, current, config.tree())
    return Recorder(current, config.steps, config.checkpoint, watch, sinks, display)


class Display:
    """Shows the run to a person, and its workers to those who watch from outside."""

    def __init__(self, progress: Progress, current: Run, runtime: Runtime) -> None:
        self.progress, self.run, self.runtime, self.version = progress, current, runtime, current.step
        self.workers_changed()

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.progress.evaluated(step, metrics)

    def row(self, row: Mapping[str, float]) -> None:
        self.progress.row(row)
        self.version = int(row["step"]) + 1
        self.workers_changed()

    def workers_changed(self) -> None:
        self.run.write_workers([{**member, "version": self.version} for member in self.runtime.members()])


class Interrupts:
    """Ctrl-C and SIGTERM: while the loop runs, the first is honoured after the step, with a checkpoint.

    At any other time, and for the second, the process ends at once: checkpoints are whole or not there. It must not be
    an exception, which libraries written in C turn into errors of their own.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.patient = False

    def __enter__(self) -> "Interrupts":
        self.before = {number: signal.signal(number, self._handle) for number in EXIT_CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Inside the block somebody asks ``stop`` after every step."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False

    def stop(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None or not self.patient:
            os.write(2, b"\nended at once; what was saved stays good\n")
            os._exit(EXIT_CODES[signal.Signals(number)])
        self.signal = signal.Signals(number)
        # os.write, since the signal may have come in the middle of a print.
        os.write(2, b"\nfinishing this step, then saving; once more to end at once\n")


def write_pages(folder: Path) -> None:
    """What a person looks at after a run."""
    before_after(RunDir(folder).samples)
    write_report(folder)


def _say_finished(folder: Path, steps: int) -> int:
    print(f"{folder} is finished after {steps} steps; --steps N prolongs it, --fresh starts anew beside it")
    _say_results(folder)
    return 0


def _say_results(folder: Path) -> None:
    """The last lines: what came out, and where it is."""
    files = RunDir(folder)
    rows = read(files.metrics)
    before, after = rows[0].get("eval/reward/mean"), rows[-1].get("eval_final/reward/mean")
    if before is not None and after is not None:
        print(f"held-out reward {before:.3f} -> {after:.3f} after {len(rows)} steps and {rows[-1]['images']:,} images")
    print(f"report       {files.report}")
    print(f"pictures     {files.samples}")
    for newest in sorted(path.name for path in files.checkpoints.glob("step_*"))[-1:]:
        print(f"checkpoint   {files.checkpoints / newest}")
    print(f"to use it    rlalign export {folder} --to DIR, or rlalign sample {folder} --prompt TEXT")
