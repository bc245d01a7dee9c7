"""Arrays in a file: a Zarr v3 group in a zip whose members are stored as they are.

    data = pack({"counts": counts}, {"counts": ArraySpec("uint16", 65_535)})
    group = Group(data, specs, where="00000.topk.zarr.zip")
    group.read("counts")

Zarr writes, so that `zarr.open_group` reads it anywhere; the bytes depend on the values alone. Reading is our own: a
file from a stranger is compared with the one form that the format allows before anything is allocated or decoded, and
what is decoded goes straight into an array of the expected length.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from numcodecs.zstd import Zstd
from zarr.codecs import BytesCodec, ZstdCodec
from zarr.codecs.numcodecs import PCodec
from zarr.storage import MemoryStore

from lopd_store import pco, strictjson
from lopd_store.errors import ArtifactError

# Zarr says at every open that PCodec is not in its specification; spec/artifact.md names it, so nobody is surprised.
warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3 specification")

CHUNK = 1 << 18  # values; decoded, they fit a processor's cache
MAX_VALUES = 1 << 28  # in one array
MAX_METADATA_BYTES = 1 << 12
GROUP_METADATA = {"zarr_format": 3, "node_type": "group", "attributes": {}}
_PCODEC_LEVEL = 8
_SHAPE = re.compile(rb'"shape":\[([0-9]{1,9})\]')
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class ArraySpec:
    """The type of one array. But for flags, a fill value is never a legal value, so a lost chunk is always seen."""

    dtype: Literal["bool", "uint16", "uint32", "int32", "int64", "float32"]
    fill: int | bool | str
    optional: bool = False


def pack(arrays: Mapping[str, npt.NDArray[Any]], specs: Mapping[str, ArraySpec]) -> bytes:
    """The bytes of a group of arrays of one dimension, as a function of their values."""
    stored: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(stored), zarr_format=3)
    members = {"zarr.json": strictjson.canonical(GROUP_METADATA)}
    for name, values in arrays.items():
        spec = specs[name]
        metadata = array_metadata(len(values), spec)
        array = group.create_array(
            name,
            shape=values.shape,
            chunks=tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]),
            dtype=spec.dtype,
            serializer=BytesCodec(endian=None) if spec.dtype == "bool" else PCodec(level=_PCODEC_LEVEL),
            compressors=[ZstdCodec(level=3, checksum=False)] if spec.dtype == "bool" else None,
            filters=None,
            fill_value=float("nan") if spec.fill == "NaN" else spec.fill,
            config={"write_empty_chunks": True},
        )
        array[:] = values
        members[f"{name}/zarr.json"] = strictjson.canonical(metadata)
    members |= {key: value.to_bytes() for key, value in stored.items() if not key.endswith("zarr.json")}
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, _ZIP_TIME), members[name])
    return sink.getvalue()


def array_metadata(length: int, spec: ArraySpec) -> dict[str, Any]:
    """The zarr.json of one array; it spells out everything that Zarr would otherwise choose by default."""
    pcodec = {"name": "numcodecs.pcodec", "configuration": {"level": _PCODEC_LEVEL}}
    zstd = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [length],
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk_length(length)]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": spec.fill,
        "codecs": [{"name": "bytes"}, zstd] if spec.dtype == "bool" else [pcodec],
        "attributes": {},
        "storage_transformers": [],
    }


def chunk_length(length: int) -> int:
    """Values of one chunk: as few chunks as 2^18 values allow, as even as can be; 1 for an empty array."""
    return math.ceil(length / max(1, math.ceil(length / CHUNK))) or 1


class Group:
    """The arrays in the bytes of a file: everything but the chunks is checked at once, chunks when they are decoded.

    They are exactly those of `specs`, of the given lengths where there are some. Raises ArtifactError where the bytes
    are not in the one form that the format allows.
    """

    def __init__(
        self,
        data: bytes | memoryview,
        specs: Mapping[str, ArraySpec],
        *,
        where: str,
        lengths: Mapping[str, int] | None = None,
        check_crc: bool = False,
    ) -> None:
        self.where = where
        self._specs = specs
        self._members = stored_members(memoryview(data), where, check_crc=check_crc)
        self.lengths = self._declared_lengths()
        for name, length in (lengths or {}).items():
            if self.lengths.get(name, length) != length:
                raise ArtifactError(
                    f"`{where}`: `{name}` has another length than the manifest says",
                    code="A040",
                    expected=length,
                    actual=self.lengths[name],
                )
        wanted = {f"{name}/c/{chunk}" for name, length in self.lengths.items() for chunk in range(_chunks(length))}
        if odd := sorted(wanted ^ set(self._members)):
            raise ArtifactError(
                f"`{where}`: the chunk `{odd[0][:100]}` is missing or does not belong here", code="A032"
            )

    def read(self, name: str) -> npt.NDArray[Any]:
        """A whole array."""
        spec, length = self._specs[name], self.lengths[name]
        values = np.empty(chunk_length(length) * _chunks(length), spec.dtype)
        for number, chunk in enumerate(np.split(values, max(_chunks(length), 1))[: _chunks(length)]):
            self._decode(f"{name}/c/{number}", chunk)
        self._check_padding(name, values[length:])
        return values[:length]

    def chunks(self, name: str) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
        """An array piece by piece, in order: where in the array, and the values, which live until the next piece."""
        length = self.lengths[name]
        size = chunk_length(length)
        chunk = np.empty(size, self._specs[name].dtype)
        for number in range(_chunks(length)):
            self._decode(f"{name}/c/{number}", chunk)
            start = number * size
            stop = min(start + size, length)
            self._check_padding(name, chunk[stop - start :])
            yield slice(start, stop), chunk[: stop - start]

    def _check_padding(self, name: str, padding: npt.NDArray[Any]) -> None:
        spec = self._specs[name]
        fill = np.nan if spec.fill == "NaN" else spec.fill
        if not np.array_equal(padding, np.full_like(padding, fill), equal_nan=spec.fill == "NaN"):
            raise ArtifactError(f"`{self.where}`: `{name}` is not padded with its fill value", code="A034")

    def _decode(self, member: str, into: npt.NDArray[Any]) -> None:
        data = self._members[member]
        try:
            if into.dtype == np.bool_:
                _decode_flags(data, into.view(np.uint8))
            else:
                pco.decode(data, into)
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(f"`{self.where}`: `{member}` does not decode: {error}", code="A033") from error

    def _parse(self, name: str, document: bytes) -> Any:
        try:
            return strictjson.loads(document, where=f"{self.where}: {name}", max_bytes=MAX_METADATA_BYTES)
        except ArtifactError as error:
            error.code = "A031"
            raise

    def _declared_lengths(self) -> dict[str, int]:
        """The length of every array by name, after comparing each zarr.json with the one that the format wants."""
        names = [name for name in self._members if name.rpartition("/")[2] == "zarr.json"]
        documents = {name: bytes(self._members.pop(name)) for name in names}
        group = documents.pop("zarr.json", b"null")
        if strictjson.canonical(self._parse("zarr.json", group)) != strictjson.canonical(GROUP_METADATA):
            raise ArtifactError(
                f"`{self.where}`: `zarr.json` is not what the format says", code="A031", expected=GROUP_METADATA
            )
        found = {name.removesuffix("/zarr.json") for name in documents}
        wanted = {name for name, spec in self._specs.items() if not spec.optional or name in found}
        if found != wanted:
            raise ArtifactError(
                f"`{self.where}` has other arrays than the format",
                code="A031",
                expected=", ".join(self._specs),
                actual=", ".join(sorted(found))[:300],
            )
        return {
            name: self._declared_length(name, documents[f"{name}/zarr.json"]) for name in self._specs if name in wanted
        }

    def _declared_length(self, name: str, document: bytes) -> int:
        shape = _SHAPE.search(document)
        if shape and int(shape[1]) <= MAX_VALUES:
            length = int(shape[1])
            if document == strictjson.canonical(array_metadata(length, self._specs[name])):  # as our writer writes it
                return length
        return _declared_length(self._parse(f"{name}/zarr.json", document), self.where, name, self._specs[name])


def stored_members(data: memoryview, where: str, *, check_crc: bool = False) -> dict[str, memoryview]:
    """The members of a zip by name, as views: stored, in order of their names, with no byte between them or around.

    One file has one reading then, whoever reads it. Raises ArtifactError at anything else.
    """

    def require(claim: bool, what: str) -> None:
        if not claim:
            raise ArtifactError(f"`{where}` is not a plain zip of stored members: {what}", code="A030")

    require(len(data) >= _END.size, "it is cut short")
    end = _END.unpack_from(data, len(data) - _END.size)
    magic, *disks, count_here, count, size, directory, comment = end
    require(magic == b"PK\5\6" and disks == [0, 0] and comment == 0, "no end of the directory at its end")
    require(count_here == count and directory + size == len(data) - _END.size, "the directory does not fit")
    members: dict[str, memoryview] = {}
    at, offset, last = directory, 0, b""
    for _ in range(count):
        require(at + _CENTRAL.size <= len(data), "the directory is cut short")
        (magic, _, needed, flags, method, time, date, crc, packed, length, *sizes, disk, _, _, local) = (
            _CENTRAL.unpack_from(data, at)
        )
        name_length, extra, note = sizes
        name = bytes(data[at + _CENTRAL.size : at + _CENTRAL.size + name_length])
        require(magic == b"PK\1\2" and (flags, method, extra, note, disk) == (0, 0, 0, 0, 0), "an entry is not plain")
        require(name.isascii() and name > last and packed == length, "names are not in order, or sizes differ")
        header = (b"PK\3\4", needed, flags, method, time, date, crc, packed, length, name_length, 0)
        start = offset + _LOCAL.size + name_length
        require(local == offset and start + length <= directory, "members overlap, or bytes lie between them")
        require(
            _LOCAL.unpack_from(data, offset) == header and data[start - name_length : start] == name, "headers differ"
        )
        member = data[start : start + length]
        require(not check_crc or zlib.crc32(member) == crc, f"the CRC of `{name.decode()[:100]}` differs")
        members[name.decode()] = member
        at, offset, last = at + _CENTRAL.size + name_length, start + length, name
    require(offset == directory and at == directory + size, "bytes lie outside the members")
    return members


def _declared_length(metadata: Any, where: str, name: str, spec: ArraySpec) -> int:
    """The length in an array's metadata, which must be ours in every other respect."""
    shape = metadata.get("shape") if isinstance(metadata, dict) else None
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or not 0 <= shape[0] <= MAX_VALUES:
        raise ArtifactError(
            f"`{where}`: the array `{name}` has no legal shape",
            code="A031",
            expected=f"one dimension of at most {MAX_VALUES}",
            actual=repr(shape)[:100],
        )
    length: int = shape[0]
    wanted = array_metadata(length, spec)
    if strictjson.canonical(metadata) != strictjson.canonical(wanted):
        # Compared as bytes: 3.0 and true would pass for 3 and 1.
        member = next(key for key in [*wanted, *metadata] if _bytes_of(metadata, key) != _bytes_of(wanted, key))
        raise ArtifactError(
            f"`{where}`: `{member[:100]}` of the array `{name}` is not what the format says",
            code="A031",
            expected=wanted.get(member),
            actual=repr(metadata.get(member))[:200],
        )
    return length


def _bytes_of(metadata: Mapping[str, Any], key: str) -> bytes:
    return strictjson.canonical([metadata[key]] if key in metadata else [])


def _decode_flags(data: bytes | memoryview, flags: npt.NDArray[np.uint8]) -> None:
    """Fill an array of 0 and 1; the frame cannot write more than fits, and what it leaves out stays neither."""
    flags[:] = 0xFF
    Zstd().decode(data, out=flags)
    if flags.max(initial=0) > 1:
        raise ValueError(f"it is not {len(flags)} flags")


def _chunks(length: int) -> int:
    return math.ceil(length / chunk_length(length))
