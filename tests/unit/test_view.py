"""Views: what a copy may say that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lopd_store
from lopd_store import layout, strictjson
from lopd_store.errors import ArtifactError
from lopd_store.view import View, read_view, whole

ALL, TOKENS = list(layout.FILE_KINDS), [layout.TOKENS]


def read(directory: Path) -> View:
    artifact = lopd_store.open(directory)
    return read_view(directory, artifact.manifest, artifact.fingerprint)


def write_view(directory: Path, **changes: Any) -> None:
    fingerprint = lopd_store.open(directory).fingerprint
    value = {"format": "lopd-view", "fingerprint": fingerprint, "kinds": TOKENS, "parts": [0, 4]} | changes
    (directory / layout.VIEW).write_bytes(strictjson.pretty(value))


def refuse(directory: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        lopd_store.open(directory)
    assert caught.value.code == "A003"


def test_a_copy_that_says_nothing_is_whole(sealed: Path) -> None:
    view, manifest = read(sealed), lopd_store.open(sealed).manifest
    assert view == whole(manifest) and view.is_whole(manifest) and view.has_topk
    assert sorted(view.files()) == sorted(f"parts/{path.name}" for path in (sealed / "parts").iterdir())


@pytest.mark.parametrize(
    ("kinds", "parts", "files"),
    [
        (TOKENS, [0, 4], 4),
        (TOKENS, [2, 3], 1),
        (ALL, [1, 3], 6),
        (["tokens", "topk"], [0, 4], 8),
        (["rollouts", "tokens"], [3, 4], 2),
    ],
)
def test_a_copy_may_hold_some_kinds_of_files_of_some_parts(
    artifact: Path, kinds: list[str], parts: list[int], files: int
) -> None:
    write_view(artifact, kinds=kinds, parts=parts)
    view = read(artifact)
    assert (view.kinds, view.parts, len(view.files())) == (tuple(kinds), range(*parts), files)
    assert view.has_topk is ("topk" in kinds) and not view.is_whole(lopd_store.open(artifact).manifest)


def test_a_view_of_everything_is_whole(artifact: Path) -> None:
    write_view(artifact, kinds=ALL)
    assert read(artifact).is_whole(lopd_store.open(artifact).manifest) and lopd_store.verify(artifact).ok


def test_a_view_comes_back_from_its_json(artifact: Path) -> None:
    view, fingerprint = View(kinds=("tokens", "topk"), parts=range(1, 4)), lopd_store.open(artifact).fingerprint
    (artifact / layout.VIEW).write_bytes(strictjson.pretty(view.to_json(fingerprint)))
    assert read(artifact) == view


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "sha256:" + "0" * 64},
        {"fingerprint": None},
        {"format": "lopd"},
        {"kinds": []},
        {"kinds": ["topk"]},
        {"kinds": ["rollouts", "topk"]},
        {"kinds": ["topk", "tokens"]},
        {"kinds": ["tokens", "tokens"]},
        {"kinds": ["tokens", "weights"]},
        {"kinds": ["tokens", 3]},
        {"kinds": [["tokens"]]},
        {"kinds": "tokens"},
        {"kinds": None},
        {"parts": [0, 5]},
        {"parts": [-1, 4]},
        {"parts": [2, 2]},
        {"parts": [3, 1]},
        {"parts": [0]},
        {"parts": [0, 2, 1]},
        {"parts": [0.0, 4]},
        {"parts": [False, 4]},
        {"parts": ["0", "4"]},
        {"parts": "04"},
        {"parts": None},
        {"surprise": 1},
    ],
)
def test_a_view_that_says_anything_else_is_refused(artifact: Path, changes: dict[str, Any]) -> None:
    write_view(artifact, **changes)
    refuse(artifact)


@pytest.mark.parametrize("name", ["format", "fingerprint", "kinds", "parts"])
def test_a_view_that_lacks_a_member_is_refused(artifact: Path, name: str) -> None:
    write_view(artifact)
    value = json.loads((artifact / layout.VIEW).read_bytes())
    del value[name]
    (artifact / layout.VIEW).write_bytes(strictjson.pretty(value))
    refuse(artifact)


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{", b"\xff", b'{"parts": 1, "parts": 1}', b" " * 5000])
def test_what_is_no_view_at_all_is_refused(artifact: Path, data: bytes) -> None:
    (artifact / layout.VIEW).write_bytes(data)
    with pytest.raises(ArtifactError, match=layout.VIEW):
        lopd_store.open(artifact)
    assert [found.code for found in lopd_store.verify(artifact).findings] == ["A003"]


@pytest.mark.parametrize("there", [True, False], ids=["to a view", "to nothing"])
def test_a_link_is_no_view(artifact: Path, tmp_path: Path, there: bool) -> None:
    if there:
        write_view(artifact)
        (artifact / layout.VIEW).rename(tmp_path / "elsewhere.json")
    (artifact / layout.VIEW).symlink_to(tmp_path / "elsewhere.json")
    refuse(artifact)


def test_a_directory_is_no_view(artifact: Path) -> None:
    (artifact / layout.VIEW).mkdir()
    refuse(artifact)


def test_another_artifacts_view_is_refused(artifact: Path) -> None:
    from tests.artifacts import edit_manifest

    write_view(artifact)
    data = (artifact / layout.MANIFEST).read_bytes()
    (artifact / layout.MANIFEST).write_bytes(edit_manifest(data, "annotations", value={"note": "mine"}))
    refuse(artifact)
