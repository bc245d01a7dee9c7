"""Verification: whatever is wrong is found, under its own code, and nothing is worse than a finding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lopd_store
from lopd_store import layout
from lopd_store.errors import ArtifactError, InputError
from lopd_store.identity import identify
from lopd_store.part import Part
from lopd_store.topk import TopK
from lopd_store.verifier import verify
from tests.artifacts import (
    change,
    edit_manifest,
    read_first_part,
    replace_files,
    replace_part,
    replace_table,
    replace_topk_arrays,
)
from tests.tiny import PROMPTS
from tests.unit.conftest import LENGTHS

FIRST = [layout.part_file(0, kind) for kind in layout.FILE_KINDS]
TOKENS, TOPK = layout.part_file(0, layout.TOKENS), layout.part_file(0, layout.TOPK)
ROLLOUTS = layout.part_file(0, layout.ROLLOUTS)


def codes(directory: Path, **options: Any) -> list[str]:
    """The codes of all findings."""
    return [finding.code for finding in verify(directory, **options).findings]


def first_part(directory: Path) -> tuple[Part, TopK]:
    part = read_first_part(directory)
    assert part.topk is not None
    return part, part.topk


def test_an_honest_artifact_has_no_findings(sealed: Path) -> None:
    report = verify(sealed)
    assert report.ok and report.to_json()["ok"]
    assert (report.files, report.fingerprint) == (13, lopd_store.open(sealed).fingerprint)
    assert report.bytes == sum(
        path.stat().st_size for path in [sealed / layout.MANIFEST, *(sealed / "parts").iterdir()]
    )


def test_a_quick_look_at_an_honest_artifact_has_no_findings(sealed: Path) -> None:
    assert codes(sealed, quick=True) == []


def test_progress_ends_with_every_byte_of_the_parts(sealed: Path) -> None:
    heard: list[tuple[int, int]] = []
    verify(sealed, on_bytes=lambda *numbers: heard.append(numbers))
    total = sum(path.stat().st_size for path in (sealed / "parts").iterdir())
    assert heard[-1] == (total, total) and heard == sorted(heard)


# Bytes


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize(("quick", "code"), [(False, "A022"), (True, "A023")])
def test_one_flipped_byte_is_found(artifact: Path, name: str, quick: bool, code: str) -> None:
    data = bytearray((artifact / name).read_bytes())
    data[len(data) // 2] ^= 1
    (artifact / name).write_bytes(data)
    (finding,) = verify(artifact, quick=quick).findings
    assert (finding.code, finding.where) == (code, name)


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("quick", [False, True])
def test_a_truncated_file_is_found(artifact: Path, name: str, quick: bool) -> None:
    data = (artifact / name).read_bytes()
    (artifact / name).write_bytes(data[:-1])
    (finding,) = verify(artifact, quick=quick).findings
    assert (finding.code, finding.where) == ("A021", name)
    assert (finding.expected, finding.actual) == (f"{len(data)} bytes", f"{len(data) - 1} bytes")


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("quick", [False, True])
def test_a_missing_file_is_found(artifact: Path, name: str, quick: bool) -> None:
    (artifact / name).unlink()
    (finding,) = verify(artifact, quick=quick).findings
    assert (finding.code, finding.where) == ("A020", name)


@pytest.mark.parametrize("name", FIRST)
def test_a_link_to_the_very_same_bytes_is_found(artifact: Path, tmp_path: Path, name: str) -> None:
    (artifact / name).rename(tmp_path / "elsewhere")
    (artifact / name).symlink_to(tmp_path / "elsewhere")
    assert codes(artifact) == ["A020"]


def test_a_directory_in_the_place_of_a_file_is_found(artifact: Path) -> None:
    (artifact / TOPK).unlink()
    (artifact / TOPK).mkdir()
    assert codes(artifact) == ["A020"]


def test_parts_that_lie_elsewhere_are_found(artifact: Path, tmp_path: Path) -> None:
    (artifact / layout.PARTS).rename(tmp_path / "elsewhere")
    (artifact / layout.PARTS).symlink_to(tmp_path / "elsewhere")
    assert codes(artifact) == ["A020"]


@pytest.mark.parametrize("name", ["parts/stray", "parts/00004.topk.zarr.zip", "parts/.hidden"])
def test_a_file_too_many_is_found(artifact: Path, name: str) -> None:
    (artifact / name).write_bytes(b"")
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where) == ("A002", name)


def test_every_broken_file_is_reported(artifact: Path) -> None:
    for name in FIRST:
        (artifact / name).unlink()
    (artifact / layout.part_file(3, layout.TOKENS)).write_bytes(b"")
    assert codes(artifact) == ["A020", "A020", "A020", "A021"]


def test_no_parts_at_all_are_findings(artifact: Path) -> None:
    shutil.rmtree(artifact / layout.PARTS)
    assert codes(artifact) == ["A020"] * 12


# The manifest


def test_a_directory_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    report = verify(tmp_path)
    assert [finding.code for finding in report.findings] == ["A001"] and report.fingerprint is None


def test_a_linked_manifest_is_no_manifest(artifact: Path, tmp_path: Path) -> None:
    (artifact / layout.MANIFEST).rename(tmp_path / "manifest.json")
    (artifact / layout.MANIFEST).symlink_to(tmp_path / "manifest.json")
    assert codes(artifact) == ["A001"]


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"format": "lopd", "version": "2.0"}'])
def test_a_manifest_that_does_not_parse_is_found(artifact: Path, data: bytes) -> None:
    (artifact / layout.MANIFEST).write_bytes(data)
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where) == ("A010", layout.MANIFEST)


def test_a_manifest_above_its_limit_is_not_read_whole(artifact: Path) -> None:
    with (artifact / layout.MANIFEST).open("wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no room
    assert codes(artifact) == ["A010"]
    with pytest.raises(ArtifactError, match="is too large to read"):
        lopd_store.open(artifact)


def test_flipped_bytes_of_the_manifest_are_findings_or_another_artifact(artifact: Path) -> None:
    data = (artifact / layout.MANIFEST).read_bytes()
    honest = verify(artifact, quick=True).fingerprint
    for at in np.random.default_rng(0).integers(0, len(data), 100).tolist():
        (artifact / layout.MANIFEST).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        report = verify(artifact, quick=True)
        assert report.fingerprint != honest


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_where_there_is_no_directory_there_is_nothing_to_verify(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"no artifact at `.*{name}`"):
        verify(tmp_path / name)


# What the bytes say. Each of these artifacts is sealed with honest digests.

Tamper = Callable[[Part, TopK], dict[str, Any]]


def without_first_entries(part: Part, topk: TopK) -> dict[str, Any]:
    """Position 0 without any entry."""
    count = int(topk.counts[0])
    return {
        "counts": change(topk.counts, 0, 0),
        "ids": topk.ids[count:],
        "logprobs": topk.logprobs[count:],
        "tail_logprobs": change(topk.tail_logprobs, 0, 0.0),
    }


def favourite(*, less: float) -> Tamper:
    """The first response token is the teacher's favourite, with a log-prob that is `less` by so much."""

    def tamper(part: Part, topk: TopK) -> dict[str, Any]:
        prompt = LENGTHS[0][0]
        return {
            "token_ids": change(part.token_ids, prompt, topk.ids[0]),
            "sampled_logprobs": change(part.sampled_logprobs, 0, topk.logprobs[0] - less),
        }

    return tamper


