"""What a build audits on the way: SFT data under the teacher, rollouts under the reference policy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lopd_store
from lopd_store import gate, layout
from lopd_store import manifest as manifests
from lopd_store.audit import SFT_POSITIONS
from lopd_store.digest import digest_contents
from lopd_store.errors import InputError
from lopd_store.handout import Progress
from lopd_store.identity import identify
from lopd_store.manifest import Inputs
from lopd_store.reader import Artifact
from lopd_store.remembered import is_remembered
from lopd_store.rollouts import RolloutsFile, write_rollouts
from lopd_store.statistic import Statistic
from tests.artifacts import edit_manifest, random_pairs, save_rollouts
from tests.records import CHECKPOINT, SFT, policy


@pytest.fixture(scope="module")
def many_rollouts(student_dir: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough of the student's responses to audit."""
    return sample(student_dir, prompts_file, tmp_path_factory.mktemp("many") / "rollouts.parquet")


@pytest.fixture(scope="module")
def audited(
    teacher_dir: Path, student_dir: Path, many_rollouts: Path, sft_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """An artifact with both audits."""
    output = tmp_path_factory.mktemp("audited") / "artifact"
    return build(teacher_dir, many_rollouts, output, sft_data=sft_file, reference=student_dir)


def sample(model: Path, prompts: Path, output: Path, **options: Any) -> Path:
    options = {"max_response_tokens": 32, "samples_per_prompt": 8} | options
    return lopd_store.generate(model=model, prompts=prompts, output=output, **options).output


def build(teacher: Path, rollouts: Path, output: Path, **options: Any) -> Artifact:
    options = {"k_max": 40, "part_positions": 300} | options
    return lopd_store.build(teacher=teacher, rollouts=rollouts, output=output, **options)


def inputs_of(artifact: Artifact) -> Inputs:
    (inputs,) = artifact.manifest.inputs
    return inputs


def test_sft_data_is_audited_as_the_command_audits_it(audited: Artifact, teacher_dir: Path, sft_file: Path) -> None:
    alone = lopd_store.audit(model=teacher_dir, data=sft_file, positions=SFT_POSITIONS)
    kept = inputs_of(audited).sft_audit
    assert kept is not None and kept.found.sums() == alone.overall.sums()
    assert (kept.data, kept.temperature, kept.top_p) == (digest_contents(sft_file.read_bytes()).sha256, 1.0, 1.0)
    assert kept.found.verdict == "consistent" and inputs_of(audited).sft.data == kept.data


def test_rollouts_are_audited_nearly_as_with_the_whole_distribution(
    audited: Artifact, student_dir: Path, many_rollouts: Path
) -> None:
    whole = lopd_store.audit(model=student_dir, data=many_rollouts).overall
    kept = inputs_of(audited).rollouts_audit
    assert kept is not None and kept.verdict == "consistent" == whole.verdict
    assert kept.positions == whole.positions == audited.manifest.counts.positions
    assert abs(kept.effect - whole.effect) < 0.02
    assert 0.7 * whole.variance < kept.variance < 1.03 * whole.variance  # what the tail would add is missing


def test_the_verifier_derives_the_audit_of_the_rollouts_itself(audited: Artifact, tmp_path: Path) -> None:
    assert len(audited.manifest.parts) > 1 and lopd_store.verify(audited.path).ok
    forged = lopd_store.subset(audited.path, output=tmp_path / "copy").path
    better = inputs_of(audited).rollouts_audit
    assert better is not None
    data = (forged / layout.MANIFEST).read_bytes()
    value = replace(better, score=better.score + 0.01).sums()
    (forged / layout.MANIFEST).write_bytes(edit_manifest(data, "inputs", 0, "rollouts_audit", value=value))
    (found,) = lopd_store.verify(forged).findings
    assert (found.code, found.where) == ("A069", "manifest.json")
    assert "score" in str(found.expected) and lopd_store.verify(forged, quick=True).ok
    opened = lopd_store.open(forged)
    assert not is_remembered(opened.fingerprint, opened.view)


def test_what_the_policy_did_not_sample_is_in_no_audit_of_its_rollouts(
    audited: Artifact, teacher_dir: Path, student_dir: Path, many_rollouts: Path, tmp_path: Path
) -> None:
    file = RolloutsFile(many_rollouts)
    rows = [
        {
            "prompt_ids": one.prompt_ids,
            "response_ids": [*one.response_ids, *range(20, 36)],
            "loss_mask": [True] * len(one.response_ids) + [False] * 16,
            "logprobs": None,
        }
        for one in file.read()
    ]
    write_rollouts(tmp_path / "with-tools.parquet", rows, file.record)
    found = build(teacher_dir, tmp_path / "with-tools.parquet", tmp_path / "a", reference=student_dir)
    kept, plain = inputs_of(found).rollouts_audit, inputs_of(audited).rollouts_audit
    assert kept is not None and plain is not None and kept.verdict == "consistent"
    assert kept.positions == plain.positions == found.manifest.counts.positions - 16 * len(rows)
    assert kept.score == pytest.approx(plain.score, abs=0.5)
    assert lopd_store.verify(found.path).ok


def test_the_teacher_can_be_asked_again_about_the_sft_data(
    audited: Artifact, teacher_dir: Path, sft_file: Path, tmp_path: Path
) -> None:
    kept = inputs_of(audited).sft_audit
    assert kept is not None
    report = lopd_store.verify(audited.path, teacher=teacher_dir, sft_data=sft_file)
    assert report.ok and report.sft_audit is not None and report.sft_audit.found.is_near(kept.found)
    forged = lopd_store.subset(audited.path, output=tmp_path / "copy").path
    data = (forged / layout.MANIFEST).read_bytes()
    better = replace(kept, found=replace(kept.found, score=kept.found.score + 0.02 * kept.found.positions))
    (forged / layout.MANIFEST).write_bytes(edit_manifest(data, "inputs", 0, "sft_audit", value=better.to_json()))
    assert lopd_store.verify(forged).ok
    (found,) = lopd_store.verify(forged, teacher=teacher_dir, sft_data=sft_file).findings
    assert (found.code, found.message) == ("A091", "the teacher finds something else in the SFT data")


def test_in_several_domains_every_audit_of_the_file_under_the_teacher_is_made_again(
    audited: Artifact, teacher_dir: Path, sft_file: Path, tmp_path: Path
) -> None:
    made = lopd_store.combine(("math", audited.path), ("code", audited.path), output=tmp_path / "both")
    assert lopd_store.verify(made.path, teacher=teacher_dir, sft_data=sft_file).ok
    kept = made.manifest.inputs[1].sft_audit
    assert kept is not None
    spoiled = replace(kept, found=replace(kept.found, score=kept.found.score + kept.found.positions))
    path = made.path / layout.MANIFEST
    path.write_bytes(edit_manifest(path.read_bytes(), "inputs", 1, "sft_audit", value=spoiled.to_json()))
    (found,) = lopd_store.verify(made.path, teacher=teacher_dir, sft_data=sft_file).findings
    assert (found.code, found.where) == ("A091", "manifest.json: inputs[1].sft_audit")


def test_only_the_audited_file_and_the_teacher_itself_can_be_asked(
    audited: Artifact, teacher_dir: Path, student_dir: Path, sft_file: Path, many_rollouts: Path, sealed: Path
) -> None:
    with pytest.raises(InputError, match="is not the SFT data that was audited"):
        lopd_store.verify(audited.path, teacher=teacher_dir, sft_data=many_rollouts)
    with pytest.raises(InputError, match="is not the teacher of this artifact"):
        lopd_store.verify(audited.path, teacher=student_dir, sft_data=sft_file)
    with pytest.raises(InputError, match="this artifact has no audit of SFT data"):
        lopd_store.verify(sealed, teacher=teacher_dir, sft_data=sft_file)
    with pytest.raises(InputError, match="`teacher` goes with `rescore` or `sft_data`"):
        lopd_store.verify(audited.path, sft_data=sft_file)


def test_a_copy_of_some_parts_keeps_the_audit_without_deriving_it(audited: Artifact, tmp_path: Path) -> None:
    copy = lopd_store.subset(audited.path, output=tmp_path / "copy", parts=range(1))
    assert inputs_of(copy) == inputs_of(audited) and lopd_store.verify(copy.path).ok


def test_rollouts_of_another_temperature_are_audited_at_it(
    teacher_dir: Path, student_dir: Path, prompts_file: Path, tmp_path: Path
) -> None:
    rollouts = sample(student_dir, prompts_file, tmp_path / "cool.parquet", temperature=0.6)
    artifact = build(teacher_dir, rollouts, tmp_path / "a", reference=student_dir)
    kept = inputs_of(artifact).rollouts_audit
    assert kept is not None and kept.verdict == "consistent" and kept.positions <= artifact.manifest.counts.positions
    warm = replace(RolloutsFile(rollouts).record or policy(identify(student_dir)), sampling=CHECKPOINT_SAMPLING)
    RolloutsFile(rollouts).copy(tmp_path / "warm.parquet", warm)
    accused = build(teacher_dir, tmp_path / "warm.parquet", tmp_path / "b", reference=student_dir)
    found = inputs_of(accused).rollouts_audit
    assert found is not None and found.verdict == "inconsistent" and found.effect > 0.1
    assert "rollouts" in [one.subject for one in gate.judge([inputs_of(accused)]).findings]


CHECKPOINT_SAMPLING = policy(CHECKPOINT.model).sampling  # at temperature 1


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.9}])
def test_what_stored_values_cannot_audit_is_not_audited(
    teacher_dir: Path, student_dir: Path, prompts_file: Path, tmp_path: Path, options: dict[str, float]
) -> None:
    rollouts = sample(student_dir, prompts_file, tmp_path / "r.parquet", samples_per_prompt=1, **options)
    artifact = build(teacher_dir, rollouts, tmp_path / "a", reference=student_dir)
    assert inputs_of(artifact).rollouts_audit is None and lopd_store.verify(artifact.path).ok


