"""The pipeline once, with tiny models: SFT data -> reference policy -> rollouts -> artifact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import lopd_store
import lopd_train
from lopd_train import TrainConfig
from tests.tiny import PROMPTS

CONFIG = replace(
    lopd_train.OPD, steps=6, batch_rollouts=5, learning_rate=1e-3, eval_fraction=0.2, eval_every=2, device="cpu"
)


@pytest.fixture(scope="session")
def config() -> TrainConfig:
    """Six steps with everything switched on."""
    return CONFIG


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture(scope="session")
def sft_data(teacher_dir: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Responses of the teacher."""
    return sample(teacher_dir, prompts, tmp_path_factory.mktemp("sft-data") / "sft.parquet")


@pytest.fixture(scope="session")
def reference(student_dir: Path, sft_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student after SFT: the reference policy, and where training from the artifact starts."""
    output = tmp_path_factory.mktemp("models") / "reference"
    return lopd_train.train_sft(model=student_dir, data=sft_data, output=output, config=CONFIG).output


@pytest.fixture(scope="session")
def rollouts(reference: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Responses of the reference policy."""
    return sample(reference, prompts, tmp_path_factory.mktemp("rollouts") / "rollouts.parquet")


@pytest.fixture(scope="session")
def artifact(teacher_dir: Path, rollouts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rollouts scored by the teacher."""
    return build(teacher_dir, rollouts, tmp_path_factory.mktemp("artifacts") / "artifact")


def sample(model: Path, prompts: Path, output: Path) -> Path:
    """Four responses to each prompt, of up to 20 tokens."""
    lopd_store.generate(model=model, prompts=prompts, output=output, max_response_tokens=20, samples_per_prompt=4)
    return output


def build(teacher: Path, rollouts: Path, output: Path) -> Path:
    """An artifact of several parts."""
    return lopd_store.build(teacher=teacher, rollouts=rollouts, output=output, workers=1, part_positions=100).path