def tie(part: Part, topk: TopK) -> dict[str, Any]:
    """Two entries of one log-prob, the higher id first."""
    ids = np.sort(topk.ids[:2])[::-1]
    return {"ids": change(topk.ids, [0, 1], ids), "logprobs": change(topk.logprobs, 1, topk.logprobs[0])}


def at(name: str, index: int, value: float) -> Tamper:
    """Another value at one index of one array."""

    def tamper(part: Part, topk: TopK) -> dict[str, Any]:
        return {name: change(getattr(part if hasattr(part, name) else topk, name), index, value)}

    return tamper


def offsets_that_wrap(part: Part, topk: TopK) -> dict[str, Any]:
    """Three rollouts whose lengths in 64 bits are positive and add up, though their offsets rise and fall."""
    offsets = np.array([0, HUGE, 26 - HUGE - 1, 25], np.int64)
    return {"rollout_offsets": offsets, "prompt_lengths": np.array([3, 1, 11], np.int32)}


HUGE = 2**63 - 1
TAMPERED: list[tuple[str, str, str, Tamper]] = [
    # code, file, what is said, what is changed
    ("A031", TOKENS, "is there in some parts and not in others", lambda part, topk: {"reference_logprobs": None}),
    ("A041", TOKENS, "do not run from 0 to the number of tokens", at("rollout_offsets", 0, 1)),
    ("A041", TOKENS, "do not run from 0 to the number of tokens", at("rollout_offsets", 0, -1)),
    ("A041", TOKENS, "do not run from 0 to the number of tokens", at("rollout_offsets", -1, 24)),
    ("A041", TOKENS, "do not run from 0 to the number of tokens", at("rollout_offsets", 1, 26)),
    ("A041", TOKENS, "do not run from 0 to the number of tokens", at("rollout_offsets", 1, HUGE)),
    ("A041", TOKENS, "do not run from 0 to the number of tokens", at("rollout_offsets", 1, -HUGE)),
    ("A041", TOKENS, "do not run from 0 to the number of tokens", offsets_that_wrap),
    ("A042", TOKENS, "rollout 1: the prompt does not fit", at("prompt_lengths", 1, 0)),
    ("A042", TOKENS, "rollout 1: the prompt does not fit", at("prompt_lengths", 1, 14)),
    ("A042", TOKENS, "rollout 0: the prompt does not fit", at("prompt_lengths", 0, -1)),
    ("A042", TOKENS, "positions are not the response tokens", at("prompt_lengths", 0, 4)),
    ("A043", TOPK, "`counts` do not add up to the entries", at("counts", 0, 41)),
    ("A043", TOPK, "`counts` do not add up to the entries", at("counts", 0, 65_535)),
    ("A050", TOKENS, "a token id is out of range", at("token_ids", 0, 300)),
    ("A050", TOKENS, "a token id is out of range", at("token_ids", 0, 2**32 - 1)),
    ("A050", TOPK, "a stored id is out of range", at("ids", 0, 300)),
    ("A051", TOKENS, "`sampled_logprobs`[2] is not a log-prob", at("sampled_logprobs", 2, 0.5)),
    ("A051", TOKENS, "`sampled_logprobs`[2] is not a log-prob", at("sampled_logprobs", 2, np.nan)),
    ("A051", TOKENS, "`sampled_logprobs`[2] is not a log-prob", at("sampled_logprobs", 2, np.inf)),
    ("A051", TOKENS, "`reference_logprobs`[1] is not a log-prob", at("reference_logprobs", 1, np.nan)),
    ("A051", TOPK, "`tail_logprobs`[3] is not a log-prob", at("tail_logprobs", 3, np.nan)),
    ("A051", TOPK, "`logprobs`[1] is not a log-prob", at("logprobs", 1, 1e38)),
    ("A051", TOPK, "`logprobs`[1] is not a log-prob", at("logprobs", 1, np.nan)),
    ("A051", TOPK, "`logprobs`[1] is not a log-prob", at("logprobs", 1, -np.inf)),
    ("A052", TOKENS, "`sampled_logprobs`[4] is not on the grid", at("sampled_logprobs", 4, -30.001)),
    ("A052", TOKENS, "`reference_logprobs`[0] is not on the grid", at("reference_logprobs", 0, -1.001)),
    ("A052", TOPK, "`tail_logprobs`[0] is not on the grid", at("tail_logprobs", 0, -4.01)),
    ("A052", TOPK, "`logprobs`[0] is not on the grid", at("logprobs", 0, -0.01)),
    ("A060", TOPK, "`counts` are out of range", without_first_entries),
    ("A061", TOPK, "position 0: entries are not in order", at("logprobs", 0, -40.0)),
    ("A061", TOPK, "position 0: entries are not in order", tie),
    ("A062", TOPK, "an id stands twice at one position", lambda part, topk: {"ids": change(topk.ids, 1, topk.ids[0])}),
    ("A063", TOPK, "position 5: top-k and tail do not sum to one", at("tail_logprobs", 5, 0.0)),
    ("A063", TOPK, "position 0: top-k and tail do not sum to one", lambda part, topk: {"logprobs": topk.logprobs - 1}),
    ("A064", TOPK, "position 0: the sampled log-prob and its top-k entry differ", favourite(less=1.0)),
    ("A064", TOPK, "position 0: the sampled log-prob and its top-k entry differ", favourite(less=np.inf)),
    ("A065", TOPK, "position 0: the sampled token is outside the top-k", at("sampled_logprobs", 0, 0.0)),
]


