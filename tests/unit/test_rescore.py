"""Rescoring finds log-probs that are not the teacher's, which no digest can."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lopd_store
from lopd_store.errors import InputError
from lopd_store.rescore import rescore
from tests.artifacts import change, edit_manifest, read_first_part, replace_part

ALL = 100  # more than there are


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"coverage": 1.0, "k_max": 5}])
def test_an_honest_artifact_is_what_its_teacher_says(
    teacher_dir: Path, rollouts_path: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    artifact = lopd_store.build(
        teacher=teacher_dir,
        rollouts=rollouts_path,
        output=tmp_path / "artifact",
        **options,  # type: ignore[arg-type]
    )
    rescored = rescore(artifact, teacher=teacher_dir, count=ALL)
    assert rescored.findings == () and rescored.rollouts == tuple(range(len(artifact)))
    assert rescored.difference <= 1e-4


def test_a_sampled_logprob_that_is_not_the_teachers_is_found(artifact: Path, teacher_dir: Path) -> None:
    sampled = read_first_part(artifact).sampled_logprobs
    lower = np.flatnonzero(read_first_part(artifact).sampled_logprobs < -8)[0]  # outside the top-k, most likely
    replace_part(artifact, sampled_logprobs=change(sampled, lower, sampled[lower] - 1))
    report = lopd_store.verify(artifact, rescore=ALL, teacher=teacher_dir)
    assert [found.code for found in report.findings] == ["A090"]
    assert "the teacher says another log-prob than the stored one" in report.findings[0].message


def test_entries_of_another_teacher_are_found(
    teacher_dir: Path, other_teacher_dir: Path, rollouts_path: Path, artifact: Path, tmp_path: Path
) -> None:
    other = lopd_store.build(teacher=other_teacher_dir, rollouts=rollouts_path, output=tmp_path / "other", k_max=40)
    stolen = other.part(0).slice(0, 2)
    assert stolen.topk is not None
    replace_part(artifact, sampled_logprobs=stolen.sampled_logprobs, **vars(stolen.topk))
    assert lopd_store.verify(artifact).ok  # nothing in the bytes is wrong
    report = lopd_store.verify(artifact, rescore=ALL, teacher=teacher_dir)
    assert {found.code for found in report.findings} == {"A090"}
    assert report.rescored is not None and report.rescored.difference > 0.1


def test_a_few_rollouts_are_drawn_by_the_seed(sealed: Path, teacher_dir: Path) -> None:
    artifact = lopd_store.open(sealed)
    drawn = [rescore(artifact, teacher=teacher_dir, count=2, seed=seed).rollouts for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


def test_only_rollouts_of_a_partial_copy_are_scored_again(sealed: Path, teacher_dir: Path, tmp_path: Path) -> None:
    copy = lopd_store.subset(sealed, output=tmp_path / "copy", only="sampled", parts=range(2, 4))
    rescored = rescore(copy, teacher=teacher_dir, count=ALL)
    assert rescored.rollouts == (3, 4, 5) and not rescored.findings


def test_another_model_than_the_teacher_is_refused(sealed: Path, other_teacher_dir: Path) -> None:
    with pytest.raises(InputError, match="is not the teacher of this artifact"):
        lopd_store.verify(sealed, rescore=1, teacher=other_teacher_dir)


def test_a_broken_artifact_is_not_scored_again(artifact: Path, teacher_dir: Path) -> None:
    (artifact / "parts" / "00000.topk.zarr.zip").unlink()
    report = lopd_store.verify(artifact, rescore=1, teacher=teacher_dir)
    assert [found.code for found in report.findings] == ["A020"] and report.rescored is None


def test_rescoring_needs_a_teacher_and_a_teacher_rescoring(sealed: Path, teacher_dir: Path) -> None:
    with pytest.raises(InputError, match="`teacher` goes with `rescore` or `sft_data`"):
        lopd_store.verify(sealed, rescore=1)
    with pytest.raises(InputError, match="`teacher` goes with `rescore` or `sft_data`"):
        lopd_store.verify(sealed, teacher=teacher_dir)


@pytest.mark.parametrize(("change_by", "codes"), [(0.006, []), (1.0, ["A090"])])
def test_what_another_engine_scored_is_scored_again_by_the_embedded_one(
    teacher_dir: Path, rollouts_path: Path, tmp_path: Path, change_by: float, codes: list[str]
) -> None:
    path = lopd_store.build(teacher=teacher_dir, rollouts=rollouts_path, output=tmp_path / "artifact", exact=True).path
    sampled = read_first_part(path).sampled_logprobs
    lowest = int(np.argmin(sampled))  # outside the top-k
    replace_part(path, sampled_logprobs=change(sampled, lowest, sampled[lowest] - change_by))
    manifest = path / "manifest.json"
    manifest.write_bytes(edit_manifest(manifest.read_bytes(), "inputs", 0, "scoring", "engine", value="http"))
    report = lopd_store.verify(path, rescore=ALL, teacher=teacher_dir)
    assert [found.code for found in report.findings] == codes


def test_what_one_teacher_scored_in_two_ways_is_compared_in_each(
    sealed: Path, teacher_dir: Path, rollouts_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "halves"
    halves = lopd_store.build(
        teacher=teacher_dir, rollouts=rollouts_path, k_max=40, dtype="bfloat16", max_noise=10, output=output
    )
    made = lopd_store.combine(("math", sealed), ("code", halves.path), output=tmp_path / "both")
    rescored = rescore(made, teacher=teacher_dir, count=ALL)
    assert rescored.rollouts == tuple(range(len(made))) and rescored.findings == ()
    assert len({one.scoring for one in made.manifest.inputs}) == 2
