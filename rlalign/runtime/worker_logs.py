"""What workers say, as RUN/logs/<worker>.jsonl: one JSON object a line, on whatever machine the worker is.

install(run / "logs", "sampler-3")   # at the start of a worker's process
at_step(12)                          # from now on lines of this thread say so
"""

import json
import logging
import os
import platform
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

MOST_BYTES = 4 * 2**20
"""Of one file; the one before it is kept as <worker>.jsonl.1."""
LOGGERS = ("rlalign", "rlalign_rewards", "py.warnings")

step_now: ContextVar[int | None] = ContextVar("step_now", default=None)


def install(folder: Path, worker: str, most_bytes: int = MOST_BYTES) -> None:
    """Sends our loggers and Python's warnings there, from INFO on; warnings and worse also to standard error.

    Where the folder cannot be written, as on a machine without the shared disk, all goes to standard error.
    """
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter(f"%(levelname)s: {worker}: %(message)s"))
    handlers: list[logging.Handler] = [console]
    refusal = None
    try:
        handlers.append(_file(folder, worker, most_bytes))
        console.setLevel(logging.WARNING)
    except OSError as error:
        refusal = f"cannot write logs into {folder} ({error.strerror or error}): they go to standard error"
    logging.captureWarnings(True)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for old in {handler for logger in loggers for handler in logger.handlers}:
        old.close()
    for logger in loggers:
        logger.handlers, logger.propagate = [*handlers], False
        logger.setLevel(logging.INFO)
    if refusal is not None:
        logging.getLogger(__name__).warning(refusal)
    logging.getLogger(__name__).info("process started")


def at_step(step: int | None) -> None:
    """The step that this thread works on."""
    step_now.set(step)


class JsonLines(logging.Formatter):
    """time, level, worker, pid, node, step if known, message, and the traceback of an exception."""

    def __init__(self, worker: str) -> None:
        super().__init__()
        self.worker = worker

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "worker": self.worker,
            "pid": os.getpid(),
            "node": platform.node(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (step := getattr(record, "step", step_now.get())) is not None:
            line["step"] = step
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


def _file(folder: Path, worker: str, most_bytes: int) -> logging.Handler:
    """Opened at once, so that a disk that refuses is known now; no run's folder is made up where there is none."""
    folder.mkdir(exist_ok=True)
    handler = RotatingFileHandler(folder / f"{worker}.jsonl", maxBytes=most_bytes, backupCount=1, encoding="utf-8")
    handler.setFormatter(JsonLines(worker))
    return handler
