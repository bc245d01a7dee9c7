"""Groups of arrays in a zip: what plain Zarr reads of them, and that every other form than ours is refused."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numcodecs.zstd import Zstd

from lopd_store.container import (
    CHUNK,
    MAX_METADATA_BYTES,
    MAX_VALUES,
    Arrays,
    ArraySpec,
    Group,
    array_metadata,
    chunk_length,
    pack,
)
from lopd_store.errors import ArtifactError
from tests.zips import Member, edit_members, make_zip, members_of, pco

SPECS = {
    "flags": ArraySpec("bool", False),
    "ids": ArraySpec("uint32", 0xFFFF_FFFF),
    "logprobs": ArraySpec("float32", "NaN"),
    "offsets": ArraySpec("int64", -1),
    "counts": ArraySpec("uint16", 65_535, optional=True),
}
ARRAYS: Arrays = {
    "flags": np.array([True, False, True]),
    "ids": np.array([7, 0, 299], np.uint32),
    "logprobs": np.array([-0.5, -np.inf], np.float32),
    "offsets": np.array([0, 1 << 40], np.int64),
}
DATA = pack(ARRAYS, SPECS)


def open_group(data: bytes, *, check_crc: bool = True) -> Group:
    return Group(data, SPECS, where="x.zarr.zip", check_crc=check_crc)


def read_all(data: bytes, *, check_crc: bool = True) -> Arrays:
    group = open_group(data, check_crc=check_crc)
    return {name: group.read(name) for name in group.lengths}


def refuse(data: bytes, code: str, said: str = "x.zarr.zip") -> None:
    with pytest.raises(ArtifactError, match=said) as caught:
        read_all(data)
    assert caught.value.code == code


def assert_equal(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name, strict=True)


def with_member(index: int, **changes: Any) -> bytes:
    """The zip with one odd member."""
    members = members_of(DATA)
    members[index] = replace(members[index], **changes)
    return make_zip(members)


def with_metadata(name: str, edit: Callable[[Any], object]) -> bytes:
    """The zip with another zarr.json."""

    def apply(members: dict[str, bytes]) -> None:
        document = json.loads(members[name])
        edit(document)
        members[name] = json.dumps(document).encode()

    return edit_members(DATA, apply)


def test_the_zip_of_these_tests_is_ours_where_nothing_is_odd() -> None:
    assert make_zip(members_of(DATA)) == DATA


# What a stranger sees


def test_plain_zarr_reads_the_same_values(tmp_path: Path) -> None:
    (tmp_path / "x.zarr.zip").write_bytes(DATA)
    group: Any = zarr.open_group(zarr.storage.ZipStore(tmp_path / "x.zarr.zip", mode="r"), mode="r")
    assert_equal({name: group[name][:] for name in sorted(dict(group.arrays()))}, ARRAYS)


def test_plain_zarr_reads_the_same_values_of_several_chunks(tmp_path: Path) -> None:
    rng, length = np.random.default_rng(0), CHUNK + 3
    arrays: Arrays = {
        "flags": rng.integers(0, 2, length).astype(np.bool_),
        "ids": rng.integers(0, 300_000, length).astype(np.uint32),
        "logprobs": -rng.exponential(5, 2 * CHUNK + 1).astype(np.float32),
        "offsets": np.arange(length),
    }
    data = pack(arrays, SPECS)
    (tmp_path / "x.zarr.zip").write_bytes(data)
    group: Any = zarr.open_group(zarr.storage.ZipStore(tmp_path / "x.zarr.zip", mode="r"), mode="r")
    assert_equal({name: group[name][:] for name in sorted(dict(group.arrays()))}, arrays)
    assert_equal(read_all(data), arrays)


def test_a_chunk_that_got_lost_reads_as_the_fill_value(tmp_path: Path) -> None:
    lost = edit_members(DATA, lambda members: [members.pop(f"{name}/c/0") for name in ARRAYS])
    (tmp_path / "x.zarr.zip").write_bytes(lost)
    group: Any = zarr.open_group(zarr.storage.ZipStore(tmp_path / "x.zarr.zip", mode="r"), mode="r")
    assert [group[name][0] for name in ("flags", "ids", "offsets")] == [False, 0xFFFF_FFFF, -1]
    assert np.isnan(group["logprobs"][0])


def test_members_are_stored_in_order_with_one_time_stamp() -> None:
    with zipfile.ZipFile(io.BytesIO(DATA)) as archive:
        infos = archive.infolist()
    assert [info.filename for info in infos] == sorted(info.filename for info in infos)
    assert {(info.compress_type, info.date_time) for info in infos} == {(zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))}


def test_a_chunk_of_nothing_but_fill_values_is_written_all_the_same() -> None:
    data = pack(ARRAYS | {"logprobs": np.full(2, np.nan, np.float32), "flags": np.zeros(3, np.bool_)}, SPECS)
    assert {b"logprobs/c/0", b"flags/c/0"} <= {member.name for member in members_of(data)}


@pytest.mark.parametrize("length", [0, 1, 2, CHUNK, CHUNK + 1, 3 * CHUNK - 1])
def test_chunks_are_as_few_and_as_even_as_can_be(length: int) -> None:
    values = np.arange(length, dtype=np.uint32)
    group = open_group(pack(ARRAYS | {"ids": values}, SPECS))
    pieces = [piece for piece, _ in group.chunks("ids")]
    assert len(pieces) == -(-length // CHUNK)
    assert all(piece.stop - piece.start == chunk_length(length) for piece in pieces[:-1])
    np.testing.assert_array_equal(group.read("ids"), values)


def test_arrays_without_values_have_no_chunks_and_come_back() -> None:
    empty: Arrays = {name: values[:0] for name, values in ARRAYS.items()}
    assert all(member.name.endswith(b"zarr.json") for member in members_of(pack(empty, SPECS)))
    assert_equal(read_all(pack(empty, SPECS)), empty)


def test_an_optional_array_may_be_there_or_not() -> None:
    arrays: Arrays = {**ARRAYS, "counts": np.array([1, 65_534], np.uint16)}
    assert_equal(read_all(pack(arrays, SPECS)), arrays)
    assert_equal(read_all(DATA), ARRAYS)


# A zip that another tool could read otherwise

LAST = len(members_of(DATA)) - 1
ODD_ZIPS: dict[str, bytes] = {
    "nothing": b"",
    "no zip": b"PK no zip, though it is long enough",
    "bytes before it": b"x" + DATA,
    "a script before it, offsets adjusted": make_zip(
        [replace(member, before=b"#!" if index == 0 else b"") for index, member in enumerate(members_of(DATA))]
    ),
    "bytes after it": DATA + b"x",
    "another zip after it": DATA + DATA,
    "bytes between two members": with_member(3, before=b"x"),
    "bytes between members and directory": make_zip(members_of(DATA), before=b"x"),
    "bytes between directory and end": make_zip(members_of(DATA), after=b"x"),
    "bytes in the directory": make_zip(members_of(DATA), after=b"xyz", end={"size": len(DATA)}),
    "a comment": DATA[:-2] + b"\1\0x",
    "a comment that looks like an end": make_zip(members_of(DATA), end={"comment": 22}) + DATA[-22:],
    "a comment that is not there": make_zip(members_of(DATA), end={"comment": 5}),
    "members in another order": make_zip(members_of(DATA)[::-1]),
    "a directory in another order than the members": make_zip(
        [replace(members_of(DATA)[0], central={"offset": 7}), *members_of(DATA)[1:]]
    ),
    "a member twice": make_zip([*members_of(DATA), members_of(DATA)[LAST]]),
    "a member twice in the directory": with_member(1, central={"offset": 0}),
    "a member with no name": make_zip([Member(b"", b""), *members_of(DATA)]),
    "a name that is not ASCII": make_zip([*members_of(DATA), Member("é".encode(), b"")]),
    "a compressed member": with_member(0, local={"method": 8}, central={"method": 8}),
    "an encrypted member": with_member(0, local={"flags": 1}, central={"flags": 1}),
    "lengths after the data": with_member(0, local={"flags": 8}, central={"flags": 8}),
    "names in UTF-8": with_member(0, local={"flags": 1 << 11}, central={"flags": 1 << 11}),
    "an extra field": with_member(0, local_extra=b"\1\0\0\0", central_extra=b"\1\0\0\0"),
    "an extra field in the member alone": with_member(0, local_extra=b"\1\0\0\0"),
    "an extra field in the directory alone": with_member(0, central_extra=b"\1\0\0\0"),
    "a comment on a member": with_member(0, note=b"note"),
    "another disk": with_member(0, central={"disk": 1}),
    "an archive of several disks": make_zip(members_of(DATA), end={"disk": 1, "start": 1}),
    "sizes of 64 bits": with_member(
        0,
        local={"packed": 0xFFFF_FFFF, "length": 0xFFFF_FFFF},
        central={"packed": 0xFFFF_FFFF, "length": 0xFFFF_FFFF},
        local_extra=struct.pack("<2H2Q", 1, 16, 1, 1),
        central_extra=struct.pack("<2H2Q", 1, 16, 1, 1),
    ),
    "an end of 64 bits": make_zip(
        members_of(DATA),
        after=struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, LAST + 1, LAST + 1, 0, 0)
        + struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1),
    ),
    "only the marks of 64 bits": make_zip(
        members_of(DATA), end={"here": 0xFFFF, "all": 0xFFFF, "size": 0xFFFF_FFFF, "at": 0xFFFF_FFFF}
    ),
    "another name in the member": with_member(0, local_name=b"flags/c/9"),
    "a shorter name in the member": with_member(0, local_name=b"flags"),
    "another method in the member": with_member(0, local={"method": 8}),
    "another CRC in the member": with_member(0, local={"crc": 1}),
    "another length in the member": with_member(0, local={"length": 1}),
    "another packed length in the member": with_member(0, local={"packed": 1}),
    "another time in the member": with_member(0, local={"time": 1}),
    "another version in the member": with_member(0, local={"needed": 45}),
    "lengths that differ": with_member(0, local={"packed": 1}, central={"packed": 1}),
    "a member longer than the file": with_member(
        LAST, local={"packed": 1 << 20, "length": 1 << 20}, central={"packed": 1 << 20, "length": 1 << 20}
    ),
    "a member that begins after the file": with_member(LAST, central={"offset": 1 << 20}),
    "fewer members than stated": make_zip(members_of(DATA), end={"here": LAST + 2, "all": LAST + 2}),
    "more members than stated": make_zip(members_of(DATA), end={"here": LAST, "all": LAST}),
    "members on another disk": make_zip(members_of(DATA), end={"here": LAST}),
    "a directory before the file": make_zip(members_of(DATA), end={"at": 0, "size": 0x7FFF_FFFF}),
    "a directory without an end": DATA[:-22],
    "no members but those stated": struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 0, 0, 0),
}


@pytest.mark.parametrize("odd", ODD_ZIPS)
def test_an_odd_zip_is_refused(odd: str) -> None:
    refuse(ODD_ZIPS[odd], "A030", "`x.zarr.zip` is not a plain zip of stored members: ")


def test_a_zip_that_is_cut_anywhere_is_refused() -> None:
    for kept in range(len(DATA)):
        refuse(DATA[:kept], "A030")


def test_a_zip_that_lacks_bytes_anywhere_is_refused() -> None:
    for at in range(0, len(DATA), 7):
        with pytest.raises(ArtifactError):
            read_all(DATA[:at] + DATA[at + 1 :])


def test_a_crc_that_is_wrong_is_refused_where_it_is_checked() -> None:
    members = members_of(DATA)
    wrong = zlib.crc32(members[0].data) ^ 1
    odd = with_member(0, local={"crc": wrong}, central={"crc": wrong})
    refuse(odd, "A030", "the CRC of `flags/c/0` differs")
    assert_equal(read_all(odd, check_crc=False), ARRAYS)  # a reader compares xxh3 of the whole file


def test_flipped_bytes_are_refused_or_change_no_value() -> None:
    for at in range(len(DATA)):
        for bit in (1, 0x80):
            try:
                found = read_all(DATA[:at] + bytes([DATA[at] ^ bit]) + DATA[at + 1 :])
            except ArtifactError:
                continue
            assert_equal(found, ARRAYS)


def test_flipped_bytes_of_a_chunk_are_never_worse_than_an_error() -> None:
    members = members_of(DATA)
    for index, member in enumerate(members):
        for at in range(len(member.data) if b"/c/" in member.name else 0):
            for byte in (0, 0xFF, member.data[at] ^ 1, member.data[at] ^ 0x10):
                content = member.data[:at] + bytes([byte]) + member.data[at + 1 :]
                odd = make_zip([*members[:index], replace(member, data=content), *members[index + 1 :]])
                try:
                    read_all(odd)
                except ArtifactError as error:
                    assert error.code == "A033"


# Metadata


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data_type", "float64"),
        ("fill_value", 0),
        ("attributes", {"evil": 1}),
        ("storage_transformers", [{"name": "evil"}]),
        ("dimension_names", ["x"]),
        ("zarr_format", 2),
        ("zarr_format", 3.0),
        ("node_type", "group"),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1]}}),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [2.0]}}),
        ("chunk_key_encoding", {"name": "v2", "configuration": {"separator": "."}}),
        ("codecs", []),
        ("codecs", [{"name": "bytes"}]),
        ("codecs", [{"name": "numcodecs.pickle", "configuration": {}}]),
        ("codecs", [{"name": "sharding_indexed", "configuration": {}}]),
        ("codecs", [{"name": "numcodecs.pcodec", "configuration": {"level": 8}}, {"name": "gzip"}]),
        ("codecs", [{"name": "numcodecs.pcodec", "configuration": {"level": 9}}]),
        ("codecs", [{"name": "numcodecs.pcodec", "configuration": {"level": 8.0}}]),
    ],
)
def test_other_metadata_of_an_array_is_refused(name: str, value: Any) -> None:
    odd = with_metadata("logprobs/zarr.json", lambda metadata: metadata.update({name: value}))
    refuse(odd, "A031", f"`{name}` of the array `logprobs` is not what the format says")


@pytest.mark.parametrize("name", array_metadata(3, SPECS["ids"]))
def test_metadata_that_lacks_a_member_is_refused(name: str) -> None:
    refuse(with_metadata("ids/zarr.json", lambda metadata: metadata.pop(name)), "A031", "the array `ids`")


@pytest.mark.parametrize("shape", [[MAX_VALUES + 1], [1 << 62], [-1], [3, 3], [], [3.0], [True], [None], 3, "3", None])
def test_a_shape_that_is_not_allowed_is_refused(shape: Any) -> None:
    odd = with_metadata("ids/zarr.json", lambda metadata: metadata.update(shape=shape))
    refuse(odd, "A031", "the array `ids` has no legal shape")


@pytest.mark.parametrize(
    "edit",
    [
        lambda group: group.update(consolidated_metadata={}),
        lambda group: group.update(zarr_format=2),
        lambda group: group.update(zarr_format=3.0),
        lambda group: group.update(node_type="array"),
        lambda group: group.update(attributes={"evil": 1}),
        lambda group: group.pop("attributes"),
    ],
)
def test_other_metadata_of_the_group_is_refused(edit: Callable[[Any], object]) -> None:
    refuse(with_metadata("zarr.json", edit), "A031", "`zarr.json` is not what the format says")


def test_a_zip_without_its_group_is_refused() -> None:
    refuse(
        edit_members(DATA, lambda members: members.pop("zarr.json")), "A031", "`zarr.json` is not what the format says"
    )


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"[]", b"null", b"{", b"\xff", b"[" * 40 + b"]" * 40, b'{"shape": [3], "shape": [4]}'),
        *(b'{"shape": [NaN]}', b'{"shape": [3]}' + b" " * MAX_METADATA_BYTES),
    ],
)
@pytest.mark.parametrize("name", ["zarr.json", "ids/zarr.json"])
def test_metadata_that_is_no_strict_json_of_ours_is_refused(name: str, data: bytes) -> None:
    refuse(edit_members(DATA, lambda members: members.update({name: data})), "A031")


def test_an_array_that_is_missing_is_refused() -> None:
    odd = edit_members(DATA, lambda members: [members.pop("ids/zarr.json"), members.pop("ids/c/0")])
    refuse(odd, "A031", "has other arrays than the format")


@pytest.mark.parametrize("name", ["extra", "a/b", "..", ""])
def test_an_array_too_many_is_refused(name: str) -> None:
    odd = edit_members(DATA, lambda members: members.update({f"{name}/zarr.json": members["ids/zarr.json"]}))
    refuse(odd, "A031", "has other arrays than the format")


# Chunks


@pytest.mark.parametrize("name", ["ids/c/0", "flags/c/0", "logprobs/c/0"])
def test_a_missing_chunk_is_refused(name: str) -> None:
    refuse(
        edit_members(DATA, lambda members: members.pop(name)),
        "A032",
        f"the chunk `{name}` is missing or does not belong",
    )


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "ids/c/../../up", "ids/c/1", "ids/c/00", "ids/c/-1", "ids/", "zarr.json/"]
)
def test_a_member_too_many_is_refused(name: str) -> None:
    odd = edit_members(DATA, lambda members: members.update({name: members["ids/c/0"]}))
    refuse(odd, "A032", f"the chunk `{name}` is missing or does not belong here")


def test_a_shape_of_more_chunks_than_there_are_is_refused_before_anything_is_allocated() -> None:
    def enlarge(metadata: Any) -> None:
        metadata["shape"] = [MAX_VALUES]
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [CHUNK]

    refuse(with_metadata("ids/zarr.json", enlarge), "A032", "the chunk `ids/c/1` is missing")


CHUNKS_OF_IDS = {
    "nothing": b"",
    "noise": b"noise",
    "fewer values": pco(np.array([1, 2], np.uint32)),
    "more values": pco(np.array([1, 2, 3, 4], np.uint32)),
    "no values": pco(np.array([], np.uint32)),
    "values of another type": pco(np.array([1, 2, 3], np.float32)),
    "values of another width": pco(np.array([1, 2, 3], np.int64)),
    "half of it": pco(ARRAYS["ids"])[:-5],
    "bytes behind it": pco(ARRAYS["ids"]) + b"x",
    "a second one behind it": pco(ARRAYS["ids"]) + pco(ARRAYS["ids"]),
    "another codec": bytes(Zstd().encode(ARRAYS["ids"].tobytes())),
}
CHUNKS_OF_FLAGS = {
    "nothing": b"",
    "noise": b"noise",
    "fewer flags": bytes(Zstd().encode(b"\1\0")),
    "more flags": bytes(Zstd().encode(b"\1\0\1\0")),
    "a million flags": bytes(Zstd().encode(b"\1" * 1_000_000)),
    "no flags": bytes(Zstd().encode(b"")),
    "what is no flag": bytes(Zstd().encode(b"\1\0\2")),
    "half of it": bytes(Zstd().encode(b"\1\0\1"))[:-2],
    "another codec": pco(np.array([1, 0, 1], np.uint16)),
}


@pytest.mark.parametrize("what", CHUNKS_OF_IDS)
def test_a_chunk_of_anything_but_its_values_is_refused(what: str) -> None:
    refuse(edit_members(DATA, lambda members: members.update({"ids/c/0": CHUNKS_OF_IDS[what]})), "A033", "`ids/c/0`")


@pytest.mark.parametrize("what", CHUNKS_OF_FLAGS)
def test_a_chunk_of_anything_but_its_flags_is_refused(what: str) -> None:
    refuse(
        edit_members(DATA, lambda members: members.update({"flags/c/0": CHUNKS_OF_FLAGS[what]})), "A033", "`flags/c/0`"
    )


@pytest.mark.parametrize(
    ("name", "padding"), [("ids", 0), ("logprobs", 0.0), ("logprobs", np.inf), ("offsets", 0), ("flags", True)]
)
def test_padding_that_is_not_the_fill_value_is_refused(name: str, padding: float) -> None:
    values = np.zeros(CHUNK + 1, ARRAYS[name].dtype)  # two chunks, of which the second has one value less
    data = pack(ARRAYS | {name: values}, SPECS)
    last = np.zeros(chunk_length(len(values)), values.dtype)
    last[-1] = padding
    chunk = bytes(Zstd().encode(last.tobytes())) if name == "flags" else pco(last)
    odd = edit_members(data, lambda members: members.update({f"{name}/c/1": chunk}))
    refuse(odd, "A034", f"`{name}` is not padded with its fill value")


# Lengths


def test_lengths_are_compared_before_anything_is_decoded() -> None:
    with pytest.raises(ArtifactError, match="`ids` has another length than the manifest says\n  expected  4\n") as e:
        Group(DATA, SPECS, where="x.zarr.zip", lengths={"ids": 4, "counts": 9})
    assert e.value.code == "A040"


def test_arrays_that_the_manifest_does_not_count_may_have_any_length() -> None:
    assert Group(DATA, SPECS, where="x.zarr.zip", lengths={"flags": 3, "counts": 9}).lengths["ids"] == 3