@pytest.mark.parametrize(("code", "where", "said", "tamper"), TAMPERED)
def test_values_that_are_wrong_are_found(artifact: Path, code: str, where: str, said: str, tamper: Tamper) -> None:
    replace_part(artifact, **tamper(*first_part(artifact)))
    assert any(
        (finding.code, finding.where) == (code, where) and said in finding.message
        for finding in verify(artifact).findings
    ), verify(artifact).findings


def test_a_quick_look_does_not_judge_values(artifact: Path) -> None:
    part, _ = first_part(artifact)
    replace_part(artifact, sampled_logprobs=np.full_like(part.sampled_logprobs, np.nan))
    assert codes(artifact, quick=True) == []


def test_rewriting_a_part_as_it_was_leaves_nothing_to_find(artifact: Path) -> None:
    replace_part(artifact)
    assert codes(artifact) == []


def test_a_sampled_token_in_the_top_k_with_its_logprob_is_fine(artifact: Path) -> None:
    replace_part(artifact, **favourite(less=0.0)(*first_part(artifact)))
    assert codes(artifact) == []


def test_certainty_is_legal(artifact: Path) -> None:
    part, topk = first_part(artifact)
    (certain,) = np.full((1, len(topk.counts)), 0.0, np.float32)
    one = np.ones_like(topk.counts)
    replace_part(
        artifact,
        counts=one,
        ids=part.response_ids,
        logprobs=certain,
        tail_logprobs=np.full_like(certain, -np.inf),
        sampled_logprobs=certain,
    )
    assert codes(artifact) == []


