"""Looking many numbers up in a table, a cache's worth at a time: NumPy alone makes 8-byte copies of all indices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

_AT_ONCE = 1 << 15


def lookup(table: npt.NDArray[Any], indices: npt.NDArray[Any], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """`table[indices]` for indices that are known to be in range."""
    found = np.empty(len(indices), table.dtype) if out is None else out
    for piece in pieces(len(indices)):
        np.take(table, indices[piece].astype(np.intp), out=found[piece], mode="wrap")
    return found


def pieces(length: int) -> Iterator[slice]:
    """Slices that cover an array in order, each small enough to stay in the cache."""
    for start in range(0, length, _AT_ONCE):
        yield slice(start, min(start + _AT_ONCE, length))
