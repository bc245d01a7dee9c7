"""Top-k: the stored part of a teacher's distribution at each position, ragged and in one order.

At every position entries stand by log-prob descending, then id ascending; k varies from position to
position and is never padded. The tail is the mass outside the stored entries, measured from the full
distribution, so that the k + 1 terms of a position sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lopd_store.compiled import compiled
from lopd_store.errors import InputError

Floats = npt.NDArray[np.float32]
_DTYPES = {"counts": np.uint16, "ids": np.uint32, "logprobs": np.float32, "tail_logprobs": np.float32}
_LONG_RUN = 64  # entries; beyond it inserting costs more than a sort does to set up


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Ragged top-k of many positions, as flat arrays."""

    counts: npt.NDArray[np.uint16]  # [positions]
    ids: npt.NDArray[np.uint32]  # [entries]
    logprobs: Floats  # [entries]
    tail_logprobs: Floats  # [positions]
    reference_logprobs: Floats | None = None  # [entries]
    reference_tail_logprobs: Floats | None = None  # [positions]

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each position's entries begin in `ids` and `logprobs`; [positions + 1]."""
        offsets = np.zeros(len(self.counts) + 1, np.int64)
        np.cumsum(self.counts, out=offsets[1:])
        return offsets

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """The position of each entry; [entries]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def slice(self, start: int, stop: int) -> TopK:
        """Positions [start, stop), as views."""
        return self._take(slice(start, stop), slice(int(self.offsets[start]), int(self.offsets[stop])))

    def mask(self, kept: npt.NDArray[np.bool_]) -> TopK:
        """The positions where `kept` is true."""
        return self if kept.all() else self._take(kept, np.repeat(kept, self.counts))

    def truncate(self, k: int) -> TopK:
        """The first k entries of each position; the mass of the others is lost in the tail.

        Of entries that rounding made equal at the border, the ones with the lowest ids stay.
        """
        counts = np.minimum(self.counts, np.uint16(min(k, 0xFFFF)))
        within = np.arange(len(self.ids)) - np.repeat(self.offsets[:-1], self.counts)
        kept = within < k

        def tail(logprobs: Floats, tails: Floats) -> Floats:
            mass = np.bincount(self.positions[~kept], np.exp(logprobs[~kept], dtype=np.float64), len(counts))
            with np.errstate(divide="ignore"):
                return np.minimum(np.logaddexp(np.log(mass), tails.astype(np.float64)), 0).astype(np.float32)

        tails = tail(self.logprobs, self.tail_logprobs)
        cut = replace(self._take(slice(None), kept), counts=counts, tail_logprobs=tails)
        if self.reference_logprobs is None or self.reference_tail_logprobs is None:
            return cut
        return replace(cut, reference_tail_logprobs=tail(self.reference_logprobs, self.reference_tail_logprobs))

    def tempered(self, temperature: float) -> TopK:
        """The stored entries at another temperature, renormalised over themselves.

        What is lost is the tail: its mass at 1 is known, but at another temperature it depends on how it is spread,
        which is not stored; so the result has a tail of -inf, and exp(`tail_logprobs`) of this one says how much of
        each position is left out.
        """
        if not temperature > 0:
            raise InputError("`temperature` is out of range", expected="above 0", actual=temperature)
        scale = np.float32(1 / temperature)
        nothing = np.full(len(self.counts), -np.inf, np.float32)
        reference = self.reference_logprobs
        return replace(
            self,
            logprobs=self._normalised(self.logprobs * scale),
            tail_logprobs=nothing,
            reference_logprobs=None if reference is None else self._normalised(reference * scale),
            reference_tail_logprobs=None if reference is None else nothing,
        )

    def _normalised(self, logits: Floats) -> Floats:
        """Log-probs of each position that sum to one; where every entry is impossible they stay so."""
        filled = self.counts > 0
        peaks = np.zeros(len(self.counts), np.float64)
        if filled.any():
            peaks[filled] = np.maximum.reduceat(logits, self.offsets[:-1][filled])
        shifted = logits - np.repeat(np.where(np.isneginf(peaks), 0, peaks), self.counts)
        total = np.bincount(self.positions, np.exp(shifted), len(self.counts))
        return np.asarray(shifted - np.repeat(np.log(np.where(total > 0, total, 1)), self.counts), np.float32)

    def _take(self, positions: Any, entries: Any) -> TopK:
        reference, reference_tail = self.reference_logprobs, self.reference_tail_logprobs
        return TopK(
            counts=self.counts[positions],
            ids=self.ids[entries],
            logprobs=self.logprobs[entries],
            tail_logprobs=self.tail_logprobs[positions],
            reference_logprobs=None if reference is None else reference[entries],
            reference_tail_logprobs=None if reference_tail is None else reference_tail[positions],
        )


def concatenate(pieces: Sequence[TopK]) -> TopK:
    """The positions of several pieces, one after the other; all of one selection."""
    columns: dict[str, Any] = {}
    for column in fields(TopK):
        arrays = [getattr(piece, column.name) for piece in pieces]
        if column.name in _DTYPES:
            columns[column.name] = np.concatenate([np.zeros(0, _DTYPES[column.name]), *arrays])
        elif arrays and all(array is not None for array in arrays):
            columns[column.name] = np.concatenate(arrays)
    return TopK(**columns)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What an engine gives for each position: likely ids in any order, and the mass outside of them.

    With a reference policy the ids are those likely under either model, each once; where a row has fewer, its other
    columns have log-probs of -inf.
    """

    ids: npt.NDArray[np.uint32]  # [positions, columns]
    logprobs: Floats  # [positions, columns]
    tail_logprobs: Floats  # [positions]
    reference_logprobs: Floats | None = None  # [positions, columns]
    reference_tail_logprobs: Floats | None = None  # [positions]


