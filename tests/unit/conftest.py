"""One artifact of several parts for every test of this folder; a test that changes it takes its own copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lopd_store
from tests.artifacts import random_pairs, save_rollouts

LENGTHS = [(3, 9), (12, 1), (1, 20), (7, 0), (2, 14), (30, 6)]
PART_POSITIONS = 10  # parts of rows 0 to 1, 2, 3 to 4, and 5


@pytest.fixture(scope="session")
def rollouts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of mixed lengths, one without a response, with reference log-probs."""
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.parquet"
    return save_rollouts(path, random_pairs(LENGTHS), logprob=-1.5)


@pytest.fixture(scope="session")
def sealed(teacher_dir: Path, rollouts_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact artifact of four parts; not to be changed."""
    output = tmp_path_factory.mktemp("artifacts") / "artifact"
    return lopd_store.build(
        teacher=teacher_dir, rollouts=rollouts_path, output=output, k_max=40, part_positions=PART_POSITIONS
    ).path


@pytest.fixture
def artifact(sealed: Path, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may change."""
    return Path(shutil.copytree(sealed, tmp_path / "artifact"))
