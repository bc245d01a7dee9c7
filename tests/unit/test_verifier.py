"""Verification: whatever is wrong is found, under its own code, and nothing is worse than a finding."""

from __future__ import annotations

import json
import pwd
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import lopd_store
from lopd_store import layout, remembered
from lopd_store.container import CHUNK, Arrays, Group
from lopd_store.errors import ArtifactError, InputError
from lopd_store.identity import identify
from lopd_store.part import Part, tokens_arrays, tokens_file, topk_arrays
from lopd_store.remembered import is_remembered
from lopd_store.topk import TopK
from lopd_store.verifier import verify
from tests.artifacts import (
    change,
    edit_manifest,
    random_pairs,
    read_first_part,
    replace_arrays,
    replace_files,
    replace_part,
    replace_table,
    save_rollouts,
)
from tests.tiny import PROMPTS, save_tiny_model
from tests.unit.conftest import LENGTHS, PART_POSITIONS
from tests.zips import edit_members, pco

FIRST = [layout.part_file(0, kind) for kind in layout.FILE_KINDS]
TOKENS, TOPK = layout.part_file(0, layout.TOKENS), layout.part_file(0, layout.TOPK)
ROLLOUTS = layout.part_file(0, layout.ROLLOUTS)
HUGE = 2**63 - 1
ZEROS = np.zeros(2, np.int32)


def codes(directory: Path, **options: Any) -> list[str]:
    """The codes of all findings."""
    return [finding.code for finding in verify(directory, **options).findings]


def assert_found(directory: Path, code: str, where: str, said: str) -> None:
    findings = verify(directory).findings
    assert any((found.code, found.where) == (code, where) and said in found.message for found in findings), findings


def first_part(directory: Path) -> tuple[Part, TopK]:
    part = read_first_part(directory)
    assert part.topk is not None
    return part, part.topk


def stored_arrays(directory: Path, kind: str) -> Arrays:
    """The arrays of one file of part 0 as they are stored, codes and rows."""
    encoding = lopd_store.open(directory).manifest.encoding
    specs = tokens_arrays(encoding) if kind == layout.TOKENS else topk_arrays(encoding)
    group = Group((directory / layout.part_file(0, kind)).read_bytes(), specs, where=kind)
    return {name: group.read(name) for name in group.lengths}


def seal_with(directory: Path, *place: str | int, value: Any) -> None:
    """Say something else in the manifest, and seal it."""
    path = directory / layout.MANIFEST
    path.write_bytes(edit_manifest(path.read_bytes(), *place, value=value))


