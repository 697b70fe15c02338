"""The benchmark runs and says what it promises; its numbers on a network of no size mean nothing."""

import json
import sys
from pathlib import Path

import pytest

from rlalign.plugins import module_from_file

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_json_is_one_line_of_consistent_numbers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    module_from_file(FOLDER / "retain.py").main(["--tiny", "--rounds", "1", "--rows", "4", "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["update_speedup"] == pytest.approx(result["replay_update_s"] / result["retain_update_s"])
    assert result["rows_per_pass"] == 4 and result["rounds"] == 1 and result["total_speedup"] > 0
