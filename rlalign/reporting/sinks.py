"""Other places for the rows of metrics.jsonl: TensorBoard, Weights & Biases when asked for, Prometheus through Ray."""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlalign.files import in_words
from rlalign.reporting.metrics import Sink
from rlalign.rundir import Run
from rlalign.runtime.telemetry import telemetry
from rlalign.settings import Settings


class ReportingConfig(Settings):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard events into RUN/events."""
    wandb: str | None = None
    """Weights & Biases project to send to; needs the extra rlalign[wandb]."""


class TensorBoard:
    """Event files; what an earlier attempt wrote from step ``start`` on is hidden."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second that no other command should pay

        with in_words(f"write TensorBoard events into {folder}"):
            self.writer = SummaryWriter(str(folder), purge_step=start)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A W&B run; the same ``run_id`` goes on where it was."""

    def __init__(self, project: str, run_id: str, config: Mapping[str, Any], folder: Path) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("reporting.wandb is set, but wandb is not installed: pip install 'rlalign[wandb]'")
        import wandb  # pyright: ignore[reportMissingImports]

        self.run: Any = wandb.init(
            project=project, id=run_id, name=folder.name, resume="allow", config=dict(config), dir=str(folder)
        )

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=step)

    def close(self) -> None:
        self.run.finish()


def make_sinks(settings: ReportingConfig, run: Run, config: Mapping[str, Any]) -> list[Sink]:
    """The sinks that were asked for, going on where the run goes on; Prometheus' only where Ray runs."""
    sinks: list[Sink] = []
    if settings.wandb is not None:
        started = re.sub(r"\D", "", run.info.created)
        sinks.append(Wandb(settings.wandb, f"{run.files.path.name}-{started}", config, run.files.path))
    if settings.tensorboard:
        sinks.append(TensorBoard(run.files.events, run.step))
    if (config.get("runtime") or {}).get("kind") == "ray":
        sinks.append(telemetry(run.files.path.name))
    return sinks
