"""`lopd-store audit` as a user runs it: a verdict in words, the numbers in JSON, an exit code for scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import run_command


def test_text_of_the_model_is_consistent_and_leaves_with_zero(teacher_dir: Path, sft_file: Path) -> None:
    ran = run_command("lopd-store", "audit", "--model", teacher_dir, "--data", sft_file)
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout.startswith("verdict    consistent with samples of teacher\n")
    assert "nat per token  (95 %: " in ran.stdout and "temperature 1, top-p 1" in ran.stdout


def test_text_of_another_model_leaves_with_one(student_dir: Path, sft_file: Path) -> None:
    ran = run_command("lopd-store", "audit", "--model", student_dir, "--data", sft_file, "--json")
    assert ran.code == 1 and ran.json["verdict"] == "inconsistent"
    assert ran.json["z"] < -4 and ran.json["interval"][1] < 0 and len(ran.json["most_unusual"]) == 10


def test_too_little_text_leaves_with_three(teacher_dir: Path, sft_file: Path) -> None:
    ran = run_command("lopd-store", "audit", "--model", teacher_dir, "--data", sft_file, "--limit", 1)
    assert ran.code == 3 and ran.stdout.startswith("verdict    too little to compare with samples of teacher\n")


@pytest.mark.parametrize(
    ("option", "value", "expected"), [("top_p", 0, "above 0, at most 1"), ("temperature", -1, "0 to 100")]
)
def test_a_sampling_parameter_out_of_range_is_a_usage_error(
    teacher_dir: Path, sft_file: Path, option: str, value: float, expected: str
) -> None:
    flag = f"--{option.replace('_', '-')}"
    ran = run_command("lopd-store", "audit", "--model", teacher_dir, "--data", sft_file, flag, value)
    assert ran.code == 2 and ran.stderr.startswith(f"error: `{option}` is out of range\n  expected  {expected}\n")