def test_an_impossible_sampled_token_is_legal(artifact: Path) -> None:
    part, topk = first_part(artifact)
    outside = [j for j, id in enumerate(part.response_ids) if id not in topk.ids[topk.offsets[j] : topk.offsets[j + 1]]]
    replace_part(artifact, sampled_logprobs=change(part.sampled_logprobs, outside, -np.inf))
    assert outside and codes(artifact) == []


def test_a_rank_without_an_id_is_found(artifact: Path) -> None:
    _, topk = first_part(artifact)
    replace_topk_arrays(artifact, id_table=np.unique(topk.ids)[:-1])
    assert codes(artifact) == ["A044"]


def test_an_id_table_with_an_id_twice_is_found(artifact: Path) -> None:
    _, topk = first_part(artifact)
    replace_topk_arrays(artifact, id_table=np.append(np.unique(topk.ids), topk.ids[:1]))
    assert codes(artifact) == ["A045"]


@pytest.mark.parametrize("name", ["rollouts", "tokens", "positions", "entries"])
def test_arrays_of_other_lengths_than_the_manifest_says_are_found(artifact: Path, name: str) -> None:
    counts = lopd_store.open(artifact).manifest.parts[0].counts
    replace_files(artifact, {}, replace(counts, **{name: getattr(counts, name) + 1}))
    assert codes(artifact) == ["A040"]


def test_more_entries_than_k_max_are_found(artifact: Path) -> None:
    data = (artifact / layout.MANIFEST).read_bytes()
    (artifact / layout.MANIFEST).write_bytes(edit_manifest(data, "encoding", "selection", "k_max", value=3))
    assert set(codes(artifact)) == {"A060"}


def test_a_part_that_does_not_decode_is_found_and_judged_no_further(artifact: Path) -> None:
    replace_files(artifact, {layout.TOPK: b"PK no zip", layout.ROLLOUTS: b"no table"})
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where) == ("A030", TOPK)


def test_another_part_in_the_place_of_a_part_is_found(artifact: Path) -> None:
    other = (artifact / layout.part_file(1, layout.TOPK)).read_bytes()
    replace_files(artifact, {layout.TOPK: other})
    assert codes(artifact) == ["A040"]


