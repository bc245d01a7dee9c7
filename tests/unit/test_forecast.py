"""What a plan foretells, against the artifact that the same inputs make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lopd_store
from lopd_store.errors import InputError
from lopd_store.forecast import Forecast
from tests.artifacts import random_pairs, save_rollouts
from tests.commands import run_command

COUNT = 120


@pytest.fixture(scope="module")
def options(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("rollouts") / "rollouts.parquet"
    rollouts = save_rollouts(path, random_pairs([(5 + row % 7, 20 + row % 40) for row in range(COUNT)]), logprob=-1.5)
    return {"teacher": teacher_dir, "rollouts": rollouts, "k_max": 16, "coverage": 0.9}


@pytest.fixture(scope="module")
def forecast(options: dict[str, Any]) -> Forecast:
    return lopd_store.estimate(probe=40, **options)


def test_what_there_is_to_score_is_counted(forecast: Forecast) -> None:
    positions = sum(20 + row % 40 for row in range(COUNT))
    assert (forecast.rollouts, forecast.skipped, forecast.positions) == (COUNT, 0, positions)
    assert forecast.tokens == positions + sum(5 + row % 7 for row in range(COUNT))
    assert forecast.probed_rollouts == 40 and 0 < forecast.probed_positions < positions
    assert forecast.hours == pytest.approx(forecast.tokens / forecast.tokens_per_second / 3600, abs=1e-3)


def test_the_size_and_the_mass_are_those_of_the_artifact(
    options: dict[str, Any], forecast: Forecast, tmp_path: Path
) -> None:
    artifact = lopd_store.build(**options, output=tmp_path / "a")
    (part,) = artifact.parts()
    assert part.topk is not None
    (choice,) = (choice for choice in forecast.choices if choice.k_max == 16)
    size = sum(file.size for entry in artifact.manifest.parts for file in entry.files.values())
    mass = -np.expm1(part.topk.tail_logprobs.astype(np.float64))
    assert choice.bytes == pytest.approx(size, rel=0.1)
    assert choice.bytes_per_position == pytest.approx(size / forecast.positions, rel=0.1)
    assert choice.mean_k == pytest.approx(float(part.topk.counts.mean()), rel=0.1)
    assert choice.mass == pytest.approx(float(mass.mean()), abs=0.02)
    assert choice.reached == pytest.approx(float((mass >= 0.9).mean()), abs=0.05)


def test_a_greater_k_costs_more_and_reaches_more(forecast: Forecast) -> None:
    assert [choice.k_max for choice in forecast.choices] == [2, 4, 8, 16, 32]
    for less, more in zip(forecast.choices, forecast.choices[1:], strict=False):
        assert less.mass <= more.mass and less.reached <= more.reached and less.mean_k <= more.mean_k


def test_a_probe_of_one_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="`probe` is out of range\n  expected  2 or more"):
        lopd_store.estimate(probe=1, **options)


def test_the_command_says_the_same_in_words_and_in_json(options: dict[str, Any]) -> None:
    words = ("plan", "--teacher", options["teacher"], "--rollouts", options["rollouts"], "--k-max", 16, "--probe", 8)
    said, told = run_command("lopd-store", *words), run_command("lopd-store", *words, "--json")
    assert (said.code, told.code) == (0, 0)
    assert "one worker" in said.stdout and "on the Hub" in said.stdout
    shown = [line.split()[0] for line in said.stdout.splitlines()[-5:]]
    assert shown == [str(choice["k_max"]) for choice in told.json["choices"]] == ["2", "4", "8", "16", "32"]


@pytest.mark.parametrize(("option", "value"), [("engine", "tensorrt"), ("dtype", "fp16"), ("on-bad-rollout", "ignore")])
def test_a_plan_takes_the_choices_of_a_build_and_no_other(options: dict[str, Any], option: str, value: str) -> None:
    words = ("plan", "--teacher", options["teacher"], "--rollouts", options["rollouts"], f"--{option}", value)
    ran = run_command("lopd-store", *words)
    assert ran.code == 2 and f"error: Invalid value for '--{option}': " in ran.stderr
