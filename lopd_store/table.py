"""The rollouts table of a part from strangers: of a Parquet file the two columns of lengths, and nothing else.

Both are stored in the plainest way that Parquet has: 32-bit integers, none missing, PLAIN, uncompressed, in data pages
of version 1. That is read here directly, so that no more is allocated than the file has bytes; a general reader gives
every page the memory that it asks for, and pyarrow's view of a column's metadata ends the process where that is wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lopd_store.errors import ArtifactError

LENGTHS = ("prompt_length", "response_length")
TEXT = ("prompt", "response")
MAX_FOOTER_BYTES = 4 << 20  # of a million rollouts it has about half a megabyte
MAX_DEPTH = 16  # of the metadata
_MARK = b"PAR1"
_INT32, _REQUIRED, _UNCOMPRESSED, _PLAIN, _DATA_PAGE = 1, 0, 0, 0, 0

Ints = npt.NDArray[np.int32]
Struct = dict[int, Any]  # by the numbers of https://github.com/apache/parquet-format/blob/master/src/main/thrift/


def read_lengths(data: bytes | memoryview, *, where: str) -> tuple[dict[str, Ints], set[str]]:
    """The two columns of lengths by name, and the names of all columns; raises ArtifactError where they do not read."""
    try:
        return _read(memoryview(data))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        problem = str(error) if type(error) is ValueError else "its metadata is not that of Parquet"
        raise ArtifactError(f"`{where}`: the rollouts table does not read: {problem}", code="A070") from error


def _read(data: memoryview) -> tuple[dict[str, Ints], set[str]]:
    if len(data) < 12 or data[:4] != _MARK or data[-4:] != _MARK:
        raise ValueError("it is not Parquet")
    size = int.from_bytes(data[-8:-4], "little")
    footer = len(data) - 8 - size
    if footer < 4 or size > MAX_FOOTER_BYTES:
        raise ValueError(f"its footer is said to have {size} bytes")
    file = _Thrift(data[:-8], footer).struct()
    root, *columns = file[2]
    names = [column[4].decode() for column in columns]
    if root[5] != len(columns) or any(column.get(5) for column in columns):
        raise ValueError("its columns are nested")
    lengths = {}
    for name in LENGTHS:
        at = names.index(name) if names.count(name) == 1 else None
        if at is None or (columns[at][1], columns[at][3]) != (_INT32, _REQUIRED) or {6, 10} & columns[at].keys():
            raise ValueError(f"`{name}` is not one column of 32-bit integers, none missing")
        pieces = [_column(data[:footer], group[1][at][3], name, group[3]) for group in file[4]]
        lengths[name] = np.concatenate([np.zeros(0, np.int32), *pieces])
        if len(lengths[name]) != file[3]:
            raise ValueError(f"`{name}` has {len(lengths[name])} values in {file[3]} rows")
    return lengths, set(names)


def _column(data: memoryview, metadata: Struct, name: str, rows: int) -> Ints:
    """The values of a column in one row group, page after page."""
    if metadata[3] != [name.encode()] or metadata[1] != _INT32 or metadata[4] != _UNCOMPRESSED or 11 in metadata:
        raise ValueError(f"`{name}` is not stored plainly")
    pieces, at, left = [], metadata[9], rows
    while left > 0:
        if at < 4:
            raise ValueError(f"the pages of `{name}` begin before the file")
        thrift = _Thrift(data, at)
        header = thrift.struct()
        page, size = header[5], header[3]
        count = page[1]
        if (header[1], page[2], header[2]) != (_DATA_PAGE, _PLAIN, size) or size != 4 * count or not 0 < count <= left:
            raise ValueError(f"a page of `{name}` is not plain")
        if thrift.at + size > len(data):
            raise ValueError(f"a page of `{name}` is cut short")
        pieces.append(np.frombuffer(data, "<i4", count, thrift.at))
        at, left = thrift.at + size, left - count
    return np.concatenate([np.zeros(0, np.int32), *pieces])


class _Thrift:
    """Structs of Thrift's compact protocol: the form of Parquet's metadata."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data = data
        self.at = at

    def struct(self, depth: int = 0) -> Struct:
        """The fields of a struct by their numbers."""
        fields: Struct = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._integer()
            if number in fields:
                raise ValueError("its metadata has a field twice")
            fields[number] = kind & 15 == 1 if kind & 15 in (1, 2) else self._value(kind & 15, depth + 1)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("its metadata is nested too deep")
        match kind:
            case 1 | 2 | 3:
                return self._byte()
            case 4 | 5 | 6:
                return self._integer()
            case 7:
                return self._bytes(8)
            case 8:
                return self._bytes(self._unsigned())
            case 9:
                kind = self._byte()
                count = kind >> 4 if kind >> 4 < 15 else self._unsigned()
                return [self._value(kind & 15, depth + 1) for _ in range(count)]
            case 12:
                return self.struct(depth)
        raise ValueError(f"its metadata has a value of the kind {kind}")

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _bytes(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self._data):
            raise ValueError("its metadata is cut short")
        return bytes(self._data[self.at - size : self.at])

    def _unsigned(self) -> int:
        number = 0
        for shift in range(0, 64, 7):
            byte = self._byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise ValueError("its metadata has a number of more than 64 bits")

    def _integer(self) -> int:
        number = self._unsigned()
        return (number >> 1) ^ -(number & 1)