@pytest.fixture(scope="module")
def sealed_exact(teacher_dir: Path, rollouts_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact without rounding; not to be changed."""
    output = tmp_path_factory.mktemp("artifacts") / "exact"
    return lopd_store.build(
        teacher=teacher_dir,
        rollouts=rollouts_path,
        output=output,
        exact=True,
        k_max=40,
        part_positions=PART_POSITIONS,
    ).path


@pytest.fixture
def exact(sealed_exact: Path, tmp_path: Path) -> Path:
    """A copy of the exact artifact that a test may change."""
    return Path(shutil.copytree(sealed_exact, tmp_path / "exact"))


@pytest.fixture(scope="module")
def rollouts_of_the_student(student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the student sampled, with a record that says so."""
    return generate(student_dir, tmp_path_factory.mktemp("rollouts"))


@pytest.fixture(scope="module")
def sealed_union(
    teacher_dir: Path, student_dir: Path, rollouts_of_the_student: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An artifact with the top-k of the reference policy too; not to be changed."""
    output = tmp_path_factory.mktemp("artifacts") / "union"
    return lopd_store.build(
        teacher=teacher_dir, reference=student_dir, rollouts=rollouts_of_the_student, output=output, k_max=30
    ).path


@pytest.fixture
def union(sealed_union: Path, tmp_path: Path) -> Path:
    """A copy of the artifact of two models that a test may change."""
    return Path(shutil.copytree(sealed_union, tmp_path / "union"))


def generate(model: Path, path: Path) -> Path:
    (path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    lopd_store.generate(model=model, prompts=path / "p.jsonl", output=path / "r.parquet", max_response_tokens=20)
    return path / "r.parquet"


@pytest.mark.parametrize("name", ["sealed_exact", "sealed_union"])
def test_an_honest_artifact_of_another_encoding_has_no_findings(request: pytest.FixtureRequest, name: str) -> None:
    assert codes(request.getfixturevalue(name)) == []


@pytest.mark.parametrize("coverage", [0.9, 0.999_999, 1.0])
def test_a_padded_head_and_a_k_max_beyond_the_vocabulary_have_no_findings(tmp_path: Path, coverage: float) -> None:
    teacher = save_tiny_model(tmp_path / "padded", seed=4, output_width=320)
    rows = save_rollouts(tmp_path / "r.parquet", random_pairs([(3, 9), (2, 4)]))
    built = lopd_store.build(
        teacher=teacher, rollouts=rows, output=tmp_path / "a", k_min=400, k_max=400, coverage=coverage
    )
    assert int(built.part(0).counts.entries) == 13 * 300 and codes(built.path) == []


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


def test_bytes_alone_are_compared_where_values_are_left_to_their_reader(artifact: Path) -> None:
    replace_arrays(artifact, layout.TOKENS, prompt_lengths=ZEROS)
    assert codes(artifact) == ["A042"]
    assert codes(artifact, values=False) == []
    (artifact / TOPK).write_bytes((artifact / TOPK).read_bytes()[:-1] + b"!")
    assert codes(artifact, values=False) == ["A022"]
    assert verify(artifact).values
    assert not verify(artifact, values=False).values and not verify(artifact, quick=True).values


# What is remembered


@pytest.mark.usefixtures("forgotten")
def test_that_all_values_were_right_is_remembered_of_the_artifact_wherever_it_lies(
    artifact: Path, tmp_path: Path
) -> None:
    opened = lopd_store.open(artifact)
    assert verify(artifact, quick=True).ok and verify(artifact, values=False).ok
    assert not is_remembered(opened.fingerprint, opened.view)
    copy = tmp_path / "elsewhere"
    shutil.copytree(artifact, copy)
    assert verify(copy).ok
    assert is_remembered(opened.fingerprint, opened.view)
    half = lopd_store.subset(artifact, output=tmp_path / "half", parts=range(2))
    assert is_remembered(opened.fingerprint, half.view)
    assert not is_remembered(opened.fingerprint, replace(half.view, parts=range(1, 2)))


@pytest.mark.usefixtures("forgotten")
def test_what_was_wrong_or_verified_by_another_lopd_is_not_remembered(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = lopd_store.open(artifact)
    (artifact / layout.PARTS / "stray").write_bytes(b"")
    assert not verify(artifact).ok and not is_remembered(opened.fingerprint, opened.view)
    (artifact / layout.PARTS / "stray").unlink()
    with monkeypatch.context() as another:
        another.setattr(remembered, "version", lambda _: "0.0")
        assert verify(artifact).ok and is_remembered(opened.fingerprint, opened.view)
    assert not is_remembered(opened.fingerprint, opened.view)


@pytest.mark.parametrize("lacking", ["a cache to write to", "a cache to read", "a home", "an installed lopd"])
def test_where_nothing_can_be_remembered_all_is_verified_as_ever(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    def fail(_: object) -> NoReturn:
        raise KeyError if lacking == "a home" else PackageNotFoundError

    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("file" if "write" in lacking else 9999 * "long")))
    if lacking == "a home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", fail)
    if lacking == "an installed lopd":
        monkeypatch.setattr(remembered, "version", fail)
    opened = lopd_store.open(artifact)
    assert verify(artifact).ok and not is_remembered(opened.fingerprint, opened.view)


# Beside a transfer


def test_parts_are_verified_as_they_arrive(sealed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / layout.PARTS).mkdir(parents=True)
    shutil.copyfile(sealed / layout.MANIFEST, copy / layout.MANIFEST)
    first_size = sum((sealed / name).stat().st_size for name in FIRST)
    first_is_read = threading.Event()

    def arrive() -> Iterator[int]:
        for number in range(len(lopd_store.open(sealed).manifest.parts)):
            assert number == 0 or first_is_read.wait(30)
            for name in (layout.part_file(number, kind) for kind in layout.FILE_KINDS):
                shutil.copyfile(sealed / name, copy / name)
            yield number

    def hear(read: int, total: int) -> None:
        if read == first_size:
            first_is_read.set()

    report = verify(copy, arriving=arrive(), on_bytes=hear)
    assert report == verify(sealed)


def test_parts_are_told_of_in_order_up_to_the_first_that_is_wrong(artifact: Path) -> None:
    heard: list[int] = []
    assert verify(artifact, on_part=heard.append).ok
    assert heard == [0, 1, 2, 3]
    heard.clear()
    (artifact / layout.part_file(2, layout.TOPK)).write_bytes(b"")
    assert codes(artifact, on_part=heard.append) == ["A021"]
    assert heard == [0, 1]


def test_what_cannot_arrive_ends_the_verification(sealed: Path) -> None:
    def arrive() -> Iterator[int]:
        yield 0
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        verify(sealed, arriving=arrive())


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


def test_an_xxh3_that_is_not_that_of_the_bytes_is_found(artifact: Path) -> None:
    seal_with(artifact, "parts", 0, "files", "topk", "xxh3_128", value="0" * 32)
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where, finding.expected) == ("A023", TOPK, "0" * 32)


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


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"format": "flop", "version": "1.0"}'])
def test_a_manifest_that_does_not_parse_is_found(artifact: Path, data: bytes) -> None:
    (artifact / layout.MANIFEST).write_bytes(data)
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where) == ("A010", layout.MANIFEST)


def test_a_manifest_that_was_edited_is_found(artifact: Path) -> None:
    path = artifact / layout.MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"k_max": 40', b'"k_max": 41'))
    assert codes(artifact) == ["A011"]


def test_a_manifest_in_another_form_is_found(artifact: Path) -> None:
    path = artifact / layout.MANIFEST
    path.write_bytes(path.read_bytes().rstrip())
    assert codes(artifact) == ["A012"]


@pytest.mark.parametrize(
    ("code", "place", "value"),
    [
        ("A013", ("version",), "2.0"),
        ("A014", ("surprise",), 1),
        ("A014", ("text",), "yes"),
        ("A015", ("counts", "positions"), 1),
        ("A016", ("parts", 0, "files", "topk", "path"), "parts/00001.topk.zarr.zip"),
        ("A016", ("parts",), []),
        ("A017", ("encoding", "grids", "topk_logprobs"), [[0, 0.3]]),
        ("A018", ("inputs", 0, "teacher", "weights"), "unknown"),
        ("A019", ("inputs", 0, "scoring", "temperature"), 0.7),
    ],
)
def test_a_manifest_that_says_what_none_may_say_is_found(
    artifact: Path, code: str, place: tuple[str | int, ...], value: Any
) -> None:
    seal_with(artifact, *place, value=value)
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where) == (code, layout.MANIFEST)


def test_a_manifest_above_its_limit_is_not_read_whole(artifact: Path) -> None:
    with (artifact / layout.MANIFEST).open("wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no room
    assert codes(artifact) == ["A010"]
    with pytest.raises(ArtifactError, match="is too large to read"):
        lopd_store.open(artifact)


def test_flipped_bytes_of_the_manifest_are_findings(artifact: Path) -> None:
    data = (artifact / layout.MANIFEST).read_bytes()
    for at in np.random.default_rng(0).integers(0, len(data), 100).tolist():
        (artifact / layout.MANIFEST).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        (finding,) = verify(artifact, quick=True).findings
        assert finding.code in ("A010", "A011", "A013")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"format": "lopd-view"}', b"x" * 5000])
def test_a_view_that_is_none_is_found(artifact: Path, data: bytes) -> None:
    (artifact / layout.VIEW).write_bytes(data)
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where) == ("A003", layout.VIEW)


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_where_there_is_no_directory_there_is_nothing_to_verify(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"no artifact at `.*{name}`"):
        verify(tmp_path / name)


# What the bytes say. Each of these artifacts is sealed with honest digests.


@pytest.mark.parametrize(
    ("code", "said", "edit"),
    [
        ("A031", "has other arrays", lambda members: [members.pop("ids/zarr.json"), members.pop("ids/c/0")]),
        ("A031", "is not what the format says", lambda members: members.update({"zarr.json": b"{}"})),
        ("A032", "the chunk `ids/c/0` is missing", lambda members: members.pop("ids/c/0")),
        ("A032", "the chunk `evil` is missing or does not belong", lambda members: members.update({"evil": b""})),
        ("A033", "`ids/c/0` does not decode", lambda members: members.update({"ids/c/0": b"noise"})),
    ],
)
def test_a_file_in_another_form_is_found(
    artifact: Path, code: str, said: str, edit: Callable[[dict[str, bytes]], object]
) -> None:
    data = (artifact / TOPK).read_bytes()
    replace_files(artifact, {layout.TOPK: edit_members(data, edit)})
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where) == (code, TOPK) and said in finding.message


def test_a_crc_that_is_wrong_is_found(artifact: Path) -> None:
    data = bytearray((artifact / TOPK).read_bytes())
    for header in (b"PK\3\4", b"PK\1\2"):
        data[data.index(header) + (14 if header == b"PK\3\4" else 16)] ^= 1
    replace_files(artifact, {layout.TOPK: bytes(data)})
    assert_found(artifact, "A030", TOPK, "the CRC of `counts/c/0` differs")


def test_padding_that_holds_something_is_found(artifact: Path) -> None:
    part = read_first_part(artifact)
    more = CHUNK + 1 - len(part.token_ids)  # of the first prompt, so that token ids have a second chunk and padding
    replace_part(
        artifact,
        token_ids=np.concatenate([np.zeros(more, np.uint32), part.token_ids]),
        rollout_offsets=part.rollout_offsets + more * (np.arange(len(part.rollout_offsets)) > 0),
        prompt_lengths=change(part.prompt_lengths, 0, LENGTHS[0][0] + more),
    )
    assert codes(artifact) == ["A071"]  # the table speaks of the shorter prompt
    chunk = np.zeros((CHUNK + 1) // 2 + 1, np.uint32)
    data = edit_members((artifact / TOKENS).read_bytes(), lambda members: members.update({"token_ids/c/1": pco(chunk)}))
    replace_files(artifact, {layout.TOKENS: data})
    assert_found(artifact, "A034", TOKENS, "`token_ids` is not padded with its fill value")


def test_reference_logprobs_that_the_manifest_does_not_state_are_found(artifact: Path) -> None:
    seal_with(artifact, "reference_logprobs", value=False)
    assert codes(artifact) == ["A035"] * 4


def test_reference_logprobs_that_are_not_there_are_found(artifact: Path) -> None:
    part, encoding = read_first_part(artifact), lopd_store.open(artifact).manifest.encoding
    replace_files(artifact, {layout.TOKENS: tokens_file(replace(part, reference_logprobs=None), encoding)})
    assert_found(artifact, "A035", TOKENS, "`reference_logprobs` are not as the manifest states")


Edit = Callable[[Arrays], dict[str, Any]]


def at(name: str, index: int, value: Any) -> Edit:
    """Another value at one index of one array as it is stored."""
    return lambda arrays: {name: change(arrays[name], index, value)}


def row_beyond(arrays: Arrays) -> dict[str, Any]:
    return {"ids": change(arrays["ids"], 0, len(arrays["id_table"]) + 1)}


def id_twice(arrays: Arrays) -> dict[str, Any]:
    return {"id_table": change(arrays["id_table"], 1, arrays["id_table"][0])}


STORED: list[tuple[str, str, str, Edit]] = [
    # code, file, what is said, what is changed in a compact artifact
    *(
        ("A041", TOKENS, "do not run from 0 to the number of tokens", at("rollout_offsets", index, value))
        for index, value in ((0, 1), (0, -1), (-1, 24), (1, 26), (1, HUGE), (1, -HUGE))
    ),
    ("A042", TOKENS, "rollout 1: the prompt does not fit", at("prompt_lengths", 1, 0)),
    ("A042", TOKENS, "rollout 1: the prompt does not fit", at("prompt_lengths", 1, 14)),
    ("A042", TOKENS, "rollout 0: the prompt does not fit", at("prompt_lengths", 0, -1)),
    ("A042", TOKENS, "positions are not the response tokens", at("prompt_lengths", 0, 4)),
    ("A043", TOPK, "`counts` do not add up to the entries", at("counts", 0, 1)),
    ("A043", TOPK, "`counts` do not add up to the entries", at("counts", 0, 65_535)),
    ("A044", TOPK, "a row is not in `id_table`", row_beyond),
    ("A044", TOPK, "a row is not in `id_table`", at("ids", 0, 0xFFFF_FFFF)),
    ("A045", TOPK, "`id_table` has an id twice", id_twice),
    ("A050", TOKENS, "a token id is out of range", at("token_ids", 0, 300)),
    ("A050", TOKENS, "a token id is out of range", at("token_ids", 0, 0xFFFF_FFFF)),
    ("A050", TOPK, "an id of `id_table` is out of range", at("id_table", 0, 300)),
    ("A051", TOKENS, "`sampled_logprobs`[2] is not a log-prob", at("sampled_logprobs", 2, 65_535)),
    ("A051", TOKENS, "`reference_logprobs`[1] is not a log-prob", at("reference_logprobs", 1, 65_535)),
    ("A051", TOPK, "`tail_logprobs`[3] is not a log-prob", at("tail_logprobs", 3, 65_535)),
    ("A051", TOPK, "`logprobs`[1] is not a log-prob", at("logprobs", 1, 65_535)),
    ("A051", TOPK, "`logprobs`[1] is not a log-prob", at("logprobs", 1, 65_534)),
]
UNROUNDED: list[tuple[str, str, str, Edit]] = [
    # code, file, what is said, what is changed in an exact artifact
    *(
        ("A051", TOKENS, "`sampled_logprobs`[2] is not a log-prob", at("sampled_logprobs", 2, value))
        for value in (1e-7, np.nan, np.inf)
    ),
    ("A051", TOKENS, "`reference_logprobs`[1] is not a log-prob", at("reference_logprobs", 1, np.nan)),
    ("A051", TOPK, "`tail_logprobs`[3] is not a log-prob", at("tail_logprobs", 3, np.nan)),
    *(("A051", TOPK, "`logprobs`[1] is not a log-prob", at("logprobs", 1, value)) for value in (1e38, np.nan, -np.inf)),
    ("A063", TOPK, "position 5: top-k and tail do not sum to one", at("tail_logprobs", 5, -3.0)),
]


@pytest.mark.parametrize(("code", "where", "said", "edit"), STORED)
def test_stored_values_that_are_wrong_are_found(artifact: Path, code: str, where: str, said: str, edit: Edit) -> None:
    kind = where.split(".")[1]
    replace_arrays(artifact, kind, **edit(stored_arrays(artifact, kind)))
    assert_found(artifact, code, where, said)


@pytest.mark.parametrize(("code", "where", "said", "edit"), UNROUNDED)
def test_unrounded_values_that_are_wrong_are_found(exact: Path, code: str, where: str, said: str, edit: Edit) -> None:
    kind = where.split(".")[1]
    replace_arrays(exact, kind, **edit(stored_arrays(exact, kind)))
    assert_found(exact, code, where, said)


def test_offsets_that_wrap_around_are_found(artifact: Path) -> None:
    """Three rollouts whose lengths in 64 bits are positive and add up, though their offsets rise and fall."""
    replace_arrays(
        artifact,
        layout.TOKENS,
        rollout_offsets=np.array([0, HUGE, 26 - HUGE - 1, 25], np.int64),
        prompt_lengths=np.array([3, 1, 11], np.int32),
    )
    counts = lopd_store.open(artifact).manifest.parts[0].counts
    replace_files(artifact, {}, replace(counts, rollouts=3))
    assert_found(artifact, "A041", TOKENS, "do not run from 0 to the number of tokens")


def test_a_response_token_that_is_stored_by_its_row_in_the_table_is_found(artifact: Path) -> None:
    part, arrays = read_first_part(artifact), stored_arrays(artifact, layout.TOPK)
    entry = int(np.flatnonzero(arrays["ids"] == 0)[0])
    position = int(np.searchsorted(np.cumsum(arrays["counts"]), entry, side="right"))
    table = np.append(arrays["id_table"], part.response_ids[position])
    if len(np.unique(table)) == len(table):
        rows = change(arrays["ids"], entry, len(table))
    else:
        table = arrays["id_table"]
        rows = change(arrays["ids"], entry, 1 + int(np.flatnonzero(table == part.response_ids[position])[0]))
    replace_arrays(artifact, layout.TOPK, id_table=table, ids=rows)
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where) == ("A046", TOPK)
    assert f"position {position}: the response token is stored by its row" in finding.message


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


def with_fewer_entries(part: Part, topk: TopK) -> dict[str, Any]:
    """The three likeliest of each position, and everything else in the tail."""
    return {name: getattr(topk.truncate(3), name) for name in ("counts", "ids", "logprobs", "tail_logprobs")}


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


TAMPERED: list[tuple[str, str, Tamper]] = [
    # code, what is said, what is changed
    ("A060", "`counts` are out of range", without_first_entries),
    ("A061", "position 0: entries are not in order", lambda _, topk: {"logprobs": change(topk.logprobs, 0, -40.0)}),
    ("A061", "position 0: entries are not in order", tie),
    ("A062", "position 0: an id stands twice", lambda _, topk: {"ids": change(topk.ids, 1, topk.ids[0])}),
    (
        "A063",
        "position 5: top-k and tail do not sum to one",
        lambda _, topk: {"tail_logprobs": change(topk.tail_logprobs, 5, 0.0)},
    ),
    ("A063", "position 0: top-k and tail do not sum to one", lambda _, topk: {"logprobs": topk.logprobs - 1}),
    ("A064", "position 0: the sampled log-prob and the entry of the response token differ", favourite(less=1.0)),
    ("A064", "position 0: the sampled log-prob and the entry of the response token differ", favourite(less=np.inf)),
    (
        "A065",
        "position 0: the sampled token is not among the entries, yet likelier than the tail",
        lambda part, _: {"sampled_logprobs": change(part.sampled_logprobs, 0, 0.0)},
    ),
    ("A066", "position 0: the entries do not reach the coverage", with_fewer_entries),
]


@pytest.mark.parametrize(("code", "said", "tamper"), TAMPERED)
def test_positions_that_are_wrong_are_found(artifact: Path, code: str, said: str, tamper: Tamper) -> None:
    replace_part(artifact, **tamper(*first_part(artifact)))
    assert_found(artifact, code, TOPK, said)


@pytest.mark.parametrize(
    ("code", "name", "value", "said"),
    [
        ("A066", "coverage", 1.0, "position 0: there are fewer entries than `k_max`"),
        ("A067", "coverage", 0.5, "position 0: there are more entries than the coverage asks for"),
        ("A060", "k_max", 3, "`counts` are out of range"),
    ],
)
def test_entries_that_are_not_the_selection_are_found(
    artifact: Path, code: str, name: str, value: Any, said: str
) -> None:
    seal_with(artifact, "encoding", "selection", name, value=value)
    assert_found(artifact, code, TOPK, said)
    assert set(codes(artifact)) == {code}


def test_a_k_min_is_what_more_entries_than_the_coverage_asks_for_may_come_from(artifact: Path) -> None:
    seal_with(artifact, "encoding", "selection", "coverage", value=0.5)
    seal_with(artifact, "encoding", "selection", "k_min", value=40)
    assert codes(artifact) == []


def test_reference_logprobs_of_the_entries_that_do_not_sum_to_one_are_found(union: Path) -> None:
    _, topk = first_part(union)
    replace_part(union, reference_tail_logprobs=np.zeros_like(topk.tail_logprobs))
    assert_found(union, "A068", TOPK, "the reference log-probs and their tail do not sum to one")
    assert codes(union) == ["A068"]


def test_a_reference_logprob_that_is_no_number_is_found(union: Path) -> None:
    codes_ = stored_arrays(union, layout.TOPK)["reference_logprobs"]
    replace_arrays(union, layout.TOPK, reference_logprobs=change(codes_, 3, 65_535))
    assert_found(union, "A051", TOPK, "`reference_logprobs`[3] is not a log-prob")


def test_a_quick_look_does_not_judge_values(artifact: Path) -> None:
    part, _ = first_part(artifact)
    replace_part(artifact, sampled_logprobs=np.zeros_like(part.sampled_logprobs))
    assert codes(artifact, quick=True) == [] and codes(artifact) != []


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


@pytest.mark.parametrize("name", ["rollouts", "tokens", "positions", "entries"])
def test_arrays_of_other_lengths_than_the_manifest_says_are_found(artifact: Path, name: str) -> None:
    counts = lopd_store.open(artifact).manifest.parts[0].counts
    replace_files(artifact, {}, replace(counts, **{name: getattr(counts, name) + 1}))
    assert codes(artifact) == ["A040"]


def test_a_part_that_does_not_decode_is_found_and_judged_no_further(artifact: Path) -> None:
    replace_files(artifact, {layout.TOPK: b"PK no zip", layout.ROLLOUTS: b"no table"})
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where) == ("A030", TOPK)


def test_another_part_in_the_place_of_a_part_is_found(artifact: Path) -> None:
    other = (artifact / layout.part_file(1, layout.TOPK)).read_bytes()
    replace_files(artifact, {layout.TOPK: other})
    assert codes(artifact) == ["A040"]


WITH_TEXT = {"prompt": ["a", "b"], "response": ["c", "d"]}


def lengths(prompts: list[int], responses: list[int]) -> dict[str, Any]:
    return {"prompt_length": np.array(prompts, np.int32), "response_length": np.array(responses, np.int32)}


@pytest.mark.parametrize(
    ("columns", "code"),
    [
        ({"prompt": ["a", "b"]}, "A070"),
        ({"prompt_length": ["3", "12"], "response_length": ["9", "1"]}, "A070"),
        ({"prompt_length": [3, 12], "response_length": [9, 1]}, "A070"),  # 64 bits
        (WITH_TEXT | lengths([3, 12], [9, 2]), "A071"),
        (WITH_TEXT | lengths([3, 13], [9, 1]), "A071"),
        (lengths([3], [9]), "A071"),
    ],
)
def test_a_rollouts_table_of_other_rollouts_is_found(artifact: Path, columns: dict[str, Any], code: str) -> None:
    replace_table(artifact, columns)
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where) == (code, ROLLOUTS)


def test_text_that_the_manifest_states_and_the_table_lacks_is_found(artifact: Path) -> None:
    replace_table(artifact, {**lengths([3, 12], [9, 1]), "prompt": ["a", "b"]})
    (finding,) = verify(artifact).findings
    assert (finding.code, finding.where, finding.expected) == ("A072", ROLLOUTS, "`prompt` and `response`")


def test_text_that_the_manifest_denies_is_found(artifact: Path) -> None:
    seal_with(artifact, "text", value=False)
    assert codes(artifact) == ["A072"] * 4


def test_a_table_without_text_is_fine_where_the_manifest_says_so(artifact: Path) -> None:
    seal_with(artifact, "text", value=False)
    replace_table(artifact, lengths([3, 12], [9, 1]))
    assert codes(artifact) == ["A072"] * 3  # of the other parts


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no table at all", b"PAR1" + b"\xff" * 40 + b"PAR1"])
def test_a_rollouts_table_that_does_not_read_is_found(artifact: Path, data: bytes) -> None:
    replace_files(artifact, {layout.ROLLOUTS: data})
    assert codes(artifact) == ["A070"]


@pytest.fixture(scope="module")
def of_the_teacher(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of rollouts that the teacher sampled itself, so that most tokens are in the top-k."""
    path = tmp_path_factory.mktemp("teacher")
    rollouts = generate(teacher_dir, path)
    return lopd_store.build(teacher=teacher_dir, rollouts=rollouts, output=path / "artifact").path


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
    "u": [0, 1, 299, 300, 65_534, 65_535, 2**31, 2**32 - 1],
    "i": [0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)],
    "f": [0.0, -0.0, -np.inf, np.inf, np.nan, -3e38, 3e38, -1e-40, -0.03],
    "b": [False, True],
}


