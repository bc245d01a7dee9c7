"""Part files: readable by plain Zarr, and refused in every other form than the format's."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from lopd_store.errors import ArtifactError
from lopd_store.part import (
    CHUNK,
    IMPOSSIBLE_ID,
    TOPK_ARRAYS,
    Part,
    read_arrays,
    read_part,
    rollouts_file,
    tokens_file,
    topk_file,
)
from tests.artifacts import make_topk

Members = list[tuple[str, bytes]]
TOPK = make_topk([[(5, -0.5), (7, -1.0)], [(5, 0.0)]], tails=[-3.0, -np.inf])
PART = Part(
    rollout_offsets=np.array([0, 3, 4], np.int64),
    prompt_lengths=np.array([1, 1], np.int32),
    token_ids=np.array([9, 5, 7, 8], np.uint32),
    loss_mask=np.array([True, False]),
    sampled_logprobs=np.array([-0.5, 0.0], np.float32),
    reference_logprobs=np.array([-0.25, -1.0], np.float32),
    topk=TOPK,
)


@pytest.fixture
def tokens_path(tmp_path: Path) -> Path:
    path = tmp_path / "00000.tokens.zarr.zip"
    path.write_bytes(tokens_file(PART))
    return path


@pytest.fixture
def topk_path(tmp_path: Path) -> Path:
    path = tmp_path / "00000.topk.zarr.zip"
    path.write_bytes(topk_file(TOPK))
    return path


def rewrite(path: Path, edit: Callable[[Members], Members], compression: int = zipfile.ZIP_STORED) -> None:
    """Write the zip again with other members."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", compression) as archive:
        for name, data in edit(members):
            archive.writestr(name, data)
    path.write_bytes(sink.getvalue())


def edit_member(name: str, edit: Callable[[Any], None]) -> Callable[[Members], Members]:
    """An edit of one member that is JSON."""

    def apply(members: Members) -> Members:
        document = json.loads(dict(members)[name])
        edit(document)
        return [(other, json.dumps(document).encode() if other == name else data) for other, data in members]

    return apply


def refuse(path: Path, said: str, arrays: dict[str, tuple[str, Any]] = TOPK_ARRAYS) -> None:
    with pytest.raises(ArtifactError, match=said):
        read_arrays(path, arrays)


# What a stranger sees


def test_plain_zarr_opens_the_tokens_with_the_documented_types(tokens_path: Path) -> None:
    group = zarr.open_group(zarr.storage.ZipStore(tokens_path, mode="r"), mode="r")
    assert {name: str(array.dtype) for name, array in group.arrays()} == {
        "rollout_offsets": "int64",
        "prompt_lengths": "int32",
        "token_ids": "uint32",
        "loss_mask": "bool",
        "sampled_logprobs": "float32",
        "reference_logprobs": "float32",
    }


def test_plain_zarr_opens_the_topk_with_the_documented_types(topk_path: Path) -> None:
    group = zarr.open_group(zarr.storage.ZipStore(topk_path, mode="r"), mode="r")
    assert {name: str(array.dtype) for name, array in group.arrays()} == {
        "counts": "uint16",
        "id_table": "uint32",
        "ids": "uint32",
        "logprobs": "float32",
        "tail_logprobs": "float32",
    }


def test_plain_zarr_decodes_the_values(topk_path: Path) -> None:
    group = zarr.open_group(zarr.storage.ZipStore(topk_path, mode="r"), mode="r")
    arrays = {name: np.asarray(group[name][:]) for name in ("id_table", "ids", "logprobs", "tail_logprobs")}  # type: ignore[index]
    assert arrays["id_table"][arrays["ids"]].tolist() == [5, 7, 5]
    assert arrays["logprobs"].tolist() == [-0.5, -1.0, 0.0]
    assert arrays["tail_logprobs"].tolist() == [-3.0, -np.inf]


@pytest.mark.parametrize(
    ("name", "fill"),
    [
        ("rollout_offsets", -1),
        ("prompt_lengths", -1),
        ("token_ids", IMPOSSIBLE_ID),
        ("sampled_logprobs", np.nan),
        ("reference_logprobs", np.nan),
    ],
)
def test_the_fill_value_of_tokens_is_no_legal_value(tokens_path: Path, name: str, fill: float) -> None:
    array: Any = zarr.open_group(zarr.storage.ZipStore(tokens_path, mode="r"), mode="r")[name]
    np.testing.assert_equal(array.metadata.fill_value, fill)


@pytest.mark.parametrize(
    ("name", "fill"),
    [
        ("counts", 65_535),
        ("id_table", IMPOSSIBLE_ID),
        ("ids", IMPOSSIBLE_ID),
        ("logprobs", np.nan),
        ("tail_logprobs", np.nan),
    ],
)
def test_the_fill_value_of_topk_is_no_legal_value(topk_path: Path, name: str, fill: float) -> None:
    array: Any = zarr.open_group(zarr.storage.ZipStore(topk_path, mode="r"), mode="r")[name]
    np.testing.assert_equal(array.metadata.fill_value, fill)