@pytest.mark.parametrize(
    ("columns", "code"),
    [
        ({"prompt": ["a", "b"]}, "A070"),
        ({"prompt_length": [3, 12], "response_length": [9, 2]}, "A071"),
        ({"prompt_length": [3, 13], "response_length": [9, 1]}, "A071"),
        ({"prompt_length": [3], "response_length": [9]}, "A071"),
        ({"prompt_length": ["3", "12"], "response_length": ["9", "1"]}, "A071"),
    ],
)
def test_a_rollouts_table_of_other_rollouts_is_found(artifact: Path, columns: dict[str, Any], code: str) -> None:
    replace_table(artifact, columns)
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where) == (code, ROLLOUTS)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no table at all", b"PAR1" + b"\xff" * 40 + b"PAR1"])
def test_a_rollouts_table_that_does_not_read_is_found(artifact: Path, data: bytes) -> None:
    replace_files(artifact, {layout.ROLLOUTS: data})
    assert codes(artifact) == ["A070"]


@pytest.fixture(scope="module")
def of_the_teacher(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of rollouts that the teacher sampled itself, so that most tokens are in the top-k."""
    path = tmp_path_factory.mktemp("teacher")
    (path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    lopd_store.generate(model=teacher_dir, prompts=path / "p.jsonl", output=path / "r.parquet", max_response_tokens=20)
    return lopd_store.build(teacher=teacher_dir, rollouts=path / "r.parquet", output=path / "artifact").path


@pytest.mark.parametrize("shift", [-1, 1])
def test_rows_that_are_off_by_one_are_found(of_the_teacher: Path, tmp_path: Path, shift: int) -> None:
    artifact = Path(shutil.copytree(of_the_teacher, tmp_path / "shifted"))
    part, _ = first_part(artifact)
    replace_part(artifact, sampled_logprobs=np.roll(part.sampled_logprobs, shift))
    assert codes(of_the_teacher) == [] and "A064" in codes(artifact)


def test_tokens_that_were_edited_after_scoring_are_found(of_the_teacher: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(of_the_teacher, tmp_path / "edited"))
    part, _ = first_part(artifact)
    replace_part(artifact, token_ids=np.roll(part.token_ids, 1))
    assert {"A064", "A065"} & set(codes(artifact))


# Never worse than a finding

WILD: dict[str, list[Any]] = {
    "u": [0, 1, 299, 300, 65_535, 2**31, 2**32 - 1],
    "i": [0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)],
    "f": [0.0, -0.0, -np.inf, np.inf, np.nan, -3e38, 3e38, -1e-40, -0.03],
    "b": [False, True],
}


@pytest.mark.parametrize("seed", range(25))
def test_no_values_make_verification_fail(artifact: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    part, topk = first_part(artifact)
    arrays: dict[str, np.ndarray] = {
        item.name: getattr(owner, item.name) for owner in (part, topk) for item in fields(owner) if item.name != "topk"
    }
    for name in generator.choice(sorted(arrays), generator.integers(1, 4), replace=False):
        array = arrays[name].copy()
        limits = None if array.dtype.kind in "fb" else np.iinfo(array.dtype)
        wild = [value for value in WILD[array.dtype.kind] if limits is None or limits.min <= value <= limits.max]
        index = generator.integers(0, len(array), generator.integers(1, 4))
        array[index] = generator.choice(np.array(wild, array.dtype), len(index))
        arrays[name] = array
    arrays["ids"] = np.minimum(arrays["ids"], 1 << 20)  # the writer's table of frequencies is as long as the highest id
    replace_part(artifact, **arrays)
    assert all(finding.code.startswith("A0") and finding.message for finding in verify(artifact).findings)


# The report


def test_a_student_is_asked_about_at_the_gate(sealed: Path, student_dir: Path) -> None:
    findings = verify(sealed, student=identify(student_dir)).findings
    assert [(finding.code, finding.where) for finding in findings] == [
        ("A080", "inputs (teacher)"),
        ("A080", "inputs (student)"),
    ]


def test_a_report_raises_its_first_finding(artifact: Path) -> None:
    (artifact / TOKENS).write_bytes(b"")
    report = verify(artifact)
    with pytest.raises(
        ArtifactError, match=r"`parts/00000\.tokens\.zarr\.zip`: size differs\n  expected  .* bytes"
    ) as e:
        report.require_ok()
    assert e.value.code == "A021"


def test_a_report_without_findings_raises_nothing(sealed: Path) -> None:
    verify(sealed).require_ok()


def test_a_report_is_json(artifact: Path) -> None:
    (artifact / TOKENS).unlink()
    value = json.loads(json.dumps(verify(artifact).to_json()))
    assert value["ok"] is False and value["findings"][0]["code"] == "A020"
