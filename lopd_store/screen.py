"""A quick look at positions before the checks: it clears those that keep every rule with room to spare.

Nearly all do, in an honest artifact, and one look costs half of what the rules cost one by one. What it does not clear
is not wrong, only in doubt, and goes to the rules. So it must never clear what a rule would report; a test holds it to
that. It knows the common case alone: log-probs on a grid, ids of less than 20 bits, the rule `teacher`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lopd_store.encoding import RESPONSE_TOKEN, Encoding
from lopd_store.lookup import lookup

POSITIONS = 1 << 12  # looked at together: their numbers and an id of 20 bits are one number of 32
_ID_BITS = 20
_NO_ID = (1 << _ID_BITS) - 1
_ROOM = 1e-5  # for float32 sums

Bools = npt.NDArray[np.bool_]


class Screen:
    """What the tables and the encoding of a part make of its positions."""

    def __init__(self, id_table: npt.NDArray[np.uint32], encoding: Encoding) -> None:
        assert encoding.topk_grid is not None and encoding.sampled_grid is not None
        self._encoding = encoding
        self._ids = np.concatenate([np.array([_NO_ID], np.uint32), id_table])
        self._topk, self._sampled = encoding.topk_grid, encoding.sampled_grid
        self._masses = np.exp(self._topk.levels.astype(np.float64)).astype(np.float32)
        self._finest = self._topk.segments[0][1] / 2

    @staticmethod
    def knows(id_table: npt.NDArray[np.uint32], logprobs: npt.NDArray[Any], encoding: Encoding) -> bool:
        """Whether this is the common case."""
        return (
            encoding.topk_grid is not None
            and encoding.sampled_grid is not None
            and encoding.rule == "teacher"
            and int(id_table.max(initial=0)) < _NO_ID
            and int(logprobs.max(initial=0)) < 1 << (32 - _ID_BITS)
        )

    def doubtful(
        self,
        counts: npt.NDArray[np.int64],  # [positions], at most POSITIONS, none 0
        starts: npt.NDArray[np.int64],  # [positions], of their entries, from 0
        logprobs: npt.NDArray[np.uint16],  # [entries], codes
        rows: npt.NDArray[np.uint32],  # [entries]
        response_ids: npt.NDArray[np.uint32],  # [positions]
        sampled: npt.NDArray[np.uint16],  # [positions], codes
        tail: npt.NDArray[np.uint16],  # [positions], codes
    ) -> Bools:
        """Which positions are in doubt."""
        positions = len(counts)
        number = np.arange(positions, dtype=np.uint32) << _ID_BITS
        keys = np.empty(len(rows) + positions, np.uint32)
        ids = lookup(self._ids, rows)
        np.bitwise_or(np.repeat(number, counts), ids, out=keys[: len(rows)])
        np.bitwise_or(number, response_ids, out=keys[len(rows) :])  # a response token stored by its row is a double
        keys.sort()
        doubt = np.zeros(positions, np.bool_)
        doubt[keys[1:][keys[1:] == keys[:-1]] >> _ID_BITS] = True

        places = np.flatnonzero(rows == RESPONSE_TOKEN)
        at = np.searchsorted(starts, places, side="right") - 1
        ids[places] = response_ids[at]
        order = logprobs.astype(np.uint32)
        order <<= _ID_BITS
        order |= ids
        falls = np.empty(len(rows), np.bool_)
        np.greater(order[1:], order[:-1], out=falls[1:])
        falls[starts] = True
        if not falls.all():
            doubt[np.searchsorted(starts, np.flatnonzero(~falls), side="right") - 1] = True

        mass = np.add.reduceat(lookup(self._masses, logprobs), starts)
        doubt |= self._mass_in_doubt(mass, counts, logprobs[starts + counts - 1], tail)
        doubt |= self._sampled_in_doubt(at, logprobs[places], sampled, tail)
        return doubt

    def _mass_in_doubt(
        self,
        mass: npt.NDArray[np.float32],
        counts: npt.NDArray[np.int64],
        last: npt.NDArray[np.uint16],
        tail: npt.NDArray[np.uint16],
    ) -> Bools:
        """The sums, each entry wrong by no more than the smallest error of all: less than rounding allows."""
        encoding, error = self._encoding, np.float32(np.exp(self._finest))
        total, last_mass = mass + self._masses[tail], self._masses[last]
        doubt: Bools = (total * error < 1 + _ROOM) | (total / error > 1 - _ROOM)
        full: Bools = (counts >= encoding.k_max) | (self._masses[tail] == 0)
        if encoding.coverage >= 1:
            return doubt | ~full
        short = ~full & (mass * error < encoding.coverage)
        too_many = (counts > encoding.k_min) & ((mass - last_mass) / error > encoding.coverage)
        return np.asarray(doubt | short | too_many)

    def _sampled_in_doubt(
        self,
        at: npt.NDArray[np.int64],
        entry: npt.NDArray[np.uint16],
        sampled: npt.NDArray[np.uint16],
        tail: npt.NDArray[np.uint16],
    ) -> Bools:
        """The response token's two log-probs apart, or likelier than the tail that it belongs to."""
        value, half = self._sampled.levels[sampled], self._sampled.half_steps[sampled]
        doubt: Bools = ~(value <= self._topk.levels[tail])
        difference = np.abs(self._topk.levels[entry] - value[at])
        doubt[at] = ~(difference <= self._topk.half_steps[entry] + half[at])
        return np.asarray(doubt)