def select(candidates: Candidates, *, k_min: int, k_max: int, coverage: float) -> TopK:
    """Adaptive k: the smallest k whose mass reaches `coverage`, at least `k_min`, at most `k_max`.

    Coverage 1 keeps `k_max`. With a reference policy both models choose, and the union is kept. What is cut goes to the
    tail, added in float64 and as logs, so that no mass is too small to count. Entries of probability 0 are never kept.
    """
    ids, logprobs, reference = candidates.ids, candidates.logprobs, candidates.reference_logprobs
    order = np.lexsort((ids, -logprobs), axis=-1)
    ids, logprobs = np.take_along_axis(ids, order, axis=-1), np.take_along_axis(logprobs, order, axis=-1)
    kept = chosen(logprobs, k_min=k_min, k_max=k_max, coverage=coverage)
    if reference is not None:
        reference = np.take_along_axis(reference, order, axis=-1)
        back = np.lexsort((ids, -reference), axis=-1)
        best = np.take_along_axis(reference, back, axis=-1)
        also = np.zeros_like(kept)
        np.put_along_axis(also, back, chosen(best, k_min=k_min, k_max=k_max, coverage=coverage), axis=-1)
        kept |= also
    kept &= np.isfinite(logprobs)
    reference_tail = candidates.reference_tail_logprobs
    return TopK(
        counts=kept.sum(axis=1).astype(np.uint16),
        ids=ids[kept].astype(np.uint32),
        logprobs=logprobs[kept].astype(np.float32),
        tail_logprobs=_with_cut(candidates.tail_logprobs, logprobs, kept),
        reference_logprobs=None if reference is None else reference[kept].astype(np.float32),
        reference_tail_logprobs=None
        if reference is None or reference_tail is None
        else _with_cut(reference_tail, reference, kept),
    )


def chosen(logprobs: Floats, *, k_min: int, k_max: int, coverage: float) -> npt.NDArray[np.bool_]:
    """Which columns, descending, one model keeps; [positions, columns]."""
    columns = logprobs.shape[1]
    if coverage >= 1:
        counts = np.full(len(logprobs), k_max)
    else:
        mass = np.cumsum(np.exp(logprobs.astype(np.float64)), axis=1)
        counts = np.clip((mass < coverage).sum(axis=1) + 1, k_min, k_max)
    kept: npt.NDArray[np.bool_] = np.arange(columns) < counts[:, None]
    return kept & np.isfinite(logprobs)


def _with_cut(tail_logprobs: Floats, logprobs: Floats, kept: npt.NDArray[np.bool_]) -> Floats:
    """The tail with the columns that are not kept."""
    cut = np.logaddexp.reduce(np.where(kept, -np.inf, logprobs.astype(np.float64)), axis=1)
    return np.minimum(np.logaddexp(cut, tail_logprobs.astype(np.float64)), 0.0).astype(np.float32)


def sort_entries(topk: TopK) -> TopK:
    """The same entries, each position's in order: log-prob descending, then id ascending.

    Made for entries whose log-probs descend already, so that only runs of equal ones are out of order.
    """
    ids, reference = topk.ids.copy(), topk.reference_logprobs
    along = topk.logprobs.copy() if reference is None else reference.copy()  # equal where they move
    _sort_runs(topk.counts, topk.logprobs, ids, along)
    return replace(topk, ids=ids, reference_logprobs=None if reference is None else along)


@compiled
def _sort_runs(
    counts: npt.NDArray[np.uint16],
    logprobs: Floats,
    ids: npt.NDArray[np.uint32],  # sorted in place where log-probs are equal
    along: Floats,  # moved with the ids
) -> None:
    stop = 0
    for position in range(len(counts)):
        begin, stop = stop, stop + counts[position]
        while begin < stop:
            end = begin + 1
            while end < stop and logprobs[end] == logprobs[begin]:
                end += 1
            if end - begin > _LONG_RUN:
                order = np.argsort(ids[begin:end])
                ids[begin:end] = ids[begin:end][order]
                along[begin:end] = along[begin:end][order]
                begin = end
            for entry in range(begin + 1, end):  # each is inserted among those before it
                place, one, other = entry, ids[entry], along[entry]
                while place > begin and ids[place - 1] > one:
                    ids[place], along[place] = ids[place - 1], along[place - 1]
                    place -= 1
                ids[place], along[place] = one, other
            begin = end
