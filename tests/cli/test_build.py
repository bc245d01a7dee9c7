"""`lopd-store build` as a user runs it: the same artifact every time, and nothing half-made when it cannot be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lopd_store
import lopd_store.rollouts
from tests.commands import Ran, run_command
from tests.pipeline import PART_POSITIONS
from tests.tiny import save_tiny_model

UNKNOWN = (
    "note: training will refuse this artifact: teacher consistency is unknown: nothing says which teacher wrote the "
    "SFT data of the reference policy\n"
)


def build(teacher: Path, rollouts: Path | str, *more: object) -> Ran:
    return run_command(
        "lopd-store", "build", "--teacher", teacher, "--rollouts", rollouts, "--output", "artifact", *more
    )


def assert_refused(ran: Ran, code: int, text: str) -> None:
    """The whole of stderr, an empty stdout, and neither an artifact nor a build in progress."""
    assert (ran.code, ran.stdout, ran.stderr) == (code, "", text)
    assert not list(Path().glob("artifact*"))


def contents(artifact: Path) -> dict[str, bytes]:
    """Every file by its relative path, but for what merely happened."""
    files = {str(path.relative_to(artifact)): path for path in artifact.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "build.json"}


def test_the_same_rollouts_give_the_same_bytes(
    teacher_dir: Path, rollouts_file: Path, sft_file: Path, sealed: Path, here: Path
) -> None:
    ran = build(teacher_dir, rollouts_file, "--sft", sft_file, "--part-positions", PART_POSITIONS, "--workers", 1)
    assert ran.code == 0
    assert contents(Path("artifact")) == contents(sealed)


def test_an_answer_in_json_is_what_inspect_says(
    teacher_dir: Path, rollouts_file: Path, sft_file: Path, here: Path
) -> None:
    ran = build(teacher_dir, rollouts_file, "--sft", sft_file, "--json")
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.json == run_command("lopd-store", "inspect", "artifact", "--json").json
    assert ran.json["consistency"] == "consistent"
    assert ran.json["fingerprint"] == lopd_store.open("artifact").fingerprint


def test_without_sft_provenance_it_says_that_training_will_refuse(
    teacher_dir: Path, rollouts_file: Path, here: Path
) -> None:
    ran = build(teacher_dir, rollouts_file)
    assert ran.code == 0
    assert "SFT teacher       unknown\n" in ran.stdout
    assert "consistency       unknown\n" in ran.stdout
    assert ran.stderr.startswith(UNKNOWN)
    assert "lopd-store build --sft" in ran.stderr


def test_another_teacher_than_that_of_the_sft_data_is_said_with_both_identities(
    other_teacher_dir: Path, rollouts_file: Path, sft_file: Path, here: Path
) -> None:
    ran = build(other_teacher_dir, rollouts_file, "--sft", sft_file, "--json")
    assert (ran.code, ran.json["consistency"]) == (0, "inconsistent")
    (inputs,) = ran.json["inputs"]
    wrote, scored = inputs["sft"]["teacher"]["weights"], inputs["teacher"]["weights"]
    assert f"  expected  teacher  (weights {wrote[7:19]}…)\n" in ran.stderr
    assert f"  actual    other-teacher  (weights {scored[7:19]}…)\n" in ran.stderr


def test_an_audit_that_accuses_is_a_warning_and_shows_wherever_the_artifact_does(
    teacher_dir: Path, other_teacher_dir: Path, student_dir: Path, prompts_file: Path, rollouts_file: Path, here: Path
) -> None:
    lopd_store.generate(
        model=other_teacher_dir,
        prompts=prompts_file,
        output="theirs.parquet",
        max_response_tokens=32,
        samples_per_prompt=4,
    )
    record = lopd_store.rollouts.RolloutsFile(rollouts_file).record
    assert record is not None
    claimed = replace(record, policy=lopd_store.identify(teacher_dir))
    lopd_store.rollouts.RolloutsFile("theirs.parquet").copy(Path("sft.parquet"), claimed)
    ran = build(teacher_dir, rollouts_file, "--sft-data", "sft.parquet", "--reference", student_dir)
    warned, refused = ran.stderr.splitlines()[:2]
    assert ran.code == 0 and warned.startswith(
        "warning: the audit finds that the teacher did not write the SFT data: z -"
    )
    assert refused.startswith(
        "note: training will refuse this artifact: teacher consistency is inconsistent: the audit"
    )
    assert "SFT data audit    inconsistent: z -" in ran.stdout
    assert "rollouts audit    consistent: z " in ran.stdout
    drawn = run_command("lopd-store", "inspect", "artifact", "--lineage").stdout
    assert "artifact: broken (the audit finds that the teacher did not write the SFT data)" in drawn
    assert "audit of the SFT data under the teacher: inconsistent, z -" in drawn
    assert "audit: consistent, z " in drawn
    links = run_command("lopd-store", "inspect", "artifact", "--lineage", "--json").json["links"]
    assert [link["audit"] and link["audit"]["verdict"] for link in links] == [None, None, "consistent", "inconsistent"]


def test_names_of_people_machines_and_folders_are_in_no_file(
    teacher_dir: Path, rollouts_file: Path, sft_file: Path, here: Path
) -> None:
    build(teacher_dir.resolve(), rollouts_file.resolve(), "--sft", sft_file.resolve())
    private = {str(here), str(teacher_dir.parent), str(rollouts_file.parent), os.uname().nodename, str(Path.home())}
    private = {name for name in private if len(name) > 3}  # a shorter one may stand among numbers by chance
    for path in Path("artifact").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                data += repr((table.to_pydict(), table.schema.metadata)).encode()
            assert not [name for name in private if name.encode() in data], path


def test_an_artifact_that_exists_is_never_overwritten(teacher_dir: Path, rollouts_file: Path, here: Path) -> None:
    Path("artifact").mkdir()
    ran = build(teacher_dir, rollouts_file)
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr == "error: `artifact` exists\n\nhint: choose another `--output`, or move it away\n"
    assert not list(Path("artifact").iterdir())
    assert not Path("artifact.building").exists()


def test_missing_rollouts_are_a_usage_error(teacher_dir: Path, here: Path) -> None:
    text = "error: no rollouts at `rollouts.parquet`\n\nhint: write them with `lopd-store generate`\n"
    assert_refused(build(teacher_dir, "rollouts.parquet"), 2, text)


def test_text_is_no_rollouts(teacher_dir: Path, here: Path) -> None:
    pq.write_table(pa.table({"prompt": ["2 + 2?"], "answer": ["4"]}), "text.parquet")
    text = (
        "error: `text.parquet` has no column `prompt_ids`, `response_ids`\n"
        "  expected  prompt, response, prompt_ids, response_ids, loss_mask, logprobs, finish_reason\n"
        "  actual    prompt, answer\n\n"
        "hint: rollouts are token ids as sampled; write them with `lopd-store generate`\n"
    )
    assert_refused(build(teacher_dir, "text.parquet"), 1, text)


def test_a_rollout_longer_than_the_context_of_the_teacher_is_refused(teacher_dir: Path, here: Path) -> None:
    pq.write_table(pa.table({"prompt_ids": [[7] * 5, [7] * 5], "response_ids": [[8], [8] * 300]}), "long.parquet")
    text = (
        "error: rollout 1 is longer than the teacher's context\n"
        "  expected  at most 256 tokens\n"
        "  actual    5 prompt + 300 response tokens\n\n"
        "hint: `--on-bad-rollout skip` leaves it out; a rollout is never cut\n"
    )
    assert_refused(build(teacher_dir, "long.parquet"), 1, text)


def test_a_teacher_with_another_tokenizer_is_refused(student_dir: Path, rollouts_file: Path, here: Path) -> None:
    teacher = save_tiny_model(here / "wide", seed=1, vocab_size=310)
    text = (
        f"error: `{rollouts_file}` has ids of another tokenizer than that of the teacher\n"
        f"  expected  {lopd_store.identify(teacher).tokenizer}  (wide)\n"
        f"  actual    {lopd_store.identify(student_dir).tokenizer}  (student)\n\n"
        "hint: teacher and student must share one tokenizer\n"
    )
    assert_refused(build(teacher, rollouts_file), 1, text)


def test_sft_provenance_that_is_not_there_is_a_usage_error(teacher_dir: Path, rollouts_file: Path, here: Path) -> None:
    text = "error: no SFT provenance at `sft.parquet`\n\nhint: name SFT data, a checkpoint directory, or its record\n"
    assert_refused(build(teacher_dir, rollouts_file, "--sft", "sft.parquet"), 2, text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--k-max", 0), "error: `k_max` is out of range\n  expected  1 to "),
        (("--k-max", 2, "--k-min", 3), "error: `k_min` is greater than `k_max`\n  actual    3 > 2\n"),
        (("--coverage", 1.5), "error: `coverage` is out of range\n  expected  above 0, at most 1 (1 keeps k_max)\n"),
        (("--workers", 0), "error: Invalid value for '--workers'"),
        (("--part-positions", 0), "error: Invalid value for '--part-positions'"),
        (("--engine", "abacus"), "error: Invalid value for '--engine'"),
        (("--device", "abacus"), "error: the device `abacus` cannot be used\n"),
    ],
)
def test_an_option_out_of_range_is_a_usage_error(
    teacher_dir: Path, rollouts_file: Path, here: Path, options: tuple[object, ...], text: str
) -> None:
    ran = build(teacher_dir, rollouts_file, *options)
    assert (ran.code, ran.stdout) == (2, "")
    assert ran.stderr.startswith(text)
    assert not list(here.iterdir())


def test_a_build_in_progress_goes_on_only_as_it_was_begun(teacher_dir: Path, here: Path) -> None:
    pq.write_table(pa.table({"prompt_ids": [[7] * 5] * 3, "response_ids": [[8], [9], [10]]}), "rollouts.parquet")
    first = build(teacher_dir, "rollouts.parquet", "--part-positions", 1, "--part", "1/2")  # parts 0 and 2
    assert (first.code, first.stdout) == (0, "artifact.building: 2 parts scored; 1 of other jobs are missing\n")
    assert first.stderr == "when all are there: lopd-store merge --output artifact\n"
    assert not Path("artifact").exists()
    assert len(list(Path("artifact.building/done").iterdir())) == 2

    second = build(teacher_dir, "rollouts.parquet", "--workers", 1, "--part-positions", 1, "--k-max", 8)
    assert (second.code, second.stdout) == (2, "")
    assert second.stderr == (
        "error: `artifact.building` was begun with another plan\n"
        "  expected  `encoding.selection.k_max` 64\n"
        "  actual    8\n\n"
        "hint: go on with the old settings, or remove `artifact.building` to begin anew\n"
    )
