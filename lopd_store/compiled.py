"""Loops that run as machine code: plain functions over arrays, compiled by Numba when they are first called.

    @compiled
    def add_up(values: npt.NDArray[np.float32], out: npt.NDArray[np.float64]) -> None:
        for i in range(len(values)):
            out[0] += values[i]

A compiled loop does not look whether an index is in range: its caller has, and says so. The machine code is kept on
disk, and it runs without the interpreter's lock, so that parts are read and verified side by side in threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """The same function, compiled for the dtypes of each call; Numba is imported at the first one."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return _machine_code(function)(*arguments)

    return call  # type: ignore[return-value]


@cache
def _machine_code(function: Callable[..., Any]) -> Callable[..., Any]:
    import numba

    try:
        return numba.njit(nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # there is no folder that its cache could be written to
        return numba.njit(nogil=True)(function)  # type: ignore[no-any-return]
