"""The selection `teacher+reference`: what both models find likely, with the log-probs of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lopd_store
from lopd_store.errors import InputError
from lopd_store.reader import Artifact
from lopd_store.rollouts import Rollout, RolloutsFile
from tests.artifacts import random_pairs, save_rollouts
from tests.unit.dense import DenseTeacher, adaptive_k, best, tail

K_MAX, COVERAGE, VOCAB_SIZE = 6, 0.8, 300
TOLERANCE = 2e-4  # float32 against float64


@pytest.fixture(scope="module")
def built(
    teacher_dir: Path, student_dir: Path, rollouts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """An exact artifact of the student's rollouts with the student's own top-k in it."""
    return lopd_store.build(
        teacher=teacher_dir,
        reference=student_dir,
        rollouts=rollouts_file,
        output=tmp_path_factory.mktemp("artifacts") / "union",
        k_max=K_MAX,
        coverage=COVERAGE,
        exact=True,
    )


@pytest.fixture(scope="module")
def rollouts(rollouts_file: Path) -> list[Rollout]:
    return RolloutsFile(rollouts_file).read()[:6]


def kept(logprobs: np.ndarray) -> list[int]:
    k = adaptive_k(logprobs, k_min=1, k_max=K_MAX, coverage=COVERAGE, vocab_size=VOCAB_SIZE)
    return best(logprobs, k, VOCAB_SIZE)


def test_the_entries_are_the_union_of_both_models_top_k(
    built: Artifact, rollouts: list[Rollout], teacher_dir: Path, student_dir: Path
) -> None:
    teacher, reference = DenseTeacher(teacher_dir), DenseTeacher(student_dir)
    sizes = set()
    for index, one in enumerate(rollouts):
        stored = built.rollout(index).topk
        assert stored is not None
        for position, (of_teacher, of_reference) in enumerate(
            zip(teacher.logprobs(one), reference.logprobs(one), strict=True)
        ):
            row = stored.slice(position, position + 1)
            wanted = set(kept(of_teacher)) | set(kept(of_reference))
            sizes.add(len(wanted))
            assert row.ids.tolist() == sorted(wanted, key=lambda id: -of_teacher[id])
            np.testing.assert_allclose(row.logprobs, of_teacher[row.ids], atol=TOLERANCE)
            assert row.reference_logprobs is not None and row.reference_tail_logprobs is not None
            np.testing.assert_allclose(row.reference_logprobs, of_reference[row.ids], atol=TOLERANCE)
            assert row.tail_logprobs[0] == pytest.approx(tail(of_teacher, list(wanted)), abs=TOLERANCE)
            assert row.reference_tail_logprobs[0] == pytest.approx(tail(of_reference, list(wanted)), abs=TOLERANCE)
    assert max(sizes) > K_MAX  # the two models disagree


def test_the_artifact_verifies_and_says_how_its_entries_were_selected(built: Artifact) -> None:
    assert lopd_store.verify(built.path).findings == ()
    assert built.manifest.encoding.rule == "teacher+reference"


def test_reference_logprobs_that_the_rollouts_lack_come_from_the_model(
    teacher_dir: Path, student_dir: Path, rollouts_file: Path, tmp_path: Path
) -> None:
    source = RolloutsFile(rollouts_file)
    rows = source.read()[:3]
    path = save_rollouts(
        tmp_path / "rollouts.parquet",
        [(one.prompt_ids.tolist(), one.response_ids.tolist()) for one in rows],
        record=source.record,
    )
    artifact = lopd_store.build(
        teacher=teacher_dir, reference=student_dir, rollouts=path, output=tmp_path / "artifact", exact=True
    )
    assert artifact.manifest.reference_logprobs
    for index, one in enumerate(rows):
        stored = artifact.rollout(index).reference_logprobs
        assert stored is not None and one.logprobs is not None
        np.testing.assert_allclose(stored, one.logprobs, atol=TOLERANCE)


def test_another_model_than_the_sampling_policy_is_refused(
    teacher_dir: Path, other_teacher_dir: Path, rollouts_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is not the policy that sampled the rollouts"):
        lopd_store.build(
            teacher=teacher_dir, reference=other_teacher_dir, rollouts=rollouts_file, output=tmp_path / "artifact"
        )
    assert not list(tmp_path.iterdir())


def test_rollouts_of_nobody_knows_whom_have_no_reference_policy(
    teacher_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    path = save_rollouts(tmp_path / "rollouts.parquet", random_pairs([(3, 4)]))
    with pytest.raises(InputError, match="does not say which policy sampled it"):
        lopd_store.build(teacher=teacher_dir, reference=student_dir, rollouts=path, output=tmp_path / "artifact")