def test_members_are_stored_in_order_with_one_time_stamp(topk_path: Path) -> None:
    with zipfile.ZipFile(topk_path) as archive:
        infos = archive.infolist()
    assert [info.filename for info in infos] == sorted(info.filename for info in infos)
    assert {(info.compress_type, info.date_time) for info in infos} == {(zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))}


def test_the_rollouts_table_opens_as_parquet(tmp_path: Path) -> None:
    (tmp_path / "table.parquet").write_bytes(rollouts_file({"prompt": ["hello", None], "prompt_length": [1, 2]}))
    assert pq.read_table(tmp_path / "table.parquet").to_pylist() == [
        {"prompt": "hello", "prompt_length": 1},
        {"prompt": None, "prompt_length": 2},
    ]


# Sizes


def test_arrays_of_several_chunks_come_back(tmp_path: Path) -> None:
    tokens = CHUNK + 3
    part = Part(
        rollout_offsets=np.array([0, tokens], np.int64),
        prompt_lengths=np.array([1], np.int32),
        token_ids=np.arange(tokens, dtype=np.uint32),
        loss_mask=np.zeros(tokens - 1, np.bool_),
        sampled_logprobs=-np.arange(tokens - 1, dtype=np.float32),
        reference_logprobs=None,
        topk=None,
    )
    path = tmp_path / "tokens.zarr.zip"
    path.write_bytes(tokens_file(part))
    with zipfile.ZipFile(path) as archive:
        assert {"token_ids/c/0", "token_ids/c/1", "loss_mask/c/1"} <= set(archive.namelist())
    read = read_part(path, None)
    np.testing.assert_array_equal(read.token_ids, part.token_ids)
    np.testing.assert_array_equal(read.sampled_logprobs, part.sampled_logprobs)
    assert not read.loss_mask.any() and read.topk is None


def test_arrays_without_values_have_no_chunks(tmp_path: Path) -> None:
    path = tmp_path / "topk.zarr.zip"
    path.write_bytes(topk_file(make_topk([], tails=[])))
    with zipfile.ZipFile(path) as archive:
        assert all(name.endswith("zarr.json") for name in archive.namelist())
    assert {name: len(array) for name, array in read_arrays(path, TOPK_ARRAYS).items()} == dict.fromkeys(TOPK_ARRAYS, 0)


def test_a_chunk_of_nothing_but_fill_values_is_written_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "topk.zarr.zip"
    path.write_bytes(topk_file(make_topk([[(5, np.nan)]], tails=[np.nan])))
    with zipfile.ZipFile(path) as archive:
        assert {"logprobs/c/0", "tail_logprobs/c/0"} <= set(archive.namelist())


def test_reference_logprobs_may_be_absent(tokens_path: Path) -> None:
    rewrite(tokens_path, lambda members: [m for m in members if not m[0].startswith("reference_logprobs/")])
    assert read_part(tokens_path, None).reference_logprobs is None


# Hostile files


def test_a_deleted_chunk_is_refused(topk_path: Path) -> None:
    rewrite(topk_path, lambda members: [m for m in members if m[0] != "logprobs/c/0"])
    refuse(topk_path, "lacks a chunk or has a member too many\n  actual    `logprobs/c/0`")


def test_a_deleted_array_is_refused(topk_path: Path) -> None:
    rewrite(topk_path, lambda members: [m for m in members if not m[0].startswith("tail_logprobs/")])
    refuse(topk_path, "has other arrays than the format")


def test_an_array_too_many_is_refused(topk_path: Path) -> None:
    rewrite(topk_path, lambda members: [*members, ("extra/zarr.json", dict(members)["ids/zarr.json"])])
    refuse(topk_path, "has other arrays than the format")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "ids/c/../../up", "ids/c/1", "ids/", "zarr.json/"])
def test_a_member_of_another_name_is_refused(topk_path: Path, name: str) -> None:
    rewrite(topk_path, lambda members: [*members, (name, b"")])
    refuse(topk_path, f"has a member too many\n  actual    `{name}`")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_duplicate_member_is_refused(topk_path: Path) -> None:
    rewrite(topk_path, lambda members: [*members, ("ids/c/0", b"other")])
    refuse(topk_path, "one of them twice")


def test_a_compressed_member_is_refused(topk_path: Path) -> None:
    rewrite(topk_path, lambda members: members, zipfile.ZIP_DEFLATED)
    refuse(topk_path, "has compressed members")


def test_an_encrypted_member_is_refused(topk_path: Path) -> None:
    data = bytearray(topk_path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    topk_path.write_bytes(data)
    refuse(topk_path, "is not a whole zip: .* is encrypted")


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "numcodecs.zlib", "gzip", "sharding_indexed"])
def test_another_codec_is_refused_before_zarr_sees_it(topk_path: Path, codec: str) -> None:
    def name_codec(metadata: Any) -> None:
        metadata["codecs"] = [{"name": codec, "configuration": {}}]

    rewrite(topk_path, edit_member("ids/zarr.json", name_codec))
    refuse(topk_path, "`codecs` of the array `ids` is not what the format says")


