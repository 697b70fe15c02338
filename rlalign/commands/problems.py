"""What the user can put right becomes one sentence; what only we can keeps its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rlalign

OURS = (Path(rlalign.__file__).parent, Path(rlalign.__file__).parents[1] / "rewards")


class BadInput(Exception):
    """One sentence for the person at the keyboard; exit code 2."""


@contextmanager
def in_preparation() -> Iterator[None]:
    """Reading, checking, loading and building: a ValueError that our own code raised is the user's to put right."""
    import torch

    from rlalign.runtime.pool import WorkerFailure

    try:
        yield
    except OSError as error:
        raise BadInput(_refused(error)) from error
    except WorkerFailure as error:
        raise BadInput(_one_line(error)) from error
    except torch.OutOfMemoryError as error:
        raise BadInput(
            "the GPU has no room for the model; `rlalign plan` counts what it takes and names settings of model.memory "
            "that make it fit"
        ) from error
    except ValueError as error:
        if not _raised_by_us(error):
            raise
        raise BadInput(_one_line(error)) from error


@contextmanager
def in_training() -> Iterator[None]:
    """While the loop runs: a reward's failure, diverged weights, and what the disk or the GPU refuses."""
    import torch

    from rlalign.models.base import Unusable
    from rlalign.runtime.pool import WorkerFailure
    from rlalign.scoring import RewardError
    from rlalign.workers.canary import Mismatch
    from rlalign.workers.learner import Diverged

    try:
        yield
    except (RewardError, WorkerFailure, Mismatch, Unusable) as error:
        raise BadInput(_one_line(error)) from error
    except Diverged as error:
        raise BadInput(f"{_one_line(error)}; go on from the last checkpoint with a lower optimizer.lr") from error
    except torch.OutOfMemoryError as error:
        raise BadInput("the GPU is out of memory; lower rollout.micro_batch") from error
    except OSError as error:
        raise BadInput(_refused(error)) from error
    except ValueError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise BadInput(_one_line(error)) from error


def _refused(error: OSError) -> str:
    """What a disk, or the network, does not let us do."""
    if error.strerror is None:
        return _one_line(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def _raised_by_us(error: BaseException) -> bool:
    elsewhere = getattr(error, "raised_in", None)  # a worker process, whose traceback stays there
    if elsewhere is not None:
        return any(Path(elsewhere).is_relative_to(home) for home in OURS)
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and any(Path(frame.tb_frame.f_code.co_filename).is_relative_to(home) for home in OURS)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
