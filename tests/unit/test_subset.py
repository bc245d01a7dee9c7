"""Subsets: copies of a part of an artifact that verify, read and train by themselves, or are not there at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lopd_store
from lopd_store import layout, subset
from lopd_store.errors import ArtifactError, InputError
from lopd_store.reader import Artifact


def files_of(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # it may be a link to the file of another artifact
    path.write_bytes(data)


def assert_same_part(found: Artifact, wanted: Artifact, number: int, *, topk: bool) -> None:
    ours, theirs = found.part(number), wanted.part(number)
    np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
    np.testing.assert_array_equal(ours.sampled_logprobs, theirs.sampled_logprobs)
    assert (ours.topk is not None) is topk
    if ours.topk is not None and theirs.topk is not None:
        np.testing.assert_array_equal(ours.topk.ids, theirs.topk.ids)


def test_the_whole_artifact_is_a_copy_without_a_view(sealed: Path, tmp_path: Path) -> None:
    copy = subset(sealed, output=tmp_path / "copy")
    assert files_of(copy.path) == files_of(sealed)
    assert all((copy.path / name).read_bytes() == (sealed / name).read_bytes() for name in files_of(sealed))
    assert lopd_store.verify(copy.path).partial is False


def test_a_sampled_only_copy_holds_token_files_alone(sealed: Path, tmp_path: Path) -> None:
    copy, opened = subset(sealed, output=tmp_path / "copy", only="sampled"), lopd_store.open(sealed)
    assert files_of(copy.path) == {
        *("manifest.json", "build.json", "README.md", "view.json"),
        *(layout.part_file(number, layout.TOKENS) for number in range(4)),
    }
    for number in range(4):
        assert_same_part(copy, opened, number, topk=False)
    assert copy.rollout(5).topk is None and copy.rollout(5).response_ids.tolist()


def test_a_copy_of_some_parts_reads_those_and_refuses_the_others(sealed: Path, tmp_path: Path) -> None:
    copy, opened = subset(sealed, output=tmp_path / "copy", parts=range(1, 3)), lopd_store.open(sealed)
    assert {path.name[:5] for path in (copy.path / "parts").iterdir()} == {"00001", "00002"}
    for number in (1, 2):
        assert_same_part(copy, opened, number, topk=True)
    assert [len(part.prompt_lengths) for part in copy.parts()] == [1, 2]
    for number in (0, 3, -1, 4):
        with pytest.raises(InputError, match=f"there is no part {number} in `.*`\n  expected  1 to 2"):
            copy.part(number)
    assert copy.rollout(2).response_ids.tolist() == opened.rollout(2).response_ids.tolist()
    with pytest.raises(InputError, match="there is no part 0"):
        copy.rollout(0)  # a rollout keeps its number


def test_a_copy_has_the_manifest_and_the_fingerprint_of_the_artifact(sealed: Path, tmp_path: Path) -> None:
    copy, opened = subset(sealed, output=tmp_path / "copy", only="sampled", parts=range(2)), lopd_store.open(sealed)
    assert (copy.fingerprint, copy.manifest) == (opened.fingerprint, opened.manifest)
    view = json.loads((copy.path / layout.VIEW).read_bytes())
    assert view == {"format": "lopd-view", "fingerprint": opened.fingerprint, "kinds": ["tokens"], "parts": [0, 2]}


@pytest.mark.parametrize("options", [{}, {"only": "sampled"}, {"parts": range(1, 3)}])
def test_a_copy_of_a_copy_is_what_the_artifact_would_give(
    sealed: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    first = subset(sealed, output=tmp_path / "first", parts=range(1, 4), only="sampled")
    second = subset(first.path, output=tmp_path / "second", **options)
    wanted = options.get("parts", range(1, 4))
    assert (second.view.kinds, second.view.parts) == (("tokens",), wanted)
    assert lopd_store.verify(second.path).ok


@pytest.mark.parametrize("parts", [range(0), range(2, 2), range(5), range(-1, 2), range(3, 5), range(9, 12)])
def test_parts_that_are_not_there_are_refused(sealed: Path, tmp_path: Path, parts: range) -> None:
    with pytest.raises(InputError, match="`parts` is out of range\n  expected  0:4 or less"):
        subset(sealed, output=tmp_path / "copy", parts=parts)
    assert not list(tmp_path.iterdir())


def test_parts_that_a_copy_lacks_are_refused(sealed: Path, tmp_path: Path) -> None:
    first = subset(sealed, output=tmp_path / "first", parts=range(1, 3))
    with pytest.raises(InputError, match="`parts` is out of range\n  expected  1:3 or less\n  actual    0:2"):
        subset(first.path, output=tmp_path / "second", parts=range(2))


def test_parts_with_gaps_are_refused(sealed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`parts`"):
        subset(sealed, output=tmp_path / "copy", parts=range(0, 4, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_an_output_that_exists_is_never_overwritten(sealed: Path, tmp_path: Path, make: Any) -> None:
    make(tmp_path / "copy")
    with pytest.raises(InputError, match=r"copy` exists\n\nhint: choose another `--output`, or move it away"):
        subset(sealed, output=tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_where_there_is_no_artifact_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no artifact at"):
        subset(tmp_path / "nowhere", output=tmp_path / "copy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_copy_that_is_interrupted_leaves_nothing(
    sealed: Path, tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(read: int, total: int) -> None:
        raise error

    with pytest.raises(error):
        subset(sealed, output=tmp_path / "copy", on_bytes=interrupt)
    assert not list(tmp_path.iterdir())
    assert lopd_store.verify(sealed).ok


def test_what_another_copy_left_behind_is_not_taken_over(sealed: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.unfinished" / "parts").mkdir(parents=True)
    (tmp_path / "copy.unfinished" / "parts" / "evil").touch()
    subset(sealed, output=tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert lopd_store.verify(tmp_path / "copy").ok


def test_a_damaged_artifact_gives_no_copy(artifact: Path, tmp_path: Path) -> None:
    flip_a_byte(artifact / layout.part_file(2, layout.TOKENS))
    with pytest.raises(ArtifactError, match=r"00002\.tokens\.zarr\.zip`: digest differs"):
        subset(artifact, output=tmp_path / "copy", only="sampled")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_damage_that_is_left_out_does_not_matter(artifact: Path, tmp_path: Path) -> None:
    flip_a_byte(artifact / layout.part_file(2, layout.TOPK))
    (artifact / layout.part_file(3, layout.ROLLOUTS)).unlink()
    subset(artifact, output=tmp_path / "copy", only="sampled")


def test_a_file_that_a_copy_says_it_lacks_is_a_file_too_many(sealed: Path, tmp_path: Path) -> None:
    copy = subset(sealed, output=tmp_path / "copy", only="sampled", parts=range(2))
    for name in (layout.part_file(0, layout.TOPK), layout.part_file(3, layout.TOKENS)):
        (copy.path / name).write_bytes((sealed / name).read_bytes())
        (finding,) = lopd_store.verify(copy.path).findings
        assert (finding.code, finding.where) == ("A002", name)
        (copy.path / name).unlink()


def test_a_file_that_a_copy_says_it_holds_must_be_there(sealed: Path, tmp_path: Path) -> None:
    copy = subset(sealed, output=tmp_path / "copy", only="sampled")
    (copy.path / layout.VIEW).unlink()
    codes = {finding.code for finding in lopd_store.verify(copy.path).findings}
    assert codes == {"A020"}


def test_a_damaged_byte_of_a_copy_is_found(sealed: Path, tmp_path: Path) -> None:
    copy = subset(sealed, output=tmp_path / "copy", parts=range(1, 2))
    flip_a_byte(copy.path / layout.part_file(1, layout.TOPK))
    assert [finding.code for finding in lopd_store.verify(copy.path).findings] == ["A022"]
    assert lopd_store.verify(sealed).ok


def test_a_file_system_without_links_gets_copies(sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    copy = subset(sealed, output=tmp_path / "copy")
    name = layout.part_file(0, layout.TOPK)
    assert (copy.path / name).stat().st_ino != (sealed / name).stat().st_ino
    assert lopd_store.verify(copy.path).ok


def test_a_link_in_the_artifact_is_not_followed_into_a_copy(artifact: Path, tmp_path: Path) -> None:
    path = artifact / layout.part_file(0, layout.TOKENS)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="a file is missing or not a plain file"):
        subset(artifact, output=tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
