"""`lopd-store verify` as a user runs it: one line for a good artifact, and for a bad one what is wrong and where."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import lopd_store
from lopd_store import manifest
from lopd_store.digest import digest_file
from tests.commands import Ran, run_command
from tests.tiny import save_tiny_model

TOKENS = "parts/00001.tokens.zarr.zip"
IN_PROGRESS = (
    "error: `{}` is still being built\n"
    "  expected  a sealed artifact, with `manifest.json`\n"
    "  actual    `{}`\n\n"
    "hint: run the same `lopd-store build` again: it goes on where it stopped\n"
)


def verify(artifact: Path | str, *more: object) -> Ran:
    return run_command("lopd-store", "verify", artifact, *more)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_manifest(artifact: Path, **members: object) -> None:
    path = artifact / "manifest.json"
    path.write_bytes(manifest.sealed({**json.loads(path.read_text()), **members}))


def test_a_good_artifact_is_one_line_on_stdout(sealed: Path) -> None:
    size = sum(file.stat().st_size for file in [sealed / "manifest.json", *(sealed / "parts").iterdir()])
    fingerprint = lopd_store.open(sealed).fingerprint
    assert verify(sealed) == Ran(code=0, stdout=f"ok: {sealed}, 13 files, {size:,} bytes, {fingerprint}\n", stderr="")


def test_a_quick_verification_says_that_it_was_quick(sealed: Path) -> None:
    ran = verify(sealed, "--quick")
    assert (ran.code, ran.stderr) == (0, "")
    assert ", sizes and xxh3 only, sha256:" in ran.stdout


def test_the_same_facts_come_in_json(sealed: Path) -> None:
    ran = verify(sealed, "--json")
    assert (ran.code, ran.stderr) == (0, "")
    facts = {
        "ok",
        "fingerprint",
        "quick",
        "values",
        "partial",
        "files",
        "bytes",
        "findings",
        "signed_by",
        "rescored",
        "sft_audit",
    }
    assert ran.json.keys() == facts
    assert (ran.json["ok"], ran.json["findings"]) == (True, [])


def test_a_changed_byte_is_found_by_its_digest(artifact: Path) -> None:
    before = digest_file(artifact / TOKENS)
    flip_a_bit(artifact / TOKENS)
    after = digest_file(artifact / TOKENS)
    assert verify(artifact) == Ran(
        code=1,
        stdout="",
        stderr=f"error[A022]: `{TOKENS}`: digest differs\n  expected  {before.sha256}\n  actual    {after.sha256}\n",
    )
    assert verify(artifact, "--quick") == Ran(
        code=1,
        stdout="",
        stderr=f"error[A023]: `{TOKENS}`: xxh3 differs\n  expected  {before.xxh3_128}\n  actual    {after.xxh3_128}\n",
    )


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (
            lambda artifact: os.truncate(artifact / TOKENS, 1000),
            f"error[A021]: `{TOKENS}`: size differs\n  expected  {{size}} bytes\n  actual    1000 bytes\n",
        ),
        (
            lambda artifact: (artifact / TOKENS).unlink(),
            f"error[A020]: `{TOKENS}`: a file is missing or not a plain file\n",
        ),
        (
            lambda artifact: (artifact / "parts/evil").write_bytes(b"evil"),
            "error[A002]: `parts/evil`: a file that the manifest does not list\n",
        ),
        (
            lambda artifact: (artifact / "manifest.json").unlink(),
            "error[A001]: `manifest.json`: there is no manifest, so this is no artifact\n",
        ),
        (
            lambda artifact: edit_manifest(artifact, version="2.0"),
            "error[A013]: `manifest.json` has format version 2.0, which this lopd does not read\n"
            "  expected  1.x\n  actual    2.0\n\nhint: pip install --upgrade lopd\n",
        ),
        (
            lambda artifact: edit_manifest(artifact, surprise=1),
            "error[A014]: `manifest.json` has unknown members: `surprise`\n\n"
            "hint: free-form data belongs in `annotations`\n",
        ),
    ],
    ids=["truncated part", "missing part", "planted file", "no manifest", "newer version", "unknown member"],
)
def test_whatever_is_wrong_is_named_with_its_code(artifact: Path, damage: Callable[[Path], object], text: str) -> None:
    size = (artifact / TOKENS).stat().st_size
    damage(artifact)
    assert verify(artifact) == Ran(code=1, stdout="", stderr=text.replace("{size}", str(size)))


def test_every_finding_is_told_and_counts_in_json(artifact: Path) -> None:
    for path in (artifact / "parts").glob("*.topk.zarr.zip"):
        flip_a_bit(path)
    ran = verify(artifact)
    assert ran.stderr.count("error[A022]: ") == 4
    findings = verify(artifact, "--json").json["findings"]
    assert [(finding["code"], finding["where"]) for finding in findings] == [
        ("A022", f"parts/0000{number}.topk.zarr.zip") for number in range(4)
    ]


def test_parts_that_changed_places_are_found(artifact: Path) -> None:
    first, second = artifact / "parts/00000.tokens.zarr.zip", artifact / TOKENS
    first.rename(artifact / "aside")
    second.rename(first)
    (artifact / "aside").rename(second)
    ran = verify(artifact)
    assert ran.code == 1
    assert "`parts/00000.tokens.zarr.zip`" in ran.stderr
    assert f"`{TOKENS}`" in ran.stderr


def test_the_reference_policy_may_be_trained(sealed: Path, student_dir: Path) -> None:
    assert verify(sealed, "--student", student_dir).code == 0


def test_a_student_with_another_tokenizer_is_refused_with_both_identities(sealed: Path, tmp_path: Path) -> None:
    wide = save_tiny_model(tmp_path / "wide", seed=3, vocab_size=310)
    ran = verify(sealed, "--student", wide)
    teacher, student = lopd_store.open(sealed).manifest.inputs[0].teacher, lopd_store.identify(wide)
    assert (ran.code, ran.stdout) == (1, "")
    assert ran.stderr.endswith(
        "error[A080]: `inputs (tokenizer)`: teacher consistency is inconsistent: "
        "the student's tokenizer is not the teacher's\n"
        f"  expected  teacher  (tokenizer {teacher.tokenizer[7:19]}…, vocab_size 300)\n"
        f"  actual    wide  (tokenizer {student.tokenizer[7:19]}…, vocab_size 310)\n"
    )


def test_an_artifact_without_sft_provenance_is_unknown_to_the_gate(unknown: Path, student_dir: Path) -> None:
    ran = verify(unknown, "--student", student_dir)
    assert (ran.code, ran.stdout) == (1, "")
    assert ran.stderr.startswith(
        "error[A080]: `inputs (teacher)`: teacher consistency is unknown: "
        "nothing says which teacher wrote the SFT data of the reference policy\n"
    )
    assert verify(unknown).code == 0  # as an artifact it is whole


def test_nothing_at_a_path_is_a_usage_error(here: Path) -> None:
    text = "error: no artifact at `artifact`\n  expected  a directory with `manifest.json`\n"
    for command in ("verify", "inspect"):
        assert run_command("lopd-store", command, "artifact") == Ran(code=2, stdout="", stderr=text)


@pytest.mark.parametrize("name", ["artifact", "artifact.building"])
def test_an_artifact_in_progress_is_told_from_none(here: Path, name: str) -> None:
    Path("artifact.building").mkdir()
    text = IN_PROGRESS.format(name, "artifact.building")
    for command in ("verify", "inspect"):
        assert run_command("lopd-store", command, name) == Ran(code=2, stdout="", stderr=text)


def test_sft_data_can_be_audited_again(teacher_dir: Path, rollouts_file: Path, sft_file: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    made = ("--teacher", teacher_dir, "--rollouts", rollouts_file, "--sft-data", sft_file, "--output", artifact)
    assert run_command("lopd-store", "build", *made).code == 0
    ran = run_command("lopd-store", "verify", artifact, "--teacher", teacher_dir, "--sft-data", sft_file)
    assert (ran.code, ran.stderr) == (0, "") and " positions of SFT data audited again, sha256:" in ran.stdout
    alone = run_command("lopd-store", "verify", artifact, "--sft-data", sft_file)
    assert alone.code == 2 and "`teacher` goes with `rescore` or `sft_data`" in alone.stderr
