"""Looking many numbers up in a table. NumPy alone makes 8-byte copies of all indices first."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lopd_store.compiled import compiled


def lookup(table: npt.NDArray[Any], indices: npt.NDArray[Any], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
    """`table[indices]` for unsigned indices that are known to be in range."""
    found = np.empty(len(indices), table.dtype) if out is None else out
    _lookup(table, indices, found)
    return found


@compiled
def _lookup(table: npt.NDArray[Any], indices: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    for i in range(len(indices)):
        out[i] = table[indices[i]]