@pytest.mark.parametrize("shape", [[1 << 40], [-1], [3, 3], [], [2.0], [True], 3, "3", None])
def test_a_shape_that_is_not_allowed_is_refused(topk_path: Path, shape: Any) -> None:
    rewrite(topk_path, edit_member("ids/zarr.json", lambda metadata: metadata.update(shape=shape)))
    refuse(topk_path, "the shape of `ids` is not allowed")


def test_a_shape_of_more_chunks_than_there_are_is_refused(topk_path: Path) -> None:
    def enlarge(metadata: Any) -> None:
        metadata["shape"] = [3 * CHUNK]
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [CHUNK]

    rewrite(topk_path, edit_member("ids/zarr.json", enlarge))
    refuse(topk_path, "lacks a chunk")


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("data_type", "float64"),
        ("fill_value", 0),
        ("attributes", {"evil": 1}),
        ("storage_transformers", [{"name": "evil"}]),
        ("dimension_names", ["x"]),
        ("zarr_format", 2),
        ("node_type", "group"),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1]}}),
    ],
)
def test_other_metadata_of_an_array_is_refused(topk_path: Path, member: str, value: Any) -> None:
    rewrite(topk_path, edit_member("logprobs/zarr.json", lambda metadata: metadata.update({member: value})))
    refuse(topk_path, f"`{member}` of the array `logprobs` is not what the format says")


@pytest.mark.parametrize("member", ["consolidated_metadata", "node_type", "attributes"])
def test_other_metadata_of_the_group_is_refused(topk_path: Path, member: str) -> None:
    rewrite(topk_path, edit_member("zarr.json", lambda metadata: metadata.update({member: "array"})))
    refuse(topk_path, "`zarr.json` is not what the format says")


def test_a_zip_without_its_group_is_refused(topk_path: Path) -> None:
    rewrite(topk_path, lambda members: [m for m in members if m[0] != "zarr.json"])
    refuse(topk_path, "`zarr.json` is not what the format says")


@pytest.mark.parametrize("data", [b"[]", b"{", b'{"shape": [3], "shape": [4]}', b"\xff", b"[" * 40 + b"]" * 40])
def test_metadata_that_is_no_strict_json_is_refused(topk_path: Path, data: bytes) -> None:
    rewrite(topk_path, lambda members: [(n, data if n == "ids/zarr.json" else d) for n, d in members])
    refuse(topk_path, "ids")


@pytest.mark.parametrize("kept", [0, 10, 0.5, -1])
def test_a_truncated_zip_is_refused(topk_path: Path, kept: float) -> None:
    data = topk_path.read_bytes()
    topk_path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    refuse(topk_path, "is not a whole zip")


def test_a_zip_whose_directory_points_before_its_start_is_refused(topk_path: Path) -> None:
    data = bytearray(topk_path.read_bytes())
    data[-6:-2] = b"\xff\xff\xff\x7f"  # the offset of the central directory
    topk_path.write_bytes(data)
    refuse(topk_path, "is not a whole zip")


def test_a_chunk_of_other_bytes_is_refused(topk_path: Path) -> None:
    rewrite(topk_path, lambda members: [(n, b"noise" if n == "ids/c/0" else d) for n, d in members])
    refuse(topk_path, "does not decode")


def test_a_chunk_of_more_values_than_declared_is_refused(topk_path: Path) -> None:
    longer = topk_path.with_name("longer.zip")
    longer.write_bytes(topk_file(make_topk([[(5, -1.0)] * 9], tails=[-1.0])))
    with zipfile.ZipFile(longer) as archive:
        chunk = archive.read("ids/c/0")
    rewrite(topk_path, lambda members: [(n, chunk if n == "ids/c/0" else d) for n, d in members])
    refuse(topk_path, "does not decode")


def test_flipped_bytes_are_refused_or_change_nothing(topk_path: Path) -> None:
    data = topk_path.read_bytes()
    wanted = read_arrays(topk_path, TOPK_ARRAYS)
    for at in np.random.default_rng(0).integers(0, len(data), 150).tolist():
        topk_path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            found = read_arrays(topk_path, TOPK_ARRAYS)
        except ArtifactError:
            continue
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted), at


def test_a_rank_without_a_row_in_the_table_is_refused(topk_path: Path, tokens_path: Path) -> None:
    fewer = topk_path.with_name("fewer.zip")
    fewer.write_bytes(topk_file(make_topk([[(5, -1.0)], [(5, -1.0)]], tails=[-1.0, -1.0])))
    with zipfile.ZipFile(fewer) as archive:
        table = [(name, archive.read(name)) for name in archive.namelist() if name.startswith("id_table/")]
    rewrite(topk_path, lambda members: [m for m in members if not m[0].startswith("id_table/")] + table)
    with pytest.raises(ArtifactError, match="a rank has no row in `id_table`\n  expected  below 1\n  actual    1"):
        read_part(tokens_path, topk_path)
