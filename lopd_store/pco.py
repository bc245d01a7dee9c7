"""Pcodec chunks from strangers: the one form that we read, decoded without trusting what a chunk says of itself.

The library allocates what a chunk asks for (a lookback window of up to 2^32 values) and reads the state of that window
before it looks whether it is there. So the header is compared first, and only what the encoder itself chooses is
decoded: one pco chunk of the expected number of values, lookback windows of at most 2^15 values and without a state.
The form is that of https://github.com/mwlon/pcodec/blob/main/docs/format.md: standalone version 2, format version 3.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from pcodec import wrapped

_MAGIC, _FORMAT_VERSION, _END = b"pco!\2", b"\3", b"\0"
_TYPES = {"uint32": (1, "u32"), "int32": (3, "i32"), "int64": (4, "i64"), "float32": (5, "f32"), "uint16": (7, "u16")}
_BITS_OF_MODE = {0: 0, 1: None, 2: None, 3: 8}  # classic, multiples (their base is one value), quantised floats
_LOOKBACK = 2
_MAX_WINDOW_LOG = 15


def decode(data: bytes | memoryview, into: npt.NDArray[Any]) -> None:
    """Fill an array from a chunk of exactly its length; raises ValueError at anything else."""
    number, name = _TYPES[into.dtype.name]
    head = _MAGIC + _varint(len(into)) + _FORMAT_VERSION + bytes([number]) + (len(into) - 1).to_bytes(3, "little")
    if data[: len(head)] != head:
        raise ValueError(f"it does not begin as {len(into)} values of {into.dtype.name} do")
    body = bytes(data[len(head) :])
    _check_delta(int.from_bytes(body[:16], "little"), into.dtype.itemsize * 8)
    try:
        file, _ = wrapped.FileDecompressor.new(_FORMAT_VERSION)
        chunk, size = file.read_chunk_meta(body, name)
        page = body[size:]
        progress, size = chunk.read_page_into(page, len(into), into)
    except (RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error
    if progress.n_processed != len(into) or not progress.finished or page[size:] != _END:
        raise ValueError(f"it is more or less than {len(into)} values")


def _varint(number: int) -> bytes:
    """6 bits for the length in bits less one, then the bits."""
    length = max(1, number.bit_length())
    return ((number << 6) | (length - 1)).to_bytes((6 + length + 7) // 8, "little")


def _check_delta(bits: int, bits_of_value: int) -> None:
    mode = bits & 15
    if mode not in _BITS_OF_MODE:
        raise ValueError(f"its mode {mode} is not known")
    extra = _BITS_OF_MODE[mode]
    bits >>= 4 + (bits_of_value if extra is None else extra)
    window_log, state_log = (bits >> 4 & 31) + 1, bits >> 9 & 15
    if bits & 15 == _LOOKBACK and (window_log > _MAX_WINDOW_LOG or state_log > 0):
        raise ValueError(f"its lookback window has 2^{window_log} values and a state of 2^{state_log}")
