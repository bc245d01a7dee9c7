"""Token files that are wrong as zips, as Zarr groups, and as chunks; the manifest tells the truth about their bytes."""

from __future__ import annotations

import json
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from pcodec import ChunkConfig, PagingSpec
from pcodec import standalone as pcodec

from lopd_store import layout
from lopd_store.container import stored_members
from recipes import valid
from recipes.artifact import Tree, data_of, viewed, with_file

NAME = layout.part_file(0, layout.TOKENS)
LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
Members = Sequence[tuple[str, bytes]]


def members_of(tree: Tree) -> dict[str, bytes]:
    """The members of the token file, in order."""
    data = memoryview(data_of(tree, NAME))
    return {name: bytes(member) for name, member in stored_members(data, NAME).items()}


def zipped(members: Members, *, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these members as they come, twice the same name included."""
    sink = BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(sink, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, data in members:
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.compress_type = method
            archive.writestr(info, data)
    return sink.getvalue()


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Tree], Tree]:
    return lambda tree: with_file(tree, layout.TOKENS, change(data_of(tree, NAME)))


def _members(change: Callable[[dict[str, bytes]], Members | dict[str, bytes]]) -> Callable[[Tree], Tree]:
    """Another list of members; a dictionary is put in order."""

    def break_it(tree: Tree) -> Tree:
        changed = change(members_of(tree))
        listed = sorted(changed.items()) if isinstance(changed, dict) else changed
        return with_file(tree, layout.TOKENS, zipped(listed))

    return break_it


def _header(where: bytes, offset: int, code: str, value: int) -> Callable[[Tree], Tree]:
    """Another number in the first header of a kind, or in those of both kinds."""

    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        for mark, at in ((LOCAL, offset - 2), (CENTRAL, offset)) if where == LOCAL + CENTRAL else ((where, offset),):
            struct.pack_into(code, changed, data.index(mark) + at, value)
        return bytes(changed)

    return _bytes(change)


def _inserted(text: bytes) -> Callable[[bytes], bytes]:
    """Bytes between the first member and the second, all offsets behind them in order."""

    def change(data: bytes) -> bytes:
        at, directory = data.index(LOCAL, 1), data.index(CENTRAL)
        changed = bytearray(data[:at] + text + data[at:])
        place = directory + len(text)
        while changed[place : place + 4] == CENTRAL:
            (offset,) = struct.unpack_from("<L", changed, place + 42)
            struct.pack_into("<L", changed, place + 42, offset + len(text) if offset >= at else offset)
            place += 46 + struct.unpack_from("<H", changed, place + 28)[0]
        struct.pack_into("<L", changed, place + 16, directory + len(text))
        return bytes(changed)

    return change


def _overlapping(data: bytes) -> bytes:
    """The second entry of the directory names the first member's bytes."""
    changed = bytearray(data)
    second = data.index(CENTRAL, data.index(CENTRAL) + 1)
    struct.pack_into("<L", changed, second + 42, 0)
    return bytes(changed)


def _renamed(old: str, new: str) -> Callable[[Tree], Tree]:
    return _members(lambda members: {new if name == old else name: data for name, data in members.items()})


def _added(name: str, data: bytes = b"") -> Callable[[Tree], Tree]:
    return _members(lambda members: {**members, name: data})


BOTH = LOCAL + CENTRAL
STRUCTURE: dict[tuple[str, str], Callable[[Tree], Tree]] = {
    ("A030", "empty_file"): _bytes(lambda data: b""),
    ("A030", "not_a_zip"): _bytes(lambda data: b"\x89HDF\r\n\x1a\n" + bytes(100)),
    ("A030", "text_before_it"): _bytes(lambda data: b"#!/bin/sh\n" + data),
    ("A030", "text_after_it"): _bytes(lambda data: data + b"more"),
    ("A030", "comment"): _bytes(lambda data: data[:-2] + b"\4\0more"),
    ("A030", "bytes_between_members"): _bytes(_inserted(b"hidden")),
    ("A030", "member_that_the_directory_hides"): _bytes(_inserted(zipped([("hidden", b"x")])[:37])),
    ("A030", "members_overlap"): _bytes(_overlapping),
    ("A030", "compressed"): lambda tree: with_file(
        tree, layout.TOKENS, zipped(list(members_of(tree).items()), method=zipfile.ZIP_DEFLATED)
    ),
    ("A030", "name_twice"): _members(lambda members: [*members.items(), list(members.items())[-1]]),
    ("A030", "names_out_of_order"): _members(lambda members: list(members.items())[::-1]),
    ("A030", "name_not_ascii"): _added("ü/c/0"),
    ("A030", "encrypted"): _header(BOTH, 8, "<H", 1),
    ("A030", "size_in_a_descriptor"): _header(BOTH, 8, "<H", 8),
    ("A030", "crc_of_other_bytes"): _header(BOTH, 16, "<L", 0),
    ("A030", "crc_differs_between_headers"): _header(LOCAL, 14, "<L", 0),
    ("A030", "size_differs_between_headers"): _header(LOCAL, 22, "<L", 1),
    ("A030", "name_differs_between_headers"): _header(LOCAL, 30, "<B", ord("L")),
    ("A030", "time_differs_between_headers"): _header(LOCAL, 10, "<H", 1),
    ("A030", "size_beyond_the_end"): _header(BOTH, 24, "<L", 0xFFFF_FFF0),
    ("A030", "offset_beyond_the_end"): _header(CENTRAL, 42, "<L", 0x7FFF_FFFF),
    ("A030", "extra_field"): _header(CENTRAL, 30, "<H", 4),
    ("A030", "another_disk"): _header(CENTRAL, 34, "<H", 1),
    ("A030", "more_members_than_entries"): _header(END, 8, "<L", 0xFFFF_FFFF),
    ("A030", "fewer_members_than_entries"): _header(END, 8, "<L", 0x0001_0001),
    ("A030", "directory_beyond_the_end"): _header(END, 16, "<L", 0xFFFF_FFFF),
    ("A031", "no_members"): _members(lambda members: {}),
    ("A032", "absolute_path"): _added("/etc/passwd", b"root"),
    ("A032", "path_that_climbs"): _added("../../evil", b"evil"),
    ("A032", "path_of_another_system"): _added("..\\..\\evil", b"evil"),
    ("A032", "directory"): _added("loss_mask/"),
    ("A032", "name_with_a_nul_after_it"): _added("token_ids/c/0\x01"),
    ("A032", "chunk_is_missing"): _members(
        lambda members: {name: data for name, data in members.items() if name != "loss_mask/c/0"}
    ),
    ("A032", "chunk_too_many"): _members(lambda members: {**members, "loss_mask/c/1": members["loss_mask/c/0"]}),
    ("A032", "chunk_of_another_dimension"): _renamed("loss_mask/c/0", "loss_mask/c/0/0"),
    ("A032", "chunk_under_an_old_name"): _renamed("loss_mask/c/0", "loss_mask/0"),
    ("A032", "stray_member"): _added(".zattrs", b"{}"),
}


# Zarr metadata


def _metadata(change: Callable[[dict[str, Any]], Any], member: str = "token_ids/zarr.json") -> Callable[[Tree], Tree]:
    """Another zarr.json, given as what it says or as bytes, or changed in place."""

    def break_it(members: dict[str, bytes]) -> dict[str, bytes]:
        said = json.loads(members[member])
        changed = change(said)
        changed = said if changed is None else changed
        return {**members, member: changed if isinstance(changed, bytes) else json.dumps(changed).encode()}

    return _members(break_it)


def _says(**changes: Any) -> Callable[[Tree], Tree]:
    return _metadata(lambda said: {**said, **changes})


def _grid(chunk: Any, name: str = "regular") -> dict[str, Any]:
    return {"name": name, "configuration": {"chunk_shape": chunk}}


def _codec(name: str, **configuration: Any) -> dict[str, Any]:
    return {"name": name, "configuration": configuration}


def _without(*names: str) -> Callable[[Tree], Tree]:
    return _members(lambda members: {name: data for name, data in members.items() if not name.startswith(tuple(names))})


PCODEC = _codec("numcodecs.pcodec", level=8)
METADATA: dict[tuple[str, str], Callable[[Tree], Tree]] = {
    ("A031", slug): break_it
    for slug, break_it in {
        "metadata_not_json": _metadata(lambda said: b"{"),
        "metadata_not_utf_8": _metadata(lambda said: b'"\xff"'),
        "metadata_list": _metadata(lambda said: [said]),
        "metadata_with_a_name_twice": _metadata(
            lambda said: json.dumps(said).replace("{", '{"shape": [11], ', 1).encode()
        ),
        "metadata_with_nan": _says(fill_value=float("nan")),
        "metadata_too_large": _metadata(lambda said: json.dumps(said).encode() + b" " * 5000),
        "metadata_1000_deep": _metadata(lambda said: 1000 * b"[" + 1000 * b"]"),
        "array_is_missing": _without("token_ids/"),
        "unknown_array": lambda tree: _added("rewards/zarr.json", members_of(tree)["loss_mask/zarr.json"])(tree),
        "array_that_climbs": lambda tree: _added("../x/zarr.json", members_of(tree)["loss_mask/zarr.json"])(tree),
        "group_is_missing": _members(lambda members: {n: data for n, data in members.items() if n != "zarr.json"}),
        "group_with_attributes": _metadata(lambda said: {**said, "attributes": {"x": 1}}, "zarr.json"),
        "group_consolidated": _metadata(lambda said: {**said, "consolidated_metadata": {"metadata": {}}}, "zarr.json"),
        "group_of_version_2": _metadata(lambda said: {**said, "zarr_format": 2}, "zarr.json"),
        "group_of_version_3_with_a_fraction": _metadata(lambda said: {**said, "zarr_format": 3.0}, "zarr.json"),
        "version_3_with_a_fraction": _says(zarr_format=3.0),
        "without_shape": _metadata(lambda said: said.pop("shape") and None),
        "two_dimensions": _says(shape=[11, 1]),
        "shape_is_a_number": _says(shape=11),
        "length_negative": _says(shape=[-1]),
        "length_with_a_fraction": _says(shape=[11.0]),
        "length_above_2_to_the_28": _says(shape=[(1 << 28) + 1], chunk_grid=_grid([1 << 18])),
        "length_2_to_the_63": _says(shape=[1 << 63], chunk_grid=_grid([1 << 63])),
        "type_of_objects": _says(data_type="object"),
        "chunks_of_1": _says(chunk_grid=_grid([1])),
        "chunk_of_2_to_the_40": _says(chunk_grid=_grid([1 << 40])),
        "another_chunk_grid": _says(chunk_grid=_grid([11], "rectangular")),
        "another_separator": _says(chunk_key_encoding=_codec("default", separator=".")),
        "fill_0": _says(fill_value=0),
        "fill_with_a_fraction": _says(fill_value=4294967295.0),
        "no_codecs": _says(codecs=[]),
        "plain_bytes": _says(codecs=[_codec("bytes", endian="little")]),
        "big_endian": _says(codecs=[_codec("bytes", endian="big"), PCODEC]),
        "codec_blosc": _says(codecs=[{"name": "bytes"}, _codec("blosc", cname="lz4", clevel=5, shuffle="noshuffle")]),
        "codec_pickle": _says(codecs=[_codec("numcodecs.pickle", protocol=5)]),
        "codec_of_a_module": _says(codecs=[_codec("os.system", command="id")]),
        "codec_sharding": _says(codecs=[_codec("sharding_indexed", chunk_shape=[1], codecs=[PCODEC])]),
        "codec_of_another_level": _says(codecs=[_codec("numcodecs.pcodec", level=12)]),
        "codec_of_level_8_with_a_fraction": _says(codecs=[_codec("numcodecs.pcodec", level=8.0)]),
        "codec_with_an_option": _says(codecs=[_codec("numcodecs.pcodec", level=8, delta_spec="none")]),
        "codec_is_a_string": _says(codecs=["numcodecs.pcodec"]),
        "attributes": _says(attributes={"pickle": "gASVHgAAAAAAAACM"}),
        "storage_transformer": _says(storage_transformers=[_codec("indirection", path="../..")]),
        "extension_to_understand": _says(extension={"must_understand": True}),
    }.items()
}


# Chunks


def _chunk(member: str, data: bytes) -> Callable[[Tree], Tree]:
    return _members(lambda members: {**members, member: data})


def _pcodec(values: Sequence[int], dtype: type = np.uint32, **options: Any) -> bytes:
    data = pcodec.simple_compress(np.array(values, dtype), ChunkConfig(compression_level=8, **options))
    return bytes(data)


def _zstd(flags: Sequence[int]) -> bytes:
    return bytes(Zstd(level=3).encode(bytes(flags)))


def _lookback(window_log: int, state_log: int) -> bytes:
    """Eleven values of 7, as a lookback of 1 into a window of 2^`window_log` values that begins with a stored state."""
    fields = [(0, 4), (2, 4), (window_log - 1, 5), (state_log, 4), (0, 1)]  # classic, lookback
    fields += [(0, 4), (1, 15), (1, 32), (0, 6)]  # lookbacks: one bin, always 1
    fields += [(0, 4), (1, 15), (1 << 31, 32), (0, 6)]  # differences: one bin, always 0
    bits = at = 0
    for value, width in fields:
        bits |= value << at
        at += width
    head = _pcodec(range(11))[: len(b"pco!\2") + 2 + 1 + 4]
    return head + bits.to_bytes((at + 7) // 8, "little") + (7).to_bytes(4, "little") + b"\0"


def _zstd_frame(blocks: int) -> bytes:
    """A frame that does not say its size: so many blocks of 128 KiB, each one byte repeated."""
    headers = [(131_072 << 3) | 2 | (number == blocks - 1) for number in range(blocks)]
    return b"\x28\xb5\x2f\xfd\0\x50" + b"".join(header.to_bytes(3, "little") + b"\1" for header in headers)


IDS, FLAGS = "token_ids/c/0", "loss_mask/c/0"
ELEVEN = list(range(11))
CHUNKS: dict[tuple[str, str], Callable[[Tree], Tree]] = {
    ("A033", slug): _chunk(member, data)
    for slug, (member, data) in {
        "empty": (IDS, b""),
        "of_other_bytes": (IDS, bytes(range(60))),
        "uncompressed": (IDS, np.arange(11, dtype="<u4").tobytes()),
        "cut": (IDS, _pcodec(ELEVEN)[:-1]),
        "cut_in_the_middle": (IDS, _pcodec(ELEVEN)[:20]),
        "text_after_it": (IDS, _pcodec(ELEVEN) + b"more"),
        "of_fewer_values": (IDS, _pcodec(ELEVEN[:10])),
        "of_more_values": (IDS, _pcodec([*ELEVEN, 11])),
        "of_another_type": (IDS, _pcodec(ELEVEN, np.int32)),
        "in_two_pieces": (IDS, _pcodec(ELEVEN, paging_spec=PagingSpec.exact_page_sizes([6, 5]))),
        "of_16_million_values": (IDS, _pcodec(ELEVEN).replace((10).to_bytes(3, "little"), b"\xff\xff\xff", 1)),
        "of_a_later_version": (IDS, _pcodec(ELEVEN).replace(b"pco!\2", b"pco!\3")),
        "of_an_unknown_mode": (IDS, _pcodec(ELEVEN)[:12] + b"\x0f" + _pcodec(ELEVEN)[13:]),
        "that_asks_for_a_window_of_16_gib": (IDS, _lookback(31, 0)),
        "that_asks_for_a_window_of_512_kib": (IDS, _lookback(16, 0)),
        "that_lacks_the_state_of_its_window": (IDS, _lookback(15, 15)),
        "of_flags_cut": (FLAGS, _zstd([1] * 7)[:-1]),
        "of_flags_fewer": (FLAGS, _zstd([1] * 6)),
        "of_flags_more": (FLAGS, _zstd([1] * 8)),
        "of_flags_that_are_2": (FLAGS, _zstd([1, 1, 2, 1, 1, 1, 1])),
        "of_flags_that_are_255": (FLAGS, _zstd([255] * 7)),
        "of_flags_as_a_skippable_frame": (FLAGS, b"\x50\x2a\x4d\x18\7\0\0\0" + b"\1" * 7),
        "of_flags_as_a_bomb": (FLAGS, _zstd_frame(200)),
        "of_flags_that_claim_2_to_the_63": (FLAGS, b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 7 + b"\x7f\x39\0\0\1\1"),
        "of_flags_with_a_dictionary": (FLAGS, b"\x28\xb5\x2f\xfd\x21\x2a\x07\x39\0\0" + b"\1" * 7),
    }.items()
}


def _padded(name: str, data: bytes) -> Callable[[], Tree]:
    """Two chunks of 131,073 values, of which the last is padding."""
    return lambda: _chunk(f"{name}/c/1", data)(viewed(valid.RECIPES["two_chunks"](), [layout.TOKENS]))


_HALF = 131_072
PADDING: dict[str, Callable[[], Tree]] = {
    "with_a_legal_value": _padded("sampled_logprobs", _pcodec([0] * (_HALF + 1), np.uint16)),
    "with_a_flag": _padded("loss_mask", _zstd([1] * (_HALF + 1))),
}
