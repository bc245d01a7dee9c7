"""Fixtures: the pipeline once per session, with tiny models. SFT data -> rollouts -> artifact.

What lasts for the session is for reading; `artifact` is a copy that a test may break.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.tiny import PROMPTS

PART_POSITIONS = 100  # several parts


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts, one per line."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture(scope="session")
def sft_file(teacher_dir: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT data: the teacher's responses."""
    return _generate(teacher_dir, prompts_file, tmp_path_factory.mktemp("sft") / "sft.parquet")


@pytest.fixture(scope="session")
def rollouts_file(student_dir: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's responses. No checkpoint record says how the student was made."""
    return _generate(student_dir, prompts_file, tmp_path_factory.mktemp("rollouts") / "rollouts.parquet")


@pytest.fixture(scope="session")
def sealed(teacher_dir: Path, rollouts_file: Path, sft_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of several parts, with SFT provenance; not to be changed."""
    import lopd_store

    output = tmp_path_factory.mktemp("artifacts") / "sealed"
    return lopd_store.build(
        teacher=teacher_dir, rollouts=rollouts_file, sft=sft_file, output=output, part_positions=PART_POSITIONS
    ).path


@pytest.fixture(scope="session")
def unknown(teacher_dir: Path, rollouts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact without SFT provenance, in one part; not to be changed."""
    import lopd_store

    output = tmp_path_factory.mktemp("artifacts") / "unknown"
    return lopd_store.build(teacher=teacher_dir, rollouts=rollouts_file, output=output).path


@pytest.fixture
def artifact(sealed: Path, tmp_path: Path) -> Path:
    """A copy of the artifact, to be broken."""
    return Path(shutil.copytree(sealed, tmp_path / "artifact"))


def _generate(model: Path, prompts: Path, output: Path) -> Path:
    import lopd_store

    return lopd_store.generate(
        model=model, prompts=prompts, output=output, max_response_tokens=24, samples_per_prompt=3
    ).output
