"""Grids: the log-probs that the profile `compact` can store, fine near probability 1 and coarser further down.

    grid = Grid(segments=((0.0, 1 / 32), (1.0, 1 / 16)))       # steps of 1/32 nat down to -1, of 1/16 below
    grid.to_logprobs(grid.to_codes(logprobs))                   # the nearest levels

A code counts levels from 0 nat down. With bases b_0 = 0, b_(i+1) = b_i + (from_(i+1) - from_i) / step_i, level c stands
for -max_i(from_i + (c - b_i) * step_i): steps grow, so the segments are lines of a convex function.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lopd_store.compiled import compiled
from lopd_store.errors import InputError
from lopd_store.lookup import lookup

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint16]

MAX_SEGMENTS = 16
LAST_LEVEL = 65_533  # stands for everything further down, too
IMPOSSIBLE = 65_534  # the code of -inf; 65,535 is the fill value
_AT_ONCE = 1 << 10  # log-probs that stay in the cache
_STEPS = {2.0**-n for n in range(21)}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Segments (from, step) in nats below 0: from ascending, steps powers of two that do not shrink."""

    segments: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.segments) <= MAX_SEGMENTS or self.segments[0][0] != 0:
            raise InputError("a grid has 1 to 16 segments, the first from 0", actual=self.segments)
        if any(step not in _STEPS for _, step in self.segments):
            raise InputError("a step of a grid is not a power of two from 2^-20 to 1", actual=self.segments)
        for (start, step), (following, wider) in zip(self.segments, self.segments[1:], strict=False):
            if wider < step or not following > start or (following - start) % step:
                raise InputError("the segments of a grid do not follow each other in whole steps", actual=self.segments)
        if not self._bases[-1] < LAST_LEVEL:
            raise InputError("a grid has more levels than codes", actual=self.segments)

    @property
    def bound(self) -> float:
        """The worst-case error of a stored log-prob in nats: half the widest step."""
        return self.segments[-1][1] / 2

    def to_codes(self, logprobs: Floats) -> Codes:
        """The code of the nearest level, ties to the even one; -inf has a code of its own."""
        codes = np.empty(len(logprobs), np.uint16)
        starts, steps = np.array(self.segments).T
        _nearest(logprobs, np.array(self._bases) - starts / steps, 1 / steps, codes)
        return codes

    def to_logprobs(self, codes: Codes) -> Floats:
        """The log-probs behind the codes; NaN for the fill value."""
        return lookup(self.levels, codes)

    @cached_property
    def levels(self) -> Floats:
        """The log-prob of every code; [65536]."""
        levels = -self._nats(np.arange(1 << 16)).astype(np.float32)
        levels[IMPOSSIBLE:] = -np.inf, np.nan
        return np.asarray(levels + np.float32(0))  # no -0.0

    @cached_property
    def half_steps(self) -> Floats:
        """For every code the greatest error of its level in nats; [65536]."""
        starts, steps = np.array(self.segments).T
        halves: Floats = (steps[np.searchsorted(starts, self._nats(np.arange(1 << 16)), side="right") - 1] / 2).astype(
            np.float32
        )
        halves[IMPOSSIBLE:] = 0
        return halves

    def to_json(self) -> list[list[float]]:
        """A list of [from, step]."""
        return [list(segment) for segment in self.segments]

    @classmethod
    def from_json(cls, value: Any) -> Grid:
        """Parse what `to_json` gave; raises InputError where it is no grid."""
        if not isinstance(value, list) or not all(
            isinstance(segment, list) and len(segment) == 2 and all(type(number) in (int, float) for number in segment)
            for segment in value
        ):
            raise InputError("a grid is not a list of [from, step]", actual=repr(value)[:200])
        return cls(segments=tuple((float(start), float(step)) for start, step in value))

    @cached_property
    def _bases(self) -> list[float]:
        bases = [0.0]
        for (start, step), (following, _) in zip(self.segments, self.segments[1:], strict=False):
            bases.append(bases[-1] + (following - start) / step)
        return bases

    def _nats(self, codes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        lines = [start + (codes - base) * step for (start, step), base in zip(self.segments, self._bases, strict=True)]
        nats: npt.NDArray[np.float64] = np.maximum.reduce(lines)
        return nats


@compiled
def _nearest(
    logprobs: Floats,
    offsets: npt.NDArray[np.float64],  # [segments], the code at which the line of a segment would meet 0 nat
    codes_per_nat: npt.NDArray[np.float64],  # [segments]
    codes: Codes,
) -> None:
    nearest = np.empty(_AT_ONCE, np.float64)
    for start in range(0, len(logprobs), _AT_ONCE):
        some, found = logprobs[start : start + _AT_ONCE], codes[start : start + _AT_ONCE]
        nearest[:] = LAST_LEVEL
        for segment in range(len(offsets)):
            offset, scale = offsets[segment], codes_per_nat[segment]
            for i in range(len(some)):
                code = offset - some[i] * scale
                nearest[i] = code if code < nearest[i] else nearest[i]
        for i in range(len(some)):
            found[i] = IMPOSSIBLE if some[i] == -np.inf else np.uint16(np.rint(nearest[i]))
