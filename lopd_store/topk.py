"""Top-k: the stored part of a teacher's distribution at each position, ragged and in one order.

At every position entries stand by log-prob descending, then id ascending; k varies from position to
position and is never padded. The tail is the mass outside the stored entries, measured from the full
distribution, so that the k + 1 terms of a position sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Ragged top-k of many positions, as flat arrays."""

    counts: npt.NDArray[np.uint16]  # [positions]
    ids: npt.NDArray[np.uint32]  # [entries]
    logprobs: Floats  # [entries]
    tail_logprobs: Floats  # [positions]

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each position's entries begin in `ids` and `logprobs`; [positions + 1]."""
        offsets = np.zeros(len(self.counts) + 1, np.int64)
        np.cumsum(self.counts, out=offsets[1:])
        return offsets

    def slice(self, start: int, stop: int) -> TopK:
        """Positions [start, stop)."""
        offsets = self.offsets
        entries = slice(int(offsets[start]), int(offsets[stop]))
        return TopK(
            counts=self.counts[start:stop],
            ids=self.ids[entries],
            logprobs=self.logprobs[entries],
            tail_logprobs=self.tail_logprobs[start:stop],
        )


def concatenate(pieces: Sequence[TopK]) -> TopK:
    """The positions of several pieces, one after the other."""
    return TopK(
        counts=np.concatenate([np.zeros(0, np.uint16), *(piece.counts for piece in pieces)]),
        ids=np.concatenate([np.zeros(0, np.uint32), *(piece.ids for piece in pieces)]),
        logprobs=np.concatenate([np.zeros(0, np.float32), *(piece.logprobs for piece in pieces)]),
        tail_logprobs=np.concatenate([np.zeros(0, np.float32), *(piece.tail_logprobs for piece in pieces)]),
    )


def select(
    ids: npt.NDArray[np.uint32],  # [positions, k], any order
    logprobs: Floats,  # [positions, k]
    tail_logprobs: Floats,  # [positions], mass outside the k columns
    *,
    k_min: int,
    coverage: float,
) -> TopK:
    """Adaptive k: the smallest k whose mass reaches `coverage`, at least `k_min`; coverage 1 keeps every column.

    What is cut goes to the tail, added in float64 and as logs, so that no mass is too small to count. Entries of
    probability 0 are never kept.
    """
    order = np.lexsort((ids, -logprobs), axis=-1)
    ids = np.take_along_axis(ids, order, axis=-1)
    logprobs = np.take_along_axis(logprobs, order, axis=-1)
    k = ids.shape[1]
    mass = np.exp(logprobs.astype(np.float64))
    finite = np.isfinite(logprobs).sum(axis=1)
    if coverage >= 1:
        counts = finite
    else:
        short_of = (np.cumsum(mass, axis=1) < coverage).sum(axis=1) + 1
        counts = np.minimum(np.clip(short_of, min(k_min, k), k), finite)
    columns = np.arange(k)
    kept = columns < counts[:, None]
    cut = np.logaddexp.reduce(np.where(kept, -np.inf, logprobs.astype(np.float64)), axis=1)
    tail = np.minimum(np.logaddexp(cut, tail_logprobs.astype(np.float64)), 0.0)
    return TopK(
        counts=counts.astype(np.uint16),
        ids=ids[kept].astype(np.uint32),
        logprobs=logprobs[kept].astype(np.float32),
        tail_logprobs=tail.astype(np.float32),
    )


def sort_entries(topk: TopK) -> TopK:
    """The same entries, each position's in order: log-prob descending, then id ascending."""
    position = np.repeat(np.arange(len(topk.counts)), topk.counts)
    order = np.lexsort((topk.ids, -topk.logprobs, position))
    return TopK(
        counts=topk.counts,
        ids=topk.ids[order],
        logprobs=topk.logprobs[order],
        tail_logprobs=topk.tail_logprobs,
    )
