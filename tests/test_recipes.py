"""Every shipped run file is planned, on a machine that has neither its weights nor its GPUs."""

import pytest

from rlalign import cli
from rlalign.config import recipes


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_planned(name: str, capsys: pytest.CaptureFixture[str]):
    """Exit code 0, with the work of a step and how to divide machines; no network, nothing of size is loaded."""
    assert cli.run(["plan", name, "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    words = {line.split()[0] for line in out.splitlines() if line and not line.startswith(" ")}
    assert {"model", "prompts", "rewards", "step", "rollout", "update", "split"} <= words
