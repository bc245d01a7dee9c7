"""Artifacts to export: of the pipeline, and one with everything that a format may stumble over."""

from __future__ import annotations

from pathlib import Path

import pytest

import lopd_store
from lopd_store.rollouts import write_rollouts
from tests.artifacts import random_pairs

LENGTHS = [(3, 9), (12, 1), (1, 20), (7, 0), (2, 14), (30, 6), (5, 5)]  # of prompts and responses
WITHOUT_RESPONSE, MASKED, HALF_MASKED = 3, 4, 5  # rollouts: nothing to learn from the first two
KEPT = [number for number in range(len(LENGTHS)) if number not in (WITHOUT_RESPONSE, MASKED)]
PART_POSITIONS = 20


@pytest.fixture(scope="session")
def mixed(teacher_dir: Path, sft_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exact log-probs in several parts: loss masks with zeros, no response, reference log-probs; not to be changed."""
    here = tmp_path_factory.mktemp("mixed")
    rows = [
        {
            "prompt_ids": prompt,
            "response_ids": response,
            "loss_mask": [
                number != MASKED and (number != HALF_MASKED or place % 2 == 0) for place in range(len(response))
            ],
            "logprobs": [-0.5 - place / 8 for place in range(len(response))],
            "finish_reason": "length",
        }
        for number, (prompt, response) in enumerate(random_pairs(LENGTHS))
    ]
    write_rollouts(here / "rollouts.parquet", rows, None)
    return lopd_store.build(
        teacher=teacher_dir,
        rollouts=here / "rollouts.parquet",
        sft=sft_file,
        output=here / "artifact",
        exact=True,
        k_max=12,
        part_positions=PART_POSITIONS,
    ).path


@pytest.fixture(scope="session")
def inconsistent(
    other_teacher_dir: Path, rollouts_file: Path, sft_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Rollouts scored by another teacher than the one of the SFT data; not to be changed."""
    output = tmp_path_factory.mktemp("inconsistent") / "artifact"
    return lopd_store.build(teacher=other_teacher_dir, rollouts=rollouts_file, sft=sft_file, output=output).path
