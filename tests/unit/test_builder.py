"""Building: the same inputs make the same bytes, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import lopd_store
from lopd_store import layout, strictjson
from lopd_store.digest import digest_contents, digest_file, digest_json
from lopd_store.errors import ArtifactError, ConsistencyError, DataError, InputError
from lopd_store.handout import Progress
from lopd_store.identity import ModelIdentity, identify
from lopd_store.models import PROVENANCE_FILE, find, load_tokenizer
from lopd_store.provenance import UNKNOWN_SFT, CheckpointRecord, RolloutsRecord
from lopd_store.reader import Artifact
from lopd_store.rollouts import RolloutsFile
from tests.artifacts import random_pairs, read_first_part, save_rollouts
from tests.records import CHECKPOINT, ROLLOUTS, SFT, SFT_OF_CODE, SFT_OF_MATH, policy
from tests.tiny import save_tiny_model, swap_ids
from tests.unit.conftest import LENGTHS, PART_POSITIONS
from tests.unit.dense import DenseTeacher


@pytest.fixture(scope="module")
def teacher(teacher_dir: Path) -> ModelIdentity:
    return identify(teacher_dir)


@pytest.fixture(scope="module")
def student(student_dir: Path) -> ModelIdentity:
    return identify(student_dir)


def build(teacher: Path, rollouts: Path, output: Path, **options: Any) -> Artifact:
    options = {"k_max": 40, "part_positions": PART_POSITIONS} | options
    return lopd_store.build(teacher=teacher, rollouts=rollouts, output=output, **options)


def files_of(directory: Path) -> dict[str, bytes]:
    """The bytes of everything that the fingerprint covers."""
    names = [layout.MANIFEST, *(f"parts/{path.name}" for path in (directory / "parts").iterdir())]
    return {name: (directory / name).read_bytes() for name in names}


def stop_at_part(number: int, output: Path) -> Any:
    """A progress callback that interrupts the build once `number` parts are done."""

    def interrupt(progress: Progress) -> None:
        if len(list((layout.building_directory(output) / "done").iterdir())) == number:
            raise KeyboardInterrupt

    return interrupt


# The same bytes


def test_building_twice_gives_the_same_bytes(
    teacher_dir: Path, rollouts_path: Path, sealed: Path, tmp_path: Path
) -> None:
    again = build(teacher_dir, rollouts_path, tmp_path / "again")
    assert files_of(again.path) == files_of(sealed)


def test_the_fingerprint_is_the_digest_of_the_manifest(sealed: Path) -> None:
    data = (sealed / layout.MANIFEST).read_bytes()
    assert lopd_store.open(sealed).fingerprint == digest_contents(data).sha256


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_an_interrupted_build_goes_on_to_the_same_bytes(
    teacher_dir: Path, rollouts_path: Path, sealed: Path, tmp_path: Path, done: int
) -> None:
    output = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        build(teacher_dir, rollouts_path, output, on_progress=stop_at_part(done, output))
    assert not output.exists()
    assert files_of(build(teacher_dir, rollouts_path, output).path) == files_of(sealed)


def test_a_resumed_build_scores_only_what_is_missing(teacher_dir: Path, rollouts_path: Path, tmp_path: Path) -> None:
    output, heard = tmp_path / "resumed", list[Progress]()
    with pytest.raises(KeyboardInterrupt):
        build(teacher_dir, rollouts_path, output, on_progress=stop_at_part(2, output))
    build(teacher_dir, rollouts_path, output, on_progress=heard.append)
    positions = sum(response for _, response in LENGTHS)
    assert (heard[0].positions, heard[0].rollouts) == (30, 3) and {one.all_positions for one in heard} == {positions}
    assert (heard[-1].positions, heard[-1].rollouts, heard[-1].all_rollouts) == (positions, 6, 6)
    assert heard[-1].tokens == sum(prompt + response for prompt, response in LENGTHS)
    assert heard[0].bytes > 0


def fail_to_seal(teacher_dir: Path, rollouts_path: Path, output: Path) -> Path:
    """A build in progress of which everything is done but the last rename, as a kill at that moment leaves it."""

    def get_in_the_way(progress: Progress) -> None:
        output.mkdir(exist_ok=True)
        (output / "something").touch()

    with pytest.raises(OSError, match="not empty"):
        build(teacher_dir, rollouts_path, output, on_progress=get_in_the_way)
    shutil.rmtree(output)
    return layout.building_directory(output)


def test_a_build_killed_while_it_is_sealed_scores_nothing_again(
    teacher_dir: Path, rollouts_path: Path, sealed: Path, tmp_path: Path
) -> None:
    output, heard = tmp_path / "killed", list[Progress]()
    fail_to_seal(teacher_dir, rollouts_path, output)
    again = build(teacher_dir, rollouts_path, output, on_progress=heard.append)
    assert [one.positions for one in heard] == [50] and files_of(again.path) == files_of(sealed)


@pytest.mark.parametrize("lost", ["manifest.json", "README.md", "plan.json", "done/00001.json", "done"])
def test_whatever_a_kill_has_left_the_next_build_makes_the_same_bytes(
    teacher_dir: Path, rollouts_path: Path, sealed: Path, tmp_path: Path, lost: str
) -> None:
    building = fail_to_seal(teacher_dir, rollouts_path, tmp_path / "killed")
    path = building / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert files_of(build(teacher_dir, rollouts_path, tmp_path / "killed").path) == files_of(sealed)


def test_a_file_that_a_kill_left_half_written_is_written_again(
    teacher_dir: Path, rollouts_path: Path, sealed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        build(teacher_dir, rollouts_path, output, on_progress=stop_at_part(1, output))
    parts = layout.building_directory(output) / layout.PARTS
    (parts / "00001.tokens.zarr.zip").write_bytes(b"of another life")
    (parts / "00002.topk.zarr.zip.unfinished").write_bytes(b"half")
    assert files_of(build(teacher_dir, rollouts_path, output).path) == files_of(sealed)


def test_a_sealed_artifact_has_no_trace_of_the_build_in_progress(sealed: Path) -> None:
    assert sorted(path.name for path in sealed.iterdir()) == ["README.md", "build.json", "manifest.json", "parts"]
    assert not layout.building_directory(sealed).exists()
    assert len(list((sealed / "parts").iterdir())) == 4 * 3


# Another plan


@pytest.mark.parametrize(
    ("options", "found", "wanted"),
    [
        ({"k_max": 39}, "`encoding.selection.k_max` 40", "39"),
        (
            {"k_max": 39, "coverage": 0.5},
            "`encoding.selection.k_max` 40, `encoding.selection.coverage` 0.99",
            "39, 0.5",
        ),
        ({"exact": True}, "`encoding.profile` compact", "exact"),
        ({"dtype": "bfloat16"}, "`scoring.dtype` float32", "bfloat16"),
        ({"batch_tokens": 64}, "`batch_tokens` 4096", "64"),
        ({"threads": 2}, "`threads` 1", "2"),
        ({"text": False}, "`text` true", "false"),
        ({"part_positions": 20}, "`parts` [[0,2,2,25,10]", "[[0,3,3,46,30]"),
    ],
)
def test_another_plan_is_refused_and_what_changed_is_named(
    teacher_dir: Path, rollouts_path: Path, begun: Path, options: dict[str, Any], found: str, wanted: str
) -> None:
    with pytest.raises(InputError, match="was begun with another plan") as refused:
        build(teacher_dir, rollouts_path, begun, **options)
    assert refused.value.hint is not None and refused.value.hint.startswith("go on with the old settings, or remove")
    expected, actual = str(refused.value.expected), str(refused.value.actual)
    assert found in expected
    assert wanted in actual


@pytest.fixture
def begun(teacher_dir: Path, rollouts_path: Path, tmp_path: Path) -> Path:
    """Where an artifact is being built of which one part is done."""
    output = tmp_path / "begun"
    with pytest.raises(KeyboardInterrupt):
        build(teacher_dir, rollouts_path, output, on_progress=stop_at_part(1, output))
    return output


def test_the_same_rollouts_in_another_order_are_another_plan(teacher_dir: Path, tmp_path: Path) -> None:
    pairs, output = random_pairs([(3, 9), (3, 9), (3, 9)]), tmp_path / "begun"
    one = save_rollouts(tmp_path / "one.parquet", pairs)
    other = save_rollouts(tmp_path / "other.parquet", pairs[::-1])
    with pytest.raises(KeyboardInterrupt):
        build(teacher_dir, one, output, part_positions=9, on_progress=stop_at_part(1, output))
    with pytest.raises(
        InputError, match=r"another plan\n  expected  `rollouts_file` sha256:[0-9a-f]{17}…\n  actual    sha"
    ):
        build(teacher_dir, other, output, part_positions=9)


def test_another_teacher_is_another_plan(other_teacher_dir: Path, rollouts_path: Path, begun: Path) -> None:
    with pytest.raises(
        InputError, match=r"another plan\n  expected  `teacher.weights` sha256:(?s:.)*`teacher.name` teacher"
    ):
        build(other_teacher_dir, rollouts_path, begun)


def test_another_library_is_another_plan(teacher_dir: Path, rollouts_path: Path, begun: Path) -> None:
    path = layout.building_directory(begun) / "plan.json"
    found = json.loads(path.read_bytes())
    found["versions"]["torch"] = "2.0.0"
    path.write_bytes(strictjson.pretty(found))
    with pytest.raises(
        InputError, match=r"`versions.torch` 2\.0\.0\n  actual    .*\n\nhint: install what it was begun with"
    ):
        build(teacher_dir, rollouts_path, begun)


# What is stored


def test_tokens_and_reference_logprobs_are_those_of_the_rollouts(rollouts_path: Path, sealed: Path) -> None:
    artifact = lopd_store.open(sealed)
    rollouts = RolloutsFile(rollouts_path).read()
    assert len(artifact) == len(rollouts)
    for index, wanted in enumerate(rollouts):
        found = artifact.rollout(index)
        assert found.prompt_ids.tolist() == wanted.prompt_ids.tolist()
        assert found.response_ids.tolist() == wanted.response_ids.tolist()
        assert found.reference_logprobs is not None and (found.reference_logprobs == -1.5).all()


def test_ids_are_stored_as_sampled_where_their_text_would_be_tokenised_otherwise(
    student_dir: Path, rollouts_file: Path, unknown: Path
) -> None:
    tokenizer, artifact = load_tokenizer(find(student_dir)), lopd_store.open(unknown)
    sampled = RolloutsFile(rollouts_file).read()
    again = [tokenizer(one.response, add_special_tokens=False).input_ids for one in sampled]
    assert any(ids != one.response_ids.tolist() for ids, one in zip(again, sampled, strict=True))
    for index, one in enumerate(sampled):
        assert artifact.rollout(index).response_ids.tolist() == one.response_ids.tolist()


def test_a_stop_token_is_stored_and_scored_and_nothing_is_added_where_there_is_none(
    teacher_dir: Path, rollouts_file: Path, unknown: Path
) -> None:
    artifact, dense = lopd_store.open(unknown), DenseTeacher(teacher_dir)
    stop = load_tokenizer(find(teacher_dir)).eos_token_id
    sampled = RolloutsFile(rollouts_file).read()
    reasons = pq.read_table(unknown / layout.part_file(0, layout.ROLLOUTS)).column("finish_reason").to_pylist()
    assert reasons == [one.finish_reason for one in sampled] and set(reasons) == {"stop", "length"}
    for index, (one, reason) in enumerate(zip(sampled, reasons, strict=True)):
        stored = artifact.rollout(index)
        assert (stored.response_ids[-1] == stop) == (reason == "stop")
        assert len(stored.loss_mask) == len(stored.response_ids) == len(one.response_ids)
        wanted = dense.logprobs(one)[-1, stored.response_ids[-1]]
        assert stored.sampled_logprobs[-1] == pytest.approx(wanted, abs=0.01)


def test_loss_masks_are_kept_as_they_are(teacher_dir: Path, tmp_path: Path) -> None:
    from lopd_store.rollouts import write_rollouts

    masks = [[True, False, True], [False]]
    rows = [{"prompt_ids": [7], "response_ids": [8] * len(mask), "loss_mask": mask} for mask in masks]
    write_rollouts(tmp_path / "r.parquet", rows, None)
    artifact = build(teacher_dir, tmp_path / "r.parquet", tmp_path / "a")
    assert [artifact.rollout(index).loss_mask.tolist() for index in range(2)] == masks


def test_rollouts_without_logprobs_make_an_artifact_without_them(teacher_dir: Path, tmp_path: Path) -> None:
    artifact = build(teacher_dir, save_rollouts(tmp_path / "r.parquet", random_pairs([(3, 4)])), tmp_path / "a")
    assert not artifact.manifest.reference_logprobs and artifact.part(0).reference_logprobs is None
    assert lopd_store.verify(artifact.path).ok


def test_a_part_without_any_position_is_a_part_all_the_same(teacher_dir: Path, tmp_path: Path) -> None:
    rollouts = save_rollouts(tmp_path / "r.parquet", random_pairs([(3, 4), (3, 0), (5, 0)]), logprob=-1.0)
    artifact = build(teacher_dir, rollouts, tmp_path / "a", part_positions=4)
    assert [entry.counts.positions for entry in artifact.manifest.parts] == [4, 0]
    assert lopd_store.verify(artifact.path).ok


def test_responses_of_nothing_at_all_make_an_artifact(teacher_dir: Path, tmp_path: Path) -> None:
    from lopd_store.rollouts import write_rollouts

    write_rollouts(tmp_path / "r.parquet", [{"prompt_ids": [7], "response_ids": []}], None)
    artifact = build(teacher_dir, tmp_path / "r.parquet", tmp_path / "a")
    assert artifact.manifest.counts.positions == 0 and lopd_store.verify(artifact.path).ok


def test_the_rollouts_table_speaks_of_every_rollout(sealed: Path) -> None:
    table = pq.read_table(sealed / layout.part_file(0, layout.ROLLOUTS)).to_pylist()
    assert [(row["prompt_length"], row["response_length"]) for row in table] == LENGTHS[:2]
    part = read_first_part(sealed)
    mean = part.sampled_logprobs[:9].mean()
    assert table[0]["mean_sampled_logprob"] == pytest.approx(mean, abs=1 / 512)
    assert table[0]["finish_reason"] == "length" and table[0]["mean_entropy"] > 0


def test_build_json_says_what_happened_and_not_what_is(sealed: Path) -> None:
    record = json.loads((sealed / layout.BUILD_RECORD).read_text())
    assert record["workers"] == 1 and record["device"] == "cpu" and set(record["versions"]) >= {"lopd", "torch", "zarr"}
    assert "seconds" in record and "seconds" not in (sealed / layout.MANIFEST).read_text()


# Provenance


def build_with(
    record: RolloutsRecord | None,
    teacher_dir: Path,
    path: Path,
    *,
    sft: Path | None = None,
    domain: str | None = None,
) -> Artifact:
    rollouts = save_rollouts(path / "with-record.parquet", random_pairs([(3, 4)]), record=record)
    return build(teacher_dir, rollouts, path / "artifact", sft=sft, domain=domain)


def checkpoint_of(student: ModelIdentity, teacher: ModelIdentity) -> CheckpointRecord:
    return replace(CHECKPOINT, model=student, sft=(replace(SFT, teacher=teacher),))


def test_the_sft_teacher_is_carried_by_the_rollouts(
    teacher_dir: Path, teacher: ModelIdentity, student: ModelIdentity, tmp_path: Path
) -> None:
    artifact = build_with(policy(student, checkpoint_of(student, teacher)), teacher_dir, tmp_path)
    assert artifact.manifest.inputs[0].sft == replace(SFT, teacher=teacher)
    assert lopd_store.open(artifact.path, student=student).fingerprint == artifact.fingerprint


def test_an_artifact_without_sft_provenance_is_refused_to_a_student(
    teacher_dir: Path, student: ModelIdentity, tmp_path: Path
) -> None:
    artifact = build_with(policy(student), teacher_dir, tmp_path)
    assert artifact.manifest.inputs[0].sft == UNKNOWN_SFT
    with pytest.raises(ConsistencyError, match="teacher consistency is unknown"):
        lopd_store.open(artifact.path, student=student)


def test_sft_data_can_be_named_on_the_users_word(
    teacher_dir: Path, teacher: ModelIdentity, student: ModelIdentity, tmp_path: Path
) -> None:
    data = save_rollouts(tmp_path / "sft.parquet", random_pairs([(2, 2)]), record=policy(teacher))
    artifact = build_with(policy(student), teacher_dir, tmp_path, sft=data)
    found = artifact.manifest.inputs[0].sft
    assert (found.status, found.teacher, found.data) == ("declared", teacher, digest_contents(data.read_bytes()).sha256)


@pytest.mark.parametrize("name", ["", PROVENANCE_FILE])
def test_an_sft_checkpoint_can_be_named_by_its_directory_or_its_record(
    teacher_dir: Path, teacher: ModelIdentity, student: ModelIdentity, tmp_path: Path, name: str
) -> None:
    record = checkpoint_of(student, teacher)
    (tmp_path / PROVENANCE_FILE).write_text(json.dumps(record.to_json()))
    artifact = build_with(policy(student), teacher_dir, tmp_path, sft=tmp_path / name)
    assert artifact.manifest.inputs[0].sft == record.sft[0]


def test_the_record_of_another_checkpoint_is_refused(
    teacher_dir: Path, teacher: ModelIdentity, student: ModelIdentity, tmp_path: Path
) -> None:
    other = checkpoint_of(replace(student, weights=teacher.weights), teacher)
    (tmp_path / PROVENANCE_FILE).write_text(json.dumps(other.to_json()))
    with pytest.raises(InputError, match=r"is the record of another checkpoint(?s:.)*which differs in weights"):
        build_with(policy(student), teacher_dir, tmp_path, sft=tmp_path)


def test_sft_data_that_names_nobody_leaves_the_sft_teacher_unknown(
    teacher_dir: Path, student: ModelIdentity, tmp_path: Path
) -> None:
    data = save_rollouts(tmp_path / "sft.parquet", random_pairs([(2, 2)]), record=replace(ROLLOUTS, status="unknown"))
    artifact = build_with(policy(student), teacher_dir, tmp_path, sft=data)
    assert artifact.manifest.inputs[0].sft == replace(UNKNOWN_SFT, data=digest_file(data).sha256)


def test_the_sft_teacher_of_a_domain_is_taken_from_the_record_that_is_named(
    teacher_dir: Path, teacher: ModelIdentity, student: ModelIdentity, tmp_path: Path
) -> None:
    math, code = (replace(one, teacher=teacher) for one in (SFT_OF_MATH, SFT_OF_CODE))
    record = replace(CHECKPOINT, model=student, data=None, sft=(math, code))
    (tmp_path / PROVENANCE_FILE).write_text(json.dumps(record.to_json()))
    artifact = build_with(policy(student), teacher_dir, tmp_path, sft=tmp_path, domain="code")
    (inputs,) = artifact.manifest.inputs
    assert (inputs.domain, inputs.sft) == ("code", code)


def test_a_domain_of_data_without_one_only_names_the_rollouts(
    teacher_dir: Path, teacher: ModelIdentity, student: ModelIdentity, tmp_path: Path
) -> None:
    carried = policy(student, checkpoint_of(student, teacher))
    (inputs,) = build_with(carried, teacher_dir, tmp_path, domain="math").manifest.inputs
    assert (inputs.domain, inputs.sft) == ("math", replace(SFT, teacher=teacher))


def test_the_only_domain_of_the_sft_data_is_that_of_the_rollouts(
    teacher_dir: Path, teacher: ModelIdentity, student: ModelIdentity, tmp_path: Path
) -> None:
    only = replace(SFT_OF_MATH, teacher=teacher)
    carried = policy(student, replace(CHECKPOINT, model=student, sft=(only,)))
    (inputs,) = build_with(carried, teacher_dir, tmp_path).manifest.inputs
    assert (inputs.domain, inputs.sft) == ("math", only)


def test_sft_that_contradicts_the_rollouts_is_refused(
    teacher_dir: Path, teacher: ModelIdentity, student: ModelIdentity, tmp_path: Path
) -> None:
    data = save_rollouts(tmp_path / "sft.parquet", random_pairs([(2, 2)]), record=policy(student))
    carried = policy(student, checkpoint_of(student, teacher))
    with pytest.raises(
        InputError, match=r"names another teacher than the rollouts themselves\n  expected  teacher, as"
    ):
        build_with(carried, teacher_dir, tmp_path, sft=data)


@pytest.mark.parametrize(
    ("name", "data", "kind", "said"),
    [
        ("nowhere", None, InputError, "no SFT provenance at"),
        ("record.json", b"{}", ArtifactError, "lacks `base`, "),
        ("record.json", b"[", ArtifactError, "is not valid JSON"),
        ("sft.parquet", b"no", DataError, "is not a Parquet file"),
    ],
)
def test_sft_that_says_nothing_is_refused(
    teacher_dir: Path, tmp_path: Path, name: str, data: bytes | None, kind: type[Exception], said: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(kind, match=said):
        build_with(None, teacher_dir, tmp_path, sft=tmp_path / name)


@pytest.mark.parametrize("same_size", [False, True])
def test_rollouts_of_another_tokenizer_are_refused(student: ModelIdentity, tmp_path: Path, same_size: bool) -> None:
    other = save_tiny_model(tmp_path / "other-tokenizer", vocab_size=300 if same_size else 290)
    if same_size:
        swap_ids(other, "a", "b")
    with pytest.raises(DataError, match=r"ids of another tokenizer(?s:.)*\(other-tokenizer\)(?s:.)*\(student\)"):
        build_with(policy(student), other, tmp_path)


# Refusals


def test_an_output_that_exists_is_left_alone(teacher_dir: Path, rollouts_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"exists\n\nhint: choose another `--output`"):
        build(teacher_dir, rollouts_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_rollouts_is_refused(teacher_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no rollouts\n\nhint: sample some"):
        build(teacher_dir, save_rollouts(tmp_path / "r.parquet", []), tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"workers": 0}, "workers"),
        ({"threads": 0}, "threads"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"part_positions": 0}, "part_positions"),
        ({"part_positions": (1 << 20) + 1}, "part_positions"),
        ({"k_max": 0}, "k_max"),
        ({"coverage": 1.5}, "coverage"),
    ],
)
def test_an_option_out_of_range_is_named(
    teacher_dir: Path, rollouts_path: Path, tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    with pytest.raises(InputError, match=f"`{name}` is out of range"):
        build(teacher_dir, rollouts_path, tmp_path / "a", **options)


def test_a_bad_rollout_is_named_by_its_row_in_the_file(teacher_dir: Path, tmp_path: Path) -> None:
    pairs = [*random_pairs([(3, 9), (3, 9)]), ([7], [8, 300])]
    rollouts, output = save_rollouts(tmp_path / "r.parquet", pairs), tmp_path / "a"
    with pytest.raises(DataError, match="rollout 2 has an id that the teacher's tokenizer does not know"):
        build(teacher_dir, rollouts, output, part_positions=9)
    assert not output.exists()


def test_the_plan_in_build_json_is_the_plan_of_the_build(
    teacher_dir: Path, rollouts_path: Path, sealed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "begun"
    with pytest.raises(KeyboardInterrupt):
        build(teacher_dir, rollouts_path, output, on_progress=stop_at_part(1, output))
    plan = json.loads((layout.building_directory(output) / "plan.json").read_text())
    assert json.loads((sealed / layout.BUILD_RECORD).read_text())["plan"] == digest_json(plan)


def test_counts_of_a_compact_artifact_are_those_of_its_arrays(sealed: Path) -> None:
    artifact = lopd_store.open(sealed)
    for entry, part in zip(artifact.manifest.parts, artifact.parts(), strict=True):
        assert part.topk is not None
        assert entry.counts.entries == len(part.topk.ids) == int(part.topk.counts.sum(dtype=np.int64))
        assert entry.counts.positions == len(part.sampled_logprobs) == len(part.response_ids)