@pytest.mark.parametrize("name", ["artifact", "exact", "union"])
@pytest.mark.parametrize("seed", range(15))
def test_no_values_make_verification_fail(request: pytest.FixtureRequest, name: str, seed: int) -> None:
    directory, generator = request.getfixturevalue(name), np.random.default_rng(seed)
    for kind in (layout.TOKENS, layout.TOPK):
        arrays = stored_arrays(directory, kind)
        for changed in generator.choice(sorted(arrays), generator.integers(0, 3), replace=False):
            array = arrays[changed].copy()
            limits = None if array.dtype.kind in "fb" else np.iinfo(array.dtype)
            wild = [value for value in WILD[array.dtype.kind] if limits is None or limits.min <= value <= limits.max]
            index = generator.integers(0, len(array), generator.integers(1, 4))
            array[index] = generator.choice(np.array(wild, array.dtype), len(index))
            replace_arrays(directory, kind, **{changed: array})
    assert all(finding.code.startswith("A0") and finding.message for finding in verify(directory).findings)


# The report


def test_a_copy_of_a_part_of_an_artifact_has_no_findings_and_says_that_it_is_one(sealed: Path, tmp_path: Path) -> None:
    copy = lopd_store.subset(sealed, output=tmp_path / "copy", only="sampled", parts=range(1, 3))
    report = verify(copy.path)
    assert report.ok and report.partial and not verify(sealed).partial
    assert (report.files, report.fingerprint) == (3, copy.fingerprint)
    assert report.to_json()["partial"] is True


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
