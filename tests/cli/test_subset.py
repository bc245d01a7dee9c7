"""`lopd-store subset`, `build --no-text` and `verify --rescore` as a user runs them."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import lopd_store
from tests.commands import run_command


def test_a_sampled_only_copy_is_verified_inspected_and_says_that_it_is_partial(sealed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sampled"
    made = run_command("lopd-store", "subset", sealed, "--only", "sampled", "--output", copy)
    assert made.code == 0 and ", tokens files" in made.stdout
    assert not list(copy.glob("parts/*.topk.*")) and not list(copy.glob("parts/*.parquet"))
    verified = run_command("lopd-store", "verify", copy)
    assert verified.code == 0 and ", a partial copy, sha256:" in verified.stdout
    assert run_command("lopd-store", "inspect", copy, "--json").json["view"]["kinds"] == ["tokens"]


def test_a_range_of_parts_can_be_copied(sealed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "first"
    ran = run_command("lopd-store", "subset", sealed, "--parts", "0:2", "--output", copy, "--json")
    assert ran.code == 0 and ran.json["view"]["parts"] == [0, 2]
    assert {file.name[:5] for file in (copy / "parts").iterdir()} == {"00000", "00001"}


@pytest.mark.parametrize(("parts", "said"), [("2", "is not a range of parts"), ("0:99", "`parts` is out of range")])
def test_a_range_that_is_none_is_refused_and_leaves_nothing(
    sealed: Path, tmp_path: Path, parts: str, said: str
) -> None:
    ran = run_command("lopd-store", "subset", sealed, "--parts", parts, "--output", tmp_path / "copy")
    assert ran.code == 2 and said in ran.stderr
    assert not list(tmp_path.glob("copy*"))


def test_an_artifact_without_text_has_none_and_verifies(teacher_dir: Path, rollouts_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "redacted"
    options = ("--teacher", teacher_dir, "--rollouts", rollouts_file, "--output", output, "--no-text", "--workers", 1)
    built = run_command("lopd-store", "build", *options, "--json")
    assert built.code == 0 and built.json["text"] is False
    names = pq.read_schema(output / "parts" / "00000.rollouts.parquet").names
    assert "prompt_length" in names and not {"prompt", "response"} & set(names)
    assert lopd_store.verify(output).ok


def test_rescoring_names_how_many_rollouts_were_scored_again(sealed: Path, teacher_dir: Path) -> None:
    ran = run_command("lopd-store", "verify", sealed, "--rescore", 2, "--teacher", teacher_dir)
    assert ran.code == 0 and ", 2 rollouts scored again, sha256:" in ran.stdout
