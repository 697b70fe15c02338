"""What a run that starts its own Ray leaves on this machine."""

import os
from pathlib import Path

from rlalign.runtime.cluster import KEPT_SESSIONS, sweep

NOBODY = 2**30  # no process has such a number


def test_folders_of_old_sessions_go_but_the_newest_and_those_in_use_stay(tmp_path: Path) -> None:
    oldest = tmp_path / f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    others = [tmp_path / f"session_2026-02-{day:02}_00-00-00_000000_{NOBODY}" for day in range(1, KEPT_SESSIONS + 3)]
    for folder in (oldest, *others):
        (folder / "logs").mkdir(parents=True)
    (tmp_path / "session_latest").symlink_to(others[-1])
    (tmp_path / "ray_current_cluster").touch()
    sweep(tmp_path)
    kept = {oldest.name, "session_latest", "ray_current_cluster", *(folder.name for folder in others[2:])}
    assert {path.name for path in tmp_path.iterdir()} == kept
