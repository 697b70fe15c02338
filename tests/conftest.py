"""One thread, no screen, no hub: set before anything imports torch or a hub library, and inherited by subprocesses."""

import os

import pytest

from tests.contracts import measured
from tests.reference import summary

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # threads are part of the numbers
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    summary.pytest_terminal_summary(terminalreporter)
    measured.pytest_terminal_summary(terminalreporter)
