"""The manifest: read back as written, versions, and every way in which it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lopd_store import strictjson
from lopd_store.encoding import make_encoding
from lopd_store.errors import ArtifactError
from lopd_store.manifest import SEAL, Manifest, parse, render, sealed
from lopd_store.provenance import UNKNOWN_SFT
from tests.artifacts import edit_manifest
from tests.records import INPUTS, make_manifest

MANIFEST = make_manifest()
DATA = render(MANIFEST)
FILE = ("parts", 1, "files", "topk")
TOPK_GRID = ("grids", "topk_logprobs")


@pytest.mark.parametrize(
    "manifest",
    [
        MANIFEST,
        make_manifest(
            parts=1, encoding=make_encoding(exact=True, k_min=3, k_max=8, coverage=1), reference_logprobs=False
        ),
        make_manifest(inputs=replace(INPUTS, sft=UNKNOWN_SFT, rollouts=None)),
        make_manifest(annotations={"note": "mine", "tags": ["ä", None, {"x": 1.5}]}),
    ],
)
def test_a_manifest_comes_back_from_its_bytes(manifest: Manifest) -> None:
    assert parse(render(manifest)) == manifest


def test_a_manifest_that_is_read_and_written_has_the_same_bytes() -> None:
    assert render(parse(DATA)) == DATA


def test_the_bounds_are_half_the_widest_steps() -> None:
    encoding = json.loads(DATA)["encoding"]
    assert encoding["bounds"] == {name: grid[-1][1] / 2 for name, grid in encoding["grids"].items()}


# Versions

PLACES: list[tuple[str | int, ...]] = [
    ("news",),
    ("inputs", 0, "news"),
    ("inputs", 0, "scoring", "news"),
    ("counts", "news"),
    ("parts", 0, "news"),
    ("parts", 1, "counts", "news"),
    ("parts", 1, "files", "news"),
    ("parts", 1, "files", "tokens", "news"),
    ("encoding", "news"),
    ("encoding", "selection", "news"),
    ("inputs", 0, "teacher", "news"),
    ("inputs", 0, "sft", "news"),
    ("inputs", 0, "rollouts", "news"),
    ("inputs", 0, "rollouts", "policy_checkpoint", "news"),
    ("inputs", 0, "rollouts", "policy_checkpoint", "sft", 0, "news"),
]


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_member_is_refused_at_the_own_minor_version(place: tuple[str | int, ...]) -> None:
    with pytest.raises(ArtifactError, match=r"has unknown members: `news`\n\nhint: .* `annotations`"):
        parse(edit_manifest(DATA, *place, value=1))


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_member_is_ignored_at_a_higher_minor_version(place: tuple[str | int, ...]) -> None:
    newer = edit_manifest(edit_manifest(DATA, *place, value=1), "version", value="1.7")
    assert parse(newer) == replace(MANIFEST, version="1.7")


def test_a_member_of_this_version_may_not_lack_at_a_higher_minor_version() -> None:
    document = json.loads(edit_manifest(DATA, "version", value="1.7"))
    del document["inputs"]
    with pytest.raises(ArtifactError, match="lacks `inputs`"):
        parse(sealed(document))


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0"])
def test_another_major_version_is_refused_with_the_way_out(version: str) -> None:
    with pytest.raises(ArtifactError, match=rf"format version {version}, (?s:.)*hint: pip install --upgrade lopd") as e:
        parse(edit_manifest(DATA, "version", value=version))
    assert e.value.code == "A013"


@pytest.mark.parametrize("version", ["1", "1.0.0", "01.0", "1.-1", "v1.0", "1.0\n", 1.0, None, "1.99999"])
def test_what_is_no_version_is_refused(version: Any) -> None:
    with pytest.raises(ArtifactError, match="is not a version") as caught:
        parse(edit_manifest(DATA, "version", value=version))
    assert caught.value.code == "A013"


# Refusals


@pytest.mark.parametrize(
    "path",
    [
        *("../parts/00001.topk.zarr.zip", "/etc/passwd", "parts/../manifest.json", "parts/00000.topk.zarr.zip"),
        *("parts/00001.tokens.zarr.zip", "C:\\x", "", None, 3),
    ],
)
def test_a_path_that_is_not_the_parts_own_is_refused(path: Any) -> None:
    with pytest.raises(ArtifactError, match=r"is not a path of this part\n  expected  parts/00001\.topk\.zarr\.zip"):
        parse(edit_manifest(DATA, *FILE, "path", value=path))


@pytest.mark.parametrize("name", ["rollouts", "tokens", "positions", "entries"])
def test_counts_that_do_not_add_up_are_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match=f"counts.{name}` is not the sum over the parts") as caught:
        parse(edit_manifest(DATA, "counts", name, value=1000))
    assert caught.value.code == "A015"


@pytest.mark.parametrize(
    ("place", "value", "code", "said"),
    [
        (("counts", "rollouts"), -1, "A015", "counts.rollouts` is not a count"),
        (("counts", "rollouts"), True, "A015", "counts.rollouts` is not a count"),
        (("parts", 0, "counts", "tokens"), 2.0, "A016", "counts.tokens` is not a count"),
        (("parts", 0, "counts", "tokens"), 1 << 53, "A016", "counts.tokens` is not a count"),
        (("parts", 0, "counts"), [], "A016", "counts` is not an object"),
        ((*FILE, "size"), -1, "A016", "size` is not a size"),
        ((*FILE, "sha256"), "sha256:0", "A016", "sha256` is not a digest"),
        ((*FILE, "xxh3_128"), "0" * 31, "A016", "xxh3_128` is not 32 hex digits"),
        ((*FILE, "xxh3_128"), None, "A016", "xxh3_128` is not 32 hex digits"),
        ((*FILE,), None, "A016", "files.topk` is not an object"),
        (("parts",), [], "A016", "is not a list of 1 to 100000 parts"),
        (("parts",), {}, "A016", "is not a list of 1 to 100000 parts"),
        (("format",), "flop", "A010", "is not the manifest of an artifact"),
        (("inputs", 0), [], "A018", r"inputs\[0\]` is not an object"),
        (("inputs", 0, "rollouts_file"), "md5:0", "A018", r"inputs\[0\].rollouts_file` is not a digest"),
        (("inputs", 0, "teacher", "weights"), "x", "A018", r"inputs\[0\].teacher.weights` is not a digest"),
        (("inputs", 0, "teacher", "vocab_size"), 0, "A018", r"inputs\[0\].teacher.vocab_size` is not a size"),
        (("inputs", 0, "teacher", "vocab_size"), 1 << 31, "A018", r"inputs\[0\].teacher.vocab_size` is not a size"),
        (("inputs", 0, "teacher", "name"), 3, "A018", r"inputs\[0\].teacher.name` is not a string"),
        (("inputs", 0, "teacher"), None, "A018", r"inputs\[0\].teacher` is not an object"),
        (("inputs", 0, "sft", "status"), "guessed", "A018", r"inputs\[0\].sft.status` is not known"),
        (("inputs", 0, "scoring", "logprobs"), "processed", "A019", "says that the log-probs were processed"),
        (("inputs", 0, "scoring", "temperature"), 0.7, "A019", "says that the log-probs were processed"),
        (("inputs", 0, "scoring", "engine"), 3, "A018", "does not name an engine and a dtype"),
        (("reference_logprobs",), 1, "A014", "reference_logprobs` is not true or false"),
        (("text",), None, "A014", "text` is not true or false"),
        (("annotations",), [], "A014", "annotations` is not an object"),
        (("encoding", "profile"), "lossless", "A017", "encoding` is not an encoding of this version"),
        (("encoding", "profile"), "exact", "A017", "encoding` is not an encoding of this version"),
        (("encoding", *TOPK_GRID), [[0, 0.3]], "A017", "encoding` is not an encoding: a step of a grid is not a power"),
        (("encoding", *TOPK_GRID), None, "A017", "encoding` is not an encoding: the profile `compact` lacks a grid"),
        (("encoding", *TOPK_GRID), "fine", "A017", "encoding` is not an encoding: a grid is not a list"),
        (("encoding", "bounds", "topk_logprobs"), 0.0, "A017", "encoding` is not an encoding of this version"),
        (("encoding", "selection", "rule"), "student", "A017", "an encoding: there is no such selection"),
        (("encoding", "selection", "k_max"), 65_535, "A017", "an encoding: `k_max` is out of range"),
        (("encoding", "selection", "k_min"), 65, "A017", "an encoding: `k_min` is greater than `k_max`"),
        (("encoding", "selection", "coverage"), 0, "A017", "an encoding: `coverage` is out of range"),
        (("encoding", "selection"), None, "A017", "encoding.selection` is not an object"),
        (("encoding",), "compact", "A017", "encoding` is not an object"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_place(
    place: tuple[str | int, ...], value: Any, code: str, said: str
) -> None:
    with pytest.raises(ArtifactError, match=said) as caught:
        parse(edit_manifest(DATA, *place, value=value))
    assert caught.value.code == code


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{}", b'{"format": "lopd", "format": "lopd"}', DATA[:-10], b"\xff"]
)
def test_what_is_no_manifest_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json") as caught:
        parse(data)
    assert caught.value.code == "A010"


# The seal


def test_a_digit_that_was_changed_is_seen_at_once() -> None:
    damaged = DATA.replace(b'"k_max": 64', b'"k_max": 65')
    with pytest.raises(ArtifactError, match="was changed after it was sealed\n  expected  sha256:") as caught:
        parse(damaged)
    assert damaged != DATA and caught.value.code == "A011"


@pytest.mark.parametrize("seal", [None, "sha256:0", 3, {}])
def test_a_seal_that_is_none_is_refused(seal: Any) -> None:
    document = json.loads(DATA)
    with pytest.raises(ArtifactError, match="was changed after it was sealed") as caught:
        parse(strictjson.pretty({**document, SEAL: seal}))
    assert caught.value.code == "A011"


def test_a_manifest_without_a_seal_is_refused() -> None:
    document = json.loads(DATA)
    del document[SEAL]
    with pytest.raises(ArtifactError, match="was changed after it was sealed") as caught:
        parse(strictjson.pretty(document))
    assert caught.value.code == "A011"


@pytest.mark.parametrize(
    "data", [DATA[:-1], DATA + b"\n", b" " + DATA, strictjson.canonical(json.loads(DATA)), DATA.replace(b"\n", b"\r\n")]
)
def test_another_form_of_the_same_facts_is_refused(data: bytes) -> None:
    assert json.loads(data) == json.loads(DATA)
    with pytest.raises(ArtifactError, match="is not in the form in which manifests are stored") as caught:
        parse(data)
    assert caught.value.code == "A012"


def test_no_flipped_bit_goes_unnoticed() -> None:
    for at in range(0, len(DATA), 7):
        with pytest.raises(ArtifactError):
            parse(DATA[:at] + bytes([DATA[at] ^ 1]) + DATA[at + 1 :])


def every_place(value: Any, place: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every path into a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [
        *([place] if place else []),
        *(deeper for key, item in inner for deeper in every_place(item, (*place, key))),
    ]


@pytest.mark.parametrize("value", [None, True, -1, 1.5, "x", [], {}, [[]], {"x": {}}])
def test_no_value_at_any_place_is_worse_than_an_artifact_error(value: Any) -> None:
    for place in every_place(json.loads(DATA)):
        try:
            parse(edit_manifest(DATA, *place, value=value))
        except ArtifactError as error:
            assert str(error)