def test_without_the_reference_policy_rollouts_are_not_audited(
    teacher_dir: Path, rollouts_file: Path, tmp_path: Path
) -> None:
    inputs = inputs_of(build(teacher_dir, rollouts_file, tmp_path / "a"))
    assert (inputs.sft_audit, inputs.rollouts_audit) == (None, None)


def test_sft_data_of_another_model_than_it_names_is_found_out(
    teacher_dir: Path, other_teacher_dir: Path, prompts_file: Path, rollouts_file: Path, tmp_path: Path
) -> None:
    """The record says the teacher, the text says another: identities agree, and the gate refuses all the same."""
    theirs = sample(other_teacher_dir, prompts_file, tmp_path / "theirs.parquet")
    RolloutsFile(theirs).copy(tmp_path / "sft.parquet", policy(identify(teacher_dir)))
    artifact = build(teacher_dir, rollouts_file, tmp_path / "a", sft_data=tmp_path / "sft.parquet")
    verdict = gate.judge([inputs_of(artifact)])
    assert [(one.subject, one.state) for one in verdict.findings] == [("SFT data", "inconsistent")]
    assert "**Warning:** the audit finds" in (artifact.path / layout.CARD).read_text()


def test_sft_data_that_the_policy_was_not_trained_on_is_refused(
    teacher_dir: Path, student_dir: Path, sft_file: Path, tmp_path: Path
) -> None:
    student, teacher = identify(student_dir), identify(teacher_dir)
    carried = policy(student, replace(CHECKPOINT, model=student, sft=(replace(SFT, teacher=teacher),)))
    rollouts = save_rollouts(tmp_path / "r.parquet", random_pairs([(3, 4)]), record=carried)
    with pytest.raises(InputError, match="is not the SFT data of the reference policy"):
        build(teacher_dir, rollouts, tmp_path / "a", sft_data=sft_file)


