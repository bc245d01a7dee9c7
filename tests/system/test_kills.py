"""Builds killed at fifty random moments, each of which ends as the same artifact as one that nobody disturbed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.artifacts import random_pairs, save_rollouts

KILLS = 50


@pytest.mark.system
def test_builds_killed_at_fifty_random_moments_end_as_the_artifact_of_one_that_was_not(
    teacher_dir: Path, tmp_path: Path
) -> None:
    rollouts = save_rollouts(tmp_path / "r.parquet", random_pairs([(3, 9)] * 8), logprob=-1.5)  # eight parts
    driver: list[str | Path] = [sys.executable, "-m", "tests.kills", teacher_dir, rollouts, tmp_path, str(KILLS), "0"]
    done = subprocess.run(driver, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["killed"] == KILLS and found["resumed"] > KILLS // 2
    assert set(found["sealed"]) == {found["undisturbed"]}