def test_any_number_of_workers_and_any_interruption_keep_the_same_bytes(
    audited: Artifact, teacher_dir: Path, student_dir: Path, many_rollouts: Path, sft_file: Path, tmp_path: Path
) -> None:
    heard = list[int]()

    def stop(progress: Progress) -> None:
        if progress.positions:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"sft_data": sft_file, "reference": student_dir}
    options["on_audited"] = lambda done, total: heard.append(done)
    with pytest.raises(KeyboardInterrupt):
        build(teacher_dir, many_rollouts, tmp_path / "a", on_progress=stop, **options)
    assert heard[-1] == int(RolloutsFile(sft_file).response_lengths.sum())
    heard.clear()
    again = build(teacher_dir, many_rollouts, tmp_path / "a", workers=2, **options)
    assert heard == [] and again.fingerprint == audited.fingerprint
    assert sorted(path.name for path in again.path.iterdir()) == ["README.md", "build.json", "manifest.json", "parts"]


def test_another_file_of_sft_data_is_another_plan(
    teacher_dir: Path, rollouts_file: Path, sft_file: Path, tmp_path: Path
) -> None:
    def stop(progress: Progress) -> None:
        if len(list((layout.building_directory(tmp_path / "a") / "done").iterdir())) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(teacher_dir, rollouts_file, tmp_path / "a", sft=sft_file, part_positions=100, on_progress=stop)
    with pytest.raises(InputError, match=r"was begun with another plan(?s:.)*`sft_data`"):
        build(teacher_dir, rollouts_file, tmp_path / "a", sft=sft_file, sft_data=sft_file, part_positions=100)


def test_audits_come_back_from_the_manifest(audited: Artifact) -> None:
    data = (audited.path / layout.MANIFEST).read_bytes()
    stored = json.loads(data)["inputs"][0]
    assert set(stored["rollouts_audit"]) == {"positions", "outside", "score", "variance"}
    assert manifests.render(manifests.parse(data)) == data
    assert isinstance(inputs_of(audited).rollouts_audit, Statistic)
